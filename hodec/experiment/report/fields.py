"""JSON that is checked while it is read: an error names the file, the key, what stands there and the remedy."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hodec.errors import CheckpointError


def broken(path: Path, why: str, remedy: str) -> CheckpointError:
    """The error for a file that cannot be used: which, why, and what to do."""
    return CheckpointError(f"{path} {why}. {remedy}")


def read_bytes(path: Path) -> bytes:
    """Content of a file; a folder in its place or a missing right is a ``CheckpointError``."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise broken(path, f"cannot be read ({error.strerror})", "Check that it is a file you may read") from error


def read_object(path: Path, remedy: str) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        CheckpointError: The file is cut off, not JSON, or holds something else than an object.
    """
    try:
        content = json.loads(read_bytes(path).decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise broken(path, f"is not readable as JSON ({error}); it may be cut off", remedy) from error
    if not isinstance(content, dict):
        raise broken(path, f"holds a JSON {type(content).__name__} where an object is expected", remedy)
    return content


class Fields:
    """Typed access to one JSON object that names file and key when a value has the wrong type.

    Missing and ``null`` values come back empty; only a value that is there *and* wrong is an error.
    """

    def __init__(self, source: Mapping[str, Any], path: Path, remedy: str, *, where: str = "") -> None:
        self.source, self.path, self.remedy, self.where = source, path, remedy, where

    def _wrong(self, key: str, expected: str) -> CheckpointError:
        given = repr(self.source[key])
        given = given if len(given) <= 60 else given[:57] + "..."
        return broken(self.path, f"has {self.where}{key} = {given} where {expected} is expected", self.remedy)

    def text(self, key: str) -> str:
        """A string or a number as text; empty when absent."""
        value = self.source.get(key)
        if isinstance(value, Mapping | list):
            raise self._wrong(key, "a text")
        return "" if value is None else str(value)

    def number(self, key: str) -> float | None:
        """A number, NaN and infinities included; ``None`` when absent."""
        value = self.source.get(key)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self._wrong(key, "a number")
        try:
            return float(value)
        except OverflowError:
            return math.inf if value > 0 else -math.inf

    def count(self, key: str) -> float | None:
        """A number that is finite and not negative, such as parameters; ``None`` when absent."""
        value = self.number(key)
        if value is not None and not 0 <= value < math.inf:
            raise self._wrong(key, "a number from 0")
        return value

    def integers(self, key: str) -> tuple[int, ...]:
        """A list of integers; one integer counts as a list of one."""
        value = self.source.get(key)
        values = [] if value is None else value if isinstance(value, list) else [value]
        if any(isinstance(item, bool) or not isinstance(item, int) for item in values):
            raise self._wrong(key, "a list of integers")
        return tuple(values)

    def texts(self, key: str) -> tuple[str, ...]:
        """A list of strings; one string counts as a list of one."""
        value = self.source.get(key)
        values = [] if value is None else value if isinstance(value, list) else [value]
        if not all(isinstance(item, str) for item in values):
            raise self._wrong(key, "a list of texts")
        return tuple(values)

    def inside(self, key: str) -> "Fields":
        """The object under a key; an empty one when absent."""
        value = self.source.get(key)
        if value is not None and not isinstance(value, Mapping):
            raise self._wrong(key, "an object")
        return Fields(value or {}, self.path, self.remedy, where=f"{self.where}{key}.")

    def numbers(self) -> dict[str, float]:
        """All values of this object, each a number; absent ones left out."""
        pairs = ((key, self.number(key)) for key in self.source)
        return {key: value for key, value in pairs if value is not None}
