"""What one setting may hold: ranges, choices, and the free-form values (ranks, rho, modes, intervals)."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

BadParts = Iterator[tuple[str, Any]]
"""(where, value) for each wrong part of a value; `where` is empty for the whole, ``'[fc]'`` for an entry."""


@dataclass(frozen=True)
class Allowed:
    """What one setting may hold beyond its type; all numbers are bounds, in the unit of the setting."""

    low: float | None = None
    above: float | None = None
    high: float | None = None
    below: float | None = None
    choices: tuple[str, ...] = ()
    words: str = ""  # said instead of type and limits
    check: Callable[[Any], BadParts] | None = None

    def bad_parts(self, value: Any) -> BadParts:
        """Yield what is wrong in `value`; whether it may be null is the business of its type."""
        if value is None:
            return
        if self.check is not None:
            yield from self.check(value)
        elif (self.choices and value not in self.choices) or not self._in_range(value):
            yield "", value

    def _in_range(self, value: Any) -> bool:
        if isinstance(value, bool) or not isinstance(value, (int, float)):
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


def setting(default: Any, **allowed: Any) -> Any:
    """A dataclass field with a default and the arguments of its `Allowed`."""
    return field(default=default, metadata={"allowed": Allowed(**allowed)})


def is_count(value: Any) -> bool:
    """Whether `value` is a whole number from 1; true and false are not numbers."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def are_counts(value: Any) -> bool:
    """Whether `value` is a filled list of whole numbers from 1."""
    return isinstance(value, (list, tuple)) and bool(value) and all(map(is_count, value))


def is_positive(value: Any) -> bool:
    """Whether `value` is a finite number above 0."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value < math.inf


def is_glob(key: Any) -> bool:
    """Whether `key` can be a pattern of layer names."""
    return isinstance(key, str) and bool(key)


def is_epoch(key: Any) -> bool:
    """Whether `key` counts epochs from 0."""
    return isinstance(key, int) and not isinstance(key, bool) and key >= 0


def bad_entries(value: Any, good: Callable[[Any], bool], good_key: Callable[[Any], bool] = is_glob) -> BadParts:
    """Yield the entries of a mapping whose key or value is wrong, or all of what is no filled mapping."""
    if not isinstance(value, dict) or not value:
        yield "", value
        return
    for key, one in value.items():
        if not good_key(key):
            yield "", {key: one}
        elif not good(one):
            yield f"[{key}]", one


def bad_ranks(value: Any) -> BadParts:
    """Yield what is wrong in ranks: a count, a list of counts, or {layer glob: either of both}."""

    def good(ranks: Any) -> bool:
        return is_count(ranks) or are_counts(ranks)

    if isinstance(value, dict):
        yield from bad_entries(value, good)
    elif not good(value):
        yield "", value


def bad_rho(value: Any) -> BadParts:
    """Yield what is wrong in rho: a word, a number above 0, {epoch: number} or {layer glob: number}."""
    if isinstance(value, dict):
        # one kind of key per mapping: the first entry says which
        by_epoch = isinstance(next(iter(value), None), int)
        yield from bad_entries(value, is_positive, is_epoch if by_epoch else is_glob)
    elif value not in ("auto", "balanced") and not is_positive(value):
        yield "", value


def bad_interval(value: Any) -> BadParts:
    """Yield an interval that is neither a count of epochs nor a word such as 50steps or 2epochs."""
    is_word = isinstance(value, str) and re.fullmatch(r"[1-9]\d*(steps|epochs)", value)
    if not is_count(value) and not is_word:
        yield "", value


def bad_modes(value: Any) -> BadParts:
    """Yield what is wrong in {layer glob: {in: counts, out: counts}}."""

    def good(sides: Any) -> bool:
        both = isinstance(sides, dict) and set(sides) == {"in", "out"}
        return both and all(map(are_counts, sides.values()))

    yield from bad_entries(value, good)


def bad_globs(value: Any) -> BadParts:
    """Yield a list of layer globs with an entry that is no text."""
    if not all(map(is_glob, value)):
        yield "", value


def bad_empty_list(value: Any) -> BadParts:
    """Yield a list that is empty."""
    if not value:
        yield "", value


def bad_scale(value: Any) -> BadParts:
    """Yield standard deviations of which one is not above 0."""
    if not value or not all(map(is_positive, value)):
        yield "", value
