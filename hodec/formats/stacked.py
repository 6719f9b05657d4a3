"""Weights that are several of a kind, such as the experts of one layer or the groups of a convolution.

Each is factorized on its own, all at the same ranks.
"""

import math
from abc import abstractmethod
from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor

from hodec.formats.base import Core, Format, Ranks
from hodec.formats.calls import CallSites
from hodec.formats.modes import Modes
from hodec.formats.ops import Op, Shape, dense_op
from hodec.formats.staged import StagedFormat, staged_cores
from hodec.linalg.svd import singular_values


class Several(Format):
    """The factorization ``one`` of each of several weights that are held as one tensor."""

    one: Format

    @abstractmethod
    def parts(self, weight: Tensor) -> Sequence[Tensor]:
        """The single weights."""

    @abstractmethod
    def part_shape(self, shape: Shape) -> Shape:
        """The shape of one of them."""

    def max_ranks(self, shape: Shape, modes: Modes) -> Ranks:
        return self.one.max_ranks(self.part_shape(shape), modes)

    def fit_ranks(self, shape: Shape, modes: Modes, ranks: Sequence[int]) -> Ranks:
        return self.one.fit_ranks(self.part_shape(shape), modes, ranks)

    def unsuitable(self, shape: Shape, modes: Modes) -> str:
        return self.one.unsuitable(self.part_shape(shape), modes)

    def unfoldings(self, weight: Tensor, modes: Modes) -> list[tuple[int, Tensor]]:
        return [pair for w in self.parts(weight) for pair in self.one.unfoldings(w, modes)]

    def spectra(self, weight: Tensor, modes: Modes) -> list[tuple[int, Tensor]]:
        """One for each unfolding of ``one``: all weights lose their k-th singular values together."""
        squares: dict[int, Tensor] = {}
        for w in self.parts(weight):
            for number, (_, values) in enumerate(self.part_spectra(w, modes)):
                own = values.double().square()
                squares[number] = squares[number] + own if number in squares else own
        positions = [position for position, _ in self.one.unfoldings(self.parts(weight)[0], modes)]
        return [(positions[number], total.sqrt()) for number, total in squares.items()]

    def part_spectra(self, weight: Tensor, modes: Modes) -> list[tuple[int, Tensor]]:
        """What one weight loses, by singular values."""
        return [(position, singular_values(matrix)) for position, matrix in self.one.unfoldings(weight, modes)]


class Stacked(Several):
    """E linear maps: a weight is (O, I, E), a factor (E, ..) one of each expert.

    Nothing runs the factors: the weight is rebuilt, and a position is a row that one expert multiplies.

    Args:
        one: the format of a linear layer.
    """

    in_graphs = False

    def __init__(self, one: Format) -> None:
        super().__init__()
        self.one = one
        self.uses_modes, self.min_modes, self.orthogonal = one.uses_modes, one.min_modes, one.orthogonal

    def parts(self, weight: Tensor) -> Sequence[Tensor]:
        return weight.unbind(-1)

    def part_shape(self, shape: Shape) -> Shape:
        return shape[:2]

    def decompose(self, weight: Tensor, ranks: Sequence[int], modes: Modes) -> list[Tensor]:
        each = [self.one.decompose(w, ranks, modes) for w in weight.unbind(-1)]
        return [torch.stack(factors) for factors in zip(*each, strict=True)]

    def reconstruct(self, factors: Sequence[Tensor], shape: Shape, modes: Modes) -> Tensor:
        def rebuilt(*own: Tensor) -> Tensor:
            return self.one.reconstruct(own, shape[:2], modes)

        return torch.vmap(rebuilt, out_dims=-1)(*factors)

    def project_many(self, weights: Tensor, ranks: Sequence[int], modes: Modes) -> Tensor:
        flat = weights.movedim(-1, 1).flatten(0, 1)
        projected = self.one.project_many(flat, ranks, modes)
        return cast(Tensor, projected.unflatten(0, (len(weights), -1)).movedim(1, -1))

    def ops(self, shape: Shape, ranks: Sequence[int], modes: Modes, *, execution: str) -> list[Op]:
        return [dense_op(shape[:2])]

    def ranks(self, factors: Sequence[Tensor]) -> Ranks:
        return self.one.ranks([factor[0] for factor in factors])

    def cores(self, factors: Sequence[Tensor]) -> list[Core]:
        return staged_cores(factors) if isinstance(self.one, StagedFormat) else [Core(factor) for factor in factors]

    def params(self, shape: Shape, ranks: Sequence[int], modes: Modes) -> int:
        return int(shape[2]) * self.one.params(shape[:2], ranks, modes)

    def macs(self, shape: Shape, ranks: Sequence[int], modes: Modes, *, call_sites: CallSites, execution: str) -> int:
        return dense_op(shape[:2]).work * call_sites.out_positions


