"""Formats whose layer is a short chain of convolutions, stored as it runs."""

from abc import abstractmethod
from collections.abc import Sequence

from hodec.formats.base import Format, Ranks
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
