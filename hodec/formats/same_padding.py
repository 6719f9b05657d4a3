"""Convolutions with TensorFlow's "same" padding: as many output positions as steps of the stride fit into the input."""

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from hodec.formats.one_node import OneNode

# The padding of such a layer, by its name in ONNX: where the zeros are an odd number, the last one is at the end.
SAME_UPPER = "same_upper"


def same_sides(
    sizes: Sequence[int], kernel: Sequence[int], stride: Sequence[int], dilation: Sequence[int]
) -> list[tuple[int, int]]:
    """Zeros before and after, per axis, with which the output has ceil(size / stride) positions."""
    sides = []
    for n, k, s, d in zip(sizes, kernel, stride, dilation, strict=True):
        total = max(0, (-(-n // s) - 1) * s + d * (k - 1) + 1 - n)
        sides.append((total // 2, total - total // 2))
    return sides


def padding_sides(
    padding: str | Sequence[int],
    sizes: Sequence[int],
    kernel: Sequence[int],
    stride: Sequence[int],
    dilation: Sequence[int],
) -> list[tuple[int, int]]:
    """Zeros (or other padding) before and after, per axis, of a convolution that is not transposed."""
    if padding == SAME_UPPER:
        return same_sides(sizes, kernel, stride, dilation)
    if padding == "valid":
        return [(0, 0) for _ in kernel]
    if padding == "same":
        total = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
        return [(n // 2, n - n // 2) for n in total]
    return [(int(n), int(n)) for n in padding]


class _Same(OneNode, nn.modules.conv._ConvNd):
    """Put before the class of a convolution without padding of its own; ``padding`` reads ``same_upper``."""

    def __init__(self, *sizes: int, padding: str = SAME_UPPER, **settings: object) -> None:
        super().__init__(*sizes, **settings)  # type: ignore[arg-type]
        self.padding = padding

    def forward(self, x: Tensor) -> Tensor:
        """(N, I, ..) -> (N, O, ..)."""
        dims = len(self.kernel_size)
        sides = same_sides(x.shape[-dims:], self.kernel_size, self.stride, self.dilation)
        x = F.pad(x, [n for side in reversed(sides) for n in side])
        zero = (0,) * dims
        convolve = (F.conv1d, F.conv2d, F.conv3d)[dims - 1]
        return convolve(x, self.weight, self.bias, self.stride, zero, self.dilation, self.groups)


class SameConv1d(_Same, nn.Conv1d):
    """``nn.Conv1d`` with TensorFlow's "same" padding."""


class SameConv2d(_Same, nn.Conv2d):
    """``nn.Conv2d`` with TensorFlow's "same" padding."""


class SameConv3d(_Same, nn.Conv3d):
    """``nn.Conv3d`` with TensorFlow's "same" padding."""


SAME_CONVS: dict[str, type[nn.Module]] = {"conv1d": SameConv1d, "conv2d": SameConv2d, "conv3d": SameConv3d}
