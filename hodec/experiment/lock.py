"""One run in a folder at a time: a file there names the process that has it."""

import contextlib
import json
import logging
import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from hodec.errors import ConfigError
from hodec.io.atomic import JsonObject

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

log = logging.getLogger(__name__)

NAME = "run.lock"

# Seconds between two signs of life of a holder, and after which one on another machine counts as dead: five missed.
BEAT_S, STALE_S = 30.0, 150.0


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """Within the block no other run works in the folder.

    A lock whose process has died is stale, and is taken over: at once on the same machine, else ``STALE_S`` after its
    last sign of life.

    Raises:
        ConfigError: another run works there; the message names its machine and process.
    """
    path, me, over = folder / NAME, this_process(), threading.Event()
    _take(path, me)
    threading.Thread(target=_beat, args=(path, over), daemon=True).start()
    try:
        yield
    finally:
        over.set()
        with contextlib.suppress(OSError), _exclusive(path) as file:
            if _holder(file) == me:
                path.unlink()


def this_process() -> JsonObject:
    """What a lock says of its holder."""
    now = time.strftime("%Y-%m-%d %H:%M:%S")
    return {"host": socket.gethostname(), "pid": os.getpid(), "began": _began(os.getpid()), "since": now} | _space()


def _take(path: Path, me: JsonObject) -> None:
    with _exclusive(path) as file:
        holder = _holder(file)
        if holder and not _is_stale(holder, me, silent_s=time.time() - os.fstat(file.fileno()).st_mtime):
            away = f" (or {STALE_S:.0f} s after that machine has died)" if holder["host"] != me["host"] else ""
            raise ConfigError(
                f"{path.parent} is in use: process {holder['pid']} on {holder['host']} has run in it since "
                f"{holder['since']}. Start again when it has ended{away}, or give another folder: hydra.run.dir=PATH"
            )
        if holder:
            log.warning("process %s on %s died in this folder; its run goes on here", holder["pid"], holder["host"])
        file.seek(0)
        file.truncate()
        file.write(json.dumps(me))


def _is_stale(holder: JsonObject, me: JsonObject, *, silent_s: float) -> bool:
    if any(holder.get(key) != me.get(key) for key in ("host", "space")):  # a process that is not seen from here
        return silent_s > STALE_S
    pid = holder["pid"]
    if pid == me["pid"] and holder["began"] == me["began"]:
        return False  # this very process: another thread, or a run within a run
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except OSError:  # of another user
        return False
    return bool(_began(pid) != holder["began"])  # the number was given out again


def _beat(path: Path, over: threading.Event) -> None:
    while not over.wait(BEAT_S):
        with contextlib.suppress(OSError):
            os.utime(path)


def _holder(file: IO[str]) -> JsonObject | None:
    """Who holds the lock; None where the file is new, or what stands in it names nobody."""
    file.seek(0)
    try:
        holder = json.load(file)
    except (ValueError, RecursionError):
        return None
    known = isinstance(holder, dict) and {"host", "pid", "began", "since"} <= holder.keys()
    return holder if known and type(holder["pid"]) is int and holder["pid"] > 0 else None


@contextmanager
def _exclusive(path: Path) -> Iterator[IO[str]]:
    """The file of the lock, which is read and written by one process at a time."""
    while True:
        with os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT, 0o666), "r+", encoding="utf-8", errors="replace") as file:
            with contextlib.suppress(OSError):  # a file system without locks
                if fcntl:
                    fcntl.flock(file, fcntl.LOCK_EX)
            if _is_at(path, os.fstat(file.fileno()).st_ino):  # not one that was removed meanwhile
                yield file
                return


def _is_at(path: Path, inode: int) -> bool:
    try:
        return path.stat().st_ino == inode
    except FileNotFoundError:
        return False


def _began(pid: int) -> str:
    """When a process began, in ticks since the machine did; empty where the system does not tell."""
    with contextlib.suppress(OSError, IndexError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    return ""


def _space() -> JsonObject:
    """The numbering of processes that this one is in: containers of one name on one folder have their own."""
    with contextlib.suppress(OSError):
        return {"space": os.readlink("/proc/self/ns/pid")}
    return {}
