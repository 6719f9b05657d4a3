"""The smallest plan of a graph whose loss on held-out data is allowed: ranks by what they do to outputs, then trials.

Every layer gets a table of options whose losses are shares of its own outputs (its weight is whitened by its input's
covariance), times what such a share did to the outputs of the whole net when the layer was decomposed alone. One budget
over all is bisected; each plan is fitted to the data, and judged by running it on data that nothing was fitted to.
"""

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from hodec.calibration.data import Samples
from hodec.calibration.fit import fit_layer, fittable
from hodec.calibration.moments import FitMoments
from hodec.cost.metric import LATENCY, latency_metric
from hodec.errors import HodecError, PlanError
from hodec.onnx_graph.calibrate import Replacement, TrialGraph, batches, tried_moments
from hodec.onnx_graph.chance import Loss
from hodec.onnx_graph.facts import GraphFacts
from hodec.onnx_graph.judge import Judge, softened, squared_errors
from hodec.onnx_graph.planning import plan_graph
from hodec.onnx_graph.sensitivity import Sensitivity, problems_of, truncated
from hodec.onnx_graph.sites import GraphSite
from hodec.options import argument
from hodec.plan.layer import LayerPlan
from hodec.plan.plan import Plan
from hodec.ranks.budget import cost_limits
from hodec.ranks.context import LayerContext, NetContext
from hodec.ranks.planning import PlanSettings
from hodec.ranks.rule import Choice, Limits, RankRule
from hodec.ranks.selection.options import CostLimit, LayerOptions
from hodec.ranks.selection.select import least_costs, select

log = logging.getLogger(__name__)

# Groups that layers are fitted in, one after the other.
GROUPS = 16
# Trials: of fits to the dense net's inputs, then of fits to those that the compressed net really gives.
QUICK_TRIALS, TRIALS, UPWARD = 6, 4, 4
# Multiply-adds of one product with a metric, of some hundred in alternating least squares, up to which these are
# worth their time: PP-OCRv4's recognition at 0.8 of its multiply-adds took 153 s with them and 9 s without, and
# read 99 and 96 of 100 lines.
REFINED_WORK = 3e7
# How far below an accepted share others are tried: fits in order keep more than quick ones promise.
LOWER = 0.7
# Shares of the dense cost: how fine the bisection is, and the least saving that is worth a file.
FINE, LEAST_SAVING = 0.02, 0.01

