"""Where a layer runs: the spatial sizes of its input and output, call by call, for one image."""

import math
from collections.abc import Iterable
from dataclasses import dataclass

Size = tuple[int, ...]


@dataclass(frozen=True)
class Runs:
    """Calls of one layer for one image.

    Attributes:
        calls: (how often, input size, output size); a size has one number per spatial axis of the kernel, and one
            for a linear layer: the positions it visits.
    """

    calls: tuple[tuple[int, Size, Size], ...]

    @classmethod
    def once(cls, before: Iterable[int], after: Iterable[int]) -> "Runs":
        """A layer that runs once."""
        return cls(((1, tuple(before), tuple(after)),))

    def also(self, other: "Runs") -> "Runs":
        """The calls of both; equal ones are counted together."""
        counts: dict[tuple[Size, Size], int] = {}
        for times, before, after in (*self.calls, *other.calls):
            counts[before, after] = counts.get((before, after), 0) + times
        return Runs(tuple((times, before, after) for (before, after), times in counts.items()))

    def positions(self, done: Iterable[int]) -> int:
        """Positions when the axes in ``done`` already have their output size."""
        finished = set(done)
        return sum(
            times * math.prod(after[axis] if axis in finished else n for axis, n in enumerate(before))
            for times, before, after in self.calls
        )

    @property
    def before(self) -> int:
        """Input positions."""
        return self.positions(())

    @property
    def after(self) -> int:
        """Output positions."""
        return sum(times * math.prod(after) for times, _, after in self.calls)
