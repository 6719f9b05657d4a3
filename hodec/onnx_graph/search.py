"""The smallest plan of a graph whose loss on held-out data is allowed: ranks by what they do to outputs, then trials.

Every layer gets a table of options whose losses are shares of its own outputs (its weight is whitened by its input's
covariance), times what such a share did to the outputs of the whole net when the layer was decomposed alone. One budget
over all is bisected; each plan is fitted to the data, and judged by running it on data that nothing was fitted to.
"""

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from hodec.calibration.data import Feeds, Samples
from hodec.calibration.fit import DAMPING, Fit, as_fit, fit_layer, fittable, kronecker
from hodec.calibration.moments import FitMoments
from hodec.cost.metric import LATENCY, latency_metric
from hodec.errors import HodecError, PlanError
from hodec.export.runtime import Array
from hodec.onnx_graph.calibrate import Replacement, TrialGraph, batches, moments_of, unmeasured
from hodec.onnx_graph.facts import GraphFacts
from hodec.onnx_graph.judge import Judge, softened, squared_errors
from hodec.onnx_graph.planning import plan_graph
from hodec.onnx_graph.sites import GraphSite
from hodec.options import argument
from hodec.plan.layer import LayerPlan
from hodec.plan.plan import Plan
from hodec.ranks.budget import cost_limits
from hodec.ranks.context import LayerContext, NetContext
from hodec.ranks.planning import PlanSettings
from hodec.ranks.rule import Choice, Limits, RankRule
from hodec.ranks.selection.options import CostLimit, LayerOptions, MethodOptions, RankOption
from hodec.ranks.selection.select import least_costs, select

log = logging.getLogger(__name__)

# Bytes of sums that are in memory at a time, and groups that layers are fitted in, one after the other.
MEMORY, GROUPS = 2**29, 16
# Samples that tell what a layer's error does to the outputs.
SENSITIVITY_SAMPLES = 12
# Trials: of fits to the dense net's inputs, then of fits to those that the compressed net really gives.
QUICK_TRIALS, TRIALS, UPWARD = 6, 4, 4
# Multiply-adds of one product with a metric, of some hundred in alternating least squares, up to which these are
# worth their time: PP-OCRv4's recognition at 0.8 of its multiply-adds took 153 s with them and 9 s without, and
# read 99 and 96 of 100 lines.
REFINED_WORK = 3e7
# Shares of the dense cost: how fine the bisection is, and the least saving that is worth a file.
FINE, LEAST_SAVING = 0.02, 0.01

HURTS = "decomposed, it loses too much on held-out data"

Progress = Callable[[str, int, int], None]
"""Told what is done, how many steps of it are, and how many there will be."""

TARGETS = {"latency": LATENCY, "macs": "macs", "size": "params"}
"""What is made small -> the metric that is limited."""


@dataclass(frozen=True)
class ByData(RankRule):
    """A rule whose choice was made elsewhere: by a search over data."""

    name = "data"
    reads_weights = True
    may_enlarge = False

    methods: tuple[str, ...] = argument(())
    chooser: Callable[[Mapping[str, LayerContext], NetContext], dict[str, Choice]] | None = argument()

    def methods_for(self, method: str) -> tuple[str, ...]:
        """Those of the search."""
        return self.methods or (method,)

    def choose(self, layers: Mapping[str, LayerContext], net: NetContext) -> dict[str, Choice]:
        """What the search chose."""
        if self.chooser is None:
            raise PlanError("rule data belongs to a search")
        return self.chooser(layers, net)


@dataclass(frozen=True)
class Trial:
    """A plan that was fitted and judged.

    Attributes:
        share: of the dense cost that it was allowed.
        cost: share of the dense cost that it takes.
        tried: layer -> its weight and shift.
    """

    share: float
    plan: Plan
    tried: Mapping[str, Replacement]
    score: float
    cost: float


