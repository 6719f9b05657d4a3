"""Layers that are a short chain of convolutions or linear maps, one parameter a stage."""

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hodec.formats.staged import StagedFormat
from hodec.layers.conv import FactorizedConv
from hodec.layers.linear import FactorizedLinear


class StagedConv(FactorizedConv):
    """A convolution as the stages its form lists; they are stored as they run."""

    format: ClassVar[StagedFormat]

    def build_factors(self, *, device: Any, dtype: Any) -> None:
        self.stages = self.format.stages(self.shape, self.ranks)
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


class StagedLinear(FactorizedLinear):
    """A linear layer as a product of small ones, input side first."""

    format: ClassVar[StagedFormat]

    def build_factors(self, *, device: Any, dtype: Any) -> None:
        self.kernels = nn.ParameterList(
            nn.Parameter(torch.empty(stage.kernel, device=device, dtype=dtype))
            for stage in self.format.stages(self.shape, self.ranks)
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
