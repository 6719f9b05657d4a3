"""The classical tensor train of a convolution: kernel core first, then paired channel modes.

It stores few numbers but costs more multiply-adds than the dense layer at useful ranks; it is the baseline that
HODEC's order is measured against.
"""

import math
from collections.abc import Sequence

from torch import Tensor

from hodec.formats.base import Shape
from hodec.formats.calls import CallSites
from hodec.formats.modes import Modes
from hodec.formats.tt import TTForm


class ClassicalTTConv(TTForm):
    """Order (K_h*K_w, I_1 O_1, .., I_d O_d).

    Source: Garipov, Podoprikhin, Novikov, Vetrov, Ultimate Tensorization, arXiv 1611.03214, 2016: section 3.
    """

    executions = ("chain",)

    def tensor_shape(self, shape: Shape, modes: Modes) -> tuple[int, ...]:
        pairs = (i * o for i, o in zip(modes.inputs, modes.outputs, strict=True))
        return (math.prod(shape[2:]), *pairs)

    def tensorize(self, weights: Tensor, modes: Modes) -> Tensor:
        d, kernel = len(modes.inputs), math.prod(weights.shape[3:])
        split = weights.reshape(len(weights), *modes.outputs, *modes.inputs, kernel)
        paired = split.permute(0, 2 * d + 1, *(axis for k in range(1, d + 1) for axis in (d + k, k)))
        return paired.reshape(len(weights), *self.tensor_shape(weights.shape[1:], modes))

    def to_weight(self, tensors: Tensor, shape: Shape, modes: Modes) -> Tensor:
        d = len(modes.inputs)
        pairs = [n for pair in zip(modes.inputs, modes.outputs, strict=True) for n in pair]
        split = tensors.reshape(len(tensors), math.prod(shape[2:]), *pairs)
        order = (0, *range(3, 2 * d + 2, 2), *range(2, 2 * d + 2, 2), 1)
        return split.permute(*order).reshape(len(tensors), *shape)

    def macs(self, shape: Shape, ranks: Sequence[int], modes: Modes, *, call_sites: CallSites, execution: str) -> int:
        r = (*ranks, 1)
        channels = sum(
            math.prod(modes.outputs[:k]) * r[k] * i * o * r[k + 1] * math.prod(modes.inputs[k + 1 :])
            for k, (i, o) in enumerate(zip(modes.inputs, modes.outputs, strict=True))
        )
        return call_sites.out_positions * (math.prod(shape[2:]) * r[0] * shape[1] + channels)


CONV = ClassicalTTConv()
