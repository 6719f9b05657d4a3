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
from hodec.calibration.fit import DAMPING, Fit, as_fit, fittable, kronecker, target_weight
from hodec.calibration.input_covariance import InputCovariance
from hodec.calibration.moments import FitMoments
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

# Bytes of sums that are made at a time, and those of the dense net that are kept.
MEMORY, KEPT = 2**29, 3 * 2**29
# Samples that tell what a layer's error does to the outputs: at least and at most, and seconds that it may take.
FEW, SEVERAL, SENSITIVITY_SECONDS = 8, 32, 60.0
# Share of a layer's cost at which its error is made: near to what budgets choose.
SENSITIVE_SHARE = 0.6

Progress = Callable[[str, int, int], None]
"""Told what is done, how many steps of it are, and how many there will be."""


@dataclass
class Sensitivity:
    """The tables of a file's layers, and the dense file's activations that they are made from.

    Attributes:
        saved: tables that are known.
        rows: see ``Rows``; of the layers that were looked at.
    """

    net: TrialGraph
    fit: Samples
    progress: Progress = lambda what, done, total: None
    saved: Saved = field(default_factory=Saved)
    rows: Rows = field(default_factory=dict)
    _moments: dict[str, FitMoments] = field(default_factory=dict)
    _problems: dict[tuple[str, str, Modes], tuple[InputCovariance, Tensor]] = field(default_factory=dict)

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
                spectra = {_key(one): truncation_spectra(whitened(one, moments.get(name))) for one in several}
                tables = [MethodOptions(one, costs, limits=limits, spectra=spectra[_key(one)]) for one in several]
                weight = self._weight(LayerOptions(tables), several, moments.get(name), (calls, wanted))
                log.info("%s: weight %.3g of its outputs' squared error", name, weight)
                self.saved.layers[name] = _to_json(weight, spectra)
            self.saved.write()
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
        moments: FitMoments | None,
        runs: tuple[Sequence[Feeds], Sequence[Sequence[Array]]],
    ) -> float:
        """Squared relative error of the file's outputs, over that of the layer's, where it alone is decomposed."""
        middle, (calls, wanted) = _middle(options), runs
        if middle is None:
            return 1.0
        layer = next(one for one in several if one.method == middle.method)
        tried = {layer.name: truncated(layer.planned(middle.ranks or ()), layer.site.weight, moments)}
        errors = squared_errors([softened(self.net.run(call, tried=tried)) for call in calls], wanted)
        return min(1e6, sum(errors) / max(1, len(errors))) / max(middle.loss, 1e-9)

    def whitened(self, layers: Mapping[str, LayerContext]) -> dict[str, LayerContext]:
        """Layers whose weights' distances are those of their outputs."""
        found = {}
        for group in self.memory_groups(list(layers)):
            moments = self.dense_moments(group)
            for name in group:
                several = [whitened(one, moments.get(name)) for one in (layers[name], *layers[name].others)]
                found[name] = replace(several[0], others=tuple(several[1:]))
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
        """Sums of layers' inputs and outputs in the dense file; kept where all layers' fit into memory."""
        names = [name for name in names if self.is_measurable(name)]
        wanted = [name for name in names if name not in self._moments]
        rows, found = dense_rows(self.net, wanted, self.fit.calls) if wanted else (Rows(), {})
        self.rows |= rows
        if sum(map(_bytes, self.net.sites.values())) <= KEPT:
            self._moments |= found
        return {name: self._moments.get(name) or found[name] for name in names}

    @torch.no_grad()
    def projected(self, name: str, layer: LayerPlan, moments: FitMoments, *, dense: bool) -> Replacement:
        """A layer fitted as ``fit_layer`` does without a solver; what does not depend on ranks is computed once.

        Args:
            dense: whether the moments are those of the dense file, so that they stay the same.
        """
        weight, key = self.net.sites[name].layer.weight, (name, layer.method, layer.modes)
        found = self._problems.get(key) if dense else None
        if found is None:
            covariance = kronecker(layer, _damped(moments))
            found = covariance, covariance.apply(target_weight(weight, moments))
            if dense and sum(map(_bytes, self.net.sites.values())) <= KEPT:
                self._problems[key] = found
        covariance, wanted = found
        near = covariance.undo(layer.format.project(wanted, layer.ranks, layer.modes))
        return replacement(as_fit(near, moments))

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


def whitened(layer: LayerContext, moments: FitMoments | None) -> LayerContext:
    """The layer with a weight whose distances are those of its outputs."""
    dense = layer.dense
    if moments is None or not fittable(dense) or not dense.format.mixable(dense.shape, dense.modes):
        return layer
    covariance = kronecker(dense, _damped(moments))
    weight = covariance.apply(layer.site.weight).to(layer.site.weight.dtype)
    return replace(layer, site=replace(layer.site, weight=weight))


def _damped(moments: FitMoments) -> Tensor:
    covariance = moments.centred()[0]
    covariance.diagonal().add_(DAMPING * max(float(covariance.diagonal().mean()), 1e-30))
    return covariance


def _middle(options: LayerOptions) -> RankOption | None:
    """The option whose cost is nearest to the share of the dense one at which layers are compared."""
    half = options.dense.costs[0] * SENSITIVE_SHARE
    several = [one for one in options.options() if one.ranks is not None]
    return min(several, key=lambda one: abs(one.costs[0] - half), default=None)


@torch.no_grad()
def truncated(layer: LayerPlan, weight: Tensor, moments: FitMoments | None) -> Replacement:
    """The nearest weight of the planned ranks, by its outputs where there are sums of its inputs."""
    if moments is None or not layer.format.mixable(layer.shape, layer.modes):
        return Replacement(layer.format.project(weight, layer.ranks, layer.modes), torch.zeros(layer.shape[0]))
    covariance = kronecker(layer, _damped(moments))
    nearest = layer.format.project(covariance.apply(weight), layer.ranks, layer.modes)
    return replacement(as_fit(covariance.undo(nearest), moments))


def replacement(fit: Fit) -> Replacement:
    """A fit as what a layer is tried with."""
    return Replacement(fit.weight.float(), fit.bias)
