"""The figures of a report: a run in, a matplotlib figure out.

A run that lacks the numbers of a figure raises ``NothingToDraw`` with the reason, which the report then prints.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator

from hodec.errors import HodecError
from hodec.experiment.report import curves
from hodec.experiment.report.rundata import PHASES, RunData, Spectrum, cut
from hodec.experiment.report.style import INKS, colors, panels, shorten, styled, visible
from hodec.experiment.report.words import ERROR
from hodec.plan.layer import LayerPlan
from hodec.text_table import accuracy, change, human, number

WIDTH = 4.8  # inches of a figure; two stand side by side on a page, one on a telephone


class NothingToDraw(HodecError):
    """The run does not hold the numbers of a figure; the text says which."""


class FigureSpec(NamedTuple):
    """How a figure is drawn; ``name`` is its file name, its id on the page and the key of its caption."""

    name: str
    draw: Callable[..., Figure]  # of a run, or of the runs of a sweep


def _need(found: object, otherwise: str) -> None:
    if not found:
        raise NothingToDraw(otherwise)


@styled
def _admm_curve(run: RunData, key: str, title: str, *, label: str = "all layers together") -> Figure:
    """One quantity of ADMM per epoch, logarithmic: all layers together in bold, each layer thin."""
    rows = run.phase("admm")
    total, layers = curves.overall(rows, f"admm/{key}"), curves.by_layer(rows, key)
    absent = f"The ADMM epochs record no admm/{key}." if rows else "metrics.jsonl holds no epoch of phase admm."
    _need(total[0] or layers, absent)
    figure, (axes,) = panels(1, 3.2, width=WIDTH)
    curves.with_layers(figure, total, layers, label=label)
    curves.finish(axes, title, log=[total, *layers.values()])
    return figure


@styled
def _training_curve(run: RunData, key: str, title: str, *, scale: float = 1) -> Figure:
    """A metric of training and validation over all phases, laid end to end."""
    lines = {f"train/{key}": ("training", "soft"), f"val/{key}": ("validation", "blue")}
    lines |= {f"admm/truncated_{key}": ("validation, if truncated now", "orange")}
    recorded = {name for row in run.epochs for name in row.values}
    _need(recorded & lines.keys(), f"metrics.jsonl holds no epoch with a {key}.")
    figure, (axes,) = panels(1, 3.2, width=WIDTH)
    for name, (label, ink) in lines.items():
        # a line of its own for each phase: another phase begins with another network
        for phase, start in _phase_starts(run).items():
            points = curves.overall(run.phase(phase), name, start=start, scale=scale)
            curves.line(axes, points, ink=INKS[ink], dashed="truncated" in name, label=label)
            label = "" if points[0] else label
    curves.finish(axes, title, xlabel="epoch, all phases")
    _mark_phases(axes, run)
    figure.legend(loc="outside lower center", ncols=3)
    return figure


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
        name = PHASES.get(phase, phase)
        if at:
            axes.axvline(start + 0.5, color=INKS["muted"], linewidth=0.7, linestyle=(0, (2, 2)), zorder=0.9)
        if at % 2:
            axes.axvspan(start + 0.5, end + 0.5, color=INKS["band"], zorder=0, linewidth=0)
        if (end - start) / bounds[-1] > 0.017 * len(name):  # the width of a letter, as a fraction of the axis
            axes.text(
                (start + end + 1) / 2,
                1.01,
                name,
                transform=axes.get_xaxis_transform(),
                color=INKS["muted"],
                fontsize=7.5,
                va="bottom",
                ha="center",
            )


@styled
def _layer_costs(run: RunData, cost: str, title: str, *, most: int = 60) -> Figure:
    """A cost of each planned layer, before (pale) and after (full); of very many layers the ``most`` largest."""
    plan: Mapping[str, LayerPlan] = run.plan or {}
    _need(plan, "plan.json names no factorized layer.")
    pairs = {name: (getattr(one, f"{cost}_before"), getattr(one, f"{cost}_after")) for name, one in plan.items()}
    largest = sorted(plan, key=lambda name: pairs[name][0], reverse=True)[:most]
    shown = {name: pair for name, pair in pairs.items() if name in largest}
    left = f", the {most} largest layers ({len(plan) - most} not shown)" if len(plan) > most else ""
    figure, (axes,) = panels(1, 1.15 + 0.225 * len(shown), width=WIDTH)
    before, after = zip(*shown.values(), strict=True)
    axes.barh(range(len(shown)), before, height=0.72, color=INKS["soft"], label="before")
    axes.barh(range(len(shown)), after, height=0.36, color=INKS["blue"], label="after")
    for at, pair in enumerate(shown.values()):
        text, place = change(cut(*pair)), (max(pair), at)
        axes.annotate(text, place, (4, 0), textcoords="offset points", va="center", color=INKS["muted"], fontsize=7.5)
    axes.set_title(f"{title}{left}")
    axes.set_xlim(0, 1.2 * max(*before, *after, 1))
    axes.xaxis.set_major_locator(MaxNLocator(4))
    axes.xaxis.set_major_formatter(lambda value, _: human(value))
    return _with_rows(figure, shown)


def _with_rows(figure: Figure, names: Iterable[str]) -> Figure:
    """The figure with a name at each of its bars, the first one on top, and its legend below."""
    (axes,), labels = figure.axes, [shorten(name, 24) for name in names]
    axes.set_ylim(len(labels) - 0.4, -0.6)
    axes.set_yticks(range(len(labels)), labels)
    axes.grid(visible=False, axis="y")
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
    figure.legend(loc="outside lower center", ncols=2)
    return figure


@styled
def _before_after(run: RunData) -> Figure:
    """Accuracy, parameters, MACs and latency of the compressed network, each against the dense one (100 %)."""
    dense, small = run.network(run.reference), run.network("compressed")
    pairs: dict[str, tuple[float | None, float | None, Callable[[float], str]]] = {
        "test accuracy": (dense.test_accuracy, small.test_accuracy, accuracy),
        "parameters": (dense.params, small.params, human),
        "MACs": (dense.macs, small.macs, human),
        "latency": (run.network("dense").latency_ms, small.latency_ms, partial(number, unit=" ms")),
    }
    rows = [(name, a, b, show) for name, (a, b, show) in pairs.items() if a and b is not None and math.isfinite(a + b)]
    _need(rows, "metrics.json names no dense and no compressed network.")
    figure, (axes,) = panels(1, 0.55 + 0.42 * len(rows), width=WIDTH)
    for at, (_, before, after, show) in enumerate(rows):
        axes.barh(at, 100, height=0.72, color=INKS["soft"], label="" if at else f"before ({run.reference})")
        axes.barh(at, 100 * after / before, height=0.36, color=INKS["blue"], label="" if at else "after (compressed)")
        axes.text(
            max(100, 100 * after / before) + 3,
            at,
            f"{show(before)} → {show(after)}",
            va="center",
            color=INKS["muted"],
            fontsize=7.5,
        )
    axes.set_xlim(0, 65 + max(100, *(100 * after / before for _, before, after, _ in rows)))
    axes.set_xticks([0, 25, 50, 75, 100], ["0", "25", "50", "75", "100 %"])
    return _with_rows(figure, [name for name, *_ in rows])


@styled
def _ranks(run: RunData, most: int = 40) -> Figure:
    """The ranks of each planned layer (full), before the full ranks (pale); of very many layers the first ``most``."""
    plan: Mapping[str, LayerPlan] = run.plan or {}
    _need(plan, "plan.json names no factorized layer.")
    shown = dict(list(plan.items())[:most])
    figure, (axes,) = panels(1, 1.15 + 0.27 * len(shown), width=WIDTH)
    widest = 1
    for at, one in enumerate(shown.values()):
        full = one.format.max_ranks(one.shape, one.modes)
        step = 0.8 / len(full)
        places = [at - 0.4 + step * (index + 0.5) for index in range(len(full))]
        axes.barh(places, full, height=0.9 * step, color=INKS["soft"], label="" if at else "full rank")
        axes.barh(places, one.ranks, height=0.9 * step, color=INKS["blue"], label="" if at else "rank")
        text = ", ".join(map(str, one.ranks))
        axes.annotate(
            text, (max(full), at), (4, 0), textcoords="offset points", va="center", color=INKS["muted"], fontsize=7
        )
        widest = max(widest, *full)
    axes.set_title("Ranks" + f", the first {most} of {len(plan)} layers" * (len(plan) > most))
    axes.set_xlim(0, 1.3 * widest)
    return _with_rows(figure, shown)


@styled
def _spectra(run: RunData, most: int = 32, columns: int = 4) -> Figure:
    """Singular values of each planned layer, a small panel a layer; of very many layers the ``most`` largest."""
    plan: Mapping[str, LayerPlan] = run.plan or {}
    layers = {name: run.spectra[name] for name in plan if name in run.spectra}
    _need(layers, "There is no spectra.json, which a run writes at its end, or it names no planned layer.")
    largest = sorted(layers, key=lambda name: plan[name].params_before, reverse=True)[:most]
    shown = [name for name in layers if name in largest]
    rows = math.ceil(len(shown) / columns)
    figure, (axes,) = panels(1, 0.8 + 0.74 * rows, width=WIDTH)
    for index, name in enumerate(shown):
        x, y = 1.12 * (index % columns), -1.5 * (index // columns)
        _draw_spectra(axes, layers[name], x=x, y=y)
        axes.text(x, y + 1.08, shorten(name, 16), color=INKS["muted"], fontsize=7)
    left = f", the {most} largest of {len(layers)} layers" if len(layers) > most else ""
    axes.set_title(f"Singular values{left}")
    axes.set_xlim(0, 1.12 * columns - 0.12)
    axes.set_ylim(-1.5 * (rows - 1) - 0.04, 1.4)
    axes.set_axis_off()
    handles = [Line2D([], [], color=INKS["blue"]), Line2D([], [], color=INKS["orange"])]
    figure.legend(handles, ["kept", "cut off"], loc="outside lower center", ncols=2)
    return figure


def _draw_spectra(axes: Axes, spectra: Sequence[Spectrum], *, x: float, y: float, decades: int = 4) -> None:
    """The spectra of one layer in the unit square at (x, y): places across, magnitude of the values upwards."""
    axes.add_patch(Rectangle((x, y), 1, 1, color=INKS["band"], linewidth=0))
    for one in spectra:
        place, alpha = Rectangle((x, y), one.rank / one.full, 1, color=INKS["soft"], linewidth=0), 0.6 / len(spectra)
        axes.add_patch(place).set_alpha(alpha)
    for one in spectra:
        heights = [1 + math.log10(min(max(value, 10**-decades), 1)) / decades for value in one.values]
        points = [(x + (place - 0.5) / one.full, y + height) for place, height in zip(one.at, heights, strict=True)]
        kept = sum(place <= one.rank for place in one.at)
        cut_off = points[max(kept - 1, 0) :] if kept < len(points) else []
        for part, ink in ((cut_off, "orange"), (points[:kept], "blue")):
            curves.line(axes, ([a for a, _ in part], [b for _, b in part]), ink=INKS[ink], width=1.1)


@styled
def _sweep_curve(runs: Sequence[RunData], key: str, title: str, *, scale: float = 1) -> Figure:
    """A metric during ADMM, one line per run; beside an accuracy, dashed, that of the truncated network.

    A control run without ADMM shows its dense training of the same length instead.
    """
    trunks = {run.label: run.phase("admm") or run.phase("dense") for run in runs}
    drawn = {label: epochs for label, epochs in trunks.items() if epochs}
    _need(drawn, "No run of this sweep recorded an epoch of ADMM or of dense training.")
    lines = {label: curves.overall(epochs, key, scale=scale) for label, epochs in drawn.items()}
    _need(any(xs for xs, _ in lines.values()), f"The epochs of this sweep record no {key}.")
    labels = [visible(shorten(label, 48)) for label in drawn]
    columns = max(1, min(len(labels), 3, 60 // (7 + max(map(len, labels)))))  # 60 letters fit beside each other
    figure, (axes,) = panels(1, 2.9 + 0.17 * math.ceil(len(labels) / columns), width=WIDTH)
    inks = dict(zip(drawn, colors(len(drawn)), strict=True))
    for label, points in lines.items():
        curves.line(axes, points, ink=inks[label])
        if "accuracy" in key:
            cut_now = curves.overall(drawn[label], "admm/truncated_accuracy", scale=scale)
            curves.line(axes, cut_now, ink=inks[label], dashed=True)
    curves.finish(axes, title, log=lines.values() if "admm" in key else (), xlabel="epoch of ADMM training")
    handles = [Line2D([], [], color=ink) for ink in inks.values()]
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, columnspacing=1.6)
    return figure


@styled
def tradeoff(runs: Sequence[RunData]) -> Figure:
    """Compressed validation accuracy against the MACs cut, one named point per finished run, and the Pareto front."""
    pairs = ((run.reduction("macs"), run.network("compressed").validation_accuracy, run.label) for run in runs)
    known = [(100 * x, 100 * y, label) for x, y, label in pairs if x is not None and y is not None]
    points = [point for point in known if math.isfinite(point[0] + point[1])]
    _need(
        len({x for x, _, _ in points}) > 1,
        "Fewer than two finished runs with a validation accuracy differ in the MACs they cut.",
    )
    figure, (axes,) = panels(1, 3.2, width=WIDTH)
    front = pareto([(x, y) for x, y, _ in points])
    axes.step(*zip(*front), where="pre", color=INKS["orange"], linewidth=1.2, label="Pareto front")
    for x, y, label in points:
        axes.plot([x], [y], "o", markersize=6, color=INKS["orange" if (x, y) in front else "blue"])
        axes.annotate(visible(shorten(label)), (x, y), xytext=(7, 3), textcoords="offset points")
    axes.margins(x=0.15, y=0.15)
    axes.set_title("Validation accuracy of the compressed network, %")
    axes.set_xlabel("MACs cut, %")
    axes.legend(loc="lower right", bbox_to_anchor=(1.0, 1.0), borderaxespad=0.2)
    return figure


def pareto(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """The points that no other one is above and to the right of, from left to right."""
    front: list[tuple[float, float]] = []
    for x, y in sorted(set(points), reverse=True):
        if not front or y > front[-1][1]:
            front.append((x, y))
    return front[::-1]


CURVES = (
    FigureSpec(
        "approximation-error", partial(_admm_curve, key="primal_residual", title=f"Approximation error {ERROR}")
    ),
    FigureSpec("accuracy", partial(_training_curve, key="accuracy", title="Accuracy, %", scale=100)),
    FigureSpec("loss", partial(_training_curve, key="loss", title="Loss")),
    FigureSpec("dual-residual", partial(_admm_curve, key="dual_residual", title="Dual residual")),
    FigureSpec("penalty", partial(_admm_curve, key="rho", title="Penalty rho", label="mean")),
    FigureSpec("pull", partial(_admm_curve, key="pull", title="Pull", label="mean")),
)
LEAD = FigureSpec("before-and-after", _before_after)
COSTS = (
    FigureSpec("ranks", _ranks),
    FigureSpec("spectra", _spectra),
    FigureSpec("parameters", partial(_layer_costs, cost="params", title="Parameters")),
    FigureSpec("macs", partial(_layer_costs, cost="macs", title="MACs for one image")),
)
SWEEP = (
    FigureSpec("sweep-error", partial(_sweep_curve, key="admm/primal_residual", title=f"Approximation error {ERROR}")),
    FigureSpec("sweep-accuracy", partial(_sweep_curve, key="val/accuracy", title="Accuracy, %", scale=100)),
    FigureSpec("sweep-loss", partial(_sweep_curve, key="train/loss", title="Training loss")),
    FigureSpec("sweep-tradeoff", tradeoff),
)
