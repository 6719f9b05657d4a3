"""From the rows of a run to lines on axes: what every figure over epochs shares."""

import math
from collections.abc import Iterable, Mapping, Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator

from hodec.experiment.report.rundata import Epoch
from hodec.experiment.report.style import INKS, SERIES, colors, shorten, visible
from hodec.text_table import human, number

#: Epochs, counted from 1, and values; a value that no axis can hold is a gap in the line.
Points = tuple[list[float], list[float]]


def overall(rows: Sequence[Epoch], key: str, *, start: int = 0, scale: float = 1) -> Points:
    """One metric over the epochs of ``rows``, shifted by ``start`` epochs."""
    seen = [(start + row.epoch + 1.0, row.values[key]) for row in rows if key in row.values]
    return [x for x, _ in seen], [_drawable(scale * y) for _, y in seen]


def by_layer(rows: Sequence[Epoch], key: str, *, most: int = 4000) -> dict[str, Points]:
    """Layer -> its points, in the order the layers are recorded; of more than ``most`` in all, every so many epochs."""
    lines: dict[str, Points] = {}
    step = -(-sum(len(row.layers) for row in rows) // most) or 1
    for row in rows[::-step][::-1]:  # with the last epoch
        for layer, values in row.layers.items():
            if key in values:
                xs, ys = lines.setdefault(layer, ([], []))
                xs.append(row.epoch + 1.0)
                ys.append(_drawable(values[key]))
    return lines


def _drawable(value: float, largest: float = 1e30) -> float:
    """NaN for the value of a run that has long diverged, which no axis holds together with the others."""
    return value if abs(value) < largest else math.nan


def line(axes: Axes, points: Points, *, ink: str, width: float = 1.6, dashed: bool = False, label: str = "") -> None:
    """One curve; very short ones show their points, as a single epoch has no line."""
    xs, ys = points
    if xs:
        style, marker = (0, (4, 2)) if dashed else "-", "o" if len(xs) <= 2 else None
        axes.plot(xs, ys, color=ink, linewidth=width, linestyle=style, marker=marker, label=label or "_unnamed")


def with_layers(figure: Figure, total: Points, layers: Mapping[str, Points], *, label: str) -> None:
    """All layers together in bold and each layer thin; the legend names each, or both ends of a ramp of many."""
    (axes,) = figure.axes
    many = len(layers) > len(SERIES)
    inks = dict(zip(layers, colors(len(layers)), strict=True))
    for name, points in layers.items():
        line(axes, points, ink=inks[name], width=0.9)
    line(axes, total, ink=INKS["ink"], width=2.4, label=label)
    named = {name: shorten(name) for name in layers}
    if many:
        first, *_, last = layers
        named = {first: f"first layer ({shorten(first)})", last: f"last layer ({shorten(last)})"}
    handles, labels = axes.get_legend_handles_labels()
    handles += [Line2D([], [], color=inks[name], linewidth=1.2) for name in named]
    labels += named.values()
    ends = {name: ys[-1] for name, (_, ys) in layers.items() if math.isfinite(ys[-1])}
    if many and len(set(ends.values())) > 1:
        highest = max(ends, key=lambda name: ends[name])
        handles.append(Line2D([], [], color=inks[highest], linewidth=1.2))
        labels.append(f"highest at the end: {shorten(highest, 20)}, {number(ends[highest])}")
    figure.legend(handles, [visible(text) for text in labels], loc="outside lower center", ncols=2)


def finish(axes: Axes, title: str, *, log: Iterable[Points] = (), xlabel: str = "epoch") -> None:
    """Title, whole-numbered epochs, and a logarithmic scale where the values of ``log`` differ enough for one."""
    axes.set_title(title)
    axes.set_xlabel(xlabel)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    decades = _decades(log)
    if decades < math.log10(2):  # a logarithmic axis might show no label at all
        return
    axes.set_yscale("log")
    # the fewer decades, the more steps between the powers of ten are needed to read the axis
    axes.yaxis.set_major_locator(
        LogLocator(subs=(1, 2, 3, 5) if decades < 1 else (1, 2, 5) if decades < 2 else (1, 3) if decades < 3 else (1,))
    )
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(lambda value, _: human(value) if value >= 1e3 else number(value))


def _decades(lines: Iterable[Points]) -> float:
    """Powers of ten between the smallest and the largest positive value."""
    values = [y for _, ys in lines for y in ys if y > 0]
    return math.log10(max(values) / min(values)) if values else 0.0
