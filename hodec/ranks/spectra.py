"""What singular values say about ranks: how much each rank loses, and the path of sensible ranks from 1 to full."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from hodec.linalg.svd import naming, singular_values
from hodec.plan.layer import LayerPlan
from hodec.ranks.base import Candidate

# Steps of a path: enough that a budget is met within a fraction of a percent over a few layers.
STEPS = 128


@dataclass(frozen=True)
class Spectrum:
    """Squared singular values, of one unfolding say, as shares of the weight's squared norm, largest first.

    Attributes:
        position: which of the format's ranks it decides.
        energy: shares, float64, shape (n,); they sum to 1 (or are all 0 for a zero weight).
    """

    position: int
    energy: Tensor

    @cached_property
    def tails(self) -> Tensor:
        """Share lost at rank 0, 1, .., n: shape (n + 1,), falling from 1 to 0."""
        lost = self.energy.flip(0).cumsum(0).flip(0)
        return torch.cat([lost, lost.new_zeros(1)])

    def rank_for_tail(self, share: float) -> int:
        """The least rank, at least 1, that loses no more than ``share``."""
        return max(1, int((self.tails > share).sum()))


def spectra(candidate: Candidate) -> list[Spectrum]:
    """What a candidate's ranks lose; for most formats the spectra of its unfoldings."""
    with naming(f"layer {candidate.name}"):
        return [_spectrum(*one) for one in candidate.format.spectra(candidate.site.weight, candidate.modes)]


def unfolding_spectra(candidate: Candidate) -> list[Spectrum]:
    """The spectra of a candidate's unfoldings."""
    unfoldings = candidate.format.unfoldings(candidate.site.weight, candidate.modes)
    with naming(f"layer {candidate.name}"):
        return [_spectrum(position, singular_values(matrix)) for position, matrix in unfoldings]


def _spectrum(position: int, values: Tensor) -> Spectrum:
    energy = values.double().square()
    return Spectrum(position, energy / energy.sum().clamp_min(torch.finfo(torch.float64).tiny))


def ranks_for_tail(candidate: Candidate, found: Sequence[Spectrum], share: float) -> tuple[int, ...]:
    """Ranks at which no unfolding loses more than ``share`` of the squared norm; fitted to each other."""
    ranks = [1] * len(candidate.most)
    for spectrum in found:
        ranks[spectrum.position] = max(ranks[spectrum.position], spectrum.rank_for_tail(share))
    return candidate.format.fit_ranks(candidate.site.shape, candidate.modes, ranks)


def relative_error(found: Sequence[Spectrum], ranks: Sequence[int]) -> float:
    """Bound on norm(W - truncated W) / norm(W) from the singular values cut off: exact for one unfolding."""
    lost = sum(float(s.tails[min(ranks[s.position], len(s.energy))]) for s in found)
    return min(1.0, max(0.0, lost)) ** 0.5


@dataclass(frozen=True)
class Option:
    """One choice of ranks for a layer: its plan (and so its costs) and its relative error, 0..1."""

    layer: LayerPlan
    error: float


def path(candidate: Candidate, steps: int = STEPS) -> list[Option]:
    """Sensible ranks of one layer, from all 1 to full, each with its cost and error, cheapest first.

    Every step cuts all unfoldings at the same share of the squared norm, which spreads the loss evenly over the
    ranks of formats that have several. An option may cost more than another and lose no less: callers compare.
    """
    found = spectra(candidate)
    tails = torch.cat([s.tails[1:] for s in found]).unique()
    picks = tails[torch.linspace(0, len(tails) - 1, min(steps, len(tails))).round().long().unique()]
    options: dict[tuple[int, ...], Option] = {}
    for share in picks.tolist():
        ranks = ranks_for_tail(candidate, found, share)
        if ranks not in options:
            options[ranks] = Option(candidate.planned(ranks), relative_error(found, ranks))
    return sorted(options.values(), key=lambda o: (o.layer.macs_after, o.layer.params_after, o.error))
