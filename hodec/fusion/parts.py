"""A factorized convolution as plain modules: its stages, neighbours of which may be multiplied into one."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import singledispatch
from itertools import pairwise, product
from typing import Any

import torch
from torch import Tensor, nn

from hodec.formats.staged import Stage
from hodec.layers.base import FactorizedLayer
from hodec.layers.conv import FactorizedConv
from hodec.layers.staged import StagedConv, StagedLinear
from hodec.layers.tt import TTConv

CONVS: dict[int, type[nn.Module]] = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
TRANSPOSED: dict[int, type[nn.Module]] = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}


@dataclass(frozen=True)
class Part:
    """One convolution or linear map.

    Attributes:
        kernel: (out, in / groups, K_1, ..), or (out, in).
        axes: the spatial axes along which it moves.
        depthwise: whether it treats each channel on its own; its kernel is (channels, 1, K_1, ..) then.
    """

    kernel: Tensor
    axes: tuple[int, ...] = ()
    depthwise: bool = False

    @property
    def stage(self) -> Stage:
        """Its shape, for counting."""
        return Stage(tuple(self.kernel.shape), self.axes)


@singledispatch
def parts_of(layer: Any) -> list[Part]:
    """The stages of a factorized layer in the order they run; none for a layer that has no such form."""
    return []


@parts_of.register
def _(layer: StagedConv) -> list[Part]:
    parts, channels = [], layer.shape[1]
    for stage, kernel in zip(layer.stages, layer.kernels, strict=True):
        parts.append(Part(kernel.detach(), tuple(stage.axes), kernel.shape[1] == 1 and channels > 1))
        channels = kernel.shape[0]
    return parts


@parts_of.register
def _(layer: StagedLinear) -> list[Part]:
    return [Part(kernel.detach()) for kernel in layer.kernels]


@parts_of.register
def _(layer: TTConv) -> list[Part]:
    inner, outer = (side.detach() for side in layer.merged_sides())
    ones = [1] * layer.layer_type.dims
    middle = Part(layer.kernel.detach(), tuple(range(layer.layer_type.dims)))
    return [Part(inner.reshape(*inner.shape, *ones)), middle, Part(outer.reshape(*outer.shape, *ones))]


def merged(first: Part, second: Part) -> Part:
    """One part that does the work of two: exact, as pointwise parts and moves along different axes commute.

    Their kernels are multiplied in float64 where the device has it.
    """
    a, b = _wide(first.kernel), _wide(second.kernel)
    if first.depthwise:
        kernel = b * (a if second.depthwise else a.transpose(0, 1))
    elif second.depthwise:
        kernel = b * a
    else:
        kernel = _product(a, b)
    axes = tuple(sorted({*first.axes, *second.axes}))
    return Part(kernel.to(first.kernel), axes, first.depthwise and second.depthwise)


def _wide(kernel: Tensor) -> Tensor:
    return kernel.float() if kernel.device.type == "mps" else kernel.double()


def _product(a: Tensor, b: Tensor) -> Tensor:
    """(m, i, ..) and (o, m, ..) -> (o, i, ..): along each spatial axis at most one of them is longer than 1."""
    sides = [x * y for x, y in zip(a.shape[2:], b.shape[2:], strict=True)]
    flat = torch.einsum("omy,mix->oiyx", b.reshape(*b.shape[:2], -1), a.reshape(*a.shape[:2], -1))
    # the longer axes of b stand before those of a: put each axis in its place
    spread = flat.reshape(*flat.shape[:2], *b.shape[2:], *a.shape[2:])
    dims = len(sides)
    order = [n for axis in range(dims) for n in (2 + axis, 2 + dims + axis)]
    return spread.permute(0, 1, *order).reshape(*flat.shape[:2], *sides)


def partitions(parts: Sequence[Part]) -> Iterator[list[list[Part]]]:
    """All ways to cut a row of parts into runs of neighbours, from uncut runs of one to all in one."""
    for cuts in product((True, False), repeat=max(0, len(parts) - 1)):
        at = [0, *(k + 1 for k, cut in enumerate(cuts) if cut), len(parts)]
        yield [list(parts[a:b]) for a, b in pairwise(at)]


def sizes(parts: Sequence[Part]) -> str:
    """Kernel sizes in words: ``1x1, 3x3, 1x1``; ``3x1 depthwise``; ``2 products`` of linear maps."""
    if parts[0].kernel.ndim == 2:
        return f"{len(parts)} products"
    return ", ".join("x".join(map(str, p.kernel.shape[2:])) + " depthwise" * p.depthwise for p in parts)


def plain(layer: FactorizedLayer, parts: Sequence[Part], bias: Tensor | None) -> nn.Module:
    """Parts as torch's own modules, the last one with the bias; several stand in a Sequential."""
    biases = [None] * (len(parts) - 1) + [bias]
    modules = [module_of(layer, part, each) for part, each in zip(parts, biases, strict=True)]
    return modules[0] if len(modules) == 1 else nn.Sequential(*modules)


def module_of(layer: FactorizedLayer, part: Part, bias: Tensor | None) -> nn.Module:
    """One part with the settings that the layer has along its axes."""
    out, inp = part.kernel.shape[:2]
    made: Any
    if isinstance(layer, FactorizedConv):
        made = _conv(layer, part, bias is not None)
    else:
        made = nn.Linear(inp, out, bias is not None, device="meta")
    made = made.to_empty(device=part.kernel.device).to(part.kernel.dtype)
    transposed = isinstance(layer, FactorizedConv) and layer.layer_type.transposed and not part.depthwise
    made.weight.data = (part.kernel.transpose(0, 1) if transposed else part.kernel).clone().contiguous()
    if bias is not None:
        made.bias.data = bias.detach().to(part.kernel).clone()
    return made.requires_grad_(False).eval()


def _conv(layer: FactorizedConv, part: Part, bias: bool) -> nn.Module:
    dims, still = layer.layer_type.dims, not part.axes
    out, per_group = part.kernel.shape[:2]

    def along(values: Any, rest: int) -> tuple[int, ...]:
        return tuple(int(n) if axis in part.axes else rest for axis, n in enumerate(values))

    settings: dict[str, Any] = {
        "in_channels": out if part.depthwise else per_group,
        "out_channels": out,
        "kernel_size": tuple(part.kernel.shape[2:]),
        "stride": along(layer.stride, 1),
        "dilation": along(layer.dilation, 1),
        "groups": out if part.depthwise else 1,
        "bias": bias,
        "device": "meta",
    }
    if layer.layer_type.transposed:
        padding, extra = along(layer.padding, 0), along(layer.output_padding, 0)
        return TRANSPOSED[dims](**settings, padding=padding, output_padding=extra)
    if isinstance(layer.padding, str):
        return CONVS[dims](**settings, padding=0 if still else layer.padding, padding_mode=_mode(layer, part))
    return CONVS[dims](**settings, padding=along(layer.padding, 0), padding_mode=_mode(layer, part))


def _mode(layer: FactorizedConv, part: Part) -> str:
    return layer.padding_mode if part.axes else "zeros"


def numbers(parts: Sequence[Part]) -> int:
    """Numbers in all kernels."""
    return sum(math.prod(part.kernel.shape) for part in parts)
