"""FactorizedConv: the settings of a convolution, and its ops as torch runs them, for every format and dimension."""

from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Unpack

import torch.nn.functional as F
from torch import Tensor, nn

from hodec.formats.layer_types import LAYER_TYPES, LayerType
from hodec.formats.ops import Op
from hodec.formats.same_padding import SAME_CONVS, SAME_UPPER, padding_sides
from hodec.layers.base import FactorizedLayer, LayerOptions, added

CONV: dict[int, Callable[..., Tensor]] = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
CONV_TRANSPOSE: dict[int, Callable[..., Tensor]] = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}


class FactorizedConv(FactorizedLayer):
    """Base of the factorized convolutions; input (N, I, ..) or (I, ..), output (N, O, ..) or (O, ..).

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, padding_mode, output_padding: as in
            torch's layer of the same type; padding also ``same_upper``, which is TensorFlow's "same".
        options: see ``LayerOptions``.
    """

    layer_type: ClassVar[LayerType] = LAYER_TYPES["conv2d"]
    #: groups of the dense layer; see ``GroupedConv``
    groups: ClassVar[int] = 1
    #: whether the last op adds the bias; otherwise it is added to its output
    bias_inside: ClassVar[bool] = True
    settings = (
        "in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "output_padding",
        "padding_mode",
    )  # fmt: skip

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | Sequence[int],
        *,
        stride: int | Sequence[int] = 1,
        padding: int | Sequence[int] | str = 0,
        dilation: int | Sequence[int] = 1,
        output_padding: int | Sequence[int] = 0,
        padding_mode: str = "zeros",
        **options: Unpack[LayerOptions],
    ) -> None:
        kernel = self._each_axis(kernel_size)
        super().__init__((out_channels, in_channels // self.groups, *kernel), **options)
        self.in_channels, self.out_channels = in_channels, out_channels
        self.kernel_size, self.stride, self.dilation = kernel, self._each_axis(stride), self._each_axis(dilation)
        self.padding = padding if isinstance(padding, str) else self._each_axis(padding)
        self.output_padding, self.padding_mode = self._each_axis(output_padding), padding_mode

    def forward(self, x: Tensor) -> Tensor:
        """(N, I, ..) -> (N, O, ..)."""
        execution = self.running_execution()
        ops = self.ops[execution]
        if any(op.contracts for op in ops):
            return self._chain(x, ops)
        inside = self.bias if self.bias_inside else None
        biases = [*(None for _ in ops[1:]), inside]
        for op, kernel, bias in zip(ops, self.op_kernels(execution), biases, strict=True):
            x = self.convolve(x, op, kernel, bias)
        return x if self.bias_inside else self._add_bias(x)

    def dense_settings(self) -> dict[str, Any]:
        settings = {**super().dense_settings(), "groups": self.groups}
        return settings if self.layer_type.transposed else {k: v for k, v in settings.items() if k != "output_padding"}

    def dense_maker(self) -> Callable[..., nn.Module]:
        same = self.padding == SAME_UPPER
        return SAME_CONVS[self.layer_type.name] if same else super().dense_maker()

    def _chain(self, x: Tensor, ops: Sequence[Op]) -> Tensor:
        dims = self.layer_type.dims
        batched = x if x.ndim == dims + 2 else x.unsqueeze(0)
        y = batched.unflatten(1, (1, 1, *self.modes.inputs))  # n p r i1 .. id h w, with p outputs done, rank r
        for op, view in zip(ops, self.views(), strict=True):
            y = self.contract(y, op, view) if op.contracts else self._move(y, op, self.format.kernel(view, op))
        y = self._add_bias(y.squeeze(2))
        return y if x.ndim == dims + 2 else y.squeeze(0)

    def _move(self, y: Tensor, op: Op, kernel: Tensor) -> Tensor:
        """A convolution amid a chain: (n, p, r, i, .., h, w) -> (n, p, s, i, .., h', w')."""
        last = -1 - self.layer_type.dims
        y = y.movedim(2, last)
        z: Tensor = self.convolve(y.flatten(0, last - 1), op, kernel).unflatten(0, y.shape[:last])
        return z.movedim(last, 2)

    def convolve(self, x: Tensor, op: Op, kernel: Tensor, bias: Tensor | None = None) -> Tensor:
        """One op, with the layer's stride, padding and dilation along the axes that it moves along."""
        dims, axes = self.layer_type.dims, op.axes
        stride = self._along(axes, self.stride, 1)
        dilation = self._along(axes, self.dilation, 1)
        if self.layer_type.transposed and axes:
            padding = self._along(axes, [int(n) for n in self.padding], 0)
            extra = self._along(axes, self.output_padding, 0)
            stored = kernel if op.depthwise else kernel.transpose(0, 1)
            return CONV_TRANSPOSE[dims](x, stored, bias, stride, padding, extra, op.groups, dilation)
        padded = padding_sides(self.padding, x.shape[-dims:], self.kernel_size, self.stride, self.dilation)
        sides = [side if axis in axes else (0, 0) for axis, side in enumerate(padded)]
        padding = [left for left, _ in sides]
        if (axes and self.padding_mode != "zeros") or any(left != right for left, right in sides):
            amounts = [n for side in reversed(sides) for n in side]
            mode = "constant" if self.padding_mode == "zeros" else self.padding_mode
            x, padding = F.pad(x, amounts, mode=mode), [0] * dims
        return CONV[dims](x, kernel, bias, stride, padding, dilation, op.groups)

    def _add_bias(self, y: Tensor) -> Tensor:
        return added(y, None if self.bias is None else self.bias.reshape(-1, *(1 for _ in self.kernel_size)))

    @staticmethod
    def _along(axes: Sequence[int], values: Sequence[int], still: int) -> list[int]:
        return [value if axis in axes else still for axis, value in enumerate(values)]

    def extra_repr(self) -> str:
        parts = [super().extra_repr()]
        zero, one = (0,) * self.layer_type.dims, (1,) * self.layer_type.dims
        defaults: dict[str, object] = {"stride": one, "padding": zero, "output_padding": zero, "dilation": one}
        defaults |= {"padding_mode": "zeros", "groups": 1}
        parts += [f"{k}={getattr(self, k)}" for k, v in defaults.items() if getattr(self, k) != v]
        return ", ".join(parts if self.bias is not None else [*parts, "bias=False"])

    @classmethod
    def _each_axis(cls, value: int | Sequence[int]) -> tuple[int, ...]:
        return (value,) * cls.layer_type.dims if isinstance(value, int) else tuple(int(n) for n in value)
