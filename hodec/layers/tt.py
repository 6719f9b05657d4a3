"""Layers stored as tensor trains: contract-in, convolution, contract-out; and linear layers with paired cores."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hodec.formats import tt
from hodec.formats.layer_types import LAYER_TYPES
from hodec.layers.conv import FactorizedConv
from hodec.layers.linear import FactorizedLinear


class TTConv(FactorizedConv):
    """Convolution whose weight is a tensor train over (I_1..I_d, K_1*K_2*.., O_1..O_d).

    Two executions of the same parameters, equal to rounding: ``chain`` contracts the input channels mode by
    mode, convolves at the inner ranks, and expands the output channels mode by mode; ``merged`` first contracts
    the cores of each side with each other, weights only, and runs 1x1, K x K and 1x1 convolutions.

    Source: Yin et al., HODEC, CVPR 2022 (chain).
    """

    def build_factors(self, *, device: Any, dtype: Any) -> None:
        d, r = len(self.modes.inputs), (1, *self.ranks, 1)

        def empty(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(shape, device=device, dtype=dtype))

        self.in_cores = nn.ParameterList(empty(r[j], n, r[j + 1]) for j, n in enumerate(self.modes.inputs))
        self.kernel = empty(r[d + 1], r[d], *self.kernel_size)
        self.out_cores = nn.ParameterList(
            empty(r[d + 1 + j], n, r[d + 2 + j]) for j, n in enumerate(self.modes.outputs)
        )

    def factors(self) -> list[Tensor]:
        kernel = torch.einsum("tr...->r...t", self.kernel).flatten(1, -2)
        return [*self.in_cores, kernel, *self.out_cores]

    @torch.no_grad()  # not through .data: the remembered merge must see the change
    def load_factors(self, factors: Sequence[Tensor]) -> None:
        d = len(self.in_cores)
        for mine, given in zip(self.in_cores, factors[:d], strict=True):
            mine.copy_(given)
        kernel = factors[d].unflatten(1, self.kernel_size)
        self.kernel.copy_(torch.einsum("r...t->tr...", kernel))
        for mine, given in zip(self.out_cores, factors[d + 1 :], strict=True):
            mine.copy_(given)

    def merged_sides(self) -> tuple[Tensor, Tensor]:
        """Both contraction chains as matrices: contract-in (r_d, I) and contract-out (O, r_{d+1})."""
        inner = self.in_cores[0]
        for core in list(self.in_cores)[1:]:
            inner = torch.einsum("aib,bjc->aijc", inner, core).flatten(1, 2)
        outer = self.out_cores[0]
        for core in list(self.out_cores)[1:]:
            outer = torch.einsum("aib,bjc->aijc", outer, core).flatten(1, 2)
        return inner[0].mT, outer[..., 0].mT

    def forward(self, x: Tensor) -> Tensor:
        """(N, I, ..) -> (N, O, ..)."""
        return self._chain(x) if self.running_execution() == "chain" else self._run_merged(x)

    def _run_merged(self, x: Tensor) -> Tensor:
        inner, outer = self.once_per_weights(self.merged_sides)
        y = self.spatial_conv(self.pointwise(x, inner), self.kernel)
        return self.pointwise(y, outer, self.bias)

    def _chain(self, x: Tensor) -> Tensor:
        batched = x if x.ndim == self.layer_type.dims + 2 else x.unsqueeze(0)
        y = batched.unflatten(1, (1, *self.modes.inputs))  # n 1 i1..id h w
        for core in self.in_cores:
            y = torch.einsum("nri...,ris->ns...", y, core)  # n s i2..id h w
        y = self.spatial_conv(y, self.kernel).unsqueeze(1)  # n 1 t h' w'
        for core in self.out_cores:
            y = torch.einsum("np...t,tou->npou...", y.movedim(2, -1), core).flatten(1, 2)
        y = self.add_bias(y.squeeze(2))  # n o h' w'
        return y if x.ndim == self.layer_type.dims + 2 else y.squeeze(0)


class TTConv1d(TTConv):
    """Tensor train of a ``nn.Conv1d``."""

    format, layer_type = tt.CONV, LAYER_TYPES["conv1d"]


class TTConv2d(TTConv):
    """Tensor train of a ``nn.Conv2d``."""

    format, layer_type = tt.CONV, LAYER_TYPES["conv2d"]


class TTConv3d(TTConv):
    """Tensor train of a ``nn.Conv3d``."""

    format, layer_type = tt.CONV, LAYER_TYPES["conv3d"]


class TTConvTranspose1d(TTConv):
    """Tensor train of a ``nn.ConvTranspose1d``."""

    format, layer_type = tt.CONV_TRANSPOSED, LAYER_TYPES["conv_transpose1d"]


class TTConvTranspose2d(TTConv):
    """Tensor train of a ``nn.ConvTranspose2d``."""

    format, layer_type = tt.CONV_TRANSPOSED, LAYER_TYPES["conv_transpose2d"]


class TTConvTranspose3d(TTConv):
    """Tensor train of a ``nn.ConvTranspose3d``."""

    format, layer_type = tt.CONV_TRANSPOSED, LAYER_TYPES["conv_transpose3d"]


class TTLinear(FactorizedLinear):
    """Linear layer whose weight (O, I) is a TT-matrix with paired cores (r, O_k, I_k, r').

    ``chain`` turns one input mode into one output mode at a time; ``merged`` rebuilds the weight once and uses
    it as a dense one (fewer parameters, the dense layer's multiply-adds).

    Source: Novikov, Podoprikhin, Osokin, Vetrov, Tensorizing Neural Networks, NeurIPS 2015: section 4.
    """

    format = tt.LINEAR

    def build_factors(self, *, device: Any, dtype: Any) -> None:
        r = (1, *self.ranks, 1)
        pairs = zip(self.modes.outputs, self.modes.inputs, strict=True)
        self.cores = nn.ParameterList(
            nn.Parameter(torch.empty(r[k], o, i, r[k + 1], device=device, dtype=dtype))
            for k, (o, i) in enumerate(pairs)
        )

    def factors(self) -> list[Tensor]:
        return [core.flatten(1, 2) for core in self.cores]

    @torch.no_grad()  # not through .data: the remembered merge must see the change
    def load_factors(self, factors: Sequence[Tensor]) -> None:
        for mine, given in zip(self.cores, factors, strict=True):
            mine.copy_(given.reshape(mine.shape))

    def forward(self, x: Tensor) -> Tensor:
        """(..., I) -> (..., O)."""
        if self.running_execution() == "merged":
            (weight,) = self.once_per_weights(lambda: (self.dense_weight(),))
            return F.linear(x, weight, self.bias)
        lead = x.shape[:-1]
        y = x.reshape(-1, 1, 1, *self.modes.inputs)  # n p r i1..id with p = 1 outputs so far, r = 1
        for core in self.cores:
            y = torch.einsum("npri...,rois->npos...", y, core).flatten(1, 2)
        y = y.reshape(*lead, self.out_features)
        return y if self.bias is None else y + self.bias
