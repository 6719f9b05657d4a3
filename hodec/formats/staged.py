"""Formats whose layer is a short chain of convolutions: cost and parameters follow from the list of its stages."""

import math
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from hodec.formats.base import Format, Ranks, Shape
from hodec.formats.calls import CallSites
from hodec.formats.modes import Modes


@dataclass(frozen=True)
class Stage:
    """One convolution of the chain.

    Attributes:
        kernel: its shape, (out, in / groups, K_1, ..) whatever the dense layer stores.
        axes: the spatial axes along which it moves; it carries stride, padding and dilation of these.
    """

    kernel: tuple[int, ...]
    axes: tuple[int, ...] = ()

    @property
    def numbers(self) -> int:
        """Numbers in the kernel, which is also the multiply-adds for one position."""
        return math.prod(self.kernel)


def staged_macs(stages: Sequence[Stage], call_sites: CallSites, *, transposed: bool) -> int:
    """Multiply-adds of the stages, each at the resolution it works at.

    A convolution visits its output positions, a transposed one its input positions; an axis has its output size
    once the stage that moves along it is done.
    """
    total, done = 0, set[int]()
    for stage in stages:
        before = call_sites.positions(done)
        done |= set(stage.axes)
        total += stage.numbers * (before if transposed else call_sites.positions(done))
    return total


class StagedFormat(Format):
    """A form without channel modes and with one execution; subclasses list the stages.

    Args:
        transposed: whether the dense layer is a transposed convolution.
    """

    uses_modes = False
    #: whether each row of the last factor belongs to one output, whatever the number of outputs
    by_rows = False

    def __init__(self, *, transposed: bool = False) -> None:
        self.transposed = transposed

    @abstractmethod
    def stages(self, shape: Shape, ranks: Sequence[int]) -> list[Stage]:
        """The convolutions of the chain, in the order they run."""

    @abstractmethod
    def most(self, shape: Shape) -> Ranks:
        """Ranks at which the format is exact for every weight of this shape."""

    def max_ranks(self, shape: Shape, modes: Modes) -> Ranks:
        return self.most(shape)

    def fit_ranks(self, shape: Shape, modes: Modes, ranks: Sequence[int]) -> Ranks:
        return tuple(min(r, most) for r, most in zip(ranks, self.most(shape), strict=True))

    def leading(self, factors: Sequence[Tensor], count: int, shape: Shape, modes: Modes) -> Tensor | None:
        if not self.by_rows:
            return None
        *inner, last = factors
        return self.reconstruct([*inner, last[:count]], (len(last[:count]), *shape[1:]), modes)

    def params(self, shape: Shape, ranks: Sequence[int], modes: Modes) -> int:
        return sum(stage.numbers for stage in self.stages(shape, ranks))

    def macs(self, shape: Shape, ranks: Sequence[int], modes: Modes, *, call_sites: CallSites, execution: str) -> int:
        return staged_macs(self.stages(shape, ranks), call_sites, transposed=self.transposed)


def spatial_axes(shape: Shape) -> tuple[int, ...]:
    """All spatial axes of a kernel (O, I, K_1, ..)."""
    return tuple(range(len(shape) - 2))


def channels_and_kernel(shape: Shape, split: int = 1) -> list[tuple[int, ...]]:
    """``Form.mixable`` where each of ``split`` channel modes is a side of its own, and the whole kernel one more."""
    kernel = tuple(split + axis for axis in spatial_axes(shape))
    return [*((axis,) for axis in range(split)), *([kernel] if kernel else [])]


def pointwise(out: int, inp: int, shape: Shape) -> Stage:
    """A 1x1 convolution (or a linear map) among the stages of a weight of this shape."""
    return Stage((out, inp, *(1 for _ in shape[2:])))
