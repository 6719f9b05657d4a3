"""Pages about a search: the curve of quality against cost, the layers, and sample outputs before and after."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from hodec.errors import PlanError
from hodec.export.runtime import Array
from hodec.io.atomic import write_text
from hodec.onnx_graph.judge import Judge
from hodec.onnx_graph.page import chart, heading, page, paragraph, table
from hodec.onnx_graph.search import Search, Trial
from hodec.onnx_graph.verdict import Compressed
from hodec.text_table import human

# Shares of the dense cost at which a curve is drawn.
SHARES = (0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2)


@dataclass(frozen=True)
class CurvePoint:
    """A plan of a curve.

    Attributes:
        macs, params: shares of the dense file's.
        score: on held-out data.
        layers: that are decomposed.
    """

    share: float
    macs: float
    params: float
    score: float
    layers: int


def point_of(trial: Trial, search: Search) -> CurvePoint:
    """What a trial comes to."""
    cost, layers = search.facts.cost, trial.plan.values()
    macs = sum(one.macs_before - one.macs_after for one in layers)
    params = sum(one.params_before - one.params_after for one in layers)
    return CurvePoint(
        trial.share, 1 - macs / max(1, cost.macs), 1 - params / max(1, cost.params), trial.score, len(trial.plan)
    )


def curve_of(search: Search, shares: Sequence[float] = SHARES) -> list[CurvePoint]:
    """Plans at several shares of the dense cost, fitted to the dense file's activations, and judged."""
    points, search.scores_all = [], True
    for share in shares:
        trial = search.trial(share, sequential=False)
        if trial is not None:
            points.append(point_of(trial, search))
    if not points:
        raise PlanError("no ranks keep less than nine tenths of the dense cost: there is no curve to draw")
    return points


def write_curve(path: Path, source: Path, search: Search, points: Sequence[CurvePoint]) -> None:
    """The curve as one HTML file."""
    judge = search.judge
    title = f"What {source.name} keeps"
    allowed = f"{judge.allowed * judge.scale:.3g}{judge.unit}"
    words = (
        f"Score: {judge.words}; dense {judge.told(judge.dense)}, of which {allowed} may be lost (dashed). "
        f"Fitted to {len(search.fit)} samples of {search.fit.words}, on the dense file's activations: "
        "hodec compress fits the last candidates once more, in order, which mostly keeps more."
    )
    parts = [heading(title, 1), paragraph(words), *_charts(points, judge), _points(points, judge)]
    write_text(path, page(title, parts))


def _charts(points: Sequence[CurvePoint], judge: Judge) -> list[str]:
    up = f"score{f' ({judge.unit.strip()})' * bool(judge.unit)}"
    floor = (judge.dense - judge.allowed) * judge.scale
    parts = []
    for what, across in (("macs", "share of the multiply-adds"), ("params", "share of the parameters")):
        placed = [
            (getattr(one, what), one.score * judge.scale, f"{judge.told(one.score)} at {getattr(one, what):.2f}")
            for one in points
        ]
        placed.append((1.0, judge.dense * judge.scale, f"dense: {judge.told(judge.dense)}"))
        parts.append(chart(placed, across=across, up=up, level=floor))
    return parts


def _points(points: Sequence[CurvePoint], judge: Judge) -> str:
    head = ["budget", "multiply-adds", "parameters", "layers", "score", ""]
    rows = [
        [f"{p.share:.3g}", f"{p.macs:.3f}", f"{p.params:.3f}", p.layers, judge.told(p.score), _fits(judge, p.score)]
        for p in points
    ]
    return table(head, rows)


def _fits(judge: Judge, score: float) -> str:
    return "allowed" if judge.accepts(score) else "loses too much"


def curve_text(points: Sequence[CurvePoint], judge: Judge) -> str:
    """The curve as lines for people."""
    lines = [f"{judge.words}: dense {judge.told(judge.dense)}"]
    lines += [
        f"{p.macs:6.1%} of the multiply-adds, {p.params:6.1%} of the parameters: {judge.told(p.score)}"
        f" ({p.layers} layers, {_fits(judge, p.score)})"
        for p in points
    ]
    return "\n".join(lines)


def write_report(
    path: Path, result: Compressed, search: Search, samples: Sequence[tuple[list[Array], list[Array]]]
) -> None:
    """What was done to a file, as one HTML file.

    Args:
        samples: outputs of the dense file and of the written one, for some held-out calls.
    """
    judge = search.judge
    points = [point_of(one, search) for one in search.trials if one.plan]
    figures = table(
        ["", "dense", "written"],
        [
            ["score", judge.told(result.dense), judge.told(result.score)],
            ["multiply-adds", human(result.before.macs), human(result.after.macs)],
            ["parameters", human(result.before.params), human(result.after.params)],
            ["bytes", human(result.bytes_before, "B"), human(result.bytes_after, "B")],
            ["milliseconds", f"{result.bench.first_ms:.3f}", f"{result.bench.second_ms:.3f}"],
        ],
    )
    notes = [*result.chance, str(result.bench).splitlines()[0], *result.rows, *result.remarks]
    parts = [
        heading(f"{search.facts.graph.path.name} made small", 1), paragraph(result.verdict), figures,
        paragraph(f"Score: {judge.words}. Data: {result.words}; {result.samples[0]} samples were fitted to."),
        *(paragraph(note, note=True) for note in notes),
        heading("Trials"), *_charts(points, judge), heading("Layers"), _layers(result), heading("Layers left dense"),
        table(["layer", "why"], [[name[:80], why] for name, why in result.plan.skipped.items()]),
        heading("Held-out samples, dense and written"), _outputs(samples),
    ]  # fmt: skip
    write_text(path, page("hodec compress", parts))


def _layers(result: Compressed) -> str:
    rows = [
        [
            name[:80], " x ".join(map(str, one.shape)), f"{one.method} {list(one.ranks)}",
            human(one.macs_before), human(one.macs_after), human(one.params_before), human(one.params_after),
        ]
        for name, one in result.plan.items()
    ]  # fmt: skip
    return table(["layer", "shape", "becomes", "MACs", "after", "parameters", "after"], rows)


def _outputs(samples: Sequence[tuple[list[Array], list[Array]]]) -> str:
    rows = []
    for k, pair in enumerate(samples):
        for number, (before, after) in enumerate(zip(*pair, strict=True)):
            rows.append([k, number, _words(before), _words(after)])
    return table(["sample", "output", "dense", "written"], rows)


def _words(array: Array, *, most: int = 8) -> str:
    """The largest classes of one row of scores, else the first numbers."""
    if array.dtype.kind == "f" and array.ndim == 2 and array.shape[1] > most:
        top = np.argsort(-array[0])[:3]
        return ", ".join(f"{i}: {array[0, i]:.3g}" for i in top)
    if array.dtype.kind == "f" and array.ndim == 3 and array.shape[2] > most:
        return " ".join(map(str, array[0].argmax(-1)[: 4 * most]))
    flat = array.reshape(-1)[:most]
    return ", ".join(f"{number:.3g}" if array.dtype.kind == "f" else str(number) for number in flat)
