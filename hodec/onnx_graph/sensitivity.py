"""What errors of layers do to a file's outputs: one table a layer, from the dense file's own activations."""

import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from hodec.calibration.data import Feeds, Samples
from hodec.calibration.fit import DAMPING, fit_dtype, fittable, kronecker, target_weight
from hodec.calibration.input_covariance import AxisRoot, InputCovariance
from hodec.calibration.moments import FitMoments
from hodec.calibration.walk import give_back
from hodec.errors import HodecError
from hodec.export.runtime import Array
from hodec.formats.modes import Modes
from hodec.io.shards import grouped
from hodec.onnx_graph.calibrate import Replacement, Rows, TrialGraph, dense_rows, unmeasured
from hodec.onnx_graph.judge import softened, squared_errors
from hodec.onnx_graph.saved import Saved
from hodec.onnx_graph.sites import GraphSite
from hodec.plan.layer import LayerPlan
from hodec.ranks.context import LayerContext
from hodec.ranks.rule import Limits
from hodec.ranks.selection.options import CostLimit, LayerOptions, MethodOptions, RankOption
from hodec.ranks.spectra import Spectrum, truncation_spectra

log = logging.getLogger(__name__)

# Bytes of sums that are made at a time, and of what is kept of all layers' for quick fits.
MEMORY, KEPT = 2**29, 3 * 2**29
# Samples that tell what a layer's error does to the outputs: at least and at most, and seconds that it may take.
FEW, SEVERAL, SENSITIVITY_SECONDS = 8, 32, 60.0
# Share of a layer's cost at which its error is made: near to what budgets choose.
SENSITIVE_SHARE = 0.6

Progress = Callable[[str, int, int], None]
"""Told what is done, how many steps of it are, and how many there will be."""


@dataclass(frozen=True)
class Problem:
    """What fits without a solver need of a layer's sums, whatever the ranks; it takes no more memory than they do.

    Attributes:
        covariance: of the layer's inputs, as far as its format can mix them.
        wanted: the best weight of any rank, whitened, (O, I, ..).
        means: of its patches, (n,), and of its outputs, (O,).
    """

    covariance: InputCovariance
    wanted: Tensor
    means: tuple[Tensor, Tensor]

    def kept(self) -> "Problem":
        """The problem in the type that fits of its size are computed in: of wide layers float32, in half the memory."""
        dtype = fit_dtype(math.prod(self.covariance.sizes))
        roots = (AxisRoot(one.axes, one.root.to(dtype)) for one in self.covariance.roots)
        return Problem(InputCovariance(self.covariance.sizes, tuple(roots)), self.wanted.to(dtype), self.means)

    def fitted(self, layer: LayerPlan) -> Replacement:
        """The layer fitted as ``fit_layer`` does without a solver."""
        return self._nearest(layer, self.wanted)

    def truncated(self, layer: LayerPlan, weight: Tensor) -> Replacement:
        """The weight of the planned ranks whose outputs are nearest to those of ``weight``."""
        return self._nearest(layer, self.covariance.apply(weight))

    @torch.no_grad()
    def _nearest(self, layer: LayerPlan, whitened: Tensor) -> Replacement:
        near = self.covariance.undo(layer.format.project(whitened, layer.ranks, layer.modes))
        x, y = self.means
        return Replacement(near.float(), y - near.double().flatten(1) @ x)


