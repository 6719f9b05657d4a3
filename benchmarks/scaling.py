"""How the cost of a Z-update grows: with channels, kernel side, layers and rank; measured, fitted, extrapolated.

Points are projections of float32 layers onto tensor trains of HODEC's order (decompose and multiply out), whole
Z-updates by ``project_layers``. One model is fitted to all of them, each point counting by its relative error: seconds
= a * (operations of products) + b * (operations of eigenvectors) + c * bytes + d * layers, no term below zero. The
terms grow together, so that a single coefficient is no rate of this machine: only their sum is a prediction. The fit's
own error stands beside it. What is said of thousands of layers or of many processes is the model's word, not a
measurement.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks import work
from benchmarks.kernels import half_ranks, kernel
from benchmarks.rows import Row
from benchmarks.settings import Settings, standalone
from benchmarks.timing import in_turns
from hodec.admm.updates import project_layers
from hodec.formats import tt
from hodec.formats.calls import CallSites
from hodec.formats.modes import Modes
from hodec.plan.layer import LayerPlan

GROUP = "scaling"
PLOTS = {"scaling.png": "Seconds of a Z-update against channels, kernel side, layers and rank; lines: fitted model"}
LAYERS, PROCESSES = 10_000, 64
# bytes/s at which a process receives; an assumption about a cluster's network, not a measurement
BANDWIDTH = 10e9


@dataclass(frozen=True)
class Point:
    """One size: ``layers`` layers of (channels, channels, side, side) at middle ranks of ``share`` of the channels."""

    channels: int = 256
    side: int = 3
    layers: int = 1
    share: float = 0.5

    @property
    def shape(self) -> tuple[int, int, int, int]:
        return (self.channels, self.channels, self.side, self.side)

    @property
    def split(self) -> tuple[Modes, tuple[int, ...]]:
        return half_ranks(self.shape, self.share)

    def work(self) -> work.Work:
        """Least work of one layer."""
        (modes, ranks), shape = self.split, self.shape
        tensor = tt.CONV.tensor_shape(shape, modes)
        moved = work.Work(nbytes=4.0 * work.FLOAT * math.prod(shape))  # into HODEC's order and back
        return work.tensor_train(tensor, ranks) + work.rebuilt_train(tensor, ranks) + moved

    def terms(self) -> list[float]:
        """What the fitted coefficients multiply."""
        one = self.work()
        return [self.layers * n for n in (one.products, one.eigen, one.nbytes, 1.0)]


# axis -> points along it
SWEEPS: dict[str, list[Point]] = {
    "channels": [Point(channels=n) for n in (64, 96, 128, 192, 256, 384, 512, 768, 1024)],
    "side": [Point(side=k) for k in (1, 3, 5, 7)],
    "layers": [Point(channels=64, layers=n) for n in (1, 2, 4, 8, 16, 32, 64)],
    "share": [Point(channels=512, share=1 / n) for n in (16, 8, 4, 2, 1)],
}
QUICK = {
    "channels": SWEEPS["channels"][:3], "side": [Point(channels=64, side=k) for k in (1, 3)],
    "layers": SWEEPS["layers"][:3], "share": [Point(channels=64, share=1 / n) for n in (4, 2)],
}  # fmt: skip
_KERNEL = "{0.side}x{0.side} kernels"
LABELS = {
    "channels": f"channels in and out ({_KERNEL}, half ranks)",
    "side": "kernel side ({0.channels} channels, half ranks)",
    "layers": f"layers ({{0.channels}} channels, {_KERNEL}, half ranks)",
    "share": f"middle rank / channels ({{0.channels}} channels, {_KERNEL})",
}


@dataclass(frozen=True)
class Model:
    """Fitted coefficients, and how far the fit is from the points (relative errors)."""

    coefficients: tuple[float, ...]
    median_error: float
    worst_error: float

    def seconds(self, point: Point) -> float:
        return float(np.dot(self.coefficients, point.terms()))

    def __str__(self) -> str:
        a, b, c, d = self.coefficients
        return (
            f"seconds = {a:.2g} * (operations of products) + {b:.2g} * (operations of eigenvectors) + {c:.2g} * bytes "
            f"+ {d:.2g} * layers; fit error {self.median_error:.0%} in the median, {self.worst_error:.0%} at worst"
        )


def rows(settings: Settings) -> Iterator[Row]:
    """Measured points, then what the model says of sizes that nobody measured."""
    sweeps = QUICK if settings.quick else SWEEPS
    seconds: dict[Point, float] = {}
    for axis, points in sweeps.items():
        for point in points:
            if point not in seconds:
                seconds[point] = measure(point, settings)
            yield _row(f"{LABELS[axis].format(point)} = {getattr(point, axis):g}", point, seconds[point], settings)
    model = fit(seconds)
    draw(settings.out / "scaling.png", sweeps, seconds, model)
    yield Row(GROUP, f"fitted model of {len(seconds)} points", note=str(model))
    yield from predictions(model)


@torch.no_grad()
def measure(point: Point, settings: Settings) -> float:
    """Median seconds of projecting all the layers."""
    modes, ranks = point.split
    layer = LayerPlan("tt", "conv2d", point.shape, modes, ranks, CallSites.once((1, 1), (1, 1)), "merged")
    plan = {f"layer{k}": layer for k in range(point.layers)}
    tensors: dict[str, Tensor] = {name: kernel(*point.shape[:3]) for name in plan}
    times = in_turns(
        {"project": lambda: project_layers(plan, tensors)}, seconds=settings.seconds(1.5), rounds=settings.rounds(3, 15)
    )
    return times.median("project")


def _row(what: str, point: Point, seconds: float, settings: Settings) -> Row:
    one = point.work()
    flops, nbytes = point.layers * one.flops, point.layers * one.nbytes
    return Row(
        GROUP,
        what,
        ours=seconds,
        figure=seconds,
        figure_unit="s",
        limit=settings.ceilings.limit(seconds, flops=flops, nbytes=nbytes),
    )


def fit(seconds: Mapping[Point, float]) -> Model:
    """Least squares of relative errors, no coefficient below zero."""
    from scipy.optimize import nnls

    took = np.array(list(seconds.values()))
    terms = np.array([point.terms() for point in seconds])
    scale = terms.max(axis=0)  # terms are of very different sizes
    found, _ = nnls(terms / scale / took[:, None], np.ones(len(took)))
    coefficients = found / scale
    errors = np.abs(terms @ coefficients / took - 1)
    return Model(tuple(map(float, coefficients)), float(np.median(errors)), float(errors.max()))


def predictions(model: Model) -> Iterator[Row]:
    """Of many layers in one process, and of each of many processes projecting its share."""
    for channels in (256, 512):
        point = Point(channels=channels, layers=LAYERS)
        alone = model.seconds(point)
        share = math.ceil(LAYERS / PROCESSES)
        own = model.seconds(Point(channels=channels, layers=share))
        nbytes = work.FLOAT * math.prod(point.shape) * (LAYERS - share)
        sent = nbytes / BANDWIDTH
        yield Row(
            GROUP,
            f"predicted: Z-update of {LAYERS:,} layers of {channels}x{channels}x3x3, {PROCESSES} processes",
            "predicted: one process",
            ours=own + sent,
            theirs=alone,
            figure=alone / (own + sent),
            note=f"model, not measured: each projects {share} layers in {own:.3g} s and receives the others' Z "
            f"({nbytes / 1e9:.3g} GB) by broadcast in {sent:.3g} s at an assumed {BANDWIDTH / 1e9:.0f} GB/s",
        )


def draw(path: Path, sweeps: Mapping[str, Sequence[Point]], seconds: Mapping[Point, float], model: Model) -> None:
    """One panel an axis, both axes logarithmic: points as measured, the model as a line."""
    from matplotlib.ticker import LogLocator

    from hodec.experiment.report.style import INKS, panels, styled, to_png

    @styled
    def figure() -> Any:
        made, axes = panels(len(sweeps), 3.2, width=13.0)
        for panel, (axis, points) in zip(axes, sweeps.items(), strict=True):
            at = [getattr(point, axis) for point in points]
            panel.plot(at, [model.seconds(point) for point in points], color=INKS["orange"], label="fitted model")
            measured = [seconds[point] for point in points]
            panel.plot(at, measured, "o", color=INKS["blue"], markersize=4.5, label="measured")
            panel.set(
                xscale="log",
                yscale="log",
                xlabel=LABELS[axis].format(points[0]).replace(" (", "\n("),
                ylabel="seconds of a Z-update",
            )
            ticks = at if len(at) < 8 else [n for n in at if math.log2(n).is_integer()]
            panel.set_xticks(ticks, [f"{n:g}" if n >= 1 else f"1/{round(1 / n)}" for n in ticks])
            # less than a decade must have ticks, too
            subs = (1, 2, 5) if max(measured) > 10 * min(measured) else (1, 1.5, 2, 3, 5, 7)
            panel.yaxis.set_major_locator(LogLocator(subs=subs))
            panel.yaxis.set_major_formatter(lambda value, _position: f"{value:g}")
            panel.minorticks_off()
        axes[0].legend()
        return made

    path.write_bytes(to_png(figure()))


if __name__ == "__main__":
    standalone(rows)
