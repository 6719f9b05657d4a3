"""The classical tensor train of a convolution: kernel core first, then paired channel modes.

It stores few elements but costs more multiply-adds than the dense layer at useful ranks; it is the baseline that
HODEC's order is measured against.
"""

import math
from collections.abc import Sequence

from torch import Tensor

from hodec.formats.modes import Modes
from hodec.formats.ops import Op, Shape, spatial_axes
from hodec.formats.tt import TTFormat, paired_ops


class ClassicalTTConv(TTFormat):
    """Order (K_h*K_w, I_1 O_1, .., I_d O_d).

    The kernel's core convolves every input channel on its own; then each core turns one input mode into one output
    mode.

    Source: Garipov, Podoprikhin, Novikov, Vetrov, Ultimate Tensorization, arXiv 1611.03214, 2016: section 3.
    """

    executions = ("chain",)
    in_graphs = False  # it convolves while input modes are pending, which takes a transposition

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

    def ops(self, shape: Shape, ranks: Sequence[int], modes: Modes, *, execution: str) -> list[Op]:
        out, inp, *kernel = shape
        convolution = Op((ranks[0], 1, *kernel), spatial_axes(shape), pending=inp)
        return [convolution, *paired_ops(shape, (*ranks, 1), modes)]

    def core(self, factor: Tensor, op: Op) -> Tensor:
        # the modes are paired (I_k, O_k)
        return (factor if factor.ndim == 4 else factor.unflatten(1, (op.takes, op.gives))).transpose(1, 2)


CONV = ClassicalTTConv()
