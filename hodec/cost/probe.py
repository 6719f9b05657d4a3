"""What is measured to know how long a layer takes: single convolutions and linear maps, or whole layers."""

import math
from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn

from hodec.formats.calls import CallSites, Size
from hodec.formats.layer_types import LAYER_TYPES
from hodec.formats.staged import Stage, StagedFormat, pointwise, spatial_axes
from hodec.formats.tt import TTConv
from hodec.methods import get_method
from hodec.plan.layer import LayerPlan

CONVS: dict[tuple[int, bool], Any] = {
    (1, False): nn.Conv1d, (2, False): nn.Conv2d, (3, False): nn.Conv3d,
    (1, True): nn.ConvTranspose1d, (2, True): nn.ConvTranspose2d, (3, True): nn.ConvTranspose3d,
}  # fmt: skip

# Channel counts at which convolutions are measured: kernels work on 8 or 16 channels at a time.
GRID = [1, 4, 8, *range(16, 129, 16), *range(192, 513, 64), *range(640, 2049, 128), *range(2560, 16385, 512)]


@dataclass(frozen=True)
class Probe:
    """One piece of work, of sizes of one image.

    Attributes:
        kind: kind of the dense layer that it belongs to.
        kernel: (out, in / groups, K_1, ..); of a linear map (out, in).
        before, after: spatial sizes of input and output; of a linear map, its rows.
        exact: the sides of the kernel (0: out, 1: in) that no rank decides: they are not moved onto the grid.
        depthwise: whether each channel is convolved on its own.
        whole: the planned layer where it is measured as it is.
    """

    layer_type: str
    kernel: tuple[int, ...]
    before: Size
    after: Size
    exact: tuple[int, ...] = ()
    depthwise: bool = False
    whole: LayerPlan | None = None

    @property
    def key(self) -> str:
        """What tells it from others, in words."""
        sides = " -> ".join("x".join(map(str, size)) for size in (self.before, self.after))
        name = f"{self.layer_type}{' depthwise' * self.depthwise} {'x'.join(map(str, self.kernel))} at {sides}"
        if self.whole is None:
            return name
        layer = self.whole
        split = f"{list(layer.modes.inputs)} {list(layer.modes.outputs)}"
        return f"{name}, {layer.method} {layer.resolved_execution} {split} ranks {list(layer.ranks)}"

    def corners(self) -> Iterator[tuple[float, "Probe"]]:
        """The probes on the grid around this one, each with its share in the straight lines between them."""
        if self.whole is not None:
            yield 1.0, self
            return
        sides = [0] if self.depthwise else [0, 1]
        near = [[(1.0, self.kernel[s])] if s in self.exact else neighbours(self.kernel[s]) for s in sides]
        for picks in product(*near):
            channels = [n for _, n in picks] if len(picks) == 2 else [picks[0][1], 1]
            share = math.prod(part for part, _ in picks)
            yield share, replace(self, kernel=(*channels, *self.kernel[2:]))

    def example(self, batch: int) -> Tensor:
        """What it is given: ones where it looks something up."""
        if LAYER_TYPES[self.layer_type].is_embedding:
            return torch.ones(batch, *self.before, dtype=torch.long)
        channels = self.kernel[0] if self.depthwise else self.kernel[1]
        if LAYER_TYPES[self.layer_type].dims == 0:
            return torch.randn(batch, *self.before, channels)
        return torch.randn(batch, channels, *self.before)

    def build(self) -> nn.Module:
        """The module to time, with random weights."""
        if self.whole is not None:
            layer, dense = self.whole, replace(self, whole=None).build()
            cls = get_method(layer.method).layers[layer.layer_type]
            return cls.like(dense, layer.ranks, modes=layer.modes, execution=layer.resolved_execution)
        out, inp, *kernel = self.kernel
        layer_type = LAYER_TYPES[self.layer_type]
        if layer_type.is_embedding:
            return nn.Embedding(inp, out)
        if not layer_type.dims:
            return nn.Linear(inp, out)
        groups = out if self.depthwise else 1
        settings = moves(kernel, self.before, self.after, transposed=layer_type.transposed)
        return CONVS[layer_type.dims, layer_type.transposed](
            out if self.depthwise else inp, out, kernel, groups=groups, **settings
        )  # type: ignore[no-any-return]


