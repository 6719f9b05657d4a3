"""Probes: the ops, or whole layers, that are timed to know how long a planned layer takes."""

import math
from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product

import torch
from torch import Tensor, nn

from hodec.errors import PlanError, Use
from hodec.formats.calls import CallSites, Size
from hodec.formats.layer_types import DENSE_CLASSES, LAYER_TYPES
from hodec.formats.ops import Op, dense_op
from hodec.formats.roles import REBUILT, Role
from hodec.methods import get_method
from hodec.plan.layer import LayerPlan

# Channel counts at which convolutions are measured: kernels work on 8 or 16 channels at a time.
GRID = [1, 4, 8, *range(16, 129, 16), *range(192, 513, 64), *range(640, 2049, 128), *range(2560, 16385, 512)]


@dataclass(frozen=True)
class Probe:
    """One op, or a whole layer, to time at the sizes of one image.

    Attributes:
        layer_type: type of the dense layer that it belongs to.
        op: its kernel; of a layer that is measured as it is, that of the dense layer.
        in_size, out_size: spatial sizes of input and output; of a linear map, its rows.
        exact: the sides of the kernel (0: out, 1: in) that no rank decides: they are not moved onto the grid.
        layer: the planned layer where it is measured as it is.
    """

    layer_type: str
    op: Op
    in_size: Size
    out_size: Size
    exact: tuple[int, ...] = ()
    layer: LayerPlan | None = None

    @property
    def key(self) -> str:
        """Its name in the table, unique among probes."""
        sides = " -> ".join("x".join(map(str, size)) for size in (self.in_size, self.out_size))
        depthwise = " depthwise" * self.op.depthwise + f" in {self.op.blocks} groups" * (self.op.blocks > 1)
        name = f"{self.layer_type}{depthwise} {'x'.join(map(str, self.op.kernel))} at {sides}"
        if self.layer is None:
            return name
        layer = self.layer
        split = f"{list(layer.modes.inputs)} {list(layer.modes.outputs)}"
        return f"{name}, {layer.method} {layer.resolved_execution} {split} ranks {list(layer.ranks)}"

    def corners(self) -> Iterator[tuple[float, "Probe"]]:
        """The probes on the grid around this one, each with its weight in the linear interpolation between them."""
        if self.layer is not None or self.op.blocks > 1:  # the grid's counts do not split into groups
            yield 1.0, self
            return
        kernel = self.op.kernel
        sides = [0] if self.op.depthwise else [0, 1]
        near = [[(1.0, kernel[s])] if s in self.exact else neighbours(kernel[s]) for s in sides]
        for picks in product(*near):
            channels = [n for _, n in picks] if len(picks) == 2 else [picks[0][1], 1]
            weight = math.prod(part for part, _ in picks)
            yield weight, replace(self, op=self.op._replace(kernel=(*channels, *kernel[2:])))

    def example(self, batch: int) -> Tensor:
        """An input for it: random, or ones where it looks something up."""
        if LAYER_TYPES[self.layer_type].is_embedding:
            return torch.ones(batch, *self.in_size, dtype=torch.long)
        if LAYER_TYPES[self.layer_type].dims == 0:
            return torch.randn(batch, *self.in_size, self.op.channels)
        return torch.randn(batch, self.op.channels, *self.in_size)

    def build(self) -> nn.Module:
        """The module to time, with random weights."""
        if self.layer is not None:
            layer, dense = self.layer, replace(self, layer=None).build()
            cls = get_method(layer.method).layer(layer.layer_type, layer.groups)
            execution = layer.resolved_execution
            return cls.like(dense, layer.ranks, modes=layer.modes, execution=execution, initialize=True)
        out, inp, *kernel = self.op.kernel
        make, transposed = DENSE_CLASSES[self.layer_type], LAYER_TYPES[self.layer_type].transposed
        if not kernel:
            return make(inp, out)
        settings = moves(kernel, self.in_size, self.out_size, transposed=transposed)
        return make(self.op.channels, out, kernel, groups=self.op.groups, **settings)


