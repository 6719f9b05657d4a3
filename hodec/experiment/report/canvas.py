"""Paper and pens: matplotlib figures in one calm style, and their way to SVG and PNG.

Figures are made from ``matplotlib.figure.Figure`` alone, so no display, no pyplot state and no backend is involved.
"""

import functools
import io
import re
from collections.abc import Callable
from html import escape
from pathlib import Path
from typing import Any, ParamSpec

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

from hodec.experiment.report import units
from hodec.io.atomic import replacing, write_text

_P = ParamSpec("_P")

#: Name -> (colour on light paper, colour on dark paper). Inline SVG refers to them as CSS variables.
INKS = {
    "paper": ("#ffffff", "#151a21"),
    "ink": ("#1d2733", "#e4e8ee"),
    "muted": ("#66717f", "#9aa5b3"),
    "grid": ("#e4e8ed", "#2f3945"),
    "band": ("#f5f7f9", "#1d242d"),
    "soft": ("#c7d5e6", "#3c4f68"),
    "blue": ("#2563a6", "#7fb3ea"),
    "orange": ("#c9621f", "#f0a36c"),
    "green": ("#2c8467", "#70caac"),
    "violet": ("#7d55b0", "#bb9ce6"),
    "red": ("#b83a5c", "#ee8ba6"),
    "ochre": ("#97790c", "#d9bb55"),
    "teal": ("#2b8396", "#74c5d6"),
    "slate": ("#5a6675", "#a3aebc"),
}
LIGHT = {name: pair[0] for name, pair in INKS.items()}
SERIES = tuple(LIGHT[name] for name in ("blue", "orange", "green", "violet", "red", "ochre", "teal", "slate"))

#: Colours of a long ordered series, first to last; readable on light and on dark paper.
_RAMP = ((0x3F, 0xA0, 0x8C), (0x5B, 0x8F, 0xC4), (0x9A, 0x6B, 0xB8))

STYLE: dict[Any, Any] = {
    "font.family": ["DejaVu Sans"],
    "font.size": 8.5,
    "text.color": LIGHT["ink"],
    "text.parse_math": False,  # a `$` in a layer name is a dollar sign
    "axes.edgecolor": LIGHT["muted"],
    "axes.labelcolor": LIGHT["muted"],
    "axes.titlecolor": LIGHT["ink"],
    "axes.titlesize": 9.5,
    "axes.titlelocation": "left",
    "axes.titlepad": 9.0,
    "axes.xmargin": 0.02,
    "axes.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.grid": True,
    "axes.facecolor": "none",
    "figure.facecolor": "none",
    "grid.color": LIGHT["grid"],
    "grid.linewidth": 0.6,
    "xtick.color": LIGHT["muted"],
    "ytick.color": LIGHT["muted"],
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "xtick.minor.size": 0.0,
    "ytick.minor.size": 0.0,
    "legend.frameon": True,
    "legend.fancybox": False,
    "legend.facecolor": LIGHT["paper"],
    "legend.edgecolor": "none",
    "legend.framealpha": 0.85,
    "legend.fontsize": 8.0,
    "legend.handlelength": 1.8,
    "lines.linewidth": 1.6,
    "lines.solid_capstyle": "round",
    "lines.markersize": 3.0,
    "svg.fonttype": "none",  # text stays text: searchable, small, in the reader's own font
    "svg.hashsalt": "hodec",  # the same figure gives the same bytes
}
DPI = 160


def styled(draw: Callable[_P, Figure]) -> Callable[_P, Figure]:
    """Let a drawing function run in the style of the house, whatever the caller's matplotlib settings are."""

    @functools.wraps(draw)
    def in_style(*args: _P.args, **kwargs: _P.kwargs) -> Figure:
        with matplotlib.rc_context():
            matplotlib.rcdefaults()
            matplotlib.rcParams.update(STYLE)
            figure = draw(*args, **kwargs)
            figure.draw_without_rendering()
            # laid out once: saving again must not move anything
            figure.set_layout_engine("none")
            return figure

    return in_style


