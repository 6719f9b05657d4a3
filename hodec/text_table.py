"""Numbers and tables as plain text."""

import io

from rich.console import Console, RenderableType


def rendered(table: RenderableType, *, width: int = 150) -> str:
    """A rich renderable as text without colours, ``width`` characters wide."""
    text = io.StringIO()
    Console(file=text, width=width, color_system=None).print(table)
    return text.getvalue()


def human(n: float) -> str:
    """1234567 -> '1.23 M'."""
    for limit, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(n) >= limit:
            return f"{n / limit:.3g} {unit}" if abs(n) < 999.5 * limit else f"{n / limit:.0f} {unit}"
    return f"{n:.0f}"
