"""The forms that a layer can run in when it is only to infer, each built when asked for."""

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from hodec.formats.calls import CallSites
from hodec.formats.staged import Stage, staged_macs
from hodec.fusion.batchnorm import Call, scale_and_shift, scaled_last
from hodec.fusion.chain import ChainConv, ChainLinear
from hodec.fusion.parts import Part, merged, numbers, partitions, parts_of, plain, sizes
from hodec.layers.base import FactorizedLayer
from hodec.layers.tt import TTConv, TTLinear

DENSE, CHAIN, MERGED = "dense", "chain", "merged"


@dataclass(frozen=True)
class Variant:
    """A form of one layer.

    Attributes:
        name: ``merged`` (its stages as they are stored), ``chain``, ``dense``, or the kernel sizes that are left when
            neighbouring stages are multiplied: ``3x3, 1x1``.
        macs: multiply-adds of one image.
        params: numbers in its kernels.
        build: makes it, batch norm folded in.
    """

    name: str
    macs: int
    params: int
    build: Callable[[], nn.Module]


def variants_of(layer: FactorizedLayer, calls: Sequence[Call], norm: nn.Module | None) -> dict[str, Variant]:
    """All forms of a factorized layer, ``dense`` last; those that cost more than dense are left out.

    An embedding has one form only: it is compressed for its memory, and a dense lookup would always be fastest.

    Args:
        layer: in evaluation mode.
        calls: what it is called with.
        norm: the batch norm to fold into it.
    """
    if layer.layer_type.is_embedding:
        return {MERGED: Variant(MERGED, 0, numbers_in(layer), lambda: copy.deepcopy(layer))}
    call_sites = call_sites_of(layer, calls)
    dense = _dense(layer, call_sites, norm)
    offered = [*_staged(layer, call_sites, norm), *_chains(layer, calls, call_sites, norm)]
    found = {one.name: one for one in offered if one.macs < dense.macs}
    return found | {DENSE: dense}


def numbers_in(module: nn.Module) -> int:
    """Numbers that a module's parameters hold."""
    return sum(p.numel() for p in module.parameters())


def call_sites_of(layer: FactorizedLayer, calls: Sequence[Call]) -> CallSites:
    """Its calls for one image, by the batch that was given."""
    dims, call_sites = layer.layer_type.dims, None
    for call in calls:
        if dims:
            one = CallSites.once(call.given[-dims:], call.made[-dims:])
        else:
            rows = math.prod(call.made[1:-1])
            one = CallSites.once((rows,), (rows,))
        call_sites = one if call_sites is None else call_sites.also(one)
    return call_sites or CallSites(())


def _dense(layer: FactorizedLayer, call_sites: CallSites, norm: nn.Module | None) -> Variant:
    axes = tuple(range(layer.layer_type.dims))
    macs = staged_macs([Stage(layer.shape, axes)], call_sites, transposed=layer.layer_type.transposed)

    def build() -> nn.Module:
        part = Part(layer.layer_type.to_oihw(layer.dense_weight().detach()), axes)
        return _folded(plain(layer, [part], _bias(layer)), norm)

    return Variant(DENSE, macs, math.prod(layer.shape), build)


def _staged(layer: FactorizedLayer, call_sites: CallSites, norm: nn.Module | None) -> list[Variant]:
    stages, found = parts_of(layer), []
    if not stages:
        return []
    for cut in partitions(stages):
        if len(cut) == 1:
            continue  # the dense form, which is made from the whole weight
        # their sizes only: what is not chosen need not be multiplied
        parts = [_product([Part(p.kernel.to("meta"), p.axes, p.depthwise) for p in run]) for run in cut]
        name = MERGED if len(parts) == len(stages) else sizes(parts)
        macs = staged_macs([p.stage for p in parts], call_sites, transposed=layer.layer_type.transposed)

        def build(cut: list[list[Part]] = cut) -> nn.Module:
            return _folded(plain(layer, [_product(run) for run in cut], _bias(layer)), norm)

        found.append(Variant(name, macs, numbers(parts), build))
    return found


def _product(run: Sequence[Part]) -> Part:
    part = run[0]
    for each in run[1:]:
        part = merged(part, each)
    return part


def _chains(layer: Any, calls: Sequence[Call], call_sites: CallSites, norm: nn.Module | None) -> list[Variant]:
    """The chain where it differs from the merged form: with two modes a side or more."""
    if CHAIN not in layer.format.executions or len(layer.modes.inputs) < 2:
        return []
    if any(len(call.given) != layer.layer_type.dims + 2 for call in calls) and layer.layer_type.dims:
        return []  # unbatched
    macs = layer.format.macs(layer.shape, layer.ranks, layer.modes, call_sites=call_sites, execution=CHAIN)

    def build() -> nn.Module:
        scale, shift = _affine(layer, norm)
        if isinstance(layer, TTLinear):
            return ChainLinear(layer, scale, shift).eval()
        if isinstance(layer, TTConv):
            return ChainConv(layer, plain(layer, parts_of(layer)[1:2], None), scale, shift).eval()
        return nn.Sequential(copy.deepcopy(layer), *([] if norm is None else [copy.deepcopy(norm)])).eval()

    return [Variant(CHAIN, macs, numbers_in(layer), build)]


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