def probes_of(layer: LayerPlan, *, dense: bool) -> list[tuple[int, Probe]]:
    """The probes whose times add up to a layer's, with how often each runs for one image.

    Raises:
        PlanError: it runs step by step, which takes other times than all steps at once.
    """
    if layer.role is Role.RECURRENT and layer.resolved_execution != REBUILT:
        raise PlanError(
            f"a recurrent weight {tuple(layer.shape)} that runs by its factors, step by step, has no latency by the "
            "table: plan it with execution='rebuilt', leave it out with {exclude}, or choose by macs or params",
            exclude=Use("exclude", "[..]"),
        )
    result = []
    for user in layer.users:
        for times, in_size, out_size in user.call_sites.calls:
            result += [(times, probe) for probe in _of_one_call(user, in_size, out_size, dense=dense)]
    return result


def _of_one_call(layer: LayerPlan, in_size: Size, out_size: Size, *, dense: bool) -> list[Probe]:
    stacked = LAYER_TYPES[layer.layer_type].stacked
    shape, kind = (layer.shape[:2], "linear") if stacked else (layer.shape, layer.layer_type)
    whole = Probe(kind, dense_op(shape, layer.groups), in_size, out_size, exact=(0, 1))
    if dense or layer.resolved_execution == REBUILT:
        return [whole]
    ops = probed_ops(layer)
    if not ops:
        call_sites = CallSites.once(in_size, out_size)
        return [replace(whole, layer=replace(layer, call_sites=call_sites, aliases=(), notes=()))]
    probes, size = [], in_size
    for k, op in enumerate(ops):
        made = tuple(out_size[axis] if axis in op.axes else n for axis, n in enumerate(size))
        exact = tuple(side for side, end in ((0, len(ops) - 1), (1, 0)) if k == end)
        probes.append(Probe(layer.layer_type, op, size, made, exact))
        size = made
    return probes


def probed_ops(layer: LayerPlan) -> list[Op]:
    """The ops that a planned layer runs one after another; none where it has to be measured as it is."""
    ops = layer.format.ops(layer.shape, layer.ranks, layer.modes, execution=layer.resolved_execution)
    as_it_is = LAYER_TYPES[layer.layer_type].is_embedding or any(op.contracts for op in ops)
    return [] if as_it_is else ops


def neighbours(n: int) -> list[tuple[float, int]]:
    """The grid's channel counts around ``n`` with their weights; ``n`` itself where it is on the grid or above it."""
    at = bisect_left(GRID, n)
    if at == len(GRID) or GRID[at] == n:
        return [(1.0, n)]
    low, high = GRID[at - 1], GRID[at]
    weight = (n - low) / (high - low)
    return [(1 - weight, low), (weight, high)]


def moves(kernel: list[int], in_size: Size, out_size: Size, *, transposed: bool) -> dict[str, tuple[int, ...]]:
    """Stride and padding that lead from one size to the other: a plan knows the sizes only.

    A dilated convolution has the same multiply-adds as the plain one found here.
    """
    found = [_move(k, n, m, transposed=transposed) for k, n, m in zip(kernel, in_size, out_size, strict=True)]
    settings = {"stride": tuple(f[0] for f in found), "padding": tuple(f[1] for f in found)}
    return settings | ({"output_padding": tuple(f[2] for f in found)} if transposed else {})


def _move(k: int, before: int, after: int, *, transposed: bool) -> tuple[int, int, int]:
    for stride in range(1, max(before, after) + 1):
        for padding in range(k):
            if not transposed and before + 2 * padding >= k and (before + 2 * padding - k) // stride + 1 == after:
                return stride, padding, 0
            extra = after - ((before - 1) * stride - 2 * padding + k)
            if transposed and 0 <= extra < stride:
                return stride, padding, extra
    # e.g. a wide dilation: near enough in time
    return (max(1, after // before), k // 2, 0) if transposed else (max(1, before // after), k // 2, 0)
