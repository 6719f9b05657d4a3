"""What automatic rules share: their ranks brought to multiples, a least and a most, with a note; checks of settings."""

from collections.abc import Sequence
from dataclasses import dataclass

from hodec.errors import ConfigError
from hodec.ranks.base import Candidate

METRICS = ("macs", "params")


@dataclass(frozen=True)
class Rounding:
    """Limits that ranks are brought into.

    Attributes:
        round_to: ranks become multiples of this, rounded up; a layer's full rank and ``max_rank`` still hold.
        min_rank: least rank, where the layer allows it.
        max_rank: greatest rank; where it is no multiple of ``round_to``, the multiple below it is the limit
            (unless that is below ``min_rank``).

    Raises:
        ConfigError: not whole numbers of at least 1, or ``min_rank`` above ``max_rank``.
    """

    round_to: int = 1
    min_rank: int = 1
    max_rank: int | None = None

    def __post_init__(self) -> None:
        _check_whole("round_to", self.round_to)
        _check_whole("min_rank", self.min_rank)
        if self.max_rank is None:
            return
        _check_whole("max_rank", self.max_rank)
        if self.max_rank < self.min_rank:
            raise ConfigError(
                f"ranks.max_rank={self.max_rank} is below ranks.min_rank={self.min_rank}; "
                f"give ranks.max_rank={self.min_rank} or more"
            )

    def apply(self, candidate: Candidate, ranks: Sequence[int]) -> tuple[tuple[int, ...], tuple[str, ...]]:
        """Ranks that this layer can take within the limits, and a note if they differ from ``ranks``."""
        given = tuple(int(r) for r in ranks)
        now, reasons = given, []
        for reason, limited in (
            (f"min_rank={self.min_rank}", self._raise),
            (f"round_to={self.round_to}", self._round_up),
            (f"max_rank={self.max_rank}", self._cut),
        ):
            after = tuple(limited(r) for r in now)
            if after != now:
                reasons.append(reason)
            now = after
        fit = tuple(candidate.format.fit_ranks(candidate.site.shape, candidate.modes, now))
        if fit != now:
            reasons.append("the most that the layer and the other ranks allow")
        if fit == given:
            return fit, ()
        return fit, (f"ranks {list(given)} became {list(fit)}: {', '.join(reasons)}",)

    def _raise(self, rank: int) -> int:
        return max(rank, self.min_rank)

    def _round_up(self, rank: int) -> int:
        return -(-rank // self.round_to) * self.round_to

    def _cut(self, rank: int) -> int:
        if self.max_rank is None or rank <= self.max_rank:
            return rank
        multiple = self.max_rank // self.round_to * self.round_to
        return multiple if multiple >= self.min_rank else self.max_rank


def _check_whole(key: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ConfigError(f"ranks.{key}={value!r} is not a whole number of at least 1; ranks.{key}=1 sets no limit")


def check_share(key: str, value: float) -> float:
    """``value`` if it is above 0 and at most 1.

    Raises:
        ConfigError: naming ``key``.
    """
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= 1:
        raise ConfigError(f"{key}={value!r} is not a share above 0 and at most 1; for a half give {key}=0.5")
    return float(value)


def check_metric(metric: str) -> str:
    """``metric`` if it is one of METRICS.

    Raises:
        ConfigError: it is not.
    """
    if metric not in METRICS:
        raise ConfigError(f"ranks.metric={metric!r} is not one of {', '.join(METRICS)}; give ranks.metric=macs")
    return metric
