"""Matplotlib figures in one style, and their way to SVG and PNG.

Figures are made from ``matplotlib.figure.Figure`` alone, so no display, no pyplot state and no backend is involved.
The colours are named in ``report.css``; inline SVG refers to them as CSS variables, so a page can change them.
"""

import functools
import io
import re
from collections.abc import Callable
from html import escape
from pathlib import Path
from typing import ParamSpec

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.colors import LinearSegmentedColormap, to_hex
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

from hodec.io.atomic import replacing, write_text

_P = ParamSpec("_P")

TEMPLATES = Path(__file__).parent / "templates"
STYLE = TEMPLATES / "report.mplstyle"
#: Name -> colour on light paper, which is what figures are drawn in.
INKS: dict[str, str] = dict(
    re.findall(r"--(\w+): (#[0-9a-f]{6});", (TEMPLATES / "report.css").read_text(encoding="utf-8").split("@media")[0])
)
SERIES = ("blue", "orange", "green", "violet", "red", "ochre", "teal", "slate")


def styled(draw: Callable[_P, Figure]) -> Callable[_P, Figure]:
    """Let a drawing function run in the style of the report, whatever the caller's matplotlib settings are."""

    @functools.wraps(draw)
    def in_style(*args: _P.args, **kwargs: _P.kwargs) -> Figure:
        with matplotlib.rc_context(fname=STYLE):
            figure = draw(*args, **kwargs)
            figure.draw_without_rendering()
            # the layout is made once: saving again must not move anything
            figure.set_layout_engine("none")
            return figure

    return in_style


def panels(columns: int, height: float, *, width: float) -> tuple[Figure, list[Axes]]:
    """A figure with panels side by side; width and height in inches."""
    figure = Figure(figsize=(width, height), layout=ConstrainedLayoutEngine(w_pad=0.06, h_pad=0.06, wspace=0.04))
    return figure, list(figure.subplots(1, columns, squeeze=False)[0])


def colors(count: int) -> list[str]:
    """Distinct colours for a few lines; for many a ramp from the first to the last, readable on any paper."""
    series = [INKS[name] for name in SERIES[:count]]
    ramp = LinearSegmentedColormap.from_list("ramp", ["#3fa08c", "#5b8fc4", "#9a6bb8"])
    return series if count <= len(SERIES) else [to_hex(ramp(at / (count - 1))) for at in range(count)]


def shorten(name: str, most: int = 34) -> str:
    """A long name with its middle left out: both ends of a layer's name tell more than the middle."""
    head = (most - 1) // 2
    return name if len(name) <= most else f"{name[:head]}…{name[head + 1 - most :]}"


def visible(text: str) -> str:
    """A legend leaves out texts that begin with an underscore; a word joiner before it keeps them."""
    return f"\u2060{text}" if text.startswith("_") else text


def to_svg(figure: Figure) -> str:
    """A figure as a standalone SVG document; the same figure gives the same text on every call and every day."""
    buffer, dpi = io.BytesIO(), figure.dpi
    with matplotlib.rc_context(fname=STYLE):
        # not savefig, which draws every figure twice
        FigureCanvasSVG(figure).print_svg(buffer, metadata={"Date": None, "Creator": None})
    figure.set_dpi(dpi)  # which is 72 now, too few for a PNG
    text = buffer.getvalue().decode("utf-8").replace("'DejaVu Sans'", "'DejaVu Sans', Verdana, sans-serif")
    return re.sub(r"[ \t]+\n", "\n", text)


def to_png(figure: Figure) -> bytes:
    """A figure as PNG on white paper."""
    buffer = io.BytesIO()
    with matplotlib.rc_context(fname=STYLE):
        FigureCanvasAgg(figure).print_png(buffer, metadata={"Software": None})
    return buffer.getvalue()


def save(path: Path, figure: Figure, svg: str) -> None:
    """Write ``path`` with the endings ``.png`` and ``.svg``, each whole or not at all."""
    with replacing(path.with_name(f"{path.name}.png")) as unfinished:
        unfinished.write_bytes(to_png(figure))
    write_text(path.with_name(f"{path.name}.svg"), svg)


def inlined(svg: str, name: str, description: str) -> str:
    """A standalone SVG as an element of an HTML page: fits its width, follows light and dark, clashes with no other.

    Args:
        svg: as ``to_svg`` returns it.
        name: prefix of all ids in it; unique on the page, letters and dashes.
        description: text for a screen reader.
    """
    svg = re.sub(r"\s*<metadata>.*?</metadata>", "", svg[svg.index("<svg") :].rstrip(), flags=re.DOTALL)
    head, body = svg.split(">", 1)
    box = re.search(r'viewBox="[^"]*"', head)
    body = re.sub(r'\bid="', f'id="{name}-', body)
    body = re.sub(r'(?:xlink:)?href="#', f'href="#{name}-', body).replace("url(#", f"url(#{name}-")
    for ink, color in INKS.items():
        body = body.replace(color, f"var(--{ink})")
    return f'<svg {box.group() if box else ""} role="img" aria-label="{escape(description)}">{body}'
