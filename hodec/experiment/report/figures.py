"""The figures of a report: a run in, a matplotlib figure out.

A run that lacks the numbers of a figure raises ``NothingToDraw`` with the reason, which the report then prints.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, MaxNLocator

from hodec.errors import HodecError
from hodec.experiment.report import curves, units
from hodec.experiment.report.canvas import LIGHT, colors, count_axis, panels, save, shorten, styled, to_svg
from hodec.experiment.report.rundata import PHASES, Epoch, Layer, RunData, cut
from hodec.experiment.report.words import ERROR

__all__ = [
    "NothingToDraw",
    "approximation_error",
    "dual_and_rho",
    "layer_costs",
    "save",
    "sweep",
    "to_svg",
    "tradeoff",
    "training_curves",
]

#: So many layers fit a bar chart that is still read on one page; the largest are shown.
MOST_BARS = 60

_TRUNCATED = "admm/truncated_accuracy"
#: Panel title -> its curves: metric, name, ink.
_TRAINING = {
    "Loss": (("train/loss", "training", "soft"), ("val/loss", "validation", "blue")),
    "Accuracy, %": (
        ("train/accuracy", "training", "soft"),
        ("val/accuracy", "validation", "blue"),
        (_TRUNCATED, "validation, if truncated now", "orange"),
    ),
}
_COSTS = {"params": "Parameters", "macs": "MACs for one image"}


class NothingToDraw(HodecError):
    """The run does not hold the numbers of a figure; the text says which."""


@styled
def approximation_error(run: RunData) -> Figure:
    """norm(W - Z) / norm(W) per epoch, logarithmic: all layers together in bold, each layer thin."""
    rows = run.phase("admm")
    total = curves.overall(rows, "admm/primal_residual")
    layers = curves.by_layer(rows, "primal_residual")
    _need(total[1] or layers, _no_admm(rows, "admm/primal_residual"))
    figure, (axes,) = panels(1, 3.4)
    curves.layer_lines(axes, layers)
    curves.line(axes, total, ink=LIGHT["ink"], width=2.4, label="all layers together")
    curves.finish(axes, f"Approximation error {ERROR}", log=[total, *layers.values()])
    curves.layer_legend(axes, layers)
    curves.name_worst(axes, layers)
    return figure


@styled
def dual_and_rho(run: RunData) -> Figure:
    """Dual residual and penalty rho per epoch: all layers together in bold, each layer thin."""
    rows = run.phase("admm")
    shown = {"dual_residual": ("Dual residual", "all layers together"), "rho": ("Penalty rho", "mean")}
    series = {key: (curves.overall(rows, f"admm/{key}"), curves.by_layer(rows, key)) for key in shown}
    found = {key: both for key, both in series.items() if both[0][1] or both[1]}
    _need(found, _no_admm(rows, "admm/dual_residual and no admm/rho"))
    figure, axes = panels(len(found), 2.9)
    for panel, (key, (total, layers)) in zip(axes, found.items(), strict=True):
        title, label = shown[key]
        lines = [total, *layers.values()]
        curves.layer_lines(panel, layers)
        curves.line(panel, total, ink=LIGHT["ink"], width=2.2, label=label)
        curves.finish(panel, title, log=lines if key != "rho" or curves.spans_decade(lines) else [])
        curves.layer_legend(panel, layers)
    return figure


@styled
def training_curves(run: RunData) -> Figure:
    """Loss and accuracy over all phases, laid end to end, with the accuracy after hard truncation."""
    recorded = {key for row in run.epochs for key in row.values}
    found = {title: [one for one in few if one[0] in recorded] for title, few in _TRAINING.items()}
    found = {title: few for title, few in found.items() if few}
    _need(found, "metrics.jsonl holds no epoch with a loss or an accuracy.")
    figure, axes = panels(len(found), 3.5)
    for panel, (title, few) in zip(axes, found.items(), strict=True):
        for key, label, ink in few:
            _over_phases(panel, run, key, label=label, ink=ink)
        curves.finish(panel, title, xlabel="epoch, all phases")
        _mark_phases(panel, run)
    handles, labels = max((panel.get_legend_handles_labels() for panel in axes), key=lambda pair: len(pair[1]))
    figure.legend(handles, labels, loc="outside lower center", ncols=3)
    return figure


def _over_phases(axes: Axes, run: RunData, key: str, *, label: str, ink: str) -> None:
    """One metric, a line of its own for each phase: another phase begins with another network."""
    scale = 100 if key.endswith("accuracy") else 1
    dash = (4, 2) if key == _TRUNCATED else None
    for phase, start in _phase_starts(run).items():
        points = curves.overall(run.phase(phase), key, start=start, scale=scale)
        curves.line(axes, points, ink=LIGHT[ink], dash=dash, label=label)
        label = "" if points[0] else label


def _phase_starts(run: RunData) -> dict[str, int]:
    """Phase -> number of epochs before it."""
    starts: dict[str, int] = {}
    end = 0
    for row in run.epochs:
        starts.setdefault(row.phase, end)
        end = max(end, starts[row.phase] + row.epoch + 1)
    return starts


def _mark_phases(axes: Axes, run: RunData) -> None:
    """A line where a phase begins, every second phase on a tinted ground, the name above where it fits."""
    starts = _phase_starts(run)
    bounds = [*starts.values(), starts[run.epochs[-1].phase] + run.epochs[-1].epoch + 1]
    axes.set_xlim(0.5, bounds[-1] + 0.5)
    axes.set_title(axes.get_title(loc="left"), pad=20)
    for at, (phase, start, end) in enumerate(zip(starts, bounds, bounds[1:], strict=False)):
        if at:
            axes.axvline(start + 0.5, color=LIGHT["muted"], linewidth=0.7, linestyle=(0, (2, 2)), zorder=0.9)
        if at % 2:
            axes.axvspan(start + 0.5, end + 0.5, color=LIGHT["band"], zorder=0, linewidth=0)
        if (end - start) / bounds[-1] > 0.14:
            above = axes.get_xaxis_transform()
            place: dict[str, Any] = {"transform": above, "ha": "center", "va": "bottom", "fontsize": 7.5}
            axes.text((start + end + 1) / 2, 1.01, PHASES.get(phase, phase), color=LIGHT["muted"], **place)


@styled
def layer_costs(run: RunData) -> Figure:
    """Parameters and MACs of each planned layer, before (pale) and after (full), in the order of the network."""
    _need(run.plan.layers, "plan.json names no factorized layer.")
    found = [key for key in _COSTS if any(_cost(layer, key, "before") for layer in run.plan.layers)]
    _need(found, "plan.json gives no parameters and no MACs for its layers.")
    shown = _largest(run.plan.layers, found[0])
    figure, axes = panels(len(found), 0.95 + 0.225 * len(shown), share_y=True)
    for panel, key in zip(axes, found, strict=True):
        _cost_bars(panel, shown, key)
        panel.set_title(_COSTS[key])
    left = len(run.plan.layers) - len(shown)
    if left:
        axes[0].set_title(f"{_COSTS[found[0]]}, the {len(shown)} largest layers ({left} not shown)")
    axes[0].set_yticks(range(len(shown)), [shorten(layer.name) for layer in shown])
    axes[0].set_ylim(len(shown) - 0.4, -0.6)
    axes[-1].legend(loc="lower right", bbox_to_anchor=(1.0, 1.0), ncols=2, borderaxespad=0.2)
    return figure


def _cost(layer: Layer, cost: str, when: str) -> float:
    """Length of a bar: a cost that is not known has none."""
    return getattr(layer, f"{cost}_{when}") or 0.0


def _largest(layers: Sequence[Layer], cost: str) -> list[Layer]:
    """At most ``MOST_BARS`` layers, in the order of the network."""
    by_size = sorted(layers, key=lambda layer: _cost(layer, cost, "before"), reverse=True)
    kept = {layer.name for layer in by_size[:MOST_BARS]}
    return [layer for layer in layers if layer.name in kept]


def _cost_bars(axes: Axes, layers: Sequence[Layer], cost: str) -> None:
    before, after = ([_cost(layer, cost, when) for layer in layers] for when in ("before", "after"))
    axes.barh(range(len(layers)), before, height=0.72, color=LIGHT["soft"], label="before")
    axes.barh(range(len(layers)), after, height=0.36, color=LIGHT["blue"], label="after")
    for at, layer in enumerate(layers):
        change = units.change(cut(getattr(layer, f"{cost}_before"), getattr(layer, f"{cost}_after")))
        place = (max(before[at], after[at]), at)
        style: dict[str, Any] = {"va": "center", "color": LIGHT["muted"], "fontsize": 7.5}
        axes.annotate(change, place, xytext=(4, 0), textcoords="offset points", **style)
    axes.set_xlim(0, 1.16 * max([*before, *after, 1.0]))
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.xaxis.set_major_formatter(FuncFormatter(count_axis))
    axes.grid(visible=False, axis="y")
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)


@styled
def sweep(runs: Sequence[RunData]) -> Figure:
    """Training loss, approximation error and accuracy during ADMM, one line per run (dashed: truncated).

    A control run without ADMM shows its dense training of the same length instead.
    """
    drawn = {run.label: run.trunk() for run in runs if run.trunk()}
    _need(drawn, "No run of this sweep recorded an epoch of ADMM or of dense training.")
    columns, rows = _legend_grid(list(drawn))
    figure, axes = panels(3, 2.9 + 0.17 * rows, width=10.2)
    inks = dict(zip(drawn, colors(len(drawn)), strict=True))
    titles = ("Training loss", "Approximation error", "Accuracy, % (dashed: if truncated now)")
    keys = ("train/loss", "admm/primal_residual", "val/accuracy")
    for panel, title, key in zip(axes, titles, keys, strict=True):
        _run_lines(panel, drawn, key, inks=inks)
        log = [curves.overall(epochs, key) for epochs in drawn.values()] if key.startswith("admm") else []
        curves.finish(panel, title, log=log, xlabel="epoch of ADMM training")
    _run_lines(axes[2], drawn, _TRUNCATED, inks=inks, dash=(3, 2))
    handles = [Line2D([], [], color=ink) for ink in inks.values()]
    labels = [curves.visible(shorten(label, 48)) for label in drawn]
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, columnspacing=1.6)
    return figure


def _run_lines(
    axes: Axes,
    drawn: Mapping[str, Sequence[Epoch]],
    key: str,
    *,
    inks: Mapping[str, str],
    dash: tuple[int, int] | None = None,
) -> None:
    scale = 100 if key.endswith("accuracy") else 1
    for label, rows in drawn.items():
        curves.line(axes, curves.overall(rows, key, scale=scale), ink=inks[label], dash=dash)


def _legend_grid(labels: Sequence[str]) -> tuple[int, int]:
    """Columns and rows of a legend as wide as the figure, which holds about 130 signs."""
    longest = min(48, max(len(label) for label in labels))
    columns = max(1, min(len(labels), 5, 130 // (longest + 7)))
    return columns, math.ceil(len(labels) / columns)


@styled
def tradeoff(runs: Sequence[RunData]) -> Figure:
    """Compressed test accuracy against the MACs cut, one named point per finished run."""
    pairs = ((run.reduction("macs"), run.network("compressed").accuracy, run.label) for run in runs)
    known = [(100 * x, 100 * y, label) for x, y, label in pairs if x is not None and y is not None]
    points = [point for point in known if math.isfinite(point[0] + point[1])]
    _need(len({x for x, _, _ in points}) > 1, "Fewer than two finished runs differ in the MACs they cut.")
    figure, (axes,) = panels(1, 3.2)
    for x, y, label in points:
        text = curves.visible(shorten(label))
        axes.plot([x], [y], "o", markersize=6, color=LIGHT["blue"])
        axes.annotate(text, (x, y), xytext=(7, 3), textcoords="offset points")
    axes.margins(x=0.15, y=0.15)
    axes.set_title("Test accuracy of the compressed network, %")
    axes.set_xlabel("MACs cut, %")
    return figure


def _need(found: object, otherwise: str) -> None:
    if not found:
        raise NothingToDraw(otherwise)


def _no_admm(rows: Sequence[Epoch], key: str) -> str:
    return f"The ADMM epochs record no {key}." if rows else "metrics.jsonl holds no epoch of phase admm."
