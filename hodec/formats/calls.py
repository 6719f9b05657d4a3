"""CallSites: the spatial sizes of a layer's input and output, call by call, for one image."""

import math
from collections.abc import Iterable
from dataclasses import dataclass

Size = tuple[int, ...]


@dataclass(frozen=True)
class CallSites:
    """Calls of one layer for one image.

    Attributes:
        calls: (how often, input size, output size); a size has one number per spatial axis of the kernel, and one
            for a linear layer: the positions it visits.
    """

    calls: tuple[tuple[int, Size, Size], ...]

    @classmethod
    def once(cls, in_size: Iterable[int], out_size: Iterable[int]) -> "CallSites":
        """A layer that runs once."""
        return cls(((1, tuple(in_size), tuple(out_size)),))

    def also(self, other: "CallSites") -> "CallSites":
        """The calls of both; equal ones are counted together."""
        counts: dict[tuple[Size, Size], int] = {}
        for times, in_size, out_size in (*self.calls, *other.calls):
            counts[in_size, out_size] = counts.get((in_size, out_size), 0) + times
        return CallSites(tuple((times, in_size, out_size) for (in_size, out_size), times in counts.items()))

    def positions(self, done: Iterable[int]) -> int:
        """Positions when the axes in ``done`` already have their output size."""
        finished = set(done)
        return sum(
            times * math.prod(out_size[axis] if axis in finished else n for axis, n in enumerate(in_size))
            for times, in_size, out_size in self.calls
        )

    @property
    def in_positions(self) -> int:
        """Input positions."""
        return self.positions(())

    @property
    def out_positions(self) -> int:
        """Output positions."""
        return sum(times * math.prod(out_size) for times, _, out_size in self.calls)
