"""Fitting the planned layers of a net to data, one after the other, each on what the net compressed so far gives it.

The dense net and a copy of it run on the same batches. A layer's patches come from the copy, in which all planned
layers before it have their fitted weights already, and the outputs that it is to give come from the dense net: what
earlier layers lost is made up for as far as this layer can. Nothing is trained: every fit is a least-squares problem.

Where a layer's output is summed with something else, as at the end of a residual block, the sum is what is to be met:
with s beside it in the dense net and s' in the copy, it is fitted to y + (s - s') / a, where a is the scale of the
BatchNorm in between. Where a ReLU comes behind, see ``Responses``.

Source: Zhang, Zou, He, Sun, Accelerating Very Deep Convolutional Networks, TPAMI 2016: sections 2.2 and 2.3; sums:
He, Zhang, Sun, Channel Pruning for Accelerating Very Deep Neural Networks, ICCV 2017: section 3.3.
"""

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice

import torch
from torch import Tensor, nn

from hodec.calibration.fit import DAMPING, fit_layer, metric_of
from hodec.calibration.moments import FitMoments
from hodec.calibration.passes import Passes
from hodec.calibration.responses import Responses
from hodec.calibration.sites import Site, Stop, sites_of, survey
from hodec.calibration.walk import give_back
from hodec.errors import ConfigError, DataError
from hodec.formats.layer_types import LAYER_TYPES
from hodec.formats.roles import Role
from hodec.inference import Batch, inference, rereadable, run_batches, uncompiled
from hodec.layers.plain import copied
from hodec.plan.layer import LayerPlan
from hodec.plan.plan import Plan, check_plan

log = logging.getLogger(__name__)

# Batches that stand in the net together; of more, each layer reads them anew, one after the other.
TOGETHER = 16
# Bytes that layers meet in all batches from which freed memory is given back. It takes some seventh of the time of a
# fit of ResNet-20 to 256 images, whose layers meet half of this, and which frees little.
LARGE = 2**25


@torch.no_grad()
def fit_to_data(
    model: nn.Module,
    plan: Plan,
    batches: Iterable[Batch],
    *,
    solver: str = "als",
    damping: float = DAMPING,
    positions: int | None = 64,
    sums: bool = True,
    turns: int = 3,
    output_roots: Mapping[str, Tensor] | None = None,
) -> nn.Module:
    """A copy of the dense model whose planned layers have weights of the planned ranks, fitted to data.

    ``convert(copy, plan)`` makes the small net of it and loses nothing more, but for CP where its iteration does not
    find a weight again. Biases are fitted too; where BatchNorm follows a layer, its running mean takes their place.

    Args:
        model: the dense model the plan was made for; it is left as it was.
        plan: the layers. Those that have no weight of their own which meets patches are projected by their weights, and
            so are those that get no rows of the first batch or of all, with a warning.
        batches: as ``collect_covariances`` takes them. Up to 16 go through both nets together, and what the nets hold
            of them at one layer is in memory; more are read anew for each layer, one batch at a time, and those of an
            iterator, which can be read once, are kept.
        solver, damping: see ``fit_layer``.
        positions: most output positions of a convolution looked at per image and call; None for all.
        sums: whether a layer whose output is summed with another's is fitted to the dense sum.
        turns: how often the outputs wanted in front of a ReLU are adapted; 0: they are those of the dense layer.
        output_roots: layer -> symmetric (O, O), as ``fit_layer`` takes it; see ``collect_output_gradients``.

    Raises:
        ConfigError: a setting out of range.
        DataError: no batch, or one that the model does not run on.

    Examples:
        >>> net = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
        >>> plan = hodec.make_plan(net, 4, method="svd", example_input=torch.zeros(1, 64))
        >>> near = hodec.fit_to_data(net, plan, [torch.randn(32, 64) for _ in range(4)])
        >>> int(torch.linalg.matrix_rank(near[0].weight, rtol=1e-4)), plan["0"].ranks
        (4, (4,))
        >>> small = hodec.convert(near, plan)
    """
    for what, given, least in (("positions", positions, 1), ("turns", turns, 0)):
        if given is not None and given < least:
            free = ", or None for all" * (what == "positions")
            raise ConfigError(f"{what}: {given!r} given; allowed: a whole number from {least}{free}")
    check_plan(plan)
    dense = uncompiled(model)
    near, count, batches = copied(dense), len(plan.example_input().args) or None, rereadable(batches)
    sites = sites_of(dense, near, plan)
    for name, layer in plan.items():
        if name not in {site.name for site in sites} and not layer.computed_from:
            _project(near, name, layer)
    first = list(islice(batches, TOGETHER + 1))
    if not first:
        raise DataError("no batch to fit to: give at least one, a few hundred images are enough")
    with inference(dense), inference(near):
        fitting = _Fitting(solver, damping, turns, output_roots or {})
        stops = survey(sites, dense, near, partial(run_batches, dense, first[:1], count=count), sums=sums)
        met = {site for stop in stops for site in stop.sites}
        for site in sites:
            if site not in met:
                _by_weight(site, "of the first batch")
        walking = partial(Passes, dense, near, count=count, positions=positions)
        while stops:
            if len(first) <= TOGETHER:
                stops = _together(stops, first, walking, fitting)
            else:
                stops = _one_by_one(stops, batches, walking, fitting)
    return near