def panels(columns: int, height: float, *, width: float = 9.2, share_y: bool = False) -> tuple[Figure, list[Axes]]:
    """A figure with panels side by side; width and height in inches."""
    layout = ConstrainedLayoutEngine(w_pad=0.06, h_pad=0.06, wspace=0.04)
    figure = Figure(figsize=(width, height), layout=layout)
    axes = figure.subplots(1, columns, squeeze=False, sharey=share_y)
    return figure, list(axes[0])


def ramp(count: int) -> list[str]:
    """Colours for an ordered series of ``count`` lines."""
    return [_ramp_at(at / max(1, count - 1)) for at in range(count)]


def _ramp_at(position: float) -> str:
    step = position * (len(_RAMP) - 1)
    low = min(int(step), len(_RAMP) - 2)
    parts = (round(a + (b - a) * (step - low)) for a, b in zip(_RAMP[low], _RAMP[low + 1], strict=True))
    return "#" + "".join(f"{part:02x}" for part in parts)


def colors(count: int) -> list[str]:
    """Distinct colours for a few lines, a ramp for many."""
    return list(SERIES[:count]) if count <= len(SERIES) else ramp(count)


def shorten(name: str, most: int = 34) -> str:
    """A long name with its middle left out: both ends of a layer's name tell more than the middle."""
    if len(name) <= most:
        return name
    head = (most - 1) // 2
    return f"{name[:head]}…{name[head + 1 - most :]}"


def count_axis(value: float, _position: int | None = None) -> str:
    """Tick label of a counting axis: ``200 k``, ``1.2 M``."""
    number, _, prefix = units.count(value).partition(" ")
    return f"{float(number):g} {prefix}".rstrip()


def to_svg(figure: Figure, *, paper: str = "white") -> str:
    """A figure as a standalone SVG document; the same figure gives the same text on every call and every day."""
    buffer = io.BytesIO()
    with matplotlib.rc_context({name: STYLE[name] for name in ("svg.fonttype", "svg.hashsalt")}):
        figure.savefig(buffer, format="svg", facecolor=paper, metadata={"Date": None, "Creator": None})
    text = buffer.getvalue().decode("utf-8").replace("'DejaVu Sans'", "'DejaVu Sans', Verdana, sans-serif")
    return re.sub(r"[ \t]+\n", "\n", text)


def to_png(figure: Figure) -> bytes:
    """A figure as PNG on white paper."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=DPI, facecolor="white", metadata={"Software": None})
    return buffer.getvalue()


def save(figure: Figure, path: str | Path) -> tuple[Path, Path]:
    """Write ``path`` with the endings ``.png`` and ``.svg``, each whole or not at all; returns both paths."""
    base = Path(path)
    stem = base.name.removesuffix(".png").removesuffix(".svg")
    png, svg = base.with_name(f"{stem}.png"), base.with_name(f"{stem}.svg")
    with replacing(png) as unfinished:
        unfinished.write_bytes(to_png(figure))
    write_text(svg, to_svg(figure))
    return png, svg


def inline_svg(figure: Figure, name: str, description: str) -> str:
    """A figure as an element of an HTML page: fits its width, follows light and dark, clashes with no other.

    Args:
        figure: The figure.
        name: Prefix of all ids in it; unique on the page, letters and dashes.
        description: What a screen reader says.
    """
    svg = to_svg(figure, paper="none")
    svg = svg[svg.index("<svg") :].rstrip()
    svg = re.sub(r"\s*<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    head, body = svg.split(">", 1)
    box = re.search(r'viewBox="[^"]*"', head)
    body = re.sub(r'\bid="', f'id="{name}-', body)
    body = re.sub(r'(?:xlink:)?href="#', f'href="#{name}-', body).replace("url(#", f"url(#{name}-")
    for ink, (light, _) in INKS.items():
        body = body.replace(light, f"var(--{ink})")
    return f'<svg {box.group() if box else ""} role="img" aria-label="{escape(description)}">{body}'