@dataclass
class Sensitivity:
    """The tables of a file's layers, and what of the dense file's activations they are made from.

    Attributes:
        saved: tables that are known.
        rows: see ``Rows``; of the layers that were looked at.
    """

    net: TrialGraph
    fit: Samples
    progress: Progress = lambda what, done, total: None
    saved: Saved = field(default_factory=Saved)
    rows: Rows = field(default_factory=dict)
    _problems: dict[tuple[str, str, Modes], Problem] = field(default_factory=dict)

    def options(
        self, layers: Mapping[str, LayerContext], costs: Sequence[CostLimit], limits: Limits
    ) -> dict[str, LayerOptions]:
        """The options of each layer: losses are shares of its outputs' energy, times what these do to the file's.

        Tables that are not known are made and saved on the way, so that a search that was stopped goes on there.
        """
        missing = [name for name, one in layers.items() if not self._knows(one)]
        calls = self.few(len(missing)) if missing else ()
        wanted = [softened(self.net.run(call)) for call in calls]
        done = 0
        for group in self.memory_groups(missing):
            moments = self.dense_moments(group)
            for name in group:
                self.progress("what each layer does to the outputs", done := done + 1, len(missing))
                several = (layers[name], *layers[name].others)
                problems = self._problems_of(name, [one.dense for one in several], moments.pop(name, None))
                spectra = {
                    _key(one): truncation_spectra(whitened(one, None if known is None else known.covariance))
                    for one, known in zip(several, problems, strict=True)
                }
                tables = [MethodOptions(one, costs, limits=limits, spectra=spectra[_key(one)]) for one in several]
                weight = self._weight(LayerOptions(tables), several, problems, (calls, wanted))
                log.info("%s: weight %.3g of its outputs' squared error", name, weight)
                self.saved.layers[name] = _to_json(weight, spectra)
            self.saved.write()
            give_back()
        return {name: self._options(one, costs, limits) for name, one in layers.items()}

    def _options(self, layer: LayerContext, costs: Sequence[CostLimit], limits: Limits) -> LayerOptions:
        weight, spectra = _from_json(self.saved.layers[layer.name])
        several = (layer, *layer.others)
        return LayerOptions(
            [MethodOptions(one, costs, weight=weight, limits=limits, spectra=spectra[_key(one)]) for one in several]
        )

    def _knows(self, layer: LayerContext) -> bool:
        tables = self.saved.layers.get(layer.name, {}).get("spectra", {})
        return all(_key(one) in tables for one in (layer, *layer.others))

    def _weight(
        self,
        options: LayerOptions,
        several: Sequence[LayerContext],
        problems: Sequence[Problem | None],
        runs: tuple[Sequence[Feeds], Sequence[Sequence[Array]]],
    ) -> float:
        """Squared relative error of the file's outputs, over that of the layer's, where it alone is decomposed."""
        middle, (calls, wanted) = _middle(options), runs
        if middle is None:
            return 1.0
        layer, problem = next(pair for pair in zip(several, problems, strict=True) if pair[0].method == middle.method)
        tried = {layer.name: truncated(layer.planned(middle.ranks or ()), layer.site.weight, problem)}
        errors = squared_errors([softened(self.net.run(call, tried=tried)) for call in calls], wanted)
        return min(1e6, sum(errors) / max(1, len(errors))) / max(middle.loss, 1e-9)

    def whitened(self, layers: Mapping[str, LayerContext]) -> dict[str, LayerContext]:
        """Layers whose weights' distances are those of their outputs."""
        found = {}
        for group in self.memory_groups(list(layers)):
            moments = self.dense_moments(group)
            for name in group:
                sums = moments.pop(name, None)
                xx = None if sums is None else _damped(sums)
                several = (layers[name], *layers[name].others)
                first, *others = (whitened(one, None if xx is None else kronecker(one.dense, xx)) for one in several)
                found[name] = replace(first, others=tuple(others))
        return found

    def few(self, layers: int) -> Sequence[Feeds]:
        """The first calls, as many as hold the samples by which layers are compared in reasonable time."""
        before = np.cumsum([0, *self.fit.counts])[:-1]
        self.net.run(self.fit.calls[0])
        began = time.perf_counter()
        self.net.run(self.fit.calls[0])
        taken = (time.perf_counter() - began) / self.fit.counts[0]
        most = min(SEVERAL, max(FEW, int(SENSITIVITY_SECONDS / (layers * taken))))
        return self.fit.part(k for k, count in enumerate(before) if count < most).calls

    def memory_groups(self, names: Sequence[str]) -> list[list[str]]:
        """Neighbours whose sums are in memory together."""
        return grouped({name: _bytes(self.net.sites[name]) for name in names}, MEMORY)

    def dense_moments(self, names: Sequence[str]) -> dict[str, FitMoments]:
        """Sums of layers' inputs and outputs in the dense file."""
        names = [name for name in names if self.is_measurable(name)]
        rows, found = dense_rows(self.net, names, self.fit.calls) if names else (Rows(), {})
        self.rows |= rows
        return found

    def problems(self, layers: Mapping[str, LayerPlan]) -> dict[str, Problem]:
        """The layers' problems in the dense file, of those that have one; what is not kept is made."""
        found = {name: self._problems.get((name, one.method, one.modes)) for name, one in layers.items()}
        moments = self.dense_moments([name for name, one in found.items() if one is None])
        for name in list(moments):
            (found[name],) = self._problems_of(name, [layers[name]], moments.pop(name))
        return {name: one for name, one in found.items() if one is not None}

    def _problems_of(
        self, name: str, layers: Sequence[LayerPlan], moments: FitMoments | None
    ) -> Sequence[Problem | None]:
        """A layer's problem for each method, from its sums in the dense file; kept where all layers' fit in."""
        if moments is None or not all(map(fittable, layers)):
            return [None] * len(layers)
        try:
            found = problems_of(layers, self.net.sites[name].layer.weight, moments)
        except HodecError as error:
            raise error.prefixed(f"{name}: ") from error
        if sum(map(_bytes, self.net.sites.values())) <= KEPT:
            ways = [(name, one.method, one.modes) for one in layers]
            self._problems |= {way: one.kept() for way, one in zip(ways, found, strict=True)}
        return found

    def forget(self) -> None:
        """Free what is kept for quick fits."""
        self._problems.clear()
        give_back()

    def is_measurable(self, name: str) -> bool:
        """Whether rows of the layer's input can be had."""
        return not unmeasured(self.net.sites[name], self.net.graph)