@dataclass(frozen=True)
class _Fitting:
    """How layers are fitted."""

    solver: str
    damping: float
    turns: int
    output_roots: Mapping[str, Tensor]

    def __call__(self, site: Site, moments: FitMoments, responses: Responses) -> None:
        """Give a layer of the copy its weight."""
        if not moments.count:  # an expert that no token went to
            _by_weight(site, "of these batches")
            return
        weight = LAYER_TYPES[site.layer.layer_type].to_oihw(site.weight.detach())
        fitted = partial(
            fit_layer,
            site.layer,
            weight,
            output_root=self.output_roots.get(site.name),
            metric=metric_of(site.layer, moments, self.damping),
        )
        wanted = moments
        for _ in range(self.turns if site.rectified else 0):
            wanted = responses.towards(fitted(wanted, solver="none"), moments)
        fit = fitted(wanted, solver=self.solver)
        log.info("%s: %.3g of the outputs' variance is missed", site.name, fit.error)
        site.take(fit)


def _blank(site: Site) -> tuple[FitMoments, Responses]:
    return FitMoments(site.layer.shape, constant=site.has_constant), Responses(*site.affine())


def _together(
    stops: list[Stop], batches: Sequence[Batch], walking: Callable[[Sequence[Stop]], Passes], fitting: _Fitting
) -> list[Stop]:
    """Fit layers while all batches go through the net; the stops that are left where it has to begin anew."""
    with walking(stops) as passes:
        for batch in batches:
            passes.start(batch)
        for k, stop in enumerate(stops):
            for one in passes.open:
                one.to(stop)
            if sum(one.held for one in passes.open) >= LARGE:
                give_back()
            for site in stop.sites:
                known = _blank(site)
                for one in passes.open:
                    one.add_to(*known, site)
                fitting(site, *known)
                passes.done(site)
                for one in passes.open:
                    one.renew(site)
            if stop.repeated:  # what is behind its first call depends on it
                return stops[k + 1 :]
    return []


def _one_by_one(
    stops: list[Stop], batches: Iterable[Batch], walking: Callable[[Sequence[Stop]], Passes], fitting: _Fitting
) -> list[Stop]:
    """Fit the layers of the first stop, each from a reading of the data of its own; the stops that are left."""
    for site in stops[0].sites:
        known = _blank(site)
        with walking(stops[:1]) as passes:
            for batch in batches:
                one = passes.start(batch)
                one.to(stops[0])
                one.add_to(*known, site)
                passes.open.remove(one)
                one.leave()
        fitting(site, *known)
    return stops[1:]


def _by_weight(site: Site, data: str) -> None:
    log.warning("%s gets no data %s: projected by its weight", site.name, data)
    site.weight.copy_(site.layer.project(site.weight))


def _project(near: nn.Module, name: str, layer: LayerPlan) -> None:
    parameter = near.get_parameter(layer.parameter(name))
    if layer.role is Role.LAYER:
        parameter.copy_(layer.project(parameter))
