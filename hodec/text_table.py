"""Numbers and tables as plain text. An absent number is shown as ``-``, a NaN or an infinity by its name."""

import csv
import io
import math
from collections.abc import Iterable, Mapping, Sequence

from rich.console import Console, RenderableType

ABSENT = "-"


def rendered(table: RenderableType, *, width: int = 150) -> str:
    """A rich renderable as text without colours, ``width`` characters wide."""
    text = io.StringIO()
    Console(file=text, width=width, color_system=None).print(table)
    return text.getvalue()


def csv_text(rows: Iterable[Mapping[str, object]], columns: Sequence[str]) -> str:
    """Rows as CSV under a head of columns; what a row lacks is empty."""
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def rendered_html(table: RenderableType, *, width: int = 150) -> str:
    """A rich renderable as HTML, ``width`` characters wide."""
    console = Console(file=io.StringIO(), width=width, record=True)
    console.print(table)
    return console.export_html(inline_styles=True, code_format='<pre style="line-height:1.2">{code}</pre>')


def human(value: float | None, unit: str = "") -> str:
    """Three significant digits and a decimal prefix: 1234567 -> ``1.23 M``, with unit B ``1.23 MB``."""
    if value is None or not math.isfinite(value):
        return number(value)
    rounded = float(f"{value:.3g}")  # the prefix of 999 999 is that of 1.00 M
    for limit, prefix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(rounded) >= limit:
            digits = f"{rounded / limit:.3g}" if abs(rounded) < 1e3 * limit else f"{rounded / limit:.0f}"
            return f"{digits} {prefix}{unit}"
    return f"{value:.0f} {unit}".rstrip()


def number(value: float | None, spec: str = ".3g", *, scale: float = 1, unit: str = "") -> str:
    """``scale * value`` in a format such as ``.2f``, with its unit; a zero has no sign."""
    if value is None:
        return ABSENT
    if not math.isfinite(value):
        return str(value).replace("nan", "NaN")
    text = format(scale * value, spec).rstrip(".")
    return (text if text.strip("+-0.") else text.lstrip("+-")) + unit


def accuracy(fraction: float | None) -> str:
    """A fraction as percent with two decimals: ``96.93 %``."""
    return number(fraction, ".2f", scale=100, unit=" %")


def percent(fraction: float | None) -> str:
    """A relative error as percent with three significant digits: ``62.5 %``, ``1.02 %``, ``2.10e-05 %``."""
    return number(fraction, "#.3g", scale=100, unit=" %")


def change(fraction_cut: float | None) -> str:
    """A fraction cut as the change it makes: 0.803 -> ``-80.3 %``, -0.1 -> ``+10.0 %``."""
    return number(fraction_cut, "+.1f", scale=-100, unit=" %")


def duration(seconds: float | None) -> str:
    """Wall-clock time: ``8.4 s``, ``12 min 5 s``, ``3 h 20 min``."""
    if seconds is None or not math.isfinite(seconds) or round(seconds, 1) < 60:
        return number(seconds, ".1f", unit=" s")
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else "{} h {} min".format(*divmod(round(seconds / 60), 60))
