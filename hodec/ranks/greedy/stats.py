"""What the greedy rule found: scores, choices and costs, as a table, a figure and plain values."""

import io
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from rich.console import Group

# So many layers can be told apart by colour in a legend.
MOST_NAMED = 16


@dataclass(frozen=True)
class Point:
    """One layer at one candidate, all others dense.

    Attributes:
        ranks: in the format's order.
        ratio: share of the layer's dense cost that it keeps.
        score: what ``evaluate`` said, or what was interpolated from it.
    """

    ranks: tuple[int, ...]
    ratio: float
    score: float


@dataclass(frozen=True)
class GreedyStats:
    """Result of one search.

    Attributes:
        metric: the cost that counted: ``macs``, ``params`` or ``latency_ms``.
        target, kept: share of the whole dense net's cost that was asked for, and that is left.
        threshold: the score that all layers were cut to.
        baseline, compressed: scores of the dense net and of the net with all choices, before any training.
        macs, params: shares of the whole dense net's that are left.
        choices: layer -> its candidate, after rounding and smoothing; None where it stays dense.
        reasons: layer -> why it stays dense.
        table: layer -> its candidates as evaluated, cheapest first.
    """

    metric: str
    target: float
    kept: float
    threshold: float
    baseline: float
    compressed: float
    macs: float
    params: float
    choices: Mapping[str, Point | None]
    reasons: Mapping[str, str]
    table: Mapping[str, tuple[Point, ...]]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        value = asdict(self)
        plain = {name: [_plain(point) for point in points] for name, points in self.table.items()}
        choices = {name: point and _plain(point) for name, point in self.choices.items()}
        return value | {"choices": choices, "table": plain, "reasons": dict(self.reasons)}

    def __str__(self) -> str:
        from rich.console import Console

        text = io.StringIO()
        Console(file=text, width=120, color_system=None).print(_tables(self))
        return text.getvalue()


def _plain(point: Point) -> dict[str, Any]:
    return {"ranks": list(point.ranks), "ratio": point.ratio, "score": point.score}


def _tables(stats: GreedyStats) -> "Group":
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    chosen = Table(title=f"Greedy ranks: {stats.metric} {stats.kept:.4f} of the dense net's, target {stats.target:g}")
    scores = Table(title="Scores with one layer factorized (share of its cost: score)")
    for heading in ("layer", "ranks", "kept", "score alone"):
        chosen.add_column(heading, overflow="fold")
    for heading in ("layer", "candidates"):
        scores.add_column(heading, overflow="fold")
    for name, point in stats.choices.items():
        dense = (f"dense: {stats.reasons.get(name, '')}", "1", "")
        made = point and (", ".join(map(str, point.ranks)), f"{point.ratio:.4f}", f"{point.score:.6f}")
        chosen.add_row(name, *(made or dense))
    for name, points in stats.table.items():
        scores.add_row(name, "  ".join(f"{p.ratio:.3f}: {p.score:.6f}" for p in points))
    lines = (
        f"score: dense {stats.baseline:.6f}, compressed {stats.compressed:.6f}, threshold {stats.threshold:.6f}",
        f"kept of the dense net: {stats.macs:.4f} of the MACs, {stats.params:.4f} of the parameters",
    )
    return Group(chosen, Text("\n".join(lines)), scores)


def figure(stats: GreedyStats) -> "Figure":
    """Score against kept share of the layer's cost, one line a layer; rings mark the choices.

    Colours run from the first layer (dark) to the last (bright).
    """
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    drawing = Figure(figsize=(7, 4.2), layout="constrained")
    axes = drawing.add_subplot()
    shades = colormaps["viridis"]
    for at, (name, points) in enumerate(stats.table.items()):
        color = shades(0.9 * at / max(1, len(stats.table) - 1))
        _draw_layer(axes, name, points, stats.choices.get(name), color)
    axes.axhline(stats.baseline, color="0.45", linewidth=1, label="dense net")
    axes.axhline(stats.threshold, color="0.45", linewidth=1, linestyle="--", label="threshold")
    axes.set_xlabel(f"kept share of the layer's {stats.metric}")
    axes.set_ylabel("score with this layer alone factorized")
    axes.set_xlim(0, 1)
    axes.spines[["top", "right"]].set_visible(False)
    if len(stats.table) <= MOST_NAMED:
        drawing.legend(loc="outside right upper", frameon=False, fontsize="small")
    return drawing


def _draw_layer(axes: "Axes", name: str, points: tuple[Point, ...], choice: Point | None, color: Any) -> None:
    axes.plot([p.ratio for p in points], [p.score for p in points], ".-", color=color, linewidth=1.2, label=name)
    if choice is not None:
        axes.plot([choice.ratio], [choice.score], "o", mfc="none", mec=color, markersize=11, markeredgewidth=1.6)
