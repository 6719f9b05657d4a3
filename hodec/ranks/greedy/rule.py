"""Greedy: score each layer alone at several costs, then cut all layers to one common score."""

import dataclasses
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from hodec.conversion.eligibility import match_names
from hodec.conversion.swap import convert
from hodec.cost.count import Cost, Inputs, count_cost
from hodec.cost.latency import LatencyTable
from hodec.errors import ConfigError, PlanError, near_matches
from hodec.plan.layer import LayerPlan
from hodec.plan.plan import Plan
from hodec.ranks.base import Candidate, Choice
from hodec.ranks.greedy.curves import COUNTED, Curve, Meter, curve_of
from hodec.ranks.greedy.progress import progress_of
from hodec.ranks.greedy.scores import Evaluate, Scorer
from hodec.ranks.greedy.search import CLOSE, Costs, Found, check_reachable, interpolated, search, smoothed
from hodec.ranks.greedy.stats import GreedyStats, Point
from hodec.ranks.greedy.table import ScoreTable, identity
from hodec.ranks.ratio import LayerCost
from hodec.ranks.rounding import check_share

log = logging.getLogger(__name__)

METRICS = (*COUNTED, "latency_ms")
Points = Mapping[str, tuple[Point, ...]]


class Greedy:
    """Every layer is evaluated alone at several shares of its cost; one score threshold then decides for all.

    Bisection finds the threshold at which the whole net keeps ``target`` of its cost. Layers that bear compression
    are cut hard, fragile ones little or not at all. It takes one evaluation of the dense net, at most
    ``candidates - 1`` a layer and one of the net with all choices, each from the same seed of torch's generators.

    Args:
        evaluate: model -> score, higher is better; it is given copies in evaluation mode.
        target: share of the whole dense net's cost to keep, above 0 and at most 1.
        metric: ``macs``, ``params`` or ``latency_ms``; shares are of this cost, of a layer and of the net.
        candidates: n, 2 or more; a layer is tried at 1/n .. (n-1)/n of its cost, at the largest ranks within each.
        monotonic: fit each layer's scores so that they nowhere fall as its cost rises.
        multiplicity: ranks become multiples of this, rounded up; cost and score follow, the score on the straight
            line between the measured ones around it.
        ignore: globs of layers that stay dense and are not evaluated.
        key: what identifies the evaluation in ``table`` beside the function's name, e.g. ``val-5000``; change it
            when the data changes.
        table: JSON file of scores. Each is saved at once, so that a run that broke off goes on where it was.
        fine_tune: trains a model in place; ``apply`` calls it after each layer.
        progress: draw a bar if stderr is a terminal; it is log lines otherwise.
        latency_table: measured milliseconds of this device, for ``latency_ms``; or instead of it:
        latency, dense_latency: planned layer -> its milliseconds, and those of the dense layer.
        rest_ms: milliseconds of everything that is no candidate; a table measures them.

    Attributes:
        stats: what the last ``choose`` found; None before, and where nothing could be factorized.

    Raises:
        ConfigError: a setting out of range.

    Source: AIMET documentation, greedy compression ratio selection. Unlike there, costs are those of the layers as
        they run, a layer whose most severe cut ties with the threshold is cut, and stale scores are not used.
    """

    name = "greedy"
    reads_weights = True

    def __init__(  # noqa: PLR0913
        self,
        evaluate: Evaluate,
        target: float,
        metric: str = "macs",
        candidates: int = 10,
        monotonic: bool = False,
        multiplicity: int = 1,
        ignore: Sequence[str] | None = (),
        *,
        key: str = "",
        table: str | Path | None = None,
        fine_tune: Callable[[nn.Module], object] | None = None,
        progress: bool = True,
        latency: LayerCost | None = None,
        dense_latency: LayerCost | None = None,
        rest_ms: float = 0.0,
        latency_table: LatencyTable | None = None,
    ) -> None:
        if not callable(evaluate):
            raise ConfigError(f"ranks.evaluate={evaluate!r} is not a function model -> score (higher is better)")
        self.evaluate, self.target = evaluate, check_share("ranks.target", target)
        if latency_table is not None:
            latency, dense_latency = latency_table.after, latency_table.before
        self.meter, self.latency_table = _meter(metric, latency, dense_latency), latency_table
        self.candidates = _whole("candidates", candidates, 2)
        self.multiplicity = _whole("multiplicity", multiplicity, 1)
        self.monotonic, self.ignore = monotonic, _globs(ignore)
        self.key, self.table = key, None if table is None else Path(table)
        self.fine_tune, self.progress, self.rest_ms = fine_tune, progress, rest_ms
        self.stats: GreedyStats | None = None
        self._bound: tuple[nn.Module, Inputs] | None = None

    def bind(self, model: nn.Module, example_input: Inputs, method: str) -> None:
        """Remember the net that the next choice is for; it is not changed. Needed once before each ``choose``."""
        self._bound = model, example_input

    def choose(self, candidates: Mapping[str, Candidate]) -> dict[str, Choice]:
        """One choice a layer.

        Raises:
            PlanError: not bound to a model, a target that cannot be reached, a glob that matches nothing, or an
                ``evaluate`` that returns no finite number.
            CheckpointError: a damaged score table.
            ConfigError: a score table that cannot be written.
        """
        if self._bound is None:
            raise PlanError("ranks=greedy has no model to evaluate: plan with hodec.make_plan, or call bind(..) first")
        (model, example_input), self._bound, self.stats = self._bound, None, None
        reasons = self._ignored(model, candidates)
        curves = self._curves(candidates, reasons)
        if not curves:
            return {name: Choice(None, reason=reasons[name]) for name in candidates}
        cost = count_cost(model, example_input)
        if self.latency_table is not None and self.meter.name not in COUNTED:
            every = [one.planned(one.most) for one in candidates.values()]
            self.rest_ms = self.latency_table.rest_ms(model, example_input, every)
        costs = self._costs(cost, candidates, curves)
        check_reachable(costs, self.target)  # known without any score: better now than after hours of evaluation
        table = ScoreTable(self.table, identity(model, example_input, self.evaluate, self.key))
        scorer = Scorer(model, example_input, cost, self.evaluate, table)
        measured = self._measured(scorer, curves)
        used = {name: self._used(curve, measured[name], scorer.score({})) for name, curve in curves.items()}
        found = search({name: [p.score for p in points] for name, points in used.items()}, costs, self.target)
        self.stats = self._stats(scorer, curves, found, measured=measured, used=used, reasons=reasons)
        log.info("greedy: %.4f of the %s kept, threshold %.6g", found.ratio, self.meter.name, found.threshold)
        if found.ratio < self.target - CLOSE:
            log.warning("greedy: %.4f is kept, not %g: one step more exceeds that; ranks.candidates=%d has finer steps",
                        found.ratio, self.target, 2 * self.candidates)  # fmt: skip
        return {name: self._choice(name, curves.get(name), found, self.stats) for name in candidates}

    def apply(self, model: nn.Module, plan: Plan) -> nn.Module:
        """Factorize the planned layers one after another, with ``fine_tune`` after each; ``model`` stays as it was.

        Each layer is decomposed as the fine-tuning of those before has left it. Without ``fine_tune`` this is
        ``hodec.convert``.

        Raises:
            PlanError, ConvertError, TrainingError: see ``hodec.convert``.
        """
        if self.fine_tune is None:
            return convert(model, plan)
        for at, (name, layer) in enumerate(plan.items(), 1):
            model = convert(model, dataclasses.replace(plan, layers={name: layer}))
            log.info("%d/%d %s factorized at ranks %s; fine-tuning", at, len(plan), name, list(layer.ranks))
            self.fine_tune(model)
        return model

    # -- before any score ----------------------------------------------------------------------------------------

    def _ignored(self, model: nn.Module, candidates: Mapping[str, Candidate]) -> dict[str, str]:
        """Ignored candidates with the reason; a glob may also name layers that are no candidates."""
        known = [*candidates, *(name for name, _ in model.named_modules() if name and name not in candidates)]
        hits = {n: glob for glob in self.ignore for n in match_names(glob, known, "ranks.ignore")}
        return {name: f"ignored by {hits[name]!r}" for name in candidates if name in hits}

    def _curves(self, candidates: Mapping[str, Candidate], reasons: dict[str, str]) -> dict[str, Curve]:
        """The curves of the candidates that have any; the others join ``reasons``."""
        curves = {}
        for name, candidate in candidates.items():
            if name in reasons:
                continue
            curve = curve_of(candidate, self.meter, count=self.candidates, multiplicity=self.multiplicity)
            if curve.offered:
                curves[name] = curve
            else:
                reasons[name] = f"none of its {self.candidates - 1} candidates saves {self.meter.name}"
        return curves

    def _costs(self, cost: Cost, candidates: Mapping[str, Candidate], curves: Mapping[str, Curve]) -> Costs:
        dense = {name: self.meter.before(one.planned(one.most)) for name, one in candidates.items()}
        whole = getattr(cost, self.meter.name, self.rest_ms + sum(dense.values()))
        mine = {name: dense[name] for name in curves}
        offered = {name: [self.meter.after(layer) for layer in curve.offered] for name, curve in curves.items()}
        return Costs(offered, mine, rest=whole - sum(mine.values()))

    # -- scores --------------------------------------------------------------------------------------------------

    def _measured(self, scorer: Scorer, curves: Mapping[str, Curve]) -> Points:
        """The dense net and every candidate, evaluated."""
        nets: list[dict[str, LayerPlan]] = [{}]
        nets += [{name: layer} for name, curve in curves.items() for layer in curve.measured]
        missing = [net for net in nets if not scorer.knows(net)]
        log.info("greedy: %d evaluations, %d of them known", len(nets), len(nets) - len(missing))
        with progress_of(len(missing), log, shown=self.progress) as tell:
            for net in missing:
                score = scorer.score(net)
                what = " ".join(f"{name} {list(layer.ranks)}" for name, layer in net.items()) or "dense"
                tell(f"{what}: score {score:.6g}")
        return {
            name: tuple(Point(p.ranks, self.meter.ratio(p), scorer.score({name: p})) for p in curve.measured)
            for name, curve in curves.items()
        }

    def _used(self, curve: Curve, points: Sequence[Point], baseline: float) -> tuple[Point, ...]:
        """The points of the offered candidates: scores smoothed where asked for, then followed along the line."""
        ratios, scores = [p.ratio for p in points], [p.score for p in points]
        if self.monotonic:
            scores = smoothed(ratios, scores)
            baseline = max(baseline, scores[-1])
        offered = [(layer.ranks, self.meter.ratio(layer)) for layer in curve.offered]
        return tuple(Point(r, at, interpolated(at, ratios, scores, baseline=baseline)) for r, at in offered)

    # -- outcome -------------------------------------------------------------------------------------------------

    def _stats(  # noqa: PLR0913
        self,
        scorer: Scorer,
        curves: Mapping[str, Curve],
        found: Found,
        *,
        measured: Points,
        used: Points,
        reasons: dict[str, str],
    ) -> GreedyStats:
        """The outcome; what the search leaves dense joins ``reasons``."""
        layers = {name: curves[name].offered[at] for name, at in found.picks.items() if at is not None}
        for name in curves.keys() - layers.keys():
            mildest = used[name][-1].score
            reasons[name] = f"its mildest candidate scores {mildest:.6g}, below the threshold {found.threshold:.6g}"
        cut = scorer.plan(layers).reduction
        return GreedyStats(
            metric=self.meter.name,
            target=self.target,
            kept=found.ratio,
            threshold=found.threshold,
            baseline=scorer.score({}),
            compressed=scorer.score(layers),
            macs=1 - cut["macs"],
            params=1 - cut["params"],
            choices={name: None if at is None else used[name][at] for name, at in found.picks.items()}
            | dict.fromkeys(reasons),
            reasons=dict(reasons),
            table=measured,
        )

    def _choice(self, name: str, curve: Curve | None, found: Found, stats: GreedyStats) -> Choice:
        at, point = found.picks.get(name), stats.choices[name]
        if curve is None or at is None or point is None:
            return Choice(None, reason=stats.reasons[name])
        share, alone = f"keeps {point.ratio:.3f} of its {stats.metric}", f"score {point.score:.6g} alone"
        note = f"{share}; {alone}, dense {stats.baseline:.6g}"
        return Choice(point.ranks, (*curve.offered[at].notes, note))


def _meter(metric: str, latency: LayerCost | None, dense_latency: LayerCost | None) -> Meter:
    if metric not in METRICS:
        raise ConfigError(
            f"ranks.metric={metric!r} is not one of {', '.join(METRICS)}; give ranks.metric=macs."
            f"{near_matches(metric, METRICS)}"
        )
    if metric in COUNTED:
        return COUNTED[metric]
    if latency is None or dense_latency is None:
        raise ConfigError(
            f"ranks.metric={metric} needs latency tables of this device (latency and dense_latency, from a planned "
            "layer to milliseconds), and none are given; without them give ranks.metric=macs"
        )
    return Meter(metric, latency, dense_latency)


def _whole(key: str, value: Any, least: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ConfigError(
            f"ranks.{key}={value!r} is not a whole number of at least {least}, e.g. ranks.{key}={max(least, 10)}"
        )
    return value


def _globs(ignore: Any) -> tuple[str, ...]:
    if isinstance(ignore, str) or not isinstance(ignore, Sequence | None):
        raise ConfigError(f"ranks.ignore={ignore!r} is not a list of layer globs, e.g. 'ranks.ignore=[conv1,layer1.*]'")
    return tuple(str(glob) for glob in ignore or ())
