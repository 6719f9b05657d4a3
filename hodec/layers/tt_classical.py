"""The classical TT convolution: the baseline that stores little and computes much."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from hodec.formats import tt_classical
from hodec.formats.layer_types import LAYER_TYPES
from hodec.layers.conv import FactorizedConv


class ClassicalTTConv(FactorizedConv):
    """Convolution whose weight is a tensor train over (K_h*K_w, I_1 O_1, .., I_d O_d).

    The kernel core convolves every input channel on its own; then each core turns one input mode into one
    output mode, while all remaining input modes and all finished output modes are carried along.

    Source: Garipov et al., Ultimate Tensorization, arXiv 1611.03214, 2016.
    """

    format = tt_classical.CONV

    def build_factors(self, *, device: Any, dtype: Any) -> None:
        r = (*self.ranks, 1)

        def empty(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(shape, device=device, dtype=dtype))

        self.kernel = empty(r[0], 1, *self.kernel_size)
        pairs = zip(self.modes.inputs, self.modes.outputs, strict=True)
        self.cores = nn.ParameterList(empty(r[k], i, o, r[k + 1]) for k, (i, o) in enumerate(pairs))

    def factors(self) -> list[Tensor]:
        kernel = torch.einsum("rk...->k...r", self.kernel).flatten(1, -2)  # k = 1
        return [kernel, *(core.flatten(1, 2) for core in self.cores)]

    @torch.no_grad()  # not through .data: the remembered merge must see the change
    def load_factors(self, factors: Sequence[Tensor]) -> None:
        kernel = factors[0].unflatten(1, self.kernel_size)
        self.kernel.copy_(torch.einsum("k...r->rk...", kernel))
        for mine, given in zip(self.cores, factors[1:], strict=True):
            mine.copy_(given.reshape(mine.shape))

    def forward(self, x: Tensor) -> Tensor:
        """(N, I, ..) -> (N, O, ..)."""
        dims = self.layer_type.dims
        batched = x if x.ndim == dims + 2 else x.unsqueeze(0)
        y = self.spatial_conv(batched.flatten(0, 1).unsqueeze(1), self.kernel)  # (n i) r h' w'
        y = y.unflatten(0, (batched.shape[0], 1, *self.modes.inputs))  # n 1 i1..id r h' w'
        y = y.movedim(-1 - dims, 2)  # n p r i1..id h' w', p = 1 outputs so far
        for core in self.cores:
            y = torch.einsum("npri...,rios->npos...", y, core).flatten(1, 2)
        y = self.add_bias(y.squeeze(2))
        return y if x.ndim == dims + 2 else y.squeeze(0)


class ClassicalTTConv1d(ClassicalTTConv):
    """Classical tensor train of a ``nn.Conv1d``."""

    layer_type = LAYER_TYPES["conv1d"]


class ClassicalTTConv2d(ClassicalTTConv):
    """Classical tensor train of a ``nn.Conv2d``."""

    layer_type = LAYER_TYPES["conv2d"]


class ClassicalTTConv3d(ClassicalTTConv):
    """Classical tensor train of a ``nn.Conv3d``."""

    layer_type = LAYER_TYPES["conv3d"]
