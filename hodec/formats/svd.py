"""Splits of a weight into two factors by a truncated SVD of one of its unfoldings."""

from collections.abc import Sequence

import torch
from torch import Tensor

from hodec.formats.base import Ranks, channels_and_kernel
from hodec.formats.modes import Modes
from hodec.formats.ops import Op, Shape, pointwise, spatial_axes
from hodec.formats.staged import StagedFormat
from hodec.linalg.svd import truncated_svd


class MatrixSplit(StagedFormat):
    """A weight read as one matrix (rows, cols); the layer's first factor applies cols -> rank, its second rank -> rows.

    Factors are in the layer's order: first (rank, ..), second (O, rank, ..). The error is the norm of the dropped
    singular values, the least possible.
    """

    orthogonal = by_rows = True

    def matrix(self, weight: Tensor) -> Tensor:
        """Weight (O, I, K..) -> matrix (rows, cols)."""
        raise NotImplementedError

    def from_sides(self, left: Tensor, right: Tensor, shape: Shape) -> list[Tensor]:
        """left (rows, r) and right (r, cols) -> kernels of the two convolutions."""
        raise NotImplementedError

    def sides(self, factors: Sequence[Tensor], shape: Shape) -> tuple[Tensor, Tensor]:
        """Inverse of ``from_sides``."""
        raise NotImplementedError

    def to_weight(self, matrix: Tensor, shape: Shape) -> Tensor:
        """Inverse of ``matrix``."""
        raise NotImplementedError

    def max_ranks(self, shape: Shape, modes: Modes) -> Ranks:
        rows, cols = self.matrix(torch.empty(tuple(shape), device="meta")).shape
        return (min(rows, cols),)

    def decompose(self, weight: Tensor, ranks: Sequence[int], modes: Modes) -> list[Tensor]:
        left, right = truncated_svd(self.matrix(weight), ranks[0])
        return self.from_sides(left, right, weight.shape)

    def reconstruct(self, factors: Sequence[Tensor], shape: Shape, modes: Modes) -> Tensor:
        left, right = self.sides(factors, shape)
        return self.to_weight(left @ right, shape)

    def unfoldings(self, weight: Tensor, modes: Modes) -> list[tuple[int, Tensor]]:
        return [(0, self.matrix(weight))]

    def project_many(self, weights: Tensor, ranks: Sequence[int], modes: Modes) -> Tensor:
        left, right = truncated_svd(torch.stack([self.matrix(w) for w in weights]), ranks[0], orthonormal=False)
        return torch.stack([self.to_weight(m, weights.shape[1:]) for m in left @ right])


class OutputSplit(MatrixSplit):
    """Matrix (O, I K): the K x K convolution runs at full input width, then 1x1 to the outputs. Linear: SVD.

    Source: Zhang, Zou, He, Sun, Accelerating Very Deep Convolutional Networks, TPAMI 2016: section 2.
    """

    def chain(self, shape: Shape, ranks: Sequence[int]) -> list[Op]:
        (r,), (out, inp, *kernel) = ranks, shape
        return [Op((r, inp, *kernel), spatial_axes(shape)), pointwise(out, r, shape)]

    def matrix(self, weight: Tensor) -> Tensor:
        return weight.flatten(1)

    def to_weight(self, matrix: Tensor, shape: Shape) -> Tensor:
        return matrix.reshape(tuple(shape))

    def from_sides(self, left: Tensor, right: Tensor, shape: Shape) -> list[Tensor]:
        return [right.reshape(-1, *shape[1:]), left.reshape(*left.shape, *(1 for _ in shape[2:]))]

    def sides(self, factors: Sequence[Tensor], shape: Shape) -> tuple[Tensor, Tensor]:
        first, second = factors
        return second.flatten(1), first.flatten(1)

    def mixable(self, shape: Shape, modes: Modes) -> list[tuple[int, ...]]:
        return [tuple(range(len(shape) - 1))]


class LookupSplit(OutputSplit):
    """Matrix (width, entries) of an embedding: a narrow table is looked up, then mapped to the full width."""

    def chain(self, shape: Shape, ranks: Sequence[int]) -> list[Op]:
        (r,), (width, entries) = ranks, shape
        return [Op((r, 1), entries=entries), pointwise(width, r, shape)]


