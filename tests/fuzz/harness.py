"""What every family of the fuzz has: limits of time and memory, what counts as right, and a tally of the outcomes.

``HODEC_FUZZ_SEED`` (0) chooses the inputs, ``HODEC_FUZZ_SCALE`` (1) multiplies their number.
"""

import math
import os
import resource
import signal
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from hodec.errors import HodecError

SEED = int(os.environ.get("HODEC_FUZZ_SEED", "0"))
SCALE = float(os.environ.get("HODEC_FUZZ_SCALE", "1"))

SECONDS = 60  # of the processor that one input may take; most take milliseconds
WAITS = 10  # times as long it may take on a busy machine, or while it waits for something
MIB = 1024  # of address space that one input may add: threads and arenas of the libraries need some of it
LONGEST = 4000  # characters of a message; one that quotes a whole file is no message

OUTCOMES: dict[str, Counter[str]] = defaultdict(Counter)

Check = Callable[[st.DataObject, Path], str]
"""Draws one input and judges what hodec does with it; returns the outcome in a word, or raises."""


class Hang(Exception):
    """An input took longer than SECONDS."""


def _hang(*_: object) -> None:
    raise Hang(f"an input took more than {SECONDS} s")


@contextmanager
def bounded(mib: int = MIB) -> Iterator[None]:
    """Within the block a hang and an allocation of more than ``mib`` are errors like others."""
    before = {number: signal.signal(number, _hang) for number in (signal.SIGPROF, signal.SIGALRM)}
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (_address_space() + mib * 2**20, hard))
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    signal.alarm(WAITS * SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.alarm(0)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
        for number, handler in before.items():
            signal.signal(number, handler)


def _address_space() -> int:
    """Bytes of address space of this process."""
    return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()


def run(family: str, check: Check, count: int, folder: Path, salt: int = 0) -> None:
    """Put ``count`` inputs of a family through ``check``, each in bounds; the tally has the outcomes."""
    OUTCOMES[family].clear()

    @seed(SEED + salt)
    @settings(
        max_examples=count,
        database=None,
        deadline=None,
        print_blob=True,
        phases=[Phase.generate, Phase.shrink],
        suppress_health_check=list(HealthCheck),
    )
    @given(st.data())
    def one(data: st.DataObject) -> None:
        with bounded():
            outcome = refusable(lambda: check(data, folder))
        OUTCOMES[family][outcome] += 1

    one()


def refusable(act: Callable[[], str]) -> str:
    """The outcome of ``act``; of an error of hodec's own, its kind, where it is one message."""
    try:
        return act()
    except HodecError as error:
        assert_one_message(error)
        return type(error).__name__


def assert_one_message(error: HodecError) -> None:
    """What a user reads is a line, or a list of such with one problem each, and shows no template."""
    text = str(error)
    assert text.strip(), f"{type(error).__name__} without a message"
    assert len(text) < LONGEST, text[:300]
    lines = text.split("\n  ")
    assert all("\n" not in line for line in lines), text
    assert "Traceback" not in text
    assert "object at 0x" not in text, text


def scaled(count: int) -> int:
    """``count`` times HODEC_FUZZ_SCALE, at least one."""
    return max(1, math.ceil(count * SCALE))
