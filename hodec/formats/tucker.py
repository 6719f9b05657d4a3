"""Tucker-2: both channel axes of a weight compressed, its spatial axes left as they are."""

import math
from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor

from hodec.formats.base import Ranks, channels_and_kernel
from hodec.formats.modes import Modes
from hodec.formats.ops import Op, Shape, pointwise, spatial_axes
from hodec.formats.staged import StagedFormat
from hodec.linalg.svd import leading_vectors, truncated_svd


class Tucker2(StagedFormat):
    """Ranks (in, out): 1x1 to ``in`` channels, K x K to ``out`` channels, 1x1 to the outputs.

    Truncation one side after the other, then one sweep of orthogonal iteration: a quasi-projection within sqrt(2) of
    the nearest point, and usually within a thousandth of what iterating to the end would give.

    Source: De Lathauwer, De Moor, Vandewalle, On the best rank-1 and rank-(R1,..,RN) approximation, SIAM J. Matrix
    Anal. Appl. 21(4), 2000; Kim et al., Compression of Deep CNNs for Fast and Low Power Mobile Applications, ICLR 2016.
    """

    orthogonal = True
    tensorly_type = "tucker"

    def chain(self, shape: Shape, ranks: Sequence[int]) -> list[Op]:
        (out, inp, *kernel), (r_in, r_out) = shape, ranks
        core = Op((r_out, r_in, *kernel), spatial_axes(shape))
        return [pointwise(r_in, inp, shape), core, pointwise(out, r_out, shape)]

    def max_ranks(self, shape: Shape, modes: Modes) -> Ranks:
        out, inp, *kernel = shape
        area = math.prod(kernel)
        return min(inp, out * area), min(out, inp * area)

    def fit_ranks(self, shape: Shape, modes: Modes, ranks: Sequence[int]) -> Ranks:
        area = math.prod(shape[2:])
        r_in, r_out = super().fit_ranks(shape, modes, ranks)
        r_out = min(r_out, r_in * area)
        return min(r_in, r_out * area), r_out

    def decompose(self, weight: Tensor, ranks: Sequence[int], modes: Modes) -> list[Tensor]:
        inner, core, outer = (part[0] for part in self._factor(weight[None], ranks))
        ones = [1] * (weight.ndim - 2)
        return [inner.mT.reshape(*inner.mT.shape, *ones), core, outer.reshape(*outer.shape, *ones)]

    def reconstruct(self, factors: Sequence[Tensor], shape: Shape, modes: Modes) -> Tensor:
        inner, core, outer = factors
        return self._expand(inner.flatten(1).mT[None], core[None], outer.flatten(1)[None])[0]

    def leading(self, factors: Sequence[Tensor], count: int, shape: Shape, modes: Modes) -> Tensor | None:
        inner, core, outer = factors
        rows = (outer[:count].flatten(1) @ core.flatten(1)).unflatten(1, core.shape[1:])
        one = torch.eye(len(rows), dtype=rows.dtype, device=rows.device)
        return self.reconstruct([inner, rows, one], shape, modes)

    def unfoldings(self, weight: Tensor, modes: Modes) -> list[tuple[int, Tensor]]:
        return [(0, weight.transpose(0, 1).flatten(1)), (1, weight.flatten(1))]

    def mixable(self, shape: Shape, modes: Modes) -> list[tuple[int, ...]]:
        return channels_and_kernel(shape)

    def to_tensorly(self, factors: Sequence[Tensor], shape: Shape) -> tuple[Tensor | None, list[Tensor]]:
        inner, core, outer = factors
        whole_axes = [torch.eye(n, dtype=core.dtype, device=core.device) for n in shape[2:]]
        return core, [outer.flatten(1), inner.flatten(1).mT, *whole_axes]

    def from_tensorly(self, first: Tensor | None, factors: Sequence[Tensor], shape: Shape) -> list[Tensor]:
        core, (outer, inner, *kernel) = cast(Tensor, first), factors
        for axis, factor in enumerate(kernel, start=2):
            core = torch.movedim(torch.tensordot(core, factor, dims=([axis], [1])), -1, axis)
        ones = [1] * len(kernel)
        return [inner.mT.reshape(*inner.mT.shape, *ones), core, outer.reshape(*outer.shape, *ones)]

    def project_many(self, weights: Tensor, ranks: Sequence[int], modes: Modes) -> Tensor:
        return self._expand(*self._factor(weights, ranks))

    def _factor(self, weights: Tensor, ranks: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
        """Weights (B, O, I, K..) -> inner (B, I, r_in), core (B, r_out, r_in, K..), outer (B, O, r_out)."""
        (r_in, r_out), (out, *rest) = ranks, weights.shape[1:]
        half = truncated_svd(weights.flatten(2), r_out)[1]
        inner = leading_vectors(_transposed(half.unflatten(2, rest)).flatten(2), r_in)
        del half  # of the largest kernels each of these is gigabytes
        half = inner.mT @ _transposed(weights).flatten(2)
        outer = leading_vectors(_transposed(half.unflatten(2, (out, *rest[1:]))).flatten(2), r_out)
        half = outer.mT @ weights.flatten(2)
        inner, core = truncated_svd(_transposed(half.unflatten(2, rest)).flatten(2), r_in)
        return inner, _transposed(core.unflatten(2, (r_out, *rest[1:]))).contiguous(), outer

    @staticmethod
    def _expand(inner: Tensor, core: Tensor, outer: Tensor) -> Tensor:
        """Inverse of ``_factor``: whole matrix products, with the kernel's axes last throughout."""
        half = inner @ _transposed(core).flatten(2)
        half = _transposed(half.unflatten(2, (core.shape[1], *core.shape[3:])))
        return cast(Tensor, (outer @ half.flatten(2)).unflatten(2, half.shape[2:]))


def _transposed(tensors: Tensor) -> Tensor:
    """(B, x, y, ..) -> (B, y, x, ..)."""
    return tensors.transpose(1, 2)


CONV, CONV_TRANSPOSED = Tucker2(), Tucker2(transposed=True)


def project(weight: Tensor, ranks: Sequence[int]) -> Tensor:
    """The quasi-nearest weight (O, I, K_1, ..) of these ranks, ordered (in, out).

    Raises:
        RankError: ranks of the wrong number or size.
    """
    modes = Modes.split(weight.shape[1], weight.shape[0], 1)
    return CONV.project(weight, CONV.check_ranks(weight.shape, modes, ranks), modes)