def _key(layer: LayerContext) -> str:
    """What a table is of, beside its layer."""
    return f"{layer.method} {list(layer.modes.inputs)} {list(layer.modes.outputs)}"


def _to_json(weight: float, spectra: Mapping[str, Sequence[Spectrum]]) -> dict[str, object]:
    tables = {name: [[one.position, one.energy.tolist()] for one in each] for name, each in spectra.items()}
    return {"weight": weight, "spectra": tables}


def _from_json(table: Mapping[str, object]) -> tuple[float, dict[str, list[Spectrum]]]:
    tables: Mapping[str, list[tuple[int, list[float]]]] = table["spectra"]  # type: ignore[assignment]
    spectra = {
        name: [Spectrum(position, torch.tensor(energy, dtype=torch.float64)) for position, energy in each]
        for name, each in tables.items()
    }
    return float(table["weight"]), spectra  # type: ignore[arg-type]


def _bytes(site: GraphSite) -> int:
    """Bytes of a layer's sums."""
    out, inputs = site.layer.shape[0], math.prod(site.layer.shape[1:])
    return 8 * inputs * (inputs + out)


def whitened(layer: LayerContext, covariance: InputCovariance | None) -> LayerContext:
    """The layer with a weight whose distances are those of its outputs."""
    if covariance is None or not fittable(layer.dense) or not covariance.roots:
        return layer
    weight = covariance.apply(layer.site.weight).to(layer.site.weight.dtype)
    return replace(layer, site=replace(layer.site, weight=weight))


def _damped(moments: FitMoments) -> Tensor:
    covariance = moments.covariance()
    covariance.diagonal().add_(DAMPING * max(float(covariance.diagonal().mean()), 1e-30))
    return covariance


def _middle(options: LayerOptions) -> RankOption | None:
    """The option whose cost is nearest to the share of the dense one at which layers are compared."""
    half = options.dense.costs[0] * SENSITIVE_SHARE
    several = [one for one in options.options() if one.ranks is not None]
    return min(several, key=lambda one: abs(one.costs[0] - half), default=None)


@torch.no_grad()
@torch.no_grad()
def problems_of(layers: Sequence[LayerPlan], weight: Tensor, moments: FitMoments) -> list[Problem]:
    """The problem of a layer for each of several methods."""
    best, xx, means = target_weight(weight, moments), _damped(moments), moments.means()
    covariances = [kronecker(one, xx) for one in layers]
    return [Problem(one, one.apply(best), means) for one in covariances]


@torch.no_grad()
def truncated(layer: LayerPlan, weight: Tensor, problem: Problem | None = None) -> Replacement:
    """The nearest weight of the planned ranks, by its outputs where its problem is known."""
    if problem is None or not problem.covariance.roots:
        return Replacement(layer.format.project(weight, layer.ranks, layer.modes), torch.zeros(layer.shape[0]))
    return problem.truncated(layer, weight)
