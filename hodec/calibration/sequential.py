"""Fitting the planned layers of a net to data, one after the other, each on what the net compressed so far gives it.

The dense net and a copy of it run on the same batches. A layer's patches come from the copy, in which all planned
layers before it have their fitted weights already, and the outputs that it is to give come from the dense net: what
earlier layers lost is made up for as far as this layer can. Nothing is trained: every fit is a least-squares problem.

Source: Zhang, Zou, He, Sun, Accelerating Very Deep Convolutional Networks, TPAMI 2016: section 2.2.
"""

import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from hodec.calibration.fit import DAMPING, Fit, fit_layer, fittable
from hodec.calibration.im2col import Draw, patches
from hodec.calibration.moments import FitMoments
from hodec.errors import DataError
from hodec.formats.layer_types import LAYER_TYPES
from hodec.formats.roles import Role
from hodec.inference import Batch, inference, run_batches, uncompiled
from hodec.layers.plain import copied, plain_layer
from hodec.plan.layer import LayerPlan
from hodec.plan.plan import Plan

log = logging.getLogger(__name__)


@dataclass
class _Site:
    """A planned layer in the dense net and in its copy."""

    name: str
    layer: LayerPlan
    dense: nn.Module
    near: nn.Module
    plain: nn.Module
    calls: int = 0
    norm: nn.modules.batchnorm._BatchNorm | None = None
    wanted: list[tuple[tuple[Tensor, ...] | None, Tensor]] = field(default_factory=list)

    @property
    def weight(self) -> nn.Parameter:
        return cast(nn.Parameter, self.near._parameters["weight"])

    @property
    def bias(self) -> nn.Parameter | None:
        return self.near._parameters.get("bias")

    @property
    def has_constant(self) -> bool:
        """Whether its mean output can be moved: by a bias, or by the BatchNorm behind it."""
        return self.bias is not None or self.norm is not None

    def note(self, draw: Draw, output: Tensor) -> None:
        """Keep a dense output (N, O, ..) at some positions, as rows (M, O)."""
        dims = LAYER_TYPES[self.layer.layer_type].dims
        if not dims:
            self.wanted.append((None, output.reshape(-1, output.shape[-1])))
            return
        batch = output if output.ndim == dims + 2 else output.unsqueeze(0)
        index = draw.of(batch.shape[2:])
        places: tuple[slice | Tensor, ...] = (slice(None), slice(None), *(index or ()))
        seen = batch.flatten(2) if index is None else batch[places]
        self.wanted.append((index, seen.transpose(1, 2).flatten(0, 1)))

    def see(self, moments: FitMoments, x: Tensor) -> None:
        """Add the patches of one call of the copy, with what the dense net gave there."""
        index, wanted = self.wanted.pop(0)
        fixed = _Fixed(index)
        at = 0
        for rows in patches(self.plain, LAYER_TYPES[self.layer.layer_type], x, cast(Draw, fixed)):
            moments.add(rows / fixed.scale, wanted[at : at + len(rows)])
            at += len(rows)

    def take(self, fit: Fit) -> None:
        """Give the copy the fitted weight, and the bias or what stands for it in the BatchNorm behind."""
        layer_type = LAYER_TYPES[self.layer.layer_type]
        self.weight.copy_(layer_type.from_oihw(fit.weight))
        if self.norm is not None:
            old = 0 if self.bias is None else self.bias
            cast(Tensor, self.norm.running_mean).sub_(fit.bias.to(self.weight) - old)
        elif self.bias is not None:
            self.bias.copy_(fit.bias)


class _Fixed:
    """Positions that were drawn before, as ``Draw`` gives them."""

    def __init__(self, index: tuple[Tensor, ...] | None) -> None:
        self.index, self.scale = index, 1.0

    def of(self, sizes: Sequence[int]) -> tuple[Tensor, ...] | None:
        if self.index is not None:
            self.scale = (math.prod(sizes) / len(self.index[0])) ** 0.5
        return self.index


class _Enough(Exception):
    """All that was to be seen of a batch has been."""