class Grouped(Several):
    """A grouped convolution: a weight is (O, I / groups, K_1, ..), its groups one after another.

    Factor k holds the kernels of op k of all groups, as the grouped convolution that runs them stores it.

    Args:
        one: the format of one group's convolution, not a transposed one.
        groups: how many there are.
    """

    uses_modes = False

    def __init__(self, one: StagedFormat, groups: int) -> None:
        super().__init__()
        self.one, self.conv_groups = one, groups
        self.orthogonal, self.iterative = one.orthogonal, one.iterative

    def parts(self, weight: Tensor) -> Sequence[Tensor]:
        return weight.chunk(self.conv_groups)

    def part_shape(self, shape: Shape) -> Shape:
        return (shape[0] // self.conv_groups, *shape[1:])

    def unsuitable(self, shape: Shape, modes: Modes) -> str:
        kernel = shape[2:]
        least = self.fit_ranks(shape, modes, [1] * len(self.max_ranks(shape, modes)))
        if shape[:2] == (self.conv_groups, 1) and self.params(shape, least, modes) >= math.prod(shape):
            return (
                f"depthwise convolution (groups={self.conv_groups}): a {'x'.join(map(str, kernel))} kernel of one "
                "channel in and one out has no smaller factors by this method"
                + "; spatial_svd splits it along its axes"
                * (len(kernel) == 2 and min(kernel) > 1)
            )
        return super().unsuitable(shape, modes)

    def part_spectra(self, weight: Tensor, modes: Modes) -> list[tuple[int, Tensor]]:
        return self.one.spectra(weight, modes)

    def mixable(self, shape: Shape, modes: Modes) -> list[tuple[int, ...]]:
        """As for one group; all groups have the covariance of their inputs' average."""
        return self.one.mixable(self.part_shape(shape), modes)

    def decompose(self, weight: Tensor, ranks: Sequence[int], modes: Modes) -> list[Tensor]:
        each = [self.one.decompose(w, ranks, modes) for w in self.parts(weight)]
        return [torch.cat(kernels) for kernels in zip(*each, strict=True)]

    def refine(
        self, weight: Tensor, ranks: Sequence[int], modes: Modes, init_factors: Sequence[Tensor]
    ) -> list[Tensor]:
        starts = zip(self.parts(weight), self._each(init_factors), strict=True)
        each = [self.one.refine(w, ranks, modes, near) for w, near in starts]
        return [torch.cat(kernels) for kernels in zip(*each, strict=True)]

    def reconstruct(self, factors: Sequence[Tensor], shape: Shape, modes: Modes) -> Tensor:
        part = self.part_shape(shape)
        return torch.cat([self.one.reconstruct(own, part, modes) for own in self._each(factors)])

    def project_many(self, weights: Tensor, ranks: Sequence[int], modes: Modes) -> Tensor:
        flat = weights.unflatten(1, (self.conv_groups, -1)).flatten(0, 1)
        projected = self.one.project_many(flat, ranks, modes)
        return cast(Tensor, projected.unflatten(0, (len(weights), -1)).flatten(1, 2))

    def ops(self, shape: Shape, ranks: Sequence[int], modes: Modes, *, execution: str) -> list[Op]:
        each = self.one.ops(self.part_shape(shape), ranks, modes, execution=execution)
        n = self.conv_groups
        return [op._replace(kernel=(n * op.kernel[0], *op.kernel[1:]), blocks=n) for op in each]

    def ranks(self, factors: Sequence[Tensor]) -> Ranks:
        return self.one.ranks(next(iter(self._each(factors))))

    def cores(self, factors: Sequence[Tensor]) -> list[Core]:
        return staged_cores([factor.unflatten(0, (self.conv_groups, -1)) for factor in factors])

    def _each(self, factors: Sequence[Tensor]) -> list[tuple[Tensor, ...]]:
        """The factors of each group."""
        return list(zip(*(factor.chunk(self.conv_groups) for factor in factors), strict=True))
