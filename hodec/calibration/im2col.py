"""im2col: the patches of a layer's input that its weight is multiplied by, one for each output position."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from hodec.formats.layer_types import LayerType
from hodec.formats.same_padding import padding_sides

# Numbers unfolded at a time: 2^24 float64 take 128 MiB.
CHUNK = 2**24


@dataclass(frozen=True)
class Draw:
    """Which output positions to look at: at most ``positions`` an image, drawn from ``generator``; None for all."""

    positions: int | None
    generator: torch.Generator

    def of(self, sizes: Sequence[int]) -> tuple[Tensor, ...] | None:
        """Indices along each axis, or None where all are wanted."""
        total = math.prod(sizes)
        if self.positions is None or self.positions >= total:
            return None
        drawn = torch.randperm(total, generator=self.generator)[: self.positions]
        return torch.unravel_index(drawn, tuple(sizes))


def patches(module: nn.Module, layer_type: LayerType, x: Tensor, draw: Draw | None = None) -> Iterator[Tensor]:
    """Everything the weight (O, I, K_1, ..) meets in one call, in chunks (M, I, K_1, ..) of some whole images.

    Summed over I and K, weight times patch is the output at one position, bias left out. What padding adds and what a
    transposed convolution does not reach is there too, as zeros. Where positions are drawn, patches are scaled so that
    sums of squares stand for all positions.

    Args:
        module: a convolution (transposed or not) or a linear layer; for embeddings see ``token_counts``.
        layer_type: its type.
        x: its input as it is called with, with or without a batch axis.
        draw: which positions of a convolution, by default all; the same for all images of a chunk.
    """
    if not layer_type.dims:
        yield x.reshape(-1, x.shape[-1])
        return
    conv, unfold = cast(_ConvNd, module), _unfolded_transposed if layer_type.transposed else _unfolded
    batch = x if x.ndim == layer_type.dims + 2 else x.unsqueeze(0)
    area = math.prod(conv.kernel_size) * (math.prod(conv.stride) if layer_type.transposed else 1)
    images = max(1, CHUNK // max(1, batch[0].numel() * area))
    for chunk in torch.split(batch, images):
        yield unfold(conv, chunk, draw)


def token_counts(module: nn.Embedding, tokens: Tensor) -> Tensor:
    """How often an embedding looks up each of its entries, (entries,) float64."""
    return tokens.flatten().bincount(minlength=module.num_embeddings).double()


def _unfolded(module: _ConvNd, x: Tensor, draw: Draw | None) -> Tensor:
    """(N, I, ..) -> (positions, I, K..) of a convolution."""
    mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
    sides = padding_sides(module.padding, x.shape[2:], module.kernel_size, module.stride, module.dilation)
    amounts = [n for side in reversed(sides) for n in side]
    padded = F.pad(x, amounts, mode=mode) if any(amounts) else x
    return _gathered(windows(padded, module.kernel_size, module.stride, module.dilation), len(module.stride), draw)


def _unfolded_transposed(module: _ConvNd, x: Tensor, draw: Draw | None) -> Tensor:
    """(N, I, ..) -> (positions, I, K..) of a transposed convolution: a plain one over the input spread by its stride,
    with the kernel turned round.
    """
    spread = x.new_zeros(*x.shape[:2], *((n - 1) * s + 1 for n, s in zip(x.shape[2:], module.stride, strict=True)))
    spread[tuple(slice(None, None, step) for step in (1, 1, *module.stride))] = x
    sides = []
    paddings = cast(tuple[int, ...], module.padding)
    axes = zip(module.kernel_size, module.dilation, paddings, module.output_padding, strict=True)
    for size, dilation, padding, extra in axes:
        reach = dilation * (size - 1) - padding  # negative ones cut off
        sides.append((reach, reach + extra))
    padded = F.pad(spread, [n for side in reversed(sides) for n in side])
    ones = (1,) * len(module.stride)
    turned = tuple(range(2, 2 + len(ones)))
    return _gathered(windows(padded, module.kernel_size, ones, module.dilation), len(ones), draw).flip(turned)


def windows(x: Tensor, kernel: Sequence[int], stride: Sequence[int], dilation: Sequence[int]) -> Tensor:
    """(N, I, ..) -> (N, I, positions.., K..), a view."""
    for axis, size in enumerate(kernel):
        reach = dilation[axis] * (size - 1) + 1
        x = x.unfold(2 + axis, reach, stride[axis])[..., :: dilation[axis]]
    return x


def _gathered(windows: Tensor, dims: int, draw: Draw | None) -> Tensor:
    """(N, I, positions.., K..) -> (M, I, K..)."""
    channels, sizes, kernel = windows.shape[1], windows.shape[2 : 2 + dims], windows.shape[2 + dims :]
    index = draw.of(sizes) if draw else None
    if index is None:
        return windows.movedim(1, 1 + dims).reshape(-1, channels, *kernel)
    places: tuple[slice | Tensor, ...] = (slice(None), slice(None), *(i.to(windows.device) for i in index))
    drawn = windows[places]
    scale: float = (math.prod(sizes) / len(index[0])) ** 0.5
    return drawn.movedim(1, 2).reshape(-1, channels, *kernel) * scale
