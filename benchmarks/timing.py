"""Several pieces of work timed in turns: medians, their ratio, and how far the rounds are apart."""

import gc
import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from hodec.cost.timing import samples_ms

Work = Callable[[], Any]


@dataclass(frozen=True)
class Times:
    """Seconds of each piece of work, round by round."""

    samples: Mapping[str, tuple[float, ...]]

    def median(self, name: str) -> float:
        return statistics.median(self.samples[name])

    def ratio(self, above: str, below: str) -> float:
        """Median of one over median of the other."""
        return self.median(above) / self.median(below)

    def spread(self, above: str, below: str) -> float | None:
        """Half the interquartile range of the ratio over the rounds, as a share of its median."""
        return spread([a / b for a, b in zip(self.samples[above], self.samples[below], strict=True)])

    def beside(self, ours: str, theirs: str, *, inverse: bool = False) -> dict[str, Any]:
        """``ours``, ``theirs``, ``figure`` and ``spread`` of a ``Row``: the peer's time over ours, or the inverse."""
        above, below = (ours, theirs) if inverse else (theirs, ours)
        medians = {"ours": self.median(ours), "theirs": self.median(theirs)}
        return {**medians, "figure": self.ratio(above, below), "spread": self.spread(above, below)}


def spread(values: list[float]) -> float | None:
    """Half the interquartile range as a share of the median; None for a single value."""
    if len(values) < 2:
        return None
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return (high - low) / 2 / middle if middle else 0.0


def in_turns(works: Mapping[str, Work], *, seconds: float = 2.0, rounds: tuple[int, int] = (5, 40)) -> Times:
    """Time the works round by round, each round from another one on; garbage is collected between samples only.

    Args:
        works: name -> function; each is called twice more, before the rounds.
        seconds: time to spend, exceeded only by the least rounds.
        rounds: least and most rounds.
    """
    gc.collect()
    gc.freeze()  # a collection between samples then looks at what the works left, not at all that was ever imported
    gc.disable()
    try:
        samples = samples_ms(works, seconds=seconds, rounds=rounds, between=gc.collect)
    finally:
        gc.enable()
        gc.unfreeze()
    return Times({name: tuple(1e-3 * ms for ms in times) for name, times in samples.items()})
