"""Options as frozen dataclasses: one place for the default, the range and the meaning of each setting.

A rank rule, a method, an optimizer, a logger or a data set is a subclass of ``Option``. Its Python constructor, its
Hydra option, its flags on the command line and its row in the docs are made from its fields. Nothing here imports
torch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import MISSING, dataclass, field, fields
from types import NoneType
from typing import Any, ClassVar, cast, get_args, get_type_hints

from hodec.errors import ConfigError, Use, literal

BadParts = Iterator[tuple[str, object]]
"""(where, value) for each wrong part of a value; ``where`` is empty for the whole, ``'[fc]'`` for an entry."""

TYPES = {bool: "true or false", int: "a whole number", float: "a number", str: "text", list[float]: "a list of numbers"}
INSTANCES: dict[object, tuple[type, ...]] = {bool: (bool,), int: (int,), float: (int, float), str: (str,)}


@dataclass(frozen=True)
class Allowed:
    """What one setting may hold beyond its type; bounds are in the unit of the setting."""

    low: float | None = None
    above: float | None = None
    high: float | None = None
    below: float | None = None
    choices: tuple[str, ...] = ()
    words: str = ""  # said instead of type and limits
    check: Callable[[Any], BadParts] | None = None

    def bad_parts(self, value: object) -> BadParts:
        """What is wrong in ``value``; None is never out of range."""
        if value is None:
            return
        if self.check is not None:
            yield from self.check(value)
        elif (self.choices and value not in self.choices) or not self._in_range(value):
            yield "", value

    def _in_range(self, value: object) -> bool:
        if isinstance(value, bool) or not isinstance(value, int | float):
            return True
        return (
            math.isfinite(value)
            and (self.low is None or value >= self.low)
            and (self.above is None or value > self.above)
            and (self.high is None or value <= self.high)
            and (self.below is None or value < self.below)
        )

    def limits(self) -> str:
        """Words for the range or the choices: ``' above 0 and below 1'``, ``': sgd | adamw'`` or ``''``."""
        if self.choices:
            return f": {' | '.join(self.choices)}"
        bounds = {"at least": self.low, "above": self.above, "at most": self.high, "below": self.below}
        given = [f"{word} {bound:.10g}" for word, bound in bounds.items() if bound is not None]
        return f" {' and '.join(given)}" if given else ""


def setting(default: Any, doc: str = "", **allowed: Any) -> Any:
    """A field that every surface can set.

    Args:
        default: its value where nothing is given.
        doc: what it means, with its unit: the comment in ``conf/``, the help of its flag, its text in the docs.
        allowed: the arguments of its ``Allowed``.
    """
    return field(default=default, metadata={"doc": doc, "allowed": Allowed(**allowed)})


def argument(default: Any = None, **allowed: Any) -> Any:
    """A field that only Python can give: a function, a table, tensors. No surface but the constructor shows it.

    Args:
        default: its value where nothing is given.
        allowed: the arguments of its ``Allowed``; ``check`` needs ``words``.
    """
    return field(default=default, metadata={"python_only": True, "allowed": Allowed(**allowed)})


@dataclass(frozen=True)
class Setting:
    """One setting of an option: its type without null, whether it may be null, its default and what it may hold."""

    name: str
    type: Any
    optional: bool
    default: object
    doc: str
    allowed: Allowed

    def words(self) -> str:
        """What may be given, in words: ``'a number above 0 and below 1'``."""
        if self.allowed.words:
            return self.allowed.words
        return f"{'null or ' if self.optional else ''}{TYPES.get(self.type, 'a value')}{self.allowed.limits()}"

    def bad_parts(self, value: object) -> BadParts:
        """The wrong parts of ``value``: of another type, None where that is not allowed, or out of range."""
        if value is None:
            wrong = not self.optional
        else:
            wrong = self.type in INSTANCES and not isinstance(value, INSTANCES[self.type])
        if wrong or (isinstance(value, bool) and self.type in (int, float)):  # true is no 1
            yield "", value
        else:
            yield from self.allowed.bad_parts(value)


def settings_of(option: type) -> dict[str, Setting]:
    """The settings that every surface can give, by name, in the order of the constructor."""
    hints, found = get_type_hints(option), {}
    for one in sorted(fields(option), key=lambda each: bool(each.kw_only)):
        if one.metadata.get("python_only"):
            continue
        hint, default = hints[one.name], None if one.default is MISSING else one.default
        optional = NoneType in get_args(hint)
        kind = next(part for part in get_args(hint) if part is not NoneType) if optional else hint
        allowed = one.metadata.get("allowed", Allowed())
        found[one.name] = Setting(one.name, kind, optional, default, one.metadata.get("doc", ""), allowed)
    return found


class Option:
    """Base of all options: a frozen dataclass that refuses what is out of range when it is made.

    Attributes:
        group: where its settings stand among all, ``ranks`` for ``ranks.macs``.
        name: what chooses it: ``ranks=budget``.
    """

    group: ClassVar[str] = ""
    name: ClassVar[str] = ""

    def __post_init__(self) -> None:
        settings = settings_of(type(self))
        for one in fields(self):  # type: ignore[arg-type]  # each option is a dataclass
            value, known = getattr(self, one.name), settings.get(one.name)
            allowed = one.metadata.get("allowed", Allowed())
            for where, part in known.bad_parts(value) if known else allowed.bad_parts(value):
                key = f"{self.group}.{one.name}" if known and self.group else one.name
                words = literal(known.words() if known else allowed.words)
                raise ConfigError(
                    f"{{key}}{literal(where)}: {literal(repr(part))} given; allowed: {words}", key=Use(key)
                )


def bad_function(value: object) -> BadParts:
    """Yield what cannot be called."""
    if not callable(value):
        yield "", value


def bad_names(value: object) -> BadParts:
    """Yield what is no filled list of names or globs."""
    names = isinstance(value, list | tuple) and len(value) > 0
    if not names or not all(isinstance(one, str) and one for one in cast(list[object], value)):
        yield "", value
