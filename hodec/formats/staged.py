"""Formats whose layer is a short chain of convolutions, stored as it runs."""

from abc import abstractmethod
from collections.abc import Sequence

from torch import Tensor

from hodec.formats.base import Core, Format, Ranks
from hodec.formats.modes import Modes
from hodec.formats.ops import Op, Shape


class StagedFormat(Format):
    """A format without channel modes and with one execution: factor k is the kernel of op k."""

    uses_modes = False

    @abstractmethod
    def chain(self, shape: Shape, ranks: Sequence[int]) -> list[Op]:
        """The ops in the order they run."""

    def ops(self, shape: Shape, ranks: Sequence[int], modes: Modes, *, execution: str) -> list[Op]:
        return self.chain(shape, ranks)

    def fit_ranks(self, shape: Shape, modes: Modes, ranks: Sequence[int]) -> Ranks:
        return tuple(min(r, most) for r, most in zip(ranks, self.max_ranks(shape, modes), strict=True))

    def cores(self, factors: Sequence[Tensor]) -> list[Core]:
        return staged_cores([factor.unsqueeze(0) for factor in factors])


def staged_cores(kernels: Sequence[Tensor]) -> list[Core]:
    """Kernels (B, out, in, K..) of convolutions or products one after another, as a chain."""
    first, *middle, last = kernels
    inner = [
        Core(kernel.squeeze(2), depthwise=True)
        if kernel.shape[2] < before.shape[1]  # it reads fewer channels than there are: one at a time
        else Core(kernel.movedim(1, -1))
        for before, kernel in zip(kernels, middle, strict=False)
    ]
    return [Core(first.movedim(1, -1).unsqueeze(1)), *inner, Core(last.movedim(2, 1).unsqueeze(-1))]
