"""Modes: the integers that a channel count splits into, 64 -> (8, 8)."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

from hodec.errors import PlanError

# Modes a side that may be asked for; and channels up to which a message suggests them, as all their divisors are tried.
MOST_MODES, MOST_SPLIT = 4, 2**24


@dataclass(frozen=True)
class Modes:
    """How the channels of one weight are split: ``math.prod(inputs)`` channels in, ``math.prod(outputs)`` out.

    Examples:
        >>> hodec.Modes((4, 4), (8, 8))
        Modes(inputs=(4, 4), outputs=(8, 8))
        >>> hodec.Modes.split(16, 64, 2)
        Modes(inputs=(4, 4), outputs=(8, 8))
    """

    inputs: tuple[int, ...]
    outputs: tuple[int, ...]

    @classmethod
    def split(cls, in_channels: int, out_channels: int, count: int) -> "Modes":
        """The most even split of both channel counts into ``count`` modes each."""
        return cls(split_channels(in_channels, count), split_channels(out_channels, count))

    def check(self, in_channels: int, out_channels: int) -> None:
        """Refuse modes whose products are not the channel counts.

        Raises:
            PlanError: naming both products and both channel counts.
        """
        numbers = (*self.inputs, *self.outputs)
        fit = all(type(n) is int and n >= 1 for n in numbers) and len(self.inputs) == len(self.outputs) >= 1
        if fit and (math.prod(self.inputs), math.prod(self.outputs)) == (in_channels, out_channels):
            return
        raise PlanError(
            f"modes in={list(self.inputs)} out={list(self.outputs)} do not fit {in_channels} -> {out_channels} "
            f"channels: each list must multiply to its channel count, and both must be equally long"
            f"{self._automatic(in_channels, out_channels)}"
        )

    def _automatic(self, in_channels: int, out_channels: int) -> str:
        """The even split of as many modes, for a message; not of the sizes that only an altered file has."""
        count = len(self.inputs)
        if not 1 <= count <= MOST_MODES or max(in_channels, out_channels) > MOST_SPLIT:
            return ""
        even = Modes.split(in_channels, out_channels, count)
        return f". Automatic modes: in={list(even.inputs)} out={list(even.outputs)}"


def split_channels(channels: int, count: int) -> tuple[int, ...]:
    """Split ``channels`` into ``count`` factors as equal as can be, in ascending order.

    A prime p has only the split (1, .., 1, p): its mode of 1 is harmless, but such a layer gains nothing from
    more than one mode. 64 -> (8, 8), 128 -> (8, 16), 17 -> (1, 17), 96 in three -> (4, 4, 6).
    """
    if channels < 1 or count < 1:
        raise PlanError(f"cannot split {channels} channels into {count} modes; both must be at least 1")
    return min(_factorizations(channels, count, 1), key=lambda f: sum(math.log(n) ** 2 for n in f))


def _factorizations(n: int, count: int, least: int) -> Iterator[tuple[int, ...]]:
    if count == 1:
        yield (n,)
        return
    for first in range(least, math.isqrt(n) + 1):
        if n % first == 0:
            yield from ((first, *rest) for rest in _factorizations(n // first, count - 1, first))