def probes_of(layer: LayerPlan, *, dense: bool) -> list[tuple[int, Probe]]:
    """What a layer consists of, with how often each runs for one image."""
    found = []
    for times, before, after in layer.call_sites.calls:
        found += [(times, probe) for probe in _of_one_call(layer, before, after, dense=dense)]
    return found


def _of_one_call(layer: LayerPlan, before: Size, after: Size, *, dense: bool) -> list[Probe]:
    whole = Probe(layer.layer_type, layer.shape, before, after, exact=(0, 1))
    if dense:
        return [whole]
    stages = stages_of(layer)
    if not stages:
        return [replace(whole, whole=replace(layer, call_sites=CallSites.once(before, after), aliases=(), notes=()))]
    probes, size, channels = [], before, layer.shape[1]
    for at, stage in enumerate(stages):
        made = tuple(after[k] if k in stage.axes else n for k, n in enumerate(size))
        exact = tuple(side for side, end in ((0, len(stages) - 1), (1, 0)) if at == end)
        depthwise = stage.kernel[1] == 1 and channels > 1
        probes.append(Probe(layer.layer_type, stage.kernel, size, made, exact, depthwise))
        size, channels = made, stage.kernel[0]
    return probes


def stages_of(layer: LayerPlan) -> list[Stage]:
    """The convolutions or linear maps that a planned layer runs as; none for one that runs otherwise."""
    fmt, ranks = layer.format, layer.ranks
    if LAYER_TYPES[layer.layer_type].is_embedding:
        return []
    if isinstance(fmt, StagedFormat):
        return fmt.stages(layer.shape, ranks)
    if isinstance(fmt, TTConv) and layer.resolved_execution == "merged":
        out, inp, *kernel = layer.shape
        d = len(layer.modes.inputs)
        r_in, r_out = ranks[d - 1], ranks[d]
        middle = Stage((r_out, r_in, *kernel), spatial_axes(layer.shape))
        return [pointwise(r_in, inp, layer.shape), middle, pointwise(out, r_out, layer.shape)]
    return []


def neighbours(n: int) -> list[tuple[float, int]]:
    """The grid's channel counts on both sides of one, with their shares; itself where it is on the grid or above."""
    at = bisect_left(GRID, n)
    if at == len(GRID) or GRID[at] == n:
        return [(1.0, n)]
    low, high = GRID[at - 1], GRID[at]
    share = (n - low) / (high - low)
    return [(1 - share, low), (share, high)]


def moves(kernel: list[int], before: Size, after: Size, *, transposed: bool) -> dict[str, Any]:
    """Stride and padding that lead from one size to the other: a plan knows the sizes only.

    A dilated convolution has the same multiply-adds as the plain one found here.
    """
    found = [_move(k, n, m, transposed=transposed) for k, n, m in zip(kernel, before, after, strict=True)]
    settings = {"stride": tuple(f[0] for f in found), "padding": tuple(f[1] for f in found)}
    return settings | ({"output_padding": tuple(f[2] for f in found)} if transposed else {})


def _move(k: int, before: int, after: int, *, transposed: bool) -> tuple[int, int, int]:
    for stride in range(1, max(before, after) + 1):
        for padding in range(k):
            if not transposed and before + 2 * padding >= k and (before + 2 * padding - k) // stride + 1 == after:
                return stride, padding, 0
            extra = after - ((before - 1) * stride - 2 * padding + k)
            if transposed and 0 <= extra < max(stride, 2) and (extra < stride):
                return stride, padding, extra
    # e.g. a wide dilation: near enough in time
    return (max(1, after // before), k // 2, 0) if transposed else (max(1, before // after), k // 2, 0)