@torch.no_grad()
def fit_to_data(
    model: nn.Module,
    plan: Plan,
    batches: Iterable[Batch],
    *,
    solver: str = "als",
    damping: float = DAMPING,
    positions: int | None = 64,
    passes: int = 16,
) -> nn.Module:
    """A copy of the dense model whose planned layers have weights of the planned ranks, fitted to data.

    ``convert(copy, plan)`` makes the small net of it and loses nothing more, but for CP where its iteration does not
    find a weight again. Biases are fitted too; where BatchNorm follows a layer, its running mean takes their place.

    Args:
        model: the dense model the plan was made for; it is left as it was.
        plan: the layers. Those that have no weight of their own which meets patches are projected by their weights.
        batches: as ``collect_covariances`` takes them; read ``passes`` times at most.
        solver, damping: see ``fit_layer``.
        positions: most output positions of a convolution looked at per image and call; None for all.
        passes: most groups of layers; those of one group are fitted on the same inputs.

    Raises:
        DataError: no batch.

    Examples:
        >>> net = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
        >>> plan = hodec.make_plan(net, 4, method="svd", example_input=torch.zeros(1, 64))
        >>> near = hodec.fit_to_data(net, plan, [torch.randn(32, 64) for _ in range(4)])
        >>> int(torch.linalg.matrix_rank(near[0].weight, rtol=1e-4)), plan["0"].ranks
        (4, (4,))
        >>> small = hodec.convert(near, plan)
    """
    dense = uncompiled(model)
    near = copied(dense)
    count = len(plan.example_input().args) or None
    sites = _sites(dense, near, plan)
    for name, layer in plan.items():
        if name not in {site.name for site in sites} and not layer.computed_from:
            _project(near, name, layer)
    with inference(dense), inference(near):
        sites = _in_order(sites, dense, near, batches, count)
        for group in _groups(sites, passes):
            for site, moments in zip(group, _moments(group, dense, near, batches, count, positions), strict=True):
                weight = LAYER_TYPES[site.layer.layer_type].to_oihw(site.weight.detach())
                fit = fit_layer(site.layer, weight, moments, solver=solver, damping=damping)
                log.info("%s: %.3g of the outputs' variance is missed", site.name, fit.error)
                site.take(fit)
    return near


def _groups(sites: Sequence[_Site], most: int) -> list[Sequence[_Site]]:
    """At most so many groups of neighbours, of equal sizes as nearly as can be."""
    count = min(max(1, most), len(sites))
    ends = [round(k * len(sites) / count) for k in range(count + 1)] if count else [0]
    return [sites[start:end] for start, end in zip(ends, ends[1:], strict=False)]


def _sites(dense: nn.Module, near: nn.Module, plan: Plan) -> list[_Site]:
    """The layers that can be fitted."""
    found = []
    for name, layer in plan.items():
        if not fittable(layer) or layer.computed_from:
            continue
        module = near.get_submodule(name)
        plain = plain_layer(module)
        if plain is not None:
            found.append(_Site(name, layer, dense.get_submodule(name), module, plain.layer))
    return found


def _project(near: nn.Module, name: str, layer: LayerPlan) -> None:
    parameter = near.get_parameter(layer.parameter(name))
    if layer.role is Role.LAYER:
        parameter.copy_(layer.project(parameter))


def _in_order(
    sites: Sequence[_Site], dense: nn.Module, near: nn.Module, batches: Iterable[Batch], count: int | None
) -> list[_Site]:
    """The layers in the order of their first calls, with their calls for a batch and the BatchNorm behind each."""
    order: list[_Site] = []
    outputs: dict[int, tuple[_Site, Tensor]] = {}
    twins = dict(zip(dense.modules(), near.modules(), strict=True))

    def called(site: _Site, _m: nn.Module, _a: object, output: Tensor) -> None:
        site.calls += 1
        if site not in order:
            order.append(site)
        outputs[id(output)] = (site, output)

    def norm_called(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        if id(args[0]) in outputs:
            outputs[id(args[0])][0].norm = cast(nn.modules.batchnorm._BatchNorm, twins[module])

    with ExitStack() as stack:
        for site in sites:
            stack.callback(site.dense.register_forward_hook(partial(called, site)).remove)
        for module in dense.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.track_running_stats:
                stack.callback(module.register_forward_pre_hook(norm_called).remove)
        first = next(iter(batches), None)
        if first is None:
            raise DataError("no batch to fit to: give at least one, a few hundred images are enough")
        run_batches(dense, [first], count=count)
    return order


def _moments(
    group: Sequence[_Site],
    dense: nn.Module,
    near: nn.Module,
    batches: Iterable[Batch],
    count: int | None,
    positions: int | None,
) -> list[FitMoments]:
    """What the fits of these layers need, from one reading of the data."""
    draw = Draw(positions, torch.Generator().manual_seed(0))
    moments = [FitMoments(site.layer.shape, constant=site.has_constant) for site in group]
    last, calls = group[-1], 0

    def enough(site: _Site) -> None:
        nonlocal calls
        calls += site is last
        if calls == last.calls:
            calls = 0
            raise _Enough

    def given(site: _Site, _m: nn.Module, _a: object, output: Tensor) -> None:
        site.note(draw, output)
        enough(site)

    def met(site: _Site, sums: FitMoments, _m: nn.Module, args: tuple[Tensor, ...], kwargs: Mapping[str, Any]) -> None:
        site.see(sums, args[0] if args else next(iter(kwargs.values())))
        enough(site)

    for batch in batches:
        for net in (dense, near):
            with ExitStack() as stack:
                for site, sums in zip(group, moments, strict=True):
                    if net is dense:
                        hook = site.dense.register_forward_hook(partial(given, site))
                    else:
                        hook = site.near.register_forward_pre_hook(partial(met, site, sums), with_kwargs=True)
                    stack.callback(hook.remove)
                with suppress(_Enough):
                    run_batches(net, [batch], count=count)
    return moments
