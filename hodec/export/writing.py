"""Where exported files go: a place that cannot be written to is one message, not a trace."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from hodec.errors import CheckpointError
from hodec.io.atomic import replacing


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """What runs within writes ``path``.

    Raises:
        CheckpointError: the system refuses: no space left, a folder in its place, no permission, ..
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
        raise CheckpointError(f"{path} could not be written: {reason}; make room there or give another path") from error


def write_content(path: Path, content: bytes) -> None:
    """Write a file in one move: an existing one is whole until it is replaced.

    Raises:
        CheckpointError: it cannot be written.
    """
    with writing(path), replacing(path) as temporary:
        temporary.write_bytes(content)
