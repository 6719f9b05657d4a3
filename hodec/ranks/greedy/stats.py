"""What a greedy search found: scores, choices and costs, as text and plain values. Importing it does not load torch."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass


@dataclass(frozen=True)
class CurvePoint:
    """One layer at one ratio, all others dense.

    Attributes:
        ranks: in the format's order.
        ratio: share of the layer's dense cost that is left.
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
        target, ratio: share of the whole dense net's cost that was asked for, and that is left.
        threshold: the score that all layers were cut to.
        baseline, compressed: scores of the dense net and of the net with all choices, before any training.
        macs, params: shares of the whole dense net's that are left.
        choices: layer -> its point, after rounding and smoothing; None where it stays dense.
        reasons: layer -> why it stays dense.
        curves: layer -> its points as evaluated, cheapest first.
    """

    metric: str
    target: float
    ratio: float
    threshold: float
    baseline: float
    compressed: float
    macs: float
    params: float
    choices: Mapping[str, CurvePoint | None]
    reasons: Mapping[str, str]
    curves: Mapping[str, tuple[CurvePoint, ...]]

    def to_dict(self) -> dict[str, object]:
        """Plain JSON values."""
        value: dict[str, object] = json.loads(json.dumps(asdict(self)))
        return value

    def __str__(self) -> str:
        from rich.console import Group
        from rich.table import Table
        from rich.text import Text

        from hodec.text_table import rendered

        title = f"Greedy ranks: {self.metric} {self.ratio:.4f} of the dense net's, target {self.target:g}"
        chosen = Table("layer", "ranks", "ratio", "score alone", title=title)
        scores = Table("layer", "ratios", title="Scores with one layer factorized (ratio of its cost: score)")
        for name, point in self.choices.items():
            dense = (f"dense: {self.reasons.get(name, '')}", "1", "")
            made = point and (", ".join(map(str, point.ranks)), f"{point.ratio:.4f}", f"{point.score:.6f}")
            chosen.add_row(name, *(made or dense))
        for name, points in self.curves.items():
            scores.add_row(name, "  ".join(f"{p.ratio:.3f}: {p.score:.6f}" for p in points))
        for column in (*chosen.columns, *scores.columns):
            column.overflow = "fold"
        lines = (
            f"score: dense {self.baseline:.6f}, compressed {self.compressed:.6f}, threshold {self.threshold:.6f}",
            f"left of the dense net: {self.macs:.4f} of the MACs, {self.params:.4f} of the parameters",
        )
        return rendered(Group(chosen, Text("\n".join(lines)), scores), width=120)
