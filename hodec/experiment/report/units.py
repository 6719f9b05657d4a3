"""Numbers as readers see them. Every function shows an absent number as ``-`` and a broken one by its name."""

import math
from collections.abc import Callable, Iterable

ABSENT = "-"
_PREFIXES = ((1e3, " k"), (1e6, " M"), (1e9, " G"), (1e12, " T"))
_BYTES = ((1e3, " kB"), (1e6, " MB"), (1e9, " GB"), (1e12, " TB"))


def _or_absent(value: float | None, show: Callable[[float], str]) -> str:
    if value is None:
        return ABSENT
    return show(value) if math.isfinite(value) else str(value).replace("nan", "NaN")


def _scaled(value: float, prefixes: tuple[tuple[float, str], ...], unit: str) -> str:
    """Three significant digits and the largest prefix below the *rounded* value, so 999 999 reads 1.00 M."""
    rounded = float(f"{value:.3g}")
    for factor, prefix in reversed(prefixes):
        if abs(rounded) >= factor:
            mantissa = rounded / factor
            decimals = max(0, 2 - int(math.log10(abs(mantissa)) + 1e-9))
            return f"{mantissa:.{decimals}f}{prefix}"
    return f"{value:.0f}{unit}"


def count(value: float | None) -> str:
    """Parameters or MACs: ``980``, ``464 k``, ``40.6 M``, ``1.82 G``."""
    return _or_absent(value, lambda v: _scaled(v, _PREFIXES, ""))


def size(value: float | None) -> str:
    """Bytes, decimal prefixes: ``1.86 MB``."""
    return _or_absent(value, lambda v: _scaled(v, _BYTES, " B"))


def exact(value: float | None) -> str:
    """All digits of a count, grouped: ``464,154``; empty when absent."""
    return f"{value:,.0f}" if value is not None and math.isfinite(value) else ""


def accuracy(value: float | None) -> str:
    """A fraction as percent with two decimals: ``96.93 %``."""
    return _or_absent(value, lambda v: f"{100 * v:.2f} %")


def points(value: float | None) -> str:
    """A difference of two accuracies in percentage points, with its sign: ``-0.30``."""
    return _or_absent(value, lambda v: _unsigned_zero(f"{100 * v:+.2f}"))


def change(fraction_cut: float | None) -> str:
    """A fraction cut as the change it makes: 0.803 -> ``-80.3 %``, -0.1 -> ``+10.0 %``."""
    return _or_absent(fraction_cut, lambda v: f"{_unsigned_zero(f'{-100 * v:+.1f}')} %")


def share(value: float | None) -> str:
    """A relative error as percent with three significant digits: ``62.5 %``, ``1.02 %``, ``2.10e-05 %``."""
    return _or_absent(value, lambda v: f"{f'{100 * v:#.3g}'.rstrip('.')} %" if v else "0 %")


def plain(value: float | None) -> str:
    """Three significant digits: rho, pull, residuals."""
    return _or_absent(value, lambda v: f"{v:.3g}")


def milliseconds(value: float | None) -> str:
    """Latency: ``3.42 ms``."""
    return _or_absent(value, lambda v: f"{v:.3g} ms")


def duration(seconds: float | None) -> str:
    """Wall-clock time: ``8.4 s``, ``12 min 5 s``, ``3 h 20 min``."""
    return _or_absent(seconds, _duration)


def _duration(seconds: float) -> str:
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60} min"


def integers(values: Iterable[int], separator: str = ", ") -> str:
    """A shape, modes or ranks: ``64 x 32 x 3 x 3`` with separator `` x ``."""
    return separator.join(str(value) for value in values) or ABSENT


def _unsigned_zero(text: str) -> str:
    return text[1:] if not text.strip("+-0.") else text
