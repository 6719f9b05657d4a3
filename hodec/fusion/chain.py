"""Chains of contractions, mode by mode, out of plain convolutions and products: every reshape between them is free."""

from typing import Any

import torch
from torch import Tensor, nn

from hodec.layers.conv import CONV
from hodec.layers.tt import TTConv, TTLinear


class ChainConv(nn.Module):
    """``TTConv``'s chain for inference: each contraction is a 1x1 convolution on (N, ..) in the usual memory order.

    Contract-in joins the rank with the next mode as channels and lets the modes still to come lengthen the first
    spatial axis; contract-out moves the modes that are done into the batch.

    Args:
        layer: what it computes.
        middle: the K x K convolution at the inner ranks.
        scale, shift: per output channel, (O,); applied last. None: 1 and 0.
    """

    def __init__(self, layer: TTConv, middle: nn.Module, scale: Tensor | None, shift: Tensor | None) -> None:
        super().__init__()
        self.dims, self.modes = layer.layer_type.dims, layer.modes
        ones = [1] * self.dims
        inner = [core.detach().flatten(0, 1).mT for core in layer.in_cores]  # (s, r i)
        outer = [core.detach().permute(1, 2, 0).flatten(0, 1) for core in layer.out_cores]  # (o u, t)
        self.inner = _frozen([m.reshape(*m.shape, *ones) for m in inner])
        self.outer = _frozen([m.reshape(*m.shape, *ones) for m in outer])
        self.middle = middle
        per_channel = (-1, *ones)
        self.scale = None if scale is None else nn.Parameter(scale.reshape(per_channel), requires_grad=False)
        self.shift = None if shift is None else nn.Parameter(shift.reshape(per_channel), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        """(N, I, ..) -> (N, O, ..)."""
        batch, conv, spatial = x.shape[0], CONV[self.dims], x.shape[2:]
        y, rank = x, 1
        for weight, mode in zip(self.inner, self.modes.inputs, strict=True):
            y = conv(y.reshape(batch, rank * mode, -1, *spatial[1:]), weight)
            rank = weight.shape[0]
        y = self.middle(y)
        spatial = y.shape[2:]
        for weight, mode in zip(self.outer, self.modes.outputs, strict=True):
            y = conv(y, weight)
            y = y.reshape(-1, weight.shape[0] // mode, *spatial)
        y = y.reshape(batch, -1, *spatial)
        y = y if self.scale is None else y * self.scale
        return y if self.shift is None else y + self.shift


class ChainLinear(nn.Module):
    """``TTLinear``'s chain for inference: each core is one matrix product.

    Args:
        layer: what it computes.
        scale, shift: per output feature, (O,); applied last. None: 1 and 0.
    """

    def __init__(self, layer: TTLinear, scale: Tensor | None, shift: Tensor | None) -> None:
        super().__init__()
        self.modes, self.out_features = layer.modes, layer.out_features
        cores = (core.detach() for core in layer.cores)  # (r, o, i, s) -> (o s, r i)
        self.cores = _frozen([c.permute(1, 3, 0, 2).reshape(c.shape[1] * c.shape[3], -1) for c in cores])
        self.scale = None if scale is None else nn.Parameter(scale, requires_grad=False)
        self.shift = None if shift is None else nn.Parameter(shift, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        """(..., I) -> (..., O)."""
        y, rest = x.reshape(-1, x.shape[-1]), x.shape[-1]
        for core, mode in zip(self.cores, self.modes.inputs, strict=True):
            rest //= mode
            y = torch.matmul(core, y.reshape(-1, core.shape[1], rest))  # finished output modes join the rows
        y = y.reshape(*x.shape[:-1], self.out_features)
        y = y if self.scale is None else y * self.scale
        return y if self.shift is None else y + self.shift


def _frozen(tensors: list[Any]) -> nn.ParameterList:
    return nn.ParameterList(nn.Parameter(t.clone().contiguous(), requires_grad=False) for t in tensors)
