"""The variants that a layer can run as when it is only to infer, as plain torch modules, each built when asked for."""

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise, product
from typing import cast

import torch
from torch import Tensor, nn

from hodec.formats.calls import CallSites
from hodec.formats.layer_types import DENSE_CLASSES
from hodec.formats.ops import Op, dense_op, total_macs
from hodec.formats.same_padding import SAME_CONVS, SAME_UPPER
from hodec.fusion.answers import Answers, Row, answer_for
from hodec.fusion.batchnorm import Call, scale_and_shift, scaled_last
from hodec.layers.base import FactorizedLayer
from hodec.layers.conv import FactorizedConv

DENSE, CHAIN, MERGED = "dense", "chain", "merged"


@dataclass(frozen=True)
class Variant:
    """One way to run a layer.

    Attributes:
        name: ``merged`` (its ops as they are stored), ``chain``, ``dense``, or the kernel sizes that are left when
            neighbouring ops are multiplied: ``3x3, 1x1``.
        macs: multiply-adds of one image.
        build: returns it as a module, with the batch norm folded in.
    """

    name: str
    macs: int
    build: Callable[[], nn.Module]


def variants_of(layer: FactorizedLayer, calls: Sequence[Call], norm: nn.Module | None) -> dict[str, Variant]:
    """All variants of a factorized layer, ``dense`` last; those that cost more than dense are left out.

    An embedding has one variant only: it is compressed for its memory, and a dense lookup would always be fastest.

    Args:
        layer: in evaluation mode.
        calls: what it is called with.
        norm: the batch norm to fold into it.
    """
    if layer.layer_type.is_embedding:
        return {MERGED: Variant(MERGED, 0, lambda: copy.deepcopy(layer))}
    call_sites = call_sites_of(layer, calls)
    dense = _dense(layer, call_sites, norm)
    unbatched = any(len(call.given) != layer.layer_type.dims + 2 for call in calls) and layer.layer_type.dims > 0
    offered, lengths = list[Variant](), set[int]()
    for execution, ops in layer.ops.items():
        if not any(op.contracts for op in ops):
            offered += _rows(layer, execution, call_sites, norm=norm)
        elif len(ops) not in lengths and not unbatched:  # of one mode a side, a chain is what is merged
            offered.append(_chain(layer, execution, call_sites, norm=norm))
        lengths.add(len(ops))
    return {one.name: one for one in offered if one.macs < dense.macs} | {DENSE: dense}


def call_sites_of(layer: FactorizedLayer, calls: Sequence[Call]) -> CallSites:
    """Its calls for one image, by the batch that was given."""
    dims, call_sites = layer.layer_type.dims, CallSites(())
    for call in calls:
        rows = (math.prod(call.made[1:-1]),)
        sizes = (call.given[-dims:], call.made[-dims:]) if dims else (rows, rows)
        call_sites = call_sites.also(CallSites.once(*sizes))
    return call_sites


def _dense(layer: FactorizedLayer, call_sites: CallSites, norm: nn.Module | None) -> Variant:
    op = dense_op(layer.shape, layer.format.conv_groups)

    def build() -> nn.Module:
        weight = layer.layer_type.to_oihw(layer.dense_weight().detach())
        return _folded(plain(layer, [op], [weight], bias=_bias(layer)), norm)

    return Variant(DENSE, _macs(layer, [op], call_sites), build)


def _rows(layer: FactorizedLayer, execution: str, call_sites: CallSites, *, norm: nn.Module | None) -> list[Variant]:
    """The ops one after another, neighbours multiplied with each other in all ways but to one (which is dense)."""
    ops, result = layer.ops[execution], []
    for cut in partitions(len(ops)):
        if len(cut) == 1:
            continue
        merged = [joined([ops[k] for k in run]) for run in cut]

        def build(cut: list[range] = cut, merged: list[Op] = merged) -> nn.Module:
            kernels = [kernel.detach() for kernel in layer.op_kernels(execution)]
            products = [multiplied([ops[k] for k in run], [kernels[k] for k in run]) for run in cut]
            return _folded(plain(layer, merged, products, bias=_bias(layer)), norm)

        name = MERGED if len(cut) == len(ops) else sizes(merged)
        result.append(Variant(name, _macs(layer, merged, call_sites), build))
    return result


