"""Where two trees of plain settings differ."""

from collections.abc import Iterator, Mapping, Sequence


def differences(a: Mapping[str, object], b: Mapping[str, object], ignore: Sequence[str] = ()) -> list[str]:
    """Dotted keys whose values differ between two plain settings; a key in `ignore` hides all below it."""
    flat_a, flat_b = dict(_flatten(a)), dict(_flatten(b))
    absent = object()
    return [
        key
        for key in dict.fromkeys([*flat_a, *flat_b])
        if flat_a.get(key, absent) != flat_b.get(key, absent)
        and not any(key == hidden or key.startswith(f"{hidden}.") for hidden in ignore)
    ]


def _flatten(tree: Mapping[str, object], prefix: str = "") -> Iterator[tuple[str, object]]:
    """(dotted key, value) of a tree of dicts; keys become text and tuples lists, as JSON would have them."""
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", list(value) if isinstance(value, tuple) else value
