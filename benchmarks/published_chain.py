"""The published way to run a tensor-train convolution, kept for comparison: one small product a mode, in its order.

Input modes are contracted one by one, the last first, each as a matrix product that leaves the new rank in front and is
turned back; then comes the convolution at the inner ranks; then the output modes, likewise. Nothing is merged.

Source: Yin, Sui, Yang, Zang, Gong, Yuan, HODEC, CVPR 2022: order of contractions of the released layer.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hodec.formats import tt
from hodec.formats.modes import Modes


class PublishedChain(nn.Module):
    """A convolution whose weight is a tensor train over (O_1..O_d, K*K, I_1..I_d); random cores.

    Args:
        conv: the dense layer to stand in for; only its sizes are read.
        ranks: as of hodec's tensor-train layer, ordered from the input side: (I_1, .., middle, .., O_d).
        modes: how its channels split.
    """

    def __init__(self, conv: Any, ranks: Sequence[int], modes: Modes) -> None:
        super().__init__()
        d, r = len(modes.inputs), (1, *ranks, 1)
        self.stride, self.padding, self.out_channels = conv.stride, conv.padding, conv.out_channels
        # the same ranks counted from the output side, as the train runs the other way round
        self.in_cores = nn.ParameterList(
            _random(r[d - j], n, r[d - j - 1]) for j, n in enumerate(reversed(modes.inputs))
        )
        self.kernel = _random(r[d + 1], r[d], *conv.kernel_size)
        self.out_cores = nn.ParameterList(
            _random(r[2 * d + 1 - j], n, r[2 * d - j]) for j, n in enumerate(reversed(modes.outputs))
        )

    def forward(self, x: Tensor) -> Tensor:
        """(N, I, H, W) -> (N, O, H', W')."""
        batch, _, height, width = x.shape
        y = x.movedim(1, -1)
        for core in reversed(self.in_cores):
            y = (core.flatten(1) @ y.reshape(-1, core.shape[1] * core.shape[2]).T).T
        y = y.reshape(batch, height, width, -1).movedim(-1, 1)
        y = F.conv2d(y, self.kernel, None, self.stride, self.padding)
        height, width = y.shape[2:]
        y = y.movedim(1, -1)
        for core in reversed(self.out_cores):
            y = (core.flatten(0, 1) @ y.reshape(-1, core.shape[2]).T).reshape(core.shape[0], -1).T
        return y.reshape(self.out_channels, batch, height, width).movedim(0, 1)

    def dense_weight(self) -> Tensor:
        """The weight that this applies, (O, I, K, K)."""
        middle = self.kernel.flatten(2).transpose(1, 2)
        dense = tt.reconstruct([*self.out_cores, middle, *self.in_cores])
        return dense.reshape(self.out_channels, *self.kernel.shape[2:], -1).movedim(-1, 1)


def _random(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(shape) / (shape[1] * shape[-1]) ** 0.5)