HURTS = "decomposed, it loses too much on held-out data"

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
        loss: on held-out data, and what that says of other inputs.
        tried: layer -> its weight and shift.
    """

    share: float
    plan: Plan
    tried: Mapping[str, Replacement]
    loss: Loss
    cost: float

    @property
    def score(self) -> float:
        """On held-out data."""
        return self.loss.score


@dataclass
class Search:
    """A search over one graph and its data.

    Attributes:
        sites: the layers that can be decomposed, in the order of the graph.
        target: a key of ``TARGETS``.
        limits: of ranks.
        scores_all: whether a trial that has lost too much is scored to the end all the same, to be drawn.
    """

    facts: GraphFacts
    sites: Mapping[str, GraphSite]
    tables: Sensitivity
    judge: Judge
    methods: tuple[str, ...]
    target: str = "latency"
    settings: PlanSettings = field(default_factory=PlanSettings)
    limits: Limits = field(default_factory=Limits)
    options: dict[str, LayerOptions] = field(default_factory=dict)
    costs: list[CostLimit] = field(default_factory=list)
    trials: list[Trial] = field(default_factory=list)
    scores_all: bool = False
    _allowed: float = 1.0

    @property
    def net(self) -> TrialGraph:
        """The graph that is run."""
        return self.tables.net

    @property
    def fit(self) -> Samples:
        """The data that is fitted to."""
        return self.tables.fit

    # -- tables --------------------------------------------------------------------------------------------------

    def _choose(self, layers: Mapping[str, LayerContext], net: NetContext) -> dict[str, Choice]:
        """The choice within the allowed share; tables are made at the first call."""
        if not self.options:
            self.costs = [self._limit(layers, net)]
            self.options = self.tables.options(layers, self.costs, self.limits)
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
        self.tables.progress("timing layers", 0, len(dense))
        metric = latency_metric(net.times, None, (), dense)
        rest = metric.remainder(net.cost, dense)
        return CostLimit(metric, rest + sum(map(metric.dense, dense)), rest)

    def whole(self) -> Trial | None:
        """The file with all its layers dense; None where none can be decomposed."""
        try:
            plan = self.plan((self._least() + 1) / 2)
        except PlanError:
            return None
        for name in list(plan):
            plan = plan.without(name, HURTS)
        return Trial(1.0, plan, {}, Loss(self.judge.dense, 0.0, 0.0), 1.0)

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
        unseen = [name for name in names if name not in self.tables.rows] if sequential else []
        for group in self.tables.memory_groups(unseen):
            self.tables.dense_moments(group)
        groups = list(batches(names, GROUPS)) if sequential else self.tables.memory_groups(names)
        for k, group in enumerate(groups):
            if sequential:
                measured = [name for name in group if self.tables.is_measurable(name)]
                moments = tried_moments(self.net, self.tables.rows, measured, self.fit.calls, tried)
                tried |= {name: self._refined(name, plan[name], moments.pop(name, None)) for name in group}
            else:
                tried |= self._quick({name: plan[name] for name in group})
            self.tables.progress(words, k + 1, len(groups))
        return tried

    def _quick(self, layers: Mapping[str, LayerPlan]) -> dict[str, Replacement]:
        """Layers fitted to the dense file's activations, without a solver."""
        problems = self.tables.problems(layers)
        return {
            name: problems[name].fitted(layer) if name in problems else truncated(layer, self.sites[name].layer.weight)
            for name, layer in layers.items()
        }

    def _refined(self, name: str, layer: LayerPlan, moments: FitMoments | None) -> Replacement:
        """A layer fitted to what the compressed net gives it, by the solver that is worth its time."""
        weight = self.sites[name].layer.weight
        if moments is None or not fittable(layer):
            return truncated(layer, weight)
        try:
            if layer.shape[0] * math.prod(layer.shape[1:]) ** 2 > REFINED_WORK:
                return problems_of([layer], weight, moments)[0].fitted(layer)
            fit = fit_layer(layer, weight, moments)
        except HodecError as error:
            raise error.prefixed(f"{name}: ") from error
        return Replacement(fit.weight.float(), fit.bias)

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
        run = self.net.fixed((), tried)
        loss = self.judge.loss(run) if self.scores_all else self.judge.trial_loss(run)
        trial = Trial(share, plan, dict(tried), loss, self._cost(plan))
        self.trials.append(replace(trial, tried={}))
        most = "not known" if loss.most is None else f"{loss.most:.3g}"
        score = "score" if loss.is_whole else "score at best"
        log.info("share %.3f: %s %.5g, %.3g lost, at most %s", share, score, loss.score, loss.lost, most)
        return trial

    def _cost(self, plan: Plan) -> float:
        """Share of the dense cost that a plan takes."""
        metric = self.costs[0].metric
        saved = sum(metric.dense(layer) - metric.factorized(layer) for layer in plan.values())
        return 1.0 - saved / self.costs[0].limit

    def best(self) -> Trial | None:
        """The cheapest trial found that loses no more than is allowed; None if nothing pays.

        What an earlier search of the same question found is fitted and judged again, and taken if it still holds.
        """
        known = self.tables.saved.answers.get(self._question())
        best = (known and self._again(known["share"], known["dense"])) or self._searched()
        if best is not None:
            dense = [name for name in self.plan(best.share) if name not in best.plan]
            self.tables.saved.answers[self._question()] = {"share": best.share, "dense": dense}
            self.tables.saved.write()
        return best

    def _question(self) -> str:
        judge = (self.judge.words, round(self.judge.dense, 9), self.judge.allowed, self.judge.confidence)
        return repr((self.target, vars(self.limits), vars(self.settings), judge))

    def _again(self, share: float, dense: Sequence[str]) -> Trial | None:
        """A trial that was accepted before, if it is again."""
        try:
            self._prepare()
            plan = self.plan(share)
            for name in dense:
                plan = plan.without(name, HURTS)
        except (PlanError, KeyError):
            return None
        trial = self.judged(share, plan, self.fitted(plan, sequential=True))
        return trial if self.accepts(trial) else None

    def _searched(self) -> Trial | None:
        low, high = self._shares()
        self.tables.forget()
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
        low = max(self._least(), LOWER * best.share) if failed is None else low
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
        """Whether it surely loses no more than is allowed, and saves enough to be worth a file."""
        return trial.cost <= 1 - LEAST_SAVING and self.judge.is_sure(trial.loss)

    def _shares(self) -> tuple[float, float]:
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
        """A failed trial with those layers dense again that hurt most, as few as have it accepted, if it costs less.

        How many is bisected, from one layer on and twice as many at a time: with more of them less is lost.
        """
        if failed is None or not failed.tried:
            return best
        plans, names = [failed.plan], self._by_harm(failed)[: len(failed.tried) - 1]
        for name in names:
            plans.append(plans[-1].without(name, HURTS))
            if self._cost(plans[-1]) >= (best.cost if best else 1 - LEAST_SAVING):
                plans.pop()
                break
        low, high, step = 0, len(plans), 1  # too few; enough, or more than there are
        while high - low > 1:
            count = (low + high) // 2 if step == 0 else min(low + step, high - 1)
            trial = self.judged(failed.share, plans[count], {one: failed.tried[one] for one in plans[count]})
            if self.accepts(trial):
                best, high, step = trial, count, 0
            else:
                low, step = count, 2 * step
        return best

    def _by_harm(self, trial: Trial) -> list[str]:
        """The layers, the one first whose return to dense takes most off the outputs' error for what it costs."""
        calls = self.tables.few(len(trial.tried))
        wanted = [softened(self.net.run(call)) for call in calls]
        metric, gains = self.costs[0].metric, {}

        def error(tried: Mapping[str, Replacement]) -> float:
            found = [softened(self.net.run(call, tried=tried)) for call in calls]
            return min(1e6, sum(squared_errors(found, wanted)))

        whole = error(trial.tried)
        for k, name in enumerate(trial.tried):
            self.tables.progress("which layers hurt", k + 1, len(trial.tried))
            layer = trial.plan[name]
            less = whole - error({other: one for other, one in trial.tried.items() if other != name})
            gains[name] = less / max(1e-9, metric.dense(layer) - metric.factorized(layer))
        return sorted(gains, key=lambda name: -gains[name])
