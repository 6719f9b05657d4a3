"""What a convolution's settings mean to a factorized one: kept in one place for every method and dimension."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hodec.formats.layer_types import LAYER_TYPES, LayerType
from hodec.formats.modes import Modes
from hodec.layers.base import FactorizedLayer

CONV: dict[int, Callable[..., Tensor]] = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
CONV_TRANSPOSE: dict[int, Callable[..., Tensor]] = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}


class FactorizedConv(FactorizedLayer):
    """Base of the factorized convolutions; input (N, I, ..) or (I, ..), output (N, O, ..) or (O, ..).

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, padding_mode, output_padding: as in
            torch's layer of the same kind.
        ranks: the format's ranks.
        modes: how channels split; by default evenly into two modes a side.
        bias: whether there is a bias.
        execution: how inference runs, one of ``form.executions``; by default the first.
    """

    layer_type: ClassVar[LayerType] = LAYER_TYPES["conv2d"]

    def __init__(  # noqa: PLR0913
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | Sequence[int],
        *,
        ranks: Sequence[int],
        modes: Modes | None = None,
        stride: int | Sequence[int] = 1,
        padding: int | Sequence[int] | str = 0,
        dilation: int | Sequence[int] = 1,
        output_padding: int | Sequence[int] = 0,
        bias: bool = True,
        padding_mode: str = "zeros",
        execution: str = "",
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        kernel = self._each_axis(kernel_size)
        super().__init__((out_channels, in_channels, *kernel), ranks=ranks, modes=modes, execution=execution)
        self.in_channels, self.out_channels = in_channels, out_channels
        self.kernel_size, self.stride, self.dilation = kernel, self._each_axis(stride), self._each_axis(dilation)
        self.padding = padding if isinstance(padding, str) else self._each_axis(padding)
        self.output_padding, self.padding_mode = self._each_axis(output_padding), padding_mode
        self.build_factors(device=device, dtype=dtype)
        self.bias = nn.Parameter(torch.zeros(out_channels, device=device, dtype=dtype)) if bias else None
        self.reset_parameters()

    @classmethod
    def like(
        cls, module: Any, ranks: Sequence[int], *, modes: Modes | None = None, execution: str = ""
    ) -> "FactorizedConv":
        return cls(
            module.in_channels,
            module.out_channels,
            module.kernel_size,
            ranks=ranks,
            modes=modes,
            stride=module.stride,
            padding=module.padding,
            dilation=module.dilation,
            output_padding=module.output_padding,
            bias=module.bias is not None,
            padding_mode=module.padding_mode,
            execution=execution,
            device=module.weight.device,
            dtype=module.weight.dtype,
        )

    def build_factors(self, *, device: Any, dtype: Any) -> None:
        """Create the parameters that hold the factors, uninitialized."""
        raise NotImplementedError

    def pointwise(self, x: Tensor, matrix: Tensor, bias: Tensor | None = None) -> Tensor:
        """A 1x1 convolution by a matrix (out, in)."""
        return CONV[self.layer_type.dims](x, matrix.reshape(*matrix.shape[:2], *(1 for _ in self.kernel_size)), bias)

    def spatial_conv(self, x: Tensor, kernel: Tensor, axes: Iterable[int] | None = None) -> Tensor:
        """The step that moves along ``axes`` (by default all), with their stride, padding and dilation.

        ``kernel`` is (out, in / groups, K_1, ..), with sides of 1 along the other axes; the number of groups follows
        from its second side.
        """
        moving = set(range(self.layer_type.dims) if axes is None else axes)
        groups = x.shape[-1 - self.layer_type.dims] // kernel.shape[1]
        stride = self._along(moving, self.stride, 1)
        dilation = self._along(moving, self.dilation, 1)
        if self.layer_type.transposed:
            padding = self._along(moving, self.padding, 0)
            extra = self._along(moving, self.output_padding, 0)
            stored = kernel if groups > 1 else kernel.transpose(0, 1)  # grouped ones are depthwise: (r, 1, ..)
            return CONV_TRANSPOSE[self.layer_type.dims](x, stored, None, stride, padding, extra, groups, dilation)
        sides = [side if axis in moving else (0, 0) for axis, side in enumerate(self._sides())]
        padding = [left for left, _ in sides]
        if self.padding_mode != "zeros" or any(left != right for left, right in sides):
            amounts = [n for side in reversed(sides) for n in side]
            mode = "constant" if self.padding_mode == "zeros" else self.padding_mode
            x, padding = F.pad(x, amounts, mode=mode), [0] * self.layer_type.dims
        return CONV[self.layer_type.dims](x, kernel, None, stride, padding, dilation, groups)

    def _sides(self) -> list[tuple[int, int]]:
        """Padding before and after, per axis."""
        if self.padding == "valid":
            return [(0, 0)] * self.layer_type.dims
        if self.padding == "same":
            total = [d * (k - 1) for d, k in zip(self.dilation, self.kernel_size, strict=True)]
            return [(n // 2, n - n // 2) for n in total]
        return [(int(n), int(n)) for n in self.padding]

    @staticmethod
    def _along(moving: set[int], values: Any, still: int) -> list[int]:
        return [int(value) if axis in moving else still for axis, value in enumerate(values)]

    def add_bias(self, y: Tensor) -> Tensor:
        """Add the bias along the channel axis."""
        return y if self.bias is None else y + self.bias.reshape(-1, *(1 for _ in self.kernel_size))

    def extra_repr(self) -> str:
        parts = [super().extra_repr()]
        zero, one = (0,) * self.layer_type.dims, (1,) * self.layer_type.dims
        defaults = {"stride": one, "padding": zero, "output_padding": zero, "dilation": one, "padding_mode": "zeros"}
        parts += [f"{k}={getattr(self, k)}" for k, v in defaults.items() if getattr(self, k) != v]
        return ", ".join(parts if self.bias is not None else [*parts, "bias=False"])

    @classmethod
    def _each_axis(cls, value: int | Sequence[int]) -> tuple[int, ...]:
        return (value,) * cls.layer_type.dims if isinstance(value, int) else tuple(int(n) for n in value)
