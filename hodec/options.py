"""Options as frozen dataclasses: one place for the default, the range and the meaning of each setting.

A rank rule, a method, an optimizer, a logger or a data set is a subclass of ``Option``. Its Python constructor, its
Hydra option, its flags on the command line and its row in the docs are made from its fields. Nothing here imports
torch.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import MISSING, dataclass, field, fields
from functools import cache
from numbers import Integral, Real
from types import NoneType, UnionType
from typing import Any, ClassVar, TypeVar, Union, cast, get_args, get_origin, get_type_hints

from hodec.errors import ConfigError, HodecError, Use, literal

T = TypeVar("T")
BadParts = Iterator[tuple[str, object]]
"""(where, value) for each wrong part of a value; ``where`` is empty for the whole, ``'[fc]'`` for an entry."""


@dataclass(frozen=True)
class Allowed:
    """What one setting may hold beyond its type; bounds are in the unit of the setting."""

    low: float | None = None
    above: float | None = None
    high: float | None = None
    below: float | None = None
    choices: tuple[str, ...] = ()
    words: str = ""  # said instead of type and limits
    example: str = ""  # a value that is said beside the words, quoted for the shell where that is read
    check: Callable[..., BadParts] | None = None

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
            -math.inf < value < math.inf  # math.isfinite raises for whole numbers beyond 1.8e308
            and (self.low is None or value >= self.low)
            and (self.above is None or value > self.above)
            and (self.high is None or value <= self.high)
            and (self.below is None or value < self.below)
        )

    def limits(self) -> str:
        """Words for the range: ``' above 0 and below 1'``, or ``''``."""
        bounds = {"at least": self.low, "above": self.above, "at most": self.high, "below": self.below}
        given = [f"{word} {bound:.10g}" for word, bound in bounds.items() if bound is not None]
        return f" {' and '.join(given)}" if given else ""


def setting(default: object, doc: str = "", **allowed: Any) -> Any:
    """A field that every surface can set.

    Args:
        default: its value where nothing is given.
        doc: what it means, with its unit: the comment in ``conf/``, the help of its flag, its text in the docs.
        allowed: the arguments of its ``Allowed``.
    """
    return field(default=default, metadata={"doc": doc, "allowed": Allowed(**allowed)})


def argument(default: object = None, **allowed: Any) -> Any:
    """A field that only Python can give: a function, a table, tensors. No surface but the constructor shows it.

    Args:
        default: its value where nothing is given.
        allowed: the arguments of its ``Allowed``; ``check`` needs ``words``.
    """
    return field(default=default, metadata={"python_only": True, "allowed": Allowed(**allowed)})


def _bool(value: object) -> bool:
    if not isinstance(value, bool):
        raise ValueError
    return value


def _int(value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise ValueError
    return int(value)


def _float(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, Real):
        raise ValueError
    try:
        return float(value)
    except OverflowError:  # a whole number beyond 1.8e308
        raise ValueError from None


def _str(value: object) -> str:
    if isinstance(value, os.PathLike):
        return str(os.fspath(value))
    if isinstance(value, bool) or not isinstance(value, str | Real):
        raise ValueError
    return str(value)


def _list(read: Callable[[object], T]) -> Callable[[object], list[T]]:
    def read_all(value: object) -> list[T]:
        if isinstance(value, str) or not isinstance(value, Sequence):
            raise ValueError
        return [read(one) for one in value]

    return read_all


# Type of a setting -> how a value is read, ValueError where it is not of that type, and the type in words.
READERS: dict[object, tuple[Callable[[object], object], str]] = {
    bool: (_bool, "true or false"),
    int: (_int, "a whole number"),
    float: (_float, "a number"),
    str: (_str, "text"),
    list[float]: (_list(_float), "a list of numbers"),
    list[str]: (_list(_str), "a list of names"),
    object: (lambda value: value, "a value"),
}


@dataclass(frozen=True)
class Setting:
    """One setting of an option: its key among all settings, its type without null and what it may hold."""

    name: str
    key: str
    type: object
    optional: bool
    default: object
    doc: str
    allowed: Allowed

    def read(self, value: object) -> object:
        """``value`` in the type of the setting: 1 becomes 1.0 for a number.

        Raises:
            ValueError: it is not of that type.
        """
        if value is None:
            if not self.optional:
                raise ValueError
            return None
        return READERS[self.type][0](value)

    def bad_parts(self, value: object) -> BadParts:
        """The wrong parts of ``value``: of another type, None where that is not allowed, or out of range."""
        try:
            read = self.read(value)
        except ValueError:
            yield "", value
        else:
            for where, part in self.allowed.bad_parts(read):
                yield where, part if where or part != read else value

    def errors(self, value: object) -> Iterator[ConfigError]:
        """One error for each wrong part of ``value``."""
        uses = {"setting": Use(self.key)}
        example = ""
        if self.allowed.example:
            example, uses["example"] = ": {example}", Use(self.key, self.allowed.example)
        for where, part in self.bad_parts(value):
            text = f"{literal(where)}: {literal(repr(part))} given; allowed: {literal(self.words())}{example}"
            yield ConfigError(f"{{setting}}{text}", **uses)

    def words(self, *, null: bool = True) -> str:
        """What may be given, in words: ``'a number above 0 and below 1'``; ``null`` too where that is told."""
        words = self.allowed.words.removeprefix("null or ") or " | ".join(self.allowed.choices)
        words = words or READERS[self.type][1] + self.allowed.limits()
        return f"null or {words}" if self.optional and null else words


def settings_of(option: type) -> dict[str, Setting]:
    """The settings that every surface can give, by name, in the order of the constructor."""
    return _settings_of(option)


@cache
def _settings_of(option: Any) -> dict[str, Setting]:
    hints, found = get_type_hints(option), {}
    group = getattr(option, "group", "")
    for one in sorted(fields(option), key=lambda one: bool(one.kw_only)):  # as in the constructor
        if one.metadata.get("python_only"):
            continue
        hint, default = hints[one.name], None if one.default is MISSING else one.default
        parts = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
        kinds = [part for part in parts if part is not NoneType]
        kind: object = kinds[0] if len(kinds) == 1 else object
        if get_origin(kind) in (list, tuple, Sequence):
            kind = list[get_args(kind)[0]]  # type: ignore[misc]
        found[one.name] = Setting(
            one.name,
            f"{group}.{one.name}" if group else one.name,
            kind if kind in READERS else object,
            len(kinds) < len(parts),
            default,
            one.metadata.get("doc", ""),
            one.metadata.get("allowed", Allowed()),
        )
    return found


class Settings:
    """Base of dataclasses of settings: refuses what is out of range when it is made.

    Attributes:
        group: where its settings stand among all, ``ranks`` for ``ranks.macs``; empty for those of the top level.
    """

    group: ClassVar[str] = ""

    def __post_init__(self) -> None:
        for one in settings_of(type(self)).values():
            given = getattr(self, one.name)
            for error in one.errors(given):
                raise error
            value = one.read(given)
            if type(value) is not type(given) and not isinstance(given, tuple):  # 1 for a number, a Path for text
                object.__setattr__(self, one.name, value)
        self._check_arguments()

    def _check_arguments(self) -> None:
        """Refuse what only Python gives where it is not what its ``Allowed`` says."""
        for one in fields(self):  # type: ignore[arg-type]  # each option is a dataclass
            allowed = one.metadata.get("allowed", Allowed())
            for where, part in allowed.bad_parts(getattr(self, one.name)) if one.metadata.get("python_only") else ():
                text = f"{where}: {part!r} given; allowed: {allowed.words}"
                raise ConfigError("{key}" + literal(text), key=Use(one.name))

    def values(self) -> dict[str, Any]:
        """Its settings by name, without what only Python gives."""
        return {name: getattr(self, name) for name in settings_of(type(self))}


class Option(Settings):
    """Base of all options: settings that are chosen by a name.

    Attributes:
        name: what chooses it: ``ranks=budget``.
    """

    name: ClassVar[str] = ""


def values_or_errors(option: type[Settings], given: dict[str, object]) -> tuple[Settings | None, list[HodecError]]:
    """The option with these settings, or every error: of each setting, else of what does not go together."""
    settings = settings_of(option)
    errors: list[HodecError] = [error for name, value in given.items() for error in settings[name].errors(value)]
    if errors:
        return None, errors
    try:
        return cast(Callable[..., Settings], option)(**given), []
    except HodecError as error:
        return None, [error]


def bad_function(value: object) -> BadParts:
    """Yield what cannot be called."""
    if not callable(value):
        yield "", value


def bad_names(value: object) -> BadParts:
    """Yield what is no filled list of names or globs."""
    names = isinstance(value, list | tuple) and len(value) > 0
    if not names or not all(isinstance(one, str) and one for one in cast(list[object], value)):
        yield "", value
