"""From the rows of a run to lines on axes: what every figure over epochs shares."""

import math
from collections.abc import Iterable, Mapping, Sequence

from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from hodec.experiment.report import units
from hodec.experiment.report.canvas import LIGHT, colors, ramp, shorten
from hodec.experiment.report.rundata import Epoch

#: Up to so many layers each gets a colour and a name; more of them share a ramp from first to last.
NAMED_LAYERS = 6

#: Decades up to which an axis is marked at these multiples of each power of ten.
_LOG_STEPS = ((1.0, (1, 2, 3, 5)), (1.8, (1, 2, 5)), (2.6, (1, 3)), (math.inf, (1,)))

#: A value this large is not drawn: it is that of a run that has long diverged, and no axis holds it with the others.
BEYOND = 1e30

#: Epochs, counted from 1, and values; a value that is not finite or beyond all axes is a gap in the line.
Points = tuple[list[float], list[float]]


def overall(rows: Sequence[Epoch], key: str, *, start: int = 0, scale: float = 1) -> Points:
    """One metric over the epochs of ``rows``, shifted by ``start`` epochs."""
    seen = [(start + row.epoch + 1.0, row.values[key]) for row in rows if key in row.values]
    return [x for x, _ in seen], [_drawable(scale * y) for _, y in seen]


def by_layer(rows: Sequence[Epoch], key: str) -> dict[str, Points]:
    """Layer -> its points, in the order the layers are recorded."""
    lines: dict[str, Points] = {}
    for row in rows:
        for layer, values in row.layers.items():
            if key in values:
                xs, ys = lines.setdefault(layer, ([], []))
                xs.append(row.epoch + 1.0)
                ys.append(_drawable(values[key]))
    return lines


def line(
    axes: Axes,
    points: Points,
    *,
    ink: str,
    width: float = 1.6,
    dash: tuple[int, int] | None = None,
    label: str = "",
) -> None:
    """One curve; very short ones show their points, as a single epoch has no line."""
    xs, ys = points
    if not xs:
        return
    marker = "o" if len(xs) <= 2 else None
    style = "-" if dash is None else (0, dash)
    axes.plot(xs, ys, color=ink, linewidth=width, linestyle=style, marker=marker, label=label or "_unnamed")


def layer_lines(axes: Axes, lines: Mapping[str, Points]) -> None:
    """A thin curve per layer."""
    for points, ink in zip(lines.values(), _layer_inks(lines), strict=True):
        line(axes, points, ink=ink, width=0.9)


def layer_legend(axes: Axes, lines: Mapping[str, Points]) -> None:
    """What is labelled so far, and the layers: each by name, or the two ends of the ramp when there are many."""
    handles, labels = axes.get_legend_handles_labels()
    inks, names = _layer_inks(lines), [shorten(name) for name in lines]
    if len(names) > NAMED_LAYERS:
        inks, names = [inks[0], inks[-1]], [f"first layer ({names[0]})", f"last layer ({names[-1]})"]
    handles += [Line2D([], [], color=ink, linewidth=1.2) for ink in inks]
    axes.legend(handles, [visible(text) for text in [*labels, *names]], loc="best")


def name_worst(axes: Axes, lines: Mapping[str, Points]) -> None:
    """Write the name of the layer that ends highest at the end of its line, where the legend cannot name it."""
    ends = {name: (xs[-1], ys[-1]) for name, (xs, ys) in lines.items() if math.isfinite(ys[-1])}
    if len(lines) <= NAMED_LAYERS or not ends:
        return
    name, end = max(ends.items(), key=lambda item: item[1][1])
    text = visible(f"{shorten(name)}, {units.share(end[1])}")
    axes.annotate(text, end, xytext=(5, 0), textcoords="offset points", va="center", color=LIGHT["muted"])


def finish(axes: Axes, title: str, *, log: Iterable[Points] = (), xlabel: str = "epoch") -> None:
    """Title, whole-numbered epochs, and a logarithmic scale where the values of ``log`` differ enough for one."""
    axes.set_title(title)
    axes.set_xlabel(xlabel)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    span = _decades(log)
    # within a factor of two a logarithmic axis may show no label at all
    if span is None or span < math.log10(2):
        return
    axes.set_yscale("log")
    # the shorter the span, the more steps between the powers of ten are needed to read it
    steps = next(steps for longest, steps in _LOG_STEPS if span < longest)
    axes.yaxis.set_major_locator(LogLocator(subs=steps))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: units.plain(value)))


def spans_decade(lines: Iterable[Points]) -> bool:
    """Whether the largest value is ten times the smallest, so that a linear axis would hide the small ones."""
    span = _decades(lines)
    return span is not None and span > 1


def visible(text: str) -> str:
    """A legend leaves out texts that begin with an underscore; a word joiner before it keeps them."""
    return f"\u2060{text}" if text.startswith("_") else text


def _drawable(value: float) -> float:
    return value if abs(value) < BEYOND else math.nan


def _layer_inks(lines: Mapping[str, Points]) -> list[str]:
    return colors(len(lines)) if len(lines) <= NAMED_LAYERS else ramp(len(lines))


def _decades(lines: Iterable[Points]) -> float | None:
    values = [y for _, ys in lines for y in ys if y > 0]
    return math.log10(max(values) / min(values)) if values else None
