"""Ranks that keep a share of each unfolding's squared norm."""

from collections.abc import Mapping

from hodec.ranks.base import Candidate, Choice
from hodec.ranks.rounding import Rounding, check_share
from hodec.ranks.spectra import unfolding_spectra

# Shares are sums of many numbers: a rank that misses by less than this share of what may be lost is enough.
SLACK = 1e-9


class Energy:
    """The least ranks at which every unfolding keeps at least a share of the weight's squared norm.

    With n unfoldings the factorized weight may lose up to n (1 - keep) of the squared norm: what each loses adds up.
    Not so for CP, whose rank is seldom enough when it is enough for each unfolding alone.

    Args:
        keep: share of the squared norm, above 0 and at most 1; 1 keeps the numerical rank.
        round_to, min_rank, max_rank: see ``Rounding``.

    Raises:
        ConfigError: a setting out of range.
    """

    name = "energy"
    reads_weights = True

    def __init__(self, keep: float, *, round_to: int = 1, min_rank: int = 1, max_rank: int | None = None) -> None:
        self.keep = check_share("ranks.keep", keep)
        self.rounding = Rounding(round_to, min_rank, max_rank)

    def choose(self, candidates: Mapping[str, Candidate]) -> dict[str, Choice]:
        """One choice a layer; none stays dense here."""
        return {name: self._one(candidate) for name, candidate in candidates.items()}

    def _one(self, candidate: Candidate) -> Choice:
        lost = (1 - self.keep) * (1 + SLACK)
        ranks = [1] * len(candidate.most)
        for spectrum in unfolding_spectra(candidate):
            ranks[spectrum.position] = max(ranks[spectrum.position], spectrum.rank_for_tail(lost))
        return Choice(*self.rounding.apply(candidate, ranks))
