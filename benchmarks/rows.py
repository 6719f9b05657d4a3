"""Rows of the table of ratios: what was measured beside what, and whether it is what was aimed at."""

from dataclasses import asdict, dataclass
from typing import Any

# Our error over the peer's: what is faster and wrong does not count.
ALLOWED_ERROR = 1.001

_FORMATS = {"x": "{:.2f}x", "%": "{:.2%}", "s": "{:.3g} s", "B": "{:.4g} MiB"}
_UNMEASURED = "not measured"
_SCALES = {"B": 2**-20}


def in_unit(value: float | None, unit: str) -> str:
    """A number as people read it: ``x`` a ratio, ``%`` a share (of 1), ``s`` seconds, ``B`` bytes."""
    return "-" if value is None else _FORMATS[unit].format(value * _SCALES.get(unit, 1))


@dataclass(frozen=True)
class Target:
    """What a figure should be: ``sense`` is ``>=`` or ``<=``, ``bound`` in ``unit`` (see ``in_unit``)."""

    sense: str
    bound: float
    unit: str = "x"

    def met(self, figure: float) -> bool:
        return figure >= self.bound if self.sense == ">=" else figure <= self.bound

    def __str__(self) -> str:
        value = f"{100 * self.bound:g} %" if self.unit == "%" else f"{self.bound * _SCALES.get(self.unit, 1):g}"
        return f"{self.sense} {value}" + {"x": "x", "%": "", "s": " s", "B": " MiB"}[self.unit]


@dataclass(frozen=True)
class Row:
    """One line.

    Attributes:
        group: the benchmark it is of.
        what: what was measured, with its sizes.
        peer: what it was measured beside, in the same process and the same rounds.
        ours, theirs: medians, in ``unit``: ``s`` or ``B`` (bytes).
        figure: the number that counts and that ``target`` is about; in the target's unit, else ``figure_unit``.
        spread: half the interquartile range of the figure over the rounds, as a share of its median.
        error: relative error of our result over the peer's; at most ``allowed_error``, or the target is missed.
        limit: the least time that this much work can take here, and the share of it that was reached.
        note: what else to know; of a row without numbers, why it has none.
    """

    group: str
    what: str
    peer: str = ""
    ours: float | None = None
    theirs: float | None = None
    unit: str = "s"
    figure: float | None = None
    figure_unit: str = "x"
    target: Target | None = None
    spread: float | None = None
    error: float | None = None
    allowed_error: float = ALLOWED_ERROR
    limit: str = ""
    note: str = ""

    @property
    def met(self) -> str:
        """``yes``, ``no``, or ``-`` where there is no target or no measurement."""
        if self.target is None or self.figure is None:
            return "-"
        right = self.error is None or self.error <= self.allowed_error
        return "yes" if right and self.target.met(self.figure) else "no"

    @property
    def unmeasured(self) -> bool:
        """Whether ``missing`` made it."""
        return self.note.startswith(_UNMEASURED)

    @property
    def figure_text(self) -> str:
        return in_unit(self.figure, self.target.unit if self.target else self.figure_unit)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        target = None if self.target is None else str(self.target)
        return {**asdict(self), "target": target, "met": self.met}


def missing(group: str, what: str, peer: str, reason: str) -> Row:
    """A row that could not be measured here, with the reason."""
    return Row(group, what, peer, note=f"{_UNMEASURED}: {reason}")
