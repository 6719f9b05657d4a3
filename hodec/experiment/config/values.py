"""Checks of free-form values: ranks, rho, modes, intervals, lists of names."""

import math
import re
from collections.abc import Callable, Mapping, Sequence

from hodec.options import BadParts


def is_count(value: object) -> bool:
    """Whether ``value`` is a whole number from 1; true and false are not numbers."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def are_counts(value: object) -> bool:
    """Whether ``value`` is a filled list of whole numbers from 1."""
    return isinstance(value, list | tuple) and bool(value) and all(map(is_count, value))


def is_positive(value: object) -> bool:
    """Whether ``value`` is a finite number above 0."""
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < math.inf


def is_glob(key: object) -> bool:
    """Whether ``key`` can be a pattern of layer names."""
    return isinstance(key, str) and bool(key)


def is_epoch(key: object) -> bool:
    """Whether ``key`` counts epochs from 0."""
    return isinstance(key, int) and not isinstance(key, bool) and key >= 0


def bad_entries(
    value: object, good: Callable[[object], bool], good_key: Callable[[object], bool] = is_glob
) -> BadParts:
    """The entries of a mapping whose key or value is wrong, or all of what is no filled mapping."""
    if not isinstance(value, Mapping) or not value:
        yield "", value
        return
    for key, one in value.items():
        if not good_key(key):
            yield "", {key: one}
        elif not good(one):
            yield f"[{key}]", one


def bad_ranks(value: object) -> BadParts:
    """What is wrong in ranks: a count, a list of counts, or {layer glob: either of both}."""

    def good(ranks: object) -> bool:
        return is_count(ranks) or are_counts(ranks)

    if isinstance(value, Mapping):
        yield from bad_entries(value, good)
    elif not good(value):
        yield "", value


def bad_rho(value: object) -> BadParts:
    """What is wrong in rho: a word, a number above 0, {epoch: number} or {layer glob: number}."""
    if isinstance(value, Mapping):
        # one kind of key per mapping: the first entry says which
        by_epoch = isinstance(next(iter(value), None), int)
        yield from bad_entries(value, is_positive, is_epoch if by_epoch else is_glob)
    elif value not in ("auto", "balanced") and not is_positive(value):
        yield "", value


def bad_interval(value: object) -> BadParts:
    """An interval that is neither a count of epochs nor a word such as 50steps or 2epochs."""
    is_word = isinstance(value, str) and re.fullmatch(r"[1-9]\d*(steps|epochs)", value)
    if not is_count(value) and not is_word:
        yield "", value


def bad_modes(value: object) -> BadParts:
    """What is wrong in {layer glob: {in: counts, out: counts}}."""

    def good(sides: object) -> bool:
        both = isinstance(sides, Mapping) and set(sides) == {"in", "out"}
        return both and all(map(are_counts, sides.values()))  # type: ignore[attr-defined]

    yield from bad_entries(value, good)


def bad_names(value: Sequence[object]) -> BadParts:
    """A list with an entry that is no text."""
    if not all(map(is_glob, value)):
        yield "", value


def bad_filled_names(value: Sequence[object]) -> BadParts:
    """A list of names that is empty, or has an entry that is no text."""
    if not value or not all(map(is_glob, value)):
        yield "", value


def bad_scale(value: Sequence[object]) -> BadParts:
    """Standard deviations of which one is not above 0."""
    if not value or not all(map(is_positive, value)):
        yield "", value
