"""Files that are either whole or not there: written beside the target, flushed, then moved over it."""

import errno
import hashlib
import json
import os
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hodec.errors import CheckpointError, HodecError

JsonObject = dict[str, Any]
"""A JSON object: its values are plain numbers, texts, truth values, None, and lists and objects of such."""


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path in the same folder; on success it replaces ``path``, on failure it is removed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part")
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        with temporary.open("rb+") as f:
            os.fsync(f.fileno())
        mask = os.umask(0)
        os.umask(mask)
        temporary.chmod(0o666 & ~mask)  # mkstemp makes files private; results are for the user's group too
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def remove_parts(folder: Path) -> None:
    """Remove what ``replacing`` left below a folder when its process was killed; nobody else may be writing there."""
    for part in folder.rglob(".*.part"):
        part.unlink(missing_ok=True)


# How a system says that there is no room: on the disk, for a file of this size, in the user's share.
NO_SPACE = tuple(getattr(errno, name) for name in ("ENOSPC", "EFBIG", "EDQUOT") if hasattr(errno, name))


@contextmanager
def writing(
    path: Path, kind: type[HodecError] = CheckpointError, way_out: str = "make room there or give another path"
) -> Iterator[None]:
    """What runs within writes ``path``: a place that cannot be written to is one message, not a trace.

    Raises:
        HodecError: of the given kind; the system refuses: no space left, a folder in its place, no permission, ..
    """
    try:
        yield
    except OSError as error:
        reason = "there is no space left" if error.errno in NO_SPACE else error.strerror or str(error).splitlines()[0]
        raise kind(f"{path} could not be written: {reason}; {way_out}") from error


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file in one move: an existing one is whole until it is replaced.

    Raises:
        CheckpointError: it cannot be written.
    """
    with writing(path), replacing(path) as temporary:
        temporary.write_bytes(content)


def check_place(path: Path, kind: type[HodecError], what: str = "") -> None:
    """Refuse a place for a file before any work is done.

    Args:
        what: what is written there, in front of the message: ``'--plan-out: '``.

    Raises:
        HodecError: of the given kind; no folder to write to, or something there that is no file.
    """
    if path.exists() and not path.is_file():  # a folder; or a device, which a move would replace
        raise kind(
            f"{what}{path} {'is a folder and' if path.is_dir() else 'is'} no file that could be replaced; name a file"
        )
    if not path.parent.is_dir():
        raise kind(f"{what}folder {path.parent} does not exist; make it first")
    if not os.access(path.parent, os.W_OK):
        raise kind(f"{what}folder {path.parent} cannot be written to; name another one")


def check_apart(path: Path, others: Iterable[object], kind: type[HodecError], what: str) -> None:
    """Refuse a place for a file that the same command reads, or writes something else to.

    Args:
        others: paths, and functions as ``file.py:function``; anything else is no file.
        what: as in ``check_place``.

    Raises:
        HodecError: of the given kind; the place is one of them, however it is spelt.
    """
    texts = [str(one) for one in others if isinstance(one, str | Path)]
    if path.resolve() in {Path(name).resolve() for text in texts for name in (text, text.rpartition(":")[0])}:
        raise kind(f"{what}{path} is one of the models or of the other files given; name another file")


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically, in UTF-8."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: object) -> None:
    """Write JSON atomically, indented; NaN is refused because JSON has none."""
    write_text(path, json.dumps(value, indent=1, allow_nan=False) + "\n")


def read_json(path: Path, what: str) -> Any:
    """Read a JSON file.

    Raises:
        CheckpointError: missing or unreadable; ``what`` says which kind of file was expected.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{what} {path} does not exist") from None
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{what} {path} is not readable JSON ({error}); is it truncated?") from error


def sha256(path: Path) -> str:
    """Hex SHA-256 of a file's bytes."""
    with path.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()
