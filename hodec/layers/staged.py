"""Layers that are a short chain of convolutions or linear maps, one parameter a stage."""

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hodec.formats.modes import Modes
from hodec.formats.staged import StagedForm
from hodec.kinds import KINDS
from hodec.layers.base import FactorizedLayer
from hodec.layers.conv import FactorizedConv


class StagedConv(FactorizedConv):
    """A convolution as the stages its form lists; they are stored as they run."""

    form: ClassVar[StagedForm]

    def build_factors(self, *, device: Any, dtype: Any) -> None:
        self.stages = self.form.stages(self.shape, self.ranks)
        self.kernels = nn.ParameterList(
            nn.Parameter(torch.empty(stage.kernel, device=device, dtype=dtype)) for stage in self.stages
        )

    def factors(self) -> list[Tensor]:
        return list(self.kernels)

    @torch.no_grad()
    def load_factors(self, factors: Sequence[Tensor]) -> None:
        for mine, given in zip(self.kernels, factors, strict=True):
            mine.copy_(given.reshape(mine.shape))

    def forward(self, x: Tensor) -> Tensor:
        """(N, I, ..) -> (N, O, ..)."""
        for stage, kernel in zip(self.stages, self.kernels, strict=True):
            x = self.spatial_conv(x, kernel, stage.axes)
        return self.add_bias(x)


class StagedLinear(FactorizedLayer):
    """A linear layer as a product of small ones, input side first."""

    form: ClassVar[StagedForm]
    kind = KINDS["linear"]

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        ranks: Sequence[int],
        modes: Modes | None = None,
        bias: bool = True,
        execution: str = "",
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__((out_features, in_features), ranks=ranks, modes=modes, execution=execution)
        self.in_features, self.out_features = in_features, out_features
        self.kernels = nn.ParameterList(
            nn.Parameter(torch.empty(stage.kernel, device=device, dtype=dtype))
            for stage in self.form.stages(self.shape, self.ranks)
        )
        self.bias = nn.Parameter(torch.zeros(out_features, device=device, dtype=dtype)) if bias else None
        self.reset_parameters()

    @classmethod
    def like(
        cls, module: Any, ranks: Sequence[int], *, modes: Modes | None = None, execution: str = ""
    ) -> "StagedLinear":
        return cls(
            module.in_features,
            module.out_features,
            ranks=ranks,
            modes=modes,
            bias=module.bias is not None,
            execution=execution,
            device=module.weight.device,
            dtype=module.weight.dtype,
        )

    def factors(self) -> list[Tensor]:
        return list(self.kernels)

    @torch.no_grad()
    def load_factors(self, factors: Sequence[Tensor]) -> None:
        for mine, given in zip(self.kernels, factors, strict=True):
            mine.copy_(given)

    def forward(self, x: Tensor) -> Tensor:
        """(..., I) -> (..., O)."""
        *first, last = self.kernels
        for kernel in first:
            x = F.linear(x, kernel)
        return F.linear(x, last, self.bias)
