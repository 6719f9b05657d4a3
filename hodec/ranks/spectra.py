"""What singular values say about ranks: how much of a weight's squared norm each rank loses."""

import hashlib
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TypeVar, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hodec.linalg.svd import naming, singular_values
from hodec.ranks.context import LayerContext

T = TypeVar("T")


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


def truncation_spectra(layer: LayerContext) -> list[Spectrum]:
    """What a layer's ranks lose; for most formats these are the spectra of its unfoldings."""
    with naming(f"layer {layer.name}"):
        return [_spectrum(*one) for one in layer.format.spectra(layer.site.values(), layer.modes)]


def unfolding_spectra(layer: LayerContext) -> list[Spectrum]:
    """The spectra of a layer's unfoldings."""
    unfoldings = layer.format.unfoldings(layer.site.values(), layer.modes)
    with naming(f"layer {layer.name}"):
        return [_spectrum(position, singular_values(matrix)) for position, matrix in unfoldings]


def _spectrum(position: int, values: Tensor) -> Spectrum:
    energy = values.double().square()
    return Spectrum(position, energy / energy.sum().clamp_min(torch.finfo(torch.float64).tiny))


_cache: OrderedDict[tuple[object, ...], object] = OrderedDict()


def cached_truncation_spectra(layer: LayerContext) -> list[Spectrum]:
    """``truncation_spectra``, remembered by the numbers in the weight: a sweep of targets computes them once."""
    return remembered(key_of(layer), lambda: truncation_spectra(layer))


def key_of(layer: LayerContext) -> tuple[object, ...]:
    """What the truncations of a layer depend on: the numbers in its weight, its format and modes."""
    weight = layer.site.values().detach().cpu().clone(memory_format=torch.contiguous_format)  # whatever its strides
    digest = hashlib.sha256(weight.view(torch.uint8).numpy().data).digest()
    return (digest, weight.dtype, weight.shape, layer.format, layer.modes)  # a method has one format for each groups


def remembered(key: tuple[object, ...], compute: Callable[[], T], size: int = 4096) -> T:
    """What ``compute`` gives, computed once in a process.

    Args:
        key: names the result.
        size: results remembered; spectra take one number a singular value, so thousands take some ten megabytes.
    """
    if key not in _cache:
        _cache[key] = compute()
        if len(_cache) > size:
            _cache.popitem(last=False)
    _cache.move_to_end(key)
    return cast(T, _cache[key])


def ranks_for_tail(spectra: Sequence[Spectrum], share: float, count: int) -> list[int]:
    """``count`` ranks at which no unfolding loses more than ``share`` of the squared norm; not fitted to each other."""
    ranks = [1] * count
    for spectrum in spectra:
        ranks[spectrum.position] = max(ranks[spectrum.position], spectrum.rank_for_tail(share))
    return ranks


def relative_error(spectra: Sequence[Spectrum], ranks: Sequence[int]) -> float:
    """Bound on norm(W - truncated W) / norm(W) from the singular values cut off: exact for one unfolding."""
    lost = sum(float(s.tails[min(ranks[s.position], len(s.energy))]) for s in spectra)
    error: float = min(1.0, max(0.0, lost)) ** 0.5
    return error


class TruncationLoss:
    """Share of a weight's squared norm that ranks lose, from the singular values they cut off, 0..1.

    With one unfolding that is its tail, exactly. With several, each truncation is taken to keep its share of
    what the others kept: 1 - prod(1 - tail). That lies between the largest tail, which no truncation can
    undercut, and the sum of all tails, which bounds it. Choosing by the sum loses up to a fifth more in truth
    where much is cut: it passes 1 and then says little.
    """

    def __init__(self, spectra: Sequence[Spectrum]) -> None:
        self.tails: list[tuple[int, NDArray[np.float64]]] = [(s.position, s.tails.cpu().numpy()) for s in spectra]
        self.levels = np.unique(np.concatenate([tails[1:] for _, tails in self.tails]))

    def at(self, ranks: Sequence[int]) -> float:
        """The share lost at these ranks."""
        retained = 1.0
        for position, tails in self.tails:
            retained *= 1.0 - float(tails[min(ranks[position], len(tails) - 1)])
        return min(1.0, max(0.0, 1.0 - retained))

    def path(self, steps: int) -> list[list[int]]:
        """Ranks at which no unfolding loses more than a level, for ``steps`` levels; falling, not fitted.

        Cutting all unfoldings at one level spreads the loss evenly over the ranks of formats that have several.
        """
        positions = 1 + max(position for position, _ in self.tails)
        at = np.linspace(0, len(self.levels) - 1, min(steps, len(self.levels))).round().astype(int)
        levels = self.levels[at]
        ranks = np.ones((positions, len(levels)), dtype=int)
        for position, tails in self.tails:
            np.maximum(ranks[position], np.searchsorted(-tails, -levels, side="left"), out=ranks[position])
        return [[int(rank) for rank in row] for row in np.unique(ranks.T, axis=0)[::-1]]
