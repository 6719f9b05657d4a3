"""What ends a run from outside: Ctrl-C, a scheduler, a terminal that closes. Each leaves one line and its exit code."""

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

# Those that mean: stop. Ctrl-C is a KeyboardInterrupt already.
NUMBERS = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name))

_soft: list[Callable[[int], bool]] = []  # each tells whether it sees to a signal itself


class Stopped(SystemExit):
    """The program was asked to stop; its exit code is 128 and the number of the signal, as a shell has it.

    Args:
        number: of the signal.
        where: the moment in words, such as ``in phase admm``.
    """

    def __init__(self, number: int, where: str = "") -> None:
        super().__init__(128 + number)
        self.number, self.where = number, where

    def __str__(self) -> str:
        return " ".join(filter(None, ("stopped by", signal.Signals(self.number).name, self.where)))


@contextmanager
def stoppable() -> Iterator[None]:
    """Within the block SIGTERM and SIGHUP raise ``Stopped``, and Ctrl-C does.

    A signal that is ignored (``nohup``) stays so. Only the main thread can be told; elsewhere nothing changes.
    """
    before = {}
    if threading.current_thread() is threading.main_thread():
        for number in NUMBERS:
            if signal.getsignal(number) is not signal.SIG_IGN:
                before[number] = signal.signal(number, _stop)
    try:
        yield
    except KeyboardInterrupt as error:
        raise Stopped(signal.SIGINT) from error
    finally:
        for number, handler in before.items():
            signal.signal(number, handler or signal.SIG_DFL)


@contextmanager
def soft(sees_to: Callable[[int], bool]) -> Iterator[None]:
    """Within the block nothing is raised for a signal for which ``sees_to`` is true: something else stops there."""
    _soft.append(sees_to)
    try:
        yield
    finally:
        _soft.remove(sees_to)


def _stop(number: int, frame: FrameType | None) -> None:
    if not any(sees_to(number) for sees_to in _soft):
        with contextlib.suppress(ValueError):  # a second one must not stop what the first one has to end
            signal.signal(number, signal.SIG_IGN)
        raise Stopped(number)
