"""Splits of a weight into two factors by a truncated SVD of one of its unfoldings."""

from abc import abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

from hodec.formats.base import Ranks
from hodec.formats.modes import Modes
from hodec.formats.ops import Op, Shape, pointwise, spatial_axes
from hodec.formats.staged import StagedFormat
from hodec.linalg.svd import truncated_svd


class MatrixSplit(StagedFormat):
    """A weight read as one matrix: rows are O with some axes of the kernel, columns are I with the others.

    The layer's first op maps columns -> rank, its second rank -> rows; each moves along its own axes. The error is the
    norm of the dropped singular values, the least possible.
    """

    orthogonal = True

    @abstractmethod
    def first_axes(self, shape: Shape) -> tuple[int, ...]:
        """The spatial axes of the first op, ascending; the second one has the others."""

    def chain(self, shape: Shape, ranks: Sequence[int]) -> list[Op]:
        (r,), (out, inp, *kernel), first = ranks, shape, self.first_axes(shape)
        second = _others(shape, first)
        one, two = ([n if axis in axes else 1 for axis, n in enumerate(kernel)] for axes in (first, second))
        return [Op((r, inp, *one), first), Op((out, r, *two), second)]

    def max_ranks(self, shape: Shape, modes: Modes) -> Ranks:
        rows, cols = self.matrix(torch.empty(tuple(shape), device="meta")).shape
        return (min(rows, cols),)

    def matrix(self, weight: Tensor) -> Tensor:
        """Weight (O, I, K..) -> matrix (rows, cols)."""
        first = self.first_axes(weight.shape)
        order, rows = _order(weight.shape, first)
        sorted_axes = weight.permute(order)
        return sorted_axes.flatten(rows).flatten(0, rows - 1)

    def to_weight(self, matrix: Tensor, shape: Shape, first: tuple[int, ...]) -> Tensor:
        """Inverse of ``matrix`` for a split whose first op moves along ``first``."""
        order, _ = _order(shape, first)
        split = matrix.reshape([shape[axis] for axis in order])
        return split.permute([order.index(axis) for axis in range(len(order))]).contiguous()

    def decompose(self, weight: Tensor, ranks: Sequence[int], modes: Modes) -> list[Tensor]:
        left, right = truncated_svd(self.matrix(weight), ranks[0])
        one, two = self.chain(weight.shape, ranks)
        if two.axes:  # (O K_b, r) -> (O, r, K_b)
            left = left.unflatten(0, (weight.shape[0], -1)).transpose(1, 2).contiguous()
        return [right.reshape(one.kernel), left.reshape(two.kernel)]

    def reconstruct(self, factors: Sequence[Tensor], shape: Shape, modes: Modes) -> Tensor:
        return self._product(factors, shape, self.first_axes(shape))

    def leading(self, factors: Sequence[Tensor], count: int, shape: Shape, modes: Modes) -> Tensor | None:
        (one, two), first = factors, self.first_axes(shape)  # of the whole weight: fewer rows might have other axes
        return self._product([one, two[:count]], (len(two[:count]), *shape[1:]), first)

    def _product(self, factors: Sequence[Tensor], shape: Shape, first: tuple[int, ...]) -> Tensor:
        one, two = factors
        left = two.flatten(2).transpose(1, 2).flatten(0, 1) if two.ndim > 2 else two
        return self.to_weight(left @ one.flatten(1), shape, first)

    def unfoldings(self, weight: Tensor, modes: Modes) -> list[tuple[int, Tensor]]:
        return [(0, self.matrix(weight))]

    def project_many(self, weights: Tensor, ranks: Sequence[int], modes: Modes) -> Tensor:
        left, right = truncated_svd(torch.stack([self.matrix(w) for w in weights]), ranks[0], orthonormal=False)
        shape = weights.shape[1:]
        return torch.stack([self.to_weight(m, shape, self.first_axes(shape)) for m in left @ right])

    def mixable(self, shape: Shape, modes: Modes) -> list[tuple[int, ...]]:
        first = self.first_axes(shape)
        second = tuple(1 + axis for axis in _others(shape, first))
        return [(0, *(1 + axis for axis in first)), *([second] if second else [])]


def _others(shape: Shape, first: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(axis for axis in spatial_axes(shape) if axis not in first)


def _order(shape: Shape, first: tuple[int, ...]) -> tuple[list[int], int]:
    """The axes of a weight in the order of the matrix, (O, K_b.., I, K_a..), and how many of them are rows."""
    rows, cols = [0, *(2 + axis for axis in _others(shape, first))], [1, *(2 + axis for axis in first)]
    return rows + cols, len(rows)


class OutputSplit(MatrixSplit):
    """Matrix (O, I K): the K x K convolution runs at full input width, then 1x1 to the outputs. Linear: SVD.

    Source: Zhang, Zou, He, Sun, Accelerating Very Deep Convolutional Networks, TPAMI 2016: section 2.
    """

    def first_axes(self, shape: Shape) -> tuple[int, ...]:
        return spatial_axes(shape)


class LookupSplit(OutputSplit):
    """Matrix (width, entries) of an embedding: a narrow table is looked up, then mapped to the full width."""

    def chain(self, shape: Shape, ranks: Sequence[int]) -> list[Op]:
        (r,), (width, entries) = ranks, shape
        return [Op((r, 1), entries=entries), pointwise(width, r, shape)]

    def decompose(self, weight: Tensor, ranks: Sequence[int], modes: Modes) -> list[Tensor]:
        left, right = truncated_svd(weight, ranks[0])
        return [right, left]


class InputSplit(MatrixSplit):
    """Matrix (O K, I): 1x1 from the inputs, then the K x K convolution. AIMET's weight SVD.

    Source: AIMET user guide, weight SVD.
    """

    def first_axes(self, shape: Shape) -> tuple[int, ...]:
        return ()


class SpatialSplit(MatrixSplit):
    """Matrix (O K_b, I K_a): a convolution along one axis, then one along the other.

    Which axis comes first is chosen by size, so that the matrix pairs the smaller channel count with the smaller
    kernel side and has the smaller full rank: rows first where (O >= I) == (K_h <= K_w). These are the four
    orientations of Ascend's split.

    Source: Jaderberg, Vedaldi, Zisserman, Speeding up Convolutional Neural Networks with Low Rank Expansions,
    BMVC 2014: scheme 2; orientations: Ascend AMCT documentation, tensor decomposition.
    """

    def first_axes(self, shape: Shape) -> tuple[int, ...]:
        out, inp, height, width = shape
        return (0,) if (out >= inp) == (height <= width) else (1,)


SVD, SVD_TRANSPOSED, LOOKUP = OutputSplit(), OutputSplit(transposed=True), LookupSplit()
WEIGHT_SVD, WEIGHT_SVD_TRANSPOSED = InputSplit(), InputSplit(transposed=True)
SPATIAL_SVD, SPATIAL_SVD_TRANSPOSED = SpatialSplit(), SpatialSplit(transposed=True)
