"""CP of a convolution: a sum of outer products, run as 1x1, one depthwise convolution per axis, 1x1."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from hodec.formats.base import Ranks
from hodec.formats.cp_als import factorize
from hodec.formats.cp_components import khatri_rao
from hodec.formats.cp_starts import start_values
from hodec.formats.modes import Modes
from hodec.formats.ops import Op, Shape, spatial_axes
from hodec.formats.staged import StagedFormat


class CP(StagedFormat):
    """One rank R: kernels (R, I, 1, ..), (R, 1, K_1, 1, ..), (R, 1, 1, K_2, ..), .., (O, R, 1, ..).

    Axes of size 1 need no op of their own. The largest rank, min_k prod_{j != k} n_j over the sides n of the
    tensor, is exact for every weight. Below it a CP is found by iteration: a local optimum, orthogonal to what it
    drops, whose error may grow by up to 0.02 of the weight from one rank to the next. A weight of exactly rank R is
    found again where R is at most the longest side, and at most a product of others that leaves a side out, up to
    coincidences of measure zero. At other ranks, decomposing a projection anew is another iteration, which may end some
    percent away from it.

    Args:
        joint: whether the spatial axes are one side of the tensor: one depthwise K_1 x K_2 x .. convolution.
        transposed: whether the dense layer is a transposed convolution.

    Source: Lebedev et al., Speeding-up CNNs Using Fine-tuned CP-Decomposition, ICLR 2015: section 3.
    """

    iterative = True
    tensorly_type = "cp"

    def __init__(self, *, joint: bool = False, transposed: bool = False) -> None:
        super().__init__(transposed=transposed)
        self.joint = joint

    def groups(self, shape: Shape) -> list[tuple[int, ...]]:
        """The spatial axes of each depthwise op."""
        moving = [axis for axis in spatial_axes(shape) if shape[2 + axis] > 1]
        if self.joint:
            return [tuple(moving)] if moving else []
        return [(axis,) for axis in moving]

    def sides(self, shape: Shape) -> tuple[int, ...]:
        """Sides of the tensor that is decomposed: O, I, and one per depthwise op."""
        return (*shape[:2], *(math.prod(shape[2 + axis] for axis in group) for group in self.groups(shape)))

    def chain(self, shape: Shape, ranks: Sequence[int]) -> list[Op]:
        (out, inp, *kernel), (r,) = shape, ranks
        ones = (1,) * len(kernel)
        middle = [
            Op((r, 1, *(n if axis in group else 1 for axis, n in enumerate(kernel))), group, depthwise=r > 1)
            for group in self.groups(shape)
        ]
        # axes of size 1 have strides and padding too: where fewest positions are visited
        still = tuple(axis for axis, n in enumerate(kernel) if n == 1)
        first, last = ((), still) if self.transposed else (still, ())
        return [Op((r, inp, *ones), first), *middle, Op((out, r, *ones), last)]

    def ranks(self, factors: Sequence[Tensor]) -> Ranks:
        return (factors[0].shape[0],)

    def max_ranks(self, shape: Shape, modes: Modes) -> Ranks:
        sides = self.sides(shape)
        return (math.prod(sides) // max(sides),)

    def decompose(self, weight: Tensor, ranks: Sequence[int], modes: Modes) -> list[Tensor]:
        return self._as_ops(self._factors(weight[None], ranks), weight)

    def refine(
        self, weight: Tensor, ranks: Sequence[int], modes: Modes, init_factors: Sequence[Tensor]
    ) -> list[Tensor]:
        near = [f[None] for f in _sides(init_factors)]
        return self._as_ops(self._factors(weight[None], ranks, near), weight)

    def _as_ops(self, factors: Sequence[Tensor], weight: Tensor) -> list[Tensor]:
        """Factors (1, n, R) of O, I and each depthwise op -> kernels in the order of the ops."""
        return self.from_tensorly(None, [f[0].to(weight.dtype) for f in factors], weight.shape)

    def reconstruct(self, factors: Sequence[Tensor], shape: Shape, modes: Modes) -> Tensor:
        return _sum_of_products(_sides(factors), shape)

    def tensorly_shape(self, shape: Shape, modes: Modes) -> tuple[int, ...]:
        return self.sides(shape)

    def to_tensorly(self, factors: Sequence[Tensor], shape: Shape) -> tuple[Tensor | None, list[Tensor]]:
        sides = _sides(factors)
        return sides[0].new_ones(sides[0].shape[1]), sides

    def from_tensorly(self, first: Tensor | None, factors: Sequence[Tensor], shape: Shape) -> list[Tensor]:
        outer, inner, *spatial = factors
        in_order = [inner.mT, *(s.mT for s in spatial), outer if first is None else outer * first]
        return [f.reshape(op.kernel) for f, op in zip(in_order, self.chain(shape, [outer.shape[1]]), strict=True)]

    def unfoldings(self, weight: Tensor, modes: Modes) -> list[tuple[int, Tensor]]:
        tensor = weight.reshape(self.sides(weight.shape))
        return [(0, tensor.movedim(k, 0).flatten(1)) for k in range(tensor.ndim)]

    def mixable(self, shape: Shape, modes: Modes) -> list[tuple[int, ...]]:
        kernel = [tuple(1 + axis for axis in group) for group in self.groups(shape)]
        return [(0,), *kernel]

    def spectra(self, weight: Tensor, modes: Modes) -> list[tuple[int, Tensor]]:
        # ranks of the unfoldings are far below those at which a CP is near: what its start loses says more
        return [(0, start_values(weight.reshape(self.sides(weight.shape))))]

    def project_many(self, weights: Tensor, ranks: Sequence[int], modes: Modes) -> Tensor:
        shape, factors = weights.shape[1:], self._factors(weights, ranks)
        return torch.stack([_sum_of_products(list(one), shape) for one in zip(*factors, strict=True)]).to(weights.dtype)

    def _factors(self, weights: Tensor, ranks: Sequence[int], near: Sequence[Tensor] | None = None) -> list[Tensor]:
        """Weights (B, O, I, K..) -> (B, n, R) for O, I and each depthwise op, float64."""
        return factorize(weights.reshape(len(weights), *self.sides(weights.shape[1:])), ranks[0], near)


def _sides(kernels: Sequence[Tensor]) -> list[Tensor]:
    """Kernels of the ops -> (n, R) for O, I and each depthwise op."""
    inner, *spatial, outer = (f.flatten(1) for f in kernels)
    return [outer, inner.mT, *(s.mT for s in spatial)]


def _sum_of_products(factors: list[Tensor], shape: Shape) -> Tensor:
    """(n_k, R) each -> their sum of outer products, as a weight."""
    first, *rest = factors
    # components may cancel: they must not overflow on the way to a sum that does not
    top = first.detach().abs().amax().clamp_min(torch.finfo(first.dtype).tiny)
    return ((first / top) @ khatri_rao([f[None] for f in rest])[0].mT * top).reshape(tuple(shape))


CONV, CONV_TRANSPOSED = CP(), CP(transposed=True)
JOINT, JOINT_TRANSPOSED = CP(joint=True), CP(joint=True, transposed=True)
