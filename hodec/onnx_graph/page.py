"""One HTML file that needs nothing else: tables, and lines of points as SVG."""

from collections.abc import Callable, Sequence
from html import escape

Point = tuple[float, float, str]
"""x, y and what the point says when it is pointed at."""

STYLE = """
body{font:15px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem;color:#222}
table{border-collapse:collapse;margin:1rem 0;font-size:14px;display:block;overflow-x:auto}
td,th{padding:.2rem .7rem;border-bottom:1px solid #ddd;text-align:left}
td.n{text-align:right;font-variant-numeric:tabular-nums}
svg{width:100%;max-width:44rem;height:auto} .note{color:#666} h1{font-size:1.4rem} h2{font-size:1.1rem}
""".strip()
WIDTH, HEIGHT, LEFT, BOTTOM = 640, 300, 60, 40


def page(title: str, parts: Sequence[str]) -> str:
    """The whole file."""
    head = f'<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{escape(title)}</title>'
    return f"<!doctype html><html><head>{head}<style>{STYLE}</style></head><body>{''.join(parts)}</body></html>\n"


def heading(text: str, level: int = 2) -> str:
    """A heading."""
    return f"<h{level}>{escape(text)}</h{level}>"


def paragraph(text: str, *, note: bool = False) -> str:
    """A paragraph."""
    return f"<p{' class=note' * note}>{escape(text)}</p>"


def table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A table; numbers and what begins like one stand at the right."""
    cells = "".join(f"<th>{escape(one)}</th>" for one in head)
    lines = ("".join(_cell(one) for one in row) for row in rows)
    return f"<table><tr>{cells}</tr>{''.join(f'<tr>{line}</tr>' for line in lines)}</table>"


def _cell(value: object) -> str:
    text = str(value)
    return f"<td{' class=n' * (text[:1].isdigit() or text[:1] in '+-')}>{escape(text)}</td>"


def chart(points: Sequence[Point], *, across: str, up: str, level: float | None = None) -> str:
    """Points joined in the order of x, and a dashed line at ``level``.

    Args:
        across, up: what the axes are, with units.
    """
    points = sorted(points)
    xs = [x for x, _, _ in points]
    ys = [y for _, y, _ in points] + ([] if level is None else [level])
    (x0, x1), (y0, y1) = _range(xs), _range(ys)

    def place(x: float, y: float) -> tuple[float, float]:
        return (
            LEFT + (x - x0) / (x1 - x0) * (WIDTH - LEFT - 20),
            HEIGHT - BOTTOM - (y - y0) / (y1 - y0) * (HEIGHT - BOTTOM - 20),
        )

    places = [(*place(x, y), escape(text)) for x, y, text in points]
    line = " ".join(f"{x:.1f},{y:.1f}" for x, y, _ in places)
    dots = "".join(
        f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" fill="#1668a7"><title>{text}</title></circle>'
        for x, y, text in places
    )
    return (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(f"{up} against {across}")}">'
        f"{_axes((x0, x1), (y0, y1), across, up)}{_level(level, place, (x0, x1))}"
        f'<polyline points="{line}" fill="none" stroke="#1668a7" stroke-width="2"/>{dots}</svg>'
    )


def _range(numbers: Sequence[float]) -> tuple[float, float]:
    low, high = min(numbers, default=0.0), max(numbers, default=1.0)
    room = 0.05 * (high - low) or 0.05 * abs(high) or 1.0
    return low - room, high + room


def _axes(x: tuple[float, float], y: tuple[float, float], across: str, up: str) -> str:
    ground = HEIGHT - BOTTOM
    parts = [f'<path d="M{LEFT} 20V{ground}H{WIDTH - 20}" fill="none" stroke="#888"/>']
    for k in range(5):
        share = k / 4
        at = LEFT + share * (WIDTH - LEFT - 20)
        parts.append(_text(at, ground + 16, f"{x[0] + share * (x[1] - x[0]):.3g}", "middle"))
        parts.append(_text(LEFT - 6, ground - share * (ground - 20) + 4, f"{y[0] + share * (y[1] - y[0]):.4g}", "end"))
    parts.append(_text((LEFT + WIDTH) / 2, HEIGHT - 6, across, "middle"))
    parts.append(_text(LEFT, 12, up, "start"))
    return "".join(parts)


def _text(x: float, y: float, text: str, anchor: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" font-size="12" fill="#444" text-anchor="{anchor}">{escape(text)}</text>'


def _level(level: float | None, place: Callable[[float, float], tuple[float, float]], x: tuple[float, float]) -> str:
    if level is None:
        return ""
    (left, y), (right, _) = place(x[0], level), place(x[1], level)
    return f'<path d="M{left:.1f} {y:.1f}H{right:.1f}" stroke="#b3261e" stroke-dasharray="5 4"/>'
