"""What a convolution's settings mean to a factorized one: kept in one place for every method."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hodec.formats.modes import Modes
from hodec.layers.base import FactorizedLayer


class FactorizedConv2d(FactorizedLayer):
    """Base of the factorized 2-d convolutions; input (N, I, H, W), output (N, O, H', W').

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, padding_mode: as in ``nn.Conv2d``.
        ranks: the format's ranks.
        modes: how channels split; by default evenly into two modes a side.
        bias: whether there is a bias.
        execution: how inference runs, one of ``form.executions``; by default the first.
    """

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
        bias: bool = True,
        padding_mode: str = "zeros",
        execution: str = "",
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        kernel = _pair(kernel_size)
        super().__init__(
            (out_channels, in_channels, *kernel), ranks=ranks, modes=modes, execution=execution
        )
        self.in_channels, self.out_channels = in_channels, out_channels
        self.kernel_size, self.stride, self.dilation = kernel, _pair(stride), _pair(dilation)
        self.padding = padding if isinstance(padding, str) else _pair(padding)
        self.padding_mode = padding_mode
        self.build_factors(device=device, dtype=dtype)
        self.bias = nn.Parameter(torch.zeros(out_channels, device=device, dtype=dtype)) if bias else None
        self.reset_parameters()

    def build_factors(self, *, device: Any, dtype: Any) -> None:
        """Create the parameters that hold the factors, uninitialized."""
        raise NotImplementedError

    @classmethod
    def like(
        cls, module: Any, ranks: Sequence[int], *, modes: Modes | None = None, execution: str = ""
    ) -> "FactorizedConv2d":
        return cls(
            module.in_channels,
            module.out_channels,
            module.kernel_size,
            ranks=ranks,
            modes=modes,
            stride=module.stride,
            padding=module.padding,
            dilation=module.dilation,
            bias=module.bias is not None,
            padding_mode=module.padding_mode,
            execution=execution,
            device=module.weight.device,
            dtype=module.weight.dtype,
        )

    def spatial_conv(self, x: Tensor, kernel: Tensor, groups: int = 1) -> Tensor:
        """The step that carries stride, padding and dilation; ``kernel`` (out, in / groups, K_h, K_w)."""
        padding: Any = self.padding
        if self.padding_mode != "zeros":
            x, padding = F.pad(x, self._pad_amounts(), mode=self.padding_mode), 0
        return F.conv2d(x, kernel, None, self.stride, padding, self.dilation, groups)

    def _pad_amounts(self) -> list[int]:
        """Padding as F.pad wants it: (left, right, top, bottom)."""
        if self.padding == "valid":
            return [0, 0, 0, 0]
        if self.padding == "same":
            total = [d * (k - 1) for d, k in zip(self.dilation, self.kernel_size, strict=True)]
            return [total[1] // 2, total[1] - total[1] // 2, total[0] // 2, total[0] - total[0] // 2]
        rows, cols = (int(n) for n in self.padding)
        return [cols, cols, rows, rows]

    def add_bias(self, y: Tensor) -> Tensor:
        """Add the bias along the channel axis."""
        return y if self.bias is None else y + self.bias[:, None, None]

    def extra_repr(self) -> str:
        parts = [super().extra_repr()]
        defaults = {"stride": (1, 1), "padding": (0, 0), "dilation": (1, 1), "padding_mode": "zeros"}
        parts += [f"{k}={getattr(self, k)}" for k, v in defaults.items() if getattr(self, k) != v]
        return ", ".join(parts if self.bias is not None else [*parts, "bias=False"])


def _pair(value: int | Sequence[int]) -> tuple[int, int]:
    if isinstance(value, int):
        return value, value
    first, second = value
    return int(first), int(second)