def _chain(layer: FactorizedLayer, execution: str, call_sites: CallSites, *, norm: nn.Module | None) -> Variant:
    def build() -> nn.Module:
        kernels = [kernel.detach() for kernel in layer.op_kernels(execution)]
        made = Chain(layer, layer.ops[execution], kernels, affine=_affine(layer, norm)).eval()
        return answer_for(made, layer)

    return Variant(CHAIN, _macs(layer, layer.ops[execution], call_sites), build)


def _macs(layer: FactorizedLayer, ops: Sequence[Op], call_sites: CallSites) -> int:
    return total_macs(ops, call_sites, transposed=layer.layer_type.transposed)


# -- neighbours multiplied -----------------------------------------------------------------------------------------


def partitions(count: int) -> Iterator[list[range]]:
    """All ways to cut a row of ``count`` ops into runs of neighbours, from runs of one to all in one."""
    for cuts in product((True, False), repeat=count - 1):
        at = [0, *(k + 1 for k, cut in enumerate(cuts) if cut), count]
        yield [range(a, b) for a, b in pairwise(at)]


def joined(ops: Sequence[Op]) -> Op:
    """One op that does the work of neighbours."""
    whole = ops[0]
    for op in ops[1:]:
        whole = whole.then(op)
    return whole


def multiplied(ops: Sequence[Op], kernels: Sequence[Tensor]) -> Tensor:
    """The kernel of ``joined(ops)``: exact, as pointwise ops and moves along different axes commute.

    Kernels are multiplied in float64 where the device has it.
    """
    if (groups := ops[0].blocks) > 1:
        one = [op._replace(kernel=(op.kernel[0] // groups, *op.kernel[1:]), blocks=1) for op in ops]
        return torch.cat([multiplied(one, own) for own in zip(*(k.chunk(groups) for k in kernels), strict=True)])
    whole, kernel = ops[0], kernels[0]
    for op, other in zip(ops[1:], kernels[1:], strict=True):
        a, b = _wide(kernel), _wide(other)
        if whole.depthwise:
            made = b * (a if op.depthwise else a.transpose(0, 1))
        else:
            made = b * a if op.depthwise else _product(a, b)
        whole, kernel = whole.then(op), made.to(kernel)
    return kernel


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


def sizes(ops: Sequence[Op]) -> str:
    """Kernel sizes in words: ``1x1, 3x3, 1x1``; ``3x1 depthwise``; ``2 products`` of linear maps."""
    if len(ops[0].kernel) == 2:
        return f"{len(ops)} products"
    return ", ".join("x".join(map(str, op.kernel[2:])) + " depthwise" * op.depthwise for op in ops)


# -- modules -------------------------------------------------------------------------------------------------------


def plain(layer: FactorizedLayer, ops: Sequence[Op], kernels: Sequence[Tensor], *, bias: Tensor | None) -> nn.Module:
    """Ops as torch's own modules, the last one with the bias; several stand in a ``Row``."""
    biases = [None] * (len(ops) - 1) + [bias]
    modules = [module_of(layer, op, kernel, bias=b) for op, kernel, b in zip(ops, kernels, biases, strict=True)]
    return modules[0] if len(modules) == 1 else answer_for(Row(*modules), layer)


def module_of(layer: FactorizedLayer, op: Op, kernel: Tensor, *, bias: Tensor | None) -> nn.Module:
    """One op as a torch module, with the settings that the layer has along its axes."""
    if isinstance(layer, FactorizedConv):
        transposed = layer.layer_type.transposed and bool(op.axes)
        made = _conv(layer, op, transposed=transposed, bias=bias is not None)
        kernel = kernel.transpose(0, 1) if transposed and not op.depthwise else kernel
    else:
        made = nn.Linear(op.kernel[1], op.kernel[0], bias is not None, device="meta")
    made = made.to_empty(device=kernel.device).to(kernel.dtype)
    cast(Tensor, made.weight).data = kernel.clone().contiguous()
    if bias is not None:
        cast(Tensor, made.bias).data = bias.detach().to(kernel).clone()
    return made.requires_grad_(False).eval()


def _conv(layer: FactorizedConv, op: Op, *, transposed: bool, bias: bool) -> nn.Module:
    def along(values: Sequence[int], rest: int) -> tuple[int, ...]:
        return tuple(n if axis in op.axes else rest for axis, n in enumerate(values))

    settings: dict[str, object] = {"stride": along(layer.stride, 1), "dilation": along(layer.dilation, 1)}
    same = layer.padding == SAME_UPPER and bool(op.axes)
    if isinstance(layer.padding, str):
        settings["padding"] = layer.padding if op.axes else 0
    else:
        settings["padding"] = along(layer.padding, 0)
    if transposed:
        settings["output_padding"] = along(layer.output_padding, 0)
    elif op.axes:
        settings["padding_mode"] = layer.padding_mode
    make = (SAME_CONVS if same else DENSE_CLASSES)[f"conv{'_transpose' * transposed}{layer.layer_type.dims}d"]
    return make(op.channels, op.kernel[0], op.kernel[2:], groups=op.groups, bias=bias, device="meta", **settings)


class Chain(Answers):
    """A chain of contractions for inference: convolutions or products on (N, ..) with nothing but reshapes between.

    Outputs that are done lie along the batch; inputs that are pending lengthen the first spatial axis, or are an axis
    of their own where there is none.

    Args:
        layer: what it computes.
        ops, kernels: its ops.
        affine: scale and shift of each output channel, (O,), applied last. None: 1 and 0.
    """

    def __init__(
        self,
        layer: FactorizedLayer,
        ops: Sequence[Op],
        kernels: Sequence[Tensor],
        *,
        affine: tuple[Tensor | None, Tensor | None],
    ) -> None:
        super().__init__()
        self.dims, self.outputs, self.ops = layer.layer_type.dims, layer.shape[0], tuple(ops)
        self.steps = nn.ModuleList(module_of(layer, op, k, bias=None) for op, k in zip(ops, kernels, strict=True))
        ones = [1] * self.dims
        self.scale, self.shift = (
            None if each is None else nn.Parameter(each.reshape(-1, *ones), requires_grad=False) for each in affine
        )

    def forward(self, x: Tensor) -> Tensor:
        """(N, I, ..) -> (N, O, ..), or (.., I) -> (.., O)."""
        y = self._convolved(x) if self.dims else self._multiplied(x)
        y = y if self.scale is None else y * self.scale
        return y if self.shift is None else y + self.shift

    def _multiplied(self, x: Tensor) -> Tensor:
        y = x.reshape(-1, x.shape[-1])
        for op, module in zip(self.ops, self.steps, strict=True):
            y = torch.matmul(cast(Tensor, module.weight), y.reshape(-1, op.channels, op.pending))
        return y.reshape(*x.shape[:-1], self.outputs)

    def _convolved(self, x: Tensor) -> Tensor:
        batch, y, spatial = x.shape[0], x, x.shape[2:]
        for op, module in zip(self.ops, self.steps, strict=True):
            if op.contracts:
                y = module(y.reshape(batch * op.done, op.channels, op.pending * spatial[0], *spatial[1:]))
                continue
            lead = y.reshape(batch, op.channels, op.pending, *spatial).transpose(1, 2)
            y = module(lead.flatten(0, 1))
            spatial = y.shape[2:]
            y = y.unflatten(0, (batch, op.pending)).transpose(1, 2)
        return y.reshape(batch, self.outputs, *spatial)


def _affine(layer: FactorizedLayer, norm: nn.Module | None) -> tuple[Tensor | None, Tensor | None]:
    bias = _bias(layer)
    if norm is None:
        return None, bias
    scale, shift = scale_and_shift(norm)
    dtype = next(layer.parameters()).dtype
    return scale.to(dtype), (shift if bias is None else shift + bias.to(scale) * scale).to(dtype)


def _bias(layer: FactorizedLayer) -> Tensor | None:
    return layer.bias.detach() if isinstance(layer.bias, Tensor) else None


def _folded(module: nn.Module, norm: nn.Module | None) -> nn.Module:
    return module if norm is None else scaled_last(module, *scale_and_shift(norm))