@dataclass
class Search:
    """A search over one graph and its data.

    Attributes:
        sites: the layers that can be decomposed, in the order of the graph.
        target: a key of ``TARGETS``.
        limits: of ranks.
    """

    facts: GraphFacts
    sites: Mapping[str, GraphSite]
    net: TrialGraph
    fit: Samples
    judge: Judge
    methods: tuple[str, ...]
    target: str = "latency"
    settings: PlanSettings = field(default_factory=PlanSettings)
    limits: Limits = field(default_factory=Limits)
    progress: Progress = lambda what, done, total: None
    options: dict[str, LayerOptions] = field(default_factory=dict)
    costs: list[CostLimit] = field(default_factory=list)
    trials: list[Trial] = field(default_factory=list)
    _moments: dict[str, FitMoments] = field(default_factory=dict)
    _allowed: float = 1.0

    # -- tables --------------------------------------------------------------------------------------------------

    def _choose(self, layers: Mapping[str, LayerContext], net: NetContext) -> dict[str, Choice]:
        """The choice within the allowed share; tables are made at the first call."""
        if not self.options:
            self.costs = [self._limit(layers, net)]
            self._tabulate(layers)
        limits = [replace(one, limit=one.limit * self._allowed) for one in self.costs]
        selection = select(self.options, limits)
        if selection is None:
            raise PlanError(f"no ranks keep {self._allowed:.1%} of the dense {TARGETS[self.target]}")
        dense = "decomposing it loses more than others do for what it saves"
        return {
            name: Choice(one.ranks, method=one.method) if one.ranks else Choice(None, reason=dense)
            for name, one in selection.options.items()
        }

    def _limit(self, layers: Mapping[str, LayerContext], net: NetContext) -> CostLimit:
        """The whole cost of the dense file in the target's metric."""
        if TARGETS[self.target] != LATENCY:
            return cost_limits({TARGETS[self.target]: 1.0}, layers, net)[0]
        dense = [layer.dense for layer in layers.values()]
        self.progress("timing layers", 0, len(dense))
        metric = latency_metric(net.times, None, (), dense)
        rest = metric.remainder(net.cost, dense)
        return CostLimit(metric, rest + sum(map(metric.dense, dense)), rest)

    def _tabulate(self, layers: Mapping[str, LayerContext]) -> None:
        calls = self._few()
        wanted = [softened(self.net.run(call)) for call in calls]
        done = 0
        for group in self._memory_groups(list(layers)):
            moments = self._dense_moments(group)
            for name in group:
                self.progress("what each layer does to the outputs", done := done + 1, len(layers))
                self._tabulate_layer(layers[name], moments.get(name), calls, wanted)

    def whitened(self, layers: Mapping[str, LayerContext]) -> dict[str, LayerContext]:
        """Layers whose weights' distances are those of their outputs."""
        found = {}
        for group in self._memory_groups(list(layers)):
            moments = self._dense_moments(group)
            for name in group:
                several = [_whitened(one, moments.get(name)) for one in (layers[name], *layers[name].others)]
                found[name] = replace(several[0], others=tuple(several[1:]))
        return found

    def _few(self) -> Sequence[Feeds]:
        """The first calls, as many as hold the samples by which layers are compared."""
        before = np.cumsum([0, *self.fit.counts])[:-1]
        return self.fit.part(k for k, count in enumerate(before) if count < SENSITIVITY_SAMPLES).calls

    def _tabulate_layer(
        self, layer: LayerContext, moments: FitMoments | None, calls: Sequence[Feeds], wanted: Sequence[Sequence[Array]]
    ) -> None:
        contexts = [_whitened(one, moments) for one in (layer, *layer.others)]
        tables = [MethodOptions(one, self.costs, limits=self.limits) for one in contexts]
        options = LayerOptions(tables)
        middle = _middle(options)
        weight = 1.0
        if middle is not None:
            context = next(one for one in (layer, *layer.others) if one.method == middle.method)
            tried = {layer.name: _truncated(context.planned(middle.ranks or ()), layer.site.weight, moments)}
            found = [softened(self.net.run(call, tried=tried)) for call in calls]
            errors = squared_errors(found, wanted)
            weight = min(1e6, sum(errors) / max(1, len(errors))) / max(middle.loss, 1e-9)
        log.info("%s: weight %.3g of its outputs' squared error", layer.name, weight)
        weighted = [MethodOptions(one, self.costs, weight=weight, limits=self.limits) for one in contexts]
        self.options[layer.name] = LayerOptions(weighted)

    # -- sums of the dense net -----------------------------------------------------------------------------------

    def _memory_groups(self, names: Sequence[str]) -> list[list[str]]:
        """Neighbours whose sums are in memory together."""
        groups: list[list[str]] = [[]]
        used = 0
        for name in names:
            size = _bytes(self.sites[name])
            if groups[-1] and used + size > MEMORY:
                groups.append([])
                used = 0
            groups[-1].append(name)
            used += size
        return groups

    def _dense_moments(self, names: Sequence[str]) -> dict[str, FitMoments]:
        """Sums on the dense net's own inputs; kept where all layers' fit into memory."""
        wanted = [name for name in names if name not in self._moments and self._measurable(name)]
        found = moments_of(self.net, wanted, self.fit.calls) if wanted else {}
        if sum(_bytes(site) for site in self.sites.values()) <= MEMORY:
            self._moments |= found
        self.net.forget()
        return {name: self._moments.get(name) or found[name] for name in names if self._measurable(name)}

    def _measurable(self, name: str) -> bool:
        return not unmeasured(self.sites[name], self.net.graph)

    # -- trials --------------------------------------------------------------------------------------------------

    def plan(self, share: float) -> Plan:
        """The plan that loses least at this share of the dense cost.

        Raises:
            PlanError: no ranks are that cheap, or no layer is decomposed.
        """
        self._allowed = share
        rule = ByData(methods=self.methods, chooser=self._choose)
        return plan_graph(self.facts, rule, self.methods[0], self.settings)[0]

    def fitted(self, plan: Plan, *, sequential: bool, words: str = "fitting") -> dict[str, Replacement]:
        """The weights of the planned ranks that meet the dense outputs best, with what is added to their outputs.

        Args:
            sequential: on the inputs that the layers before, as they are compressed, really give.
        """
        tried: dict[str, Replacement] = {}
        names = list(plan)
        groups = list(batches(names, GROUPS)) if sequential else self._memory_groups(names)
        for k, group in enumerate(groups):
            if sequential:
                measured = [name for name in group if self._measurable(name)]
                moments = moments_of(self.net, measured, self.fit.calls, tried)
            else:
                moments = self._dense_moments(group)
            for name in group:
                tried[name] = self._fit(name, plan[name], moments.get(name), refined=sequential)
            self.progress(words, k + 1, len(groups))
            self.net.forget()
        return tried

    def _fit(self, name: str, layer: LayerPlan, moments: FitMoments | None, *, refined: bool) -> Replacement:
        work = layer.shape[0] * math.prod(layer.shape[1:]) ** 2
        solver = "als" if refined and work <= REFINED_WORK else "none"
        weight = self.sites[name].layer.weight
        if moments is None or not fittable(layer):
            return _truncated(layer, weight, None)
        try:
            return _replacement(fit_layer(layer, weight, moments, solver=solver))
        except HodecError as error:
            raise error.prefixed(f"{name}: ") from error

    def trial(self, share: float, *, sequential: bool) -> Trial | None:
        """A plan at this share, fitted and judged; None where there is none."""
        try:
            plan = self.plan(share)
        except PlanError as error:
            log.info("share %.3f: %s", share, error)
            return None
        words = f"fitting at {share:.0%} of the dense {self.target}"
        return self.judged(share, plan, self.fitted(plan, sequential=sequential, words=words))

    def judged(self, share: float, plan: Plan, tried: Mapping[str, Replacement]) -> Trial:
        """A plan with its weights, judged by running the trial graph."""
        score = self.judge.score(lambda feeds: self.net.run(feeds, tried=tried))
        trial = Trial(share, plan, dict(tried), score, self._cost(plan))
        self.trials.append(replace(trial, tried={}))
        log.info("share %.3f: score %.5g (dense %.5g)", share, score, self.judge.dense)
        return trial

    def _cost(self, plan: Plan) -> float:
        """Share of the dense cost that a plan takes."""
        metric = self.costs[0].metric
        saved = sum(metric.dense(layer) - metric.factorized(layer) for layer in plan.values())
        return 1.0 - saved / self.costs[0].limit

    def best(self) -> Trial | None:
        """The cheapest trial found that loses no more than is allowed; None if nothing pays."""
        low, high = self._quick()
        best = failed = None
        share = high if high < 1 else (low + 1) / 2
        for _ in range(UPWARD):  # up, until one is accepted
            trial = self.trial(share, sequential=True)
            if trial is not None and self.accepts(trial):
                best = trial
                break
            failed, low, share = trial or failed, max(low, share), (share + 1) / 2
        if best is None:
            return self._mended(failed, None)
        low = max(self._least(), min(low, best.share - 2 * FINE), 0.6 * best.share if failed is None else low)
        for _ in range(TRIALS):  # down, as the fit to the real inputs may allow more
            if best.share - low < FINE:
                break
            trial = self.trial((low + best.share) / 2, sequential=True)
            if trial is not None and self.accepts(trial):
                best = trial
            else:
                failed, low = trial or failed, (low + best.share) / 2
        return self._mended(failed, best)

    def accepts(self, trial: Trial) -> bool:
        """Whether it loses no more than is allowed, and saves enough to be worth a file."""
        return trial.cost <= 1 - LEAST_SAVING and self.judge.accepts(trial.score)

    def _quick(self) -> tuple[float, float]:
        """Shares that are too small and that do, by fits to the dense net's inputs."""
        self._allowed = 1.0
        self._prepare()
        low, high = self._least(), 1.0
        for _ in range(QUICK_TRIALS):
            if high - low < FINE:
                break
            share = (low + high) / 2
            trial = self.trial(share, sequential=False)
            low, high = (low, share) if trial is not None and self.accepts(trial) else (share, high)
        return low, high

    def _prepare(self) -> None:
        """Make the tables, which the first plan does."""
        try:
            self.plan(1.0)
        except PlanError:
            if not self.options:
                raise  # there is no layer at all

    def _least(self) -> float:
        (least,) = least_costs(self.options, self.costs).values()
        return least / self.costs[0].limit

    def _mended(self, failed: Trial | None, best: Trial | None) -> Trial | None:
        """A failed trial with those layers dense again that hurt most, if it is accepted then and costs less."""
        if failed is None or not failed.tried:
            return best
        tried, plan = dict(failed.tried), failed.plan
        for name in self._by_harm(failed)[: len(tried) - 1]:
            del tried[name]
            plan = plan.without(name, HURTS)
            if self._cost(plan) >= (best.cost if best else 1 - LEAST_SAVING):
                break
            trial = self.judged(failed.share, plan, tried)
            if self.accepts(trial):
                return trial
        return best

    def _by_harm(self, trial: Trial) -> list[str]:
        """The layers, the one first whose return to dense takes most off the outputs' error for what it costs."""
        calls = self._few()
        wanted = [softened(self.net.run(call)) for call in calls]
        metric, gains = self.costs[0].metric, {}

        def error(tried: Mapping[str, Replacement]) -> float:
            found = [softened(self.net.run(call, tried=tried)) for call in calls]
            return min(1e6, sum(squared_errors(found, wanted)))

        whole = error(trial.tried)
        for k, name in enumerate(trial.tried):
            self.progress("which layers hurt", k + 1, len(trial.tried))
            layer = trial.plan[name]
            less = whole - error({other: one for other, one in trial.tried.items() if other != name})
            gains[name] = less / max(1e-9, metric.dense(layer) - metric.factorized(layer))
        return sorted(gains, key=lambda name: -gains[name])


def _bytes(site: GraphSite) -> int:
    """Bytes of a layer's sums."""
    out, inputs = site.layer.shape[0], math.prod(site.layer.shape[1:])
    return 8 * (inputs + out) ** 2


def _whitened(layer: LayerContext, moments: FitMoments | None) -> LayerContext:
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
    """The option whose cost is nearest to half of the dense one."""
    half = options.dense.costs[0] / 2
    several = [one for one in options.options() if one.ranks is not None]
    return min(several, key=lambda one: abs(one.costs[0] - half), default=None)


@torch.no_grad()
def _truncated(layer: LayerPlan, weight: Tensor, moments: FitMoments | None) -> Replacement:
    """The nearest weight of the planned ranks, by its outputs where there are sums of its inputs."""
    if moments is None or not layer.format.mixable(layer.shape, layer.modes):
        return Replacement(layer.format.project(weight, layer.ranks, layer.modes), torch.zeros(layer.shape[0]))
    covariance = kronecker(layer, _damped(moments))
    nearest = layer.format.project(covariance.apply(weight), layer.ranks, layer.modes)
    return _replacement(as_fit(covariance.undo(nearest), moments))


def _replacement(fit: Fit) -> Replacement:
    return Replacement(fit.weight.float(), fit.bias)
