"""Greedy: score each layer alone at several costs, then cut all layers to one common score."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from hodec.cost.metric import COUNTED, LATENCY, METRICS, LayerTimes, latency_metric
from hodec.options import argument, bad_function, bad_names, setting
from hodec.ranks.greedy.stats import CurvePoint, GreedyStats
from hodec.ranks.rule import Choice, RankRule

if TYPE_CHECKING:
    from hodec.cost.metric import CostMetric
    from hodec.plan.layer import LayerPlan
    from hodec.ranks.context import LayerContext, NetContext
    from hodec.ranks.greedy.curves import SensitivityCurve
    from hodec.ranks.greedy.scores import NetScorer
    from hodec.ranks.greedy.search import NetCosts, SearchResult

log = logging.getLogger(__name__)

Points = Mapping[str, tuple[CurvePoint, ...]]


@dataclass(frozen=True)
class Greedy(RankRule):
    """Every layer is evaluated alone at several ratios of its cost; one score threshold then decides for all.

    Bisection finds the threshold at which the whole net keeps ``target`` of its cost. Layers that bear compression
    are cut hard, fragile ones little or not at all. It takes one evaluation of the dense net, at most
    ``ratios - 1`` a layer and one of the net with all choices, each from the same seed of torch's generators. Layers
    are cut at the largest ranks within each ratio; where ranks are rounded, cost and score follow, the score on the
    straight line between the measured ones around it.

    Args:
        evaluate: model -> score, higher is better; it is given copies in evaluation mode.
        key: what identifies the evaluation in ``table`` beside the function's name, e.g. ``val-5000``; change it
            when the data changes.
        table: JSON file of scores. Each is saved at once, so that a run that broke off goes on where it was.
        progress: draw a bar if stderr is a terminal, beside the log line of each evaluation.
        latency_table: milliseconds of layers, for ``latency_ms``; None: they are measured on this machine.
        report: called with the ``GreedyStats`` of each search: scores, choices and costs.

    Raises:
        ConfigError: a setting out of range.

    Source: AIMET documentation, greedy compression ratio selection. Unlike there, costs are those of the layers as
        they run, a layer whose most severe cut ties with the threshold is cut, and stale scores are not used.
    """

    name = "greedy"
    reads_weights = True
    runs_net = "evaluates the net on a validation split"

    evaluate: Callable[..., object] | None = argument(words="a function model -> score", check=bad_function)
    target: float = setting(0.5, "share of the whole dense net's cost to keep", above=0, high=1)
    metric: str = setting("macs", "cost of layers and net that counts", choices=(*COUNTED, LATENCY))
    ratios: int = setting(10, "n of the ratios 1/n .. (n-1)/n of its cost that each layer is evaluated at", low=2)
    monotonic: bool = setting(False, "fit each layer's scores so that they nowhere fall as its cost rises")
    multiplicity: int = setting(1, "ranks become multiples of this, rounded up", low=1)
    ignore: list[str] | None = setting(
        None,
        "globs of layers that stay dense and are not evaluated",
        words="null or a list of globs: [conv1,layer1.0.*]",
        check=bad_names,
    )
    key: str = argument("")
    table: str | Path | None = argument()
    progress: bool = argument(True)
    latency_table: LayerTimes | None = argument()
    report: Callable[..., object] | None = argument(words="a function of GreedyStats", check=bad_function)

    def choose(self, layers: Mapping[str, LayerContext], net: NetContext) -> dict[str, Choice]:
        """One choice a layer.

        Raises:
            PlanError: a target that cannot be reached, a glob that matches nothing, or an ``evaluate`` that returns
                no finite number.
            CheckpointError: a damaged score table.
            ConfigError: no ``evaluate``, or a score table that cannot be written.
        """
        from hodec.ranks.greedy.scores import NetScorer
        from hodec.ranks.greedy.search import check_reachable, search

        metric = self._metric(layers, net)
        reasons = self._ignored(layers, net)
        curves = self._curves(layers, metric, reasons)
        if not curves:
            return {name: Choice(None, reason=reasons[name]) for name in layers}
        costs = _costs(metric, layers, curves, net)
        check_reachable(costs, self.target)  # known without any score: better now than after hours of evaluation
        scorer = NetScorer.of(self.name, net, self.evaluate, table=self.table, key=self.key)
        measured = self._measured(scorer, metric, curves)
        used = {name: self._used(curve, measured[name], metric, scorer.score({})) for name, curve in curves.items()}
        result = search({name: [p.score for p in points] for name, points in used.items()}, costs, self.target)
        stats = self._stats(scorer, curves, result, measured=measured, used=used, reasons=reasons)
        self._tell(result)
        if self.report is not None:
            self.report(stats)
        return {name: _choice(name, curves.get(name), result, stats) for name in layers}

    # -- before any score ----------------------------------------------------------------------------------------

    def _metric(self, layers: Mapping[str, LayerContext], net: NetContext) -> CostMetric:
        if self.metric in METRICS:
            return METRICS[self.metric]
        model, example_input = net.runnable("greedy measures milliseconds on PyTorch layers")
        return latency_metric(self.latency_table, model, example_input, [layer.dense for layer in layers.values()])

    def _ignored(self, layers: Mapping[str, LayerContext], net: NetContext) -> dict[str, str]:
        """Ignored layers with the reason; a glob may also name layers that cannot be factorized."""
        from hodec.conversion.eligibility import match_names

        model, _ = net.runnable("greedy evaluates the net")
        known = [*layers, *(name for name, _ in model.named_modules() if name and name not in layers)]
        hits = {n: glob for glob in self.ignore or () for n in match_names(glob, known, "ranks.ignore")}
        return {name: f"ignored by {hits[name]!r}" for name in layers if name in hits}

    def _curves(
        self, layers: Mapping[str, LayerContext], metric: CostMetric, reasons: dict[str, str]
    ) -> dict[str, SensitivityCurve]:
        """The curves of the layers that have any; the others join ``reasons``."""
        from hodec.ranks.greedy.curves import curve_of

        curves = {}
        for name, layer in layers.items():
            if name in reasons:
                continue
            curve = curve_of(layer, metric, ratios=self.ratios, multiplicity=self.multiplicity)
            if curve.offered:
                curves[name] = curve
            else:
                reasons[name] = f"none of its {self.ratios - 1} ratios saves {metric.name}"
        return curves

    # -- scores --------------------------------------------------------------------------------------------------

    def _measured(self, scorer: NetScorer, metric: CostMetric, curves: Mapping[str, SensitivityCurve]) -> Points:
        """The dense net and every ratio, evaluated; on a terminal a bar shows how far it is."""
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

        nets: list[dict[str, LayerPlan]] = [{}]
        nets += [{name: layer} for name, curve in curves.items() for layer in curve.measured]
        missing = [net for net in nets if not scorer.knows(net)]
        log.info("greedy: %d evaluations, %d of them known", len(nets), len(nets) - len(missing))
        columns, console = (BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()), Console(stderr=True)
        hidden = not (self.progress and console.is_terminal)
        with Progress(*columns, console=console, transient=True, disable=hidden) as bar:
            for at, net in enumerate(bar.track(missing), 1):
                score = scorer.score(net)
                what = " ".join(f"{name} {list(layer.ranks)}" for name, layer in net.items()) or "dense"
                log.info("%d/%d %s: score %.6g", at, len(missing), what, score)
        return {
            name: tuple(CurvePoint(p.ranks, metric.ratio(p), scorer.score({name: p})) for p in curve.measured)
            for name, curve in curves.items()
        }

    def _used(
        self, curve: SensitivityCurve, points: Sequence[CurvePoint], metric: CostMetric, baseline: float
    ) -> tuple[CurvePoint, ...]:
        """The points of the offered ranks: scores smoothed where asked for, then followed along the line."""
        from hodec.ranks.greedy.search import interpolated, smoothed

        ratios, scores = [p.ratio for p in points], [p.score for p in points]
        if self.monotonic:
            scores = smoothed(ratios, scores)
            baseline = max(baseline, scores[-1])
        offered = [(layer.ranks, metric.ratio(layer)) for layer in curve.offered]
        return tuple(CurvePoint(r, at, interpolated(at, ratios, scores, baseline=baseline)) for r, at in offered)

    # -- outcome -------------------------------------------------------------------------------------------------

    def _stats(
        self,
        scorer: NetScorer,
        curves: Mapping[str, SensitivityCurve],
        result: SearchResult,
        *,
        measured: Points,
        used: Points,
        reasons: dict[str, str],
    ) -> GreedyStats:
        """The outcome; layers that the search leaves dense join ``reasons``."""
        layers = {name: curves[name].offered[at] for name, at in result.picks.items() if at is not None}
        for name in curves.keys() - layers.keys():
            mildest = used[name][-1].score
            reasons[name] = f"its mildest ratio scores {mildest:.6g}, below the threshold {result.threshold:.6g}"
        cut = scorer.plan(layers).reduction
        return GreedyStats(
            metric=self.metric,
            target=self.target,
            ratio=result.ratio,
            threshold=result.threshold,
            baseline=scorer.score({}),
            compressed=scorer.score(layers),
            macs=1 - cut["macs"],
            params=1 - cut["params"],
            choices={name: None if at is None else used[name][at] for name, at in result.picks.items()}
            | dict.fromkeys(reasons),
            reasons=dict(reasons),
            curves=measured,
        )

    def _tell(self, result: SearchResult) -> None:
        from hodec.ranks.greedy.search import CLOSE

        log.info("greedy: %.4f of the %s kept, threshold %.6g", result.ratio, self.metric, result.threshold)
        if result.ratio < self.target - CLOSE:
            log.warning(
                "greedy: %.4f is kept, not %g: one step more exceeds that; ratios=%d has finer steps",
                result.ratio,
                self.target,
                2 * self.ratios,
            )


def _costs(
    metric: CostMetric, layers: Mapping[str, LayerContext], curves: Mapping[str, SensitivityCurve], net: NetContext
) -> NetCosts:
    from hodec.ranks.greedy.search import NetCosts

    dense = {name: metric.dense(layers[name].dense) for name in curves}
    offered = {name: [metric.factorized(layer) for layer in curve.offered] for name, curve in curves.items()}
    total = metric.whole_net(net.cost, [layer.dense for layer in layers.values()])
    return NetCosts(offered, dense, rest=total - sum(dense.values()))


def _choice(name: str, curve: SensitivityCurve | None, result: SearchResult, stats: GreedyStats) -> Choice:
    at, point = result.picks.get(name), stats.choices[name]
    if curve is None or at is None or point is None:
        return Choice(None, reason=stats.reasons[name])
    ratio, alone = f"keeps {point.ratio:.3f} of its {stats.metric}", f"score {point.score:.6g} alone"
    return Choice(point.ranks, (*curve.offered[at].notes, f"{ratio}; {alone}, dense {stats.baseline:.6g}"))