class InputSplit(MatrixSplit):
    """Matrix (O K, I): 1x1 from the inputs, then the K x K convolution. AIMET's weight SVD.

    Source: AIMET user guide, weight SVD.
    """

    def chain(self, shape: Shape, ranks: Sequence[int]) -> list[Op]:
        (r,), (out, inp, *kernel) = ranks, shape
        return [pointwise(r, inp, shape), Op((out, r, *kernel), spatial_axes(shape))]

    def matrix(self, weight: Tensor) -> Tensor:
        return torch.einsum("oi...->o...i", weight).flatten(0, -2)

    def to_weight(self, matrix: Tensor, shape: Shape) -> Tensor:
        out, inp, *kernel = shape
        return torch.einsum("o...i->oi...", matrix.reshape(out, *kernel, inp)).contiguous()

    def from_sides(self, left: Tensor, right: Tensor, shape: Shape) -> list[Tensor]:
        out, inp, *kernel = shape
        second = torch.einsum("o...r->or...", left.reshape(out, *kernel, left.shape[1]))
        return [right.reshape(-1, inp, *(1 for _ in kernel)), second.contiguous()]

    def sides(self, factors: Sequence[Tensor], shape: Shape) -> tuple[Tensor, Tensor]:
        first, second = factors
        return torch.einsum("or...->o...r", second).flatten(0, -2), first.flatten(1)

    def mixable(self, shape: Shape, modes: Modes) -> list[tuple[int, ...]]:
        return channels_and_kernel(shape)


class SpatialSplit(MatrixSplit):
    """Matrix (O K_b, I K_a): a convolution along one axis, then one along the other.

    Which axis comes first is chosen by size, so that the matrix pairs the smaller channel count with the smaller
    kernel side and has the smaller full rank: rows first where (O >= I) == (K_h <= K_w). These are the four
    orientations of Ascend's split.

    Source: Jaderberg, Vedaldi, Zisserman, Speeding up Convolutional Neural Networks with Low Rank Expansions,
    BMVC 2014: scheme 2; orientations: Ascend AMCT documentation, tensor decomposition.
    """

    @staticmethod
    def first_axis(shape: Shape) -> int:
        """The spatial axis (0: rows, 1: columns) of the first convolution."""
        out, inp, height, width = shape
        return 0 if (out >= inp) == (height <= width) else 1

    def chain(self, shape: Shape, ranks: Sequence[int]) -> list[Op]:
        (r,), (out, inp, *kernel), first = ranks, shape, self.first_axis(shape)
        one, two = [1, 1], [1, 1]
        one[first], two[1 - first] = kernel[first], kernel[1 - first]
        return [Op((r, inp, *one), (first,)), Op((out, r, *two), (1 - first,))]

    def matrix(self, weight: Tensor) -> Tensor:
        pattern = "oihw->owih" if self.first_axis(weight.shape) == 0 else "oihw->ohiw"
        return torch.einsum(pattern, weight).flatten(2).flatten(0, 1)

    def to_weight(self, matrix: Tensor, shape: Shape) -> Tensor:
        return self._unsplit(matrix, shape, self.first_axis(shape))

    @staticmethod
    def _unsplit(matrix: Tensor, shape: Shape, first: int) -> Tensor:
        out, inp, *kernel = shape
        split = matrix.reshape(out, kernel[1 - first], inp, kernel[first])
        return torch.einsum("owih->oihw" if first == 0 else "ohiw->oihw", split).contiguous()

    def from_sides(self, left: Tensor, right: Tensor, shape: Shape) -> list[Tensor]:
        (out, inp, *kernel), first = shape, self.first_axis(shape)
        one = right.reshape(-1, inp, kernel[first])
        two = left.reshape(out, kernel[1 - first], -1).transpose(1, 2).contiguous()
        return [one.unsqueeze(3 - first), two.unsqueeze(2 + first)]

    def sides(self, factors: Sequence[Tensor], shape: Shape) -> tuple[Tensor, Tensor]:
        return self._sides(factors, self.first_axis(shape))

    @staticmethod
    def _sides(factors: Sequence[Tensor], first: int) -> tuple[Tensor, Tensor]:
        one, two = factors[0].squeeze(3 - first), factors[1].squeeze(2 + first)
        return two.transpose(1, 2).flatten(0, 1), one.flatten(1)

    def leading(self, factors: Sequence[Tensor], count: int, shape: Shape, modes: Modes) -> Tensor | None:
        one, two = factors
        first = self.first_axis(shape)  # of the whole weight: fewer rows alone would have another order
        left, right = self._sides([one, two[:count]], first)
        return self._unsplit(left @ right, (len(two[:count]), *shape[1:]), first)

    def mixable(self, shape: Shape, modes: Modes) -> list[tuple[int, ...]]:
        first = self.first_axis(shape)
        return [(0, 1 + first), (2 - first,)]


SVD, SVD_TRANSPOSED, LOOKUP = OutputSplit(), OutputSplit(transposed=True), LookupSplit()
WEIGHT_SVD, WEIGHT_SVD_TRANSPOSED = InputSplit(), InputSplit(transposed=True)
SPATIAL_SVD, SPATIAL_SVD_TRANSPOSED = SpatialSplit(), SpatialSplit(transposed=True)
