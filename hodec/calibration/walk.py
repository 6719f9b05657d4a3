"""A forward pass that stands still where it is told to, and goes on from there.

With several of them a net is seen layer by layer in one reading of the data: all batches stand in front of a layer, the
layer is changed, and all go on through it. Nothing before it runs again, and nothing of the net has to be known.
"""

import ctypes
import sys
import threading
from collections.abc import Callable

import torch


class _Left(BaseException):
    """The pass is not wanted any more; no error, so that no model takes it for one."""


class Walk:
    """One forward pass, in a thread of its own that runs only while ``on`` waits for it.

    Args:
        run: the forward pass; whatever it calls may call ``stop``.

    Attributes:
        ended: whether it is through.
    """

    def __init__(self, run: Callable[[], object]) -> None:
        self._run = run
        self._go, self._stands = threading.Semaphore(0), threading.Semaphore(0)
        self._thread = threading.Thread(target=self._forward, daemon=True)
        self._left = False
        self._error: BaseException | None = None
        self.ended = False

    def on(self) -> None:
        """Go on to the next stop or to the end.

        Raises:
            Exception: whatever the forward pass raises.
        """
        if self.ended:
            return
        if self._thread.ident is None:
            self._thread.start()
        else:
            self._go.release()
        self._stands.acquire()
        if self._error is not None:
            raise self._error

    def stop(self) -> None:
        """Stand still until ``on``; called from within the pass."""
        self._stands.release()
        self._go.acquire()
        if self._left:
            raise _Left

    def leave(self) -> None:
        """End the pass where it stands, if it is not through."""
        self._left = True
        if self._thread.ident is not None and not self.ended:
            self._go.release()
            self._thread.join()
        self.ended = True

    def _forward(self) -> None:
        try:
            with torch.no_grad():  # each thread has its own mode
                self._run()
        except _Left:
            pass
        except BaseException as error:  # raised by ``on``, in the thread that waits
            self._error = error
        finally:
            self.ended = True
            self._stands.release()


def give_back() -> None:
    """Return freed memory to the system, where the C library takes such a wish.

    glibc keeps blocks of up to 32 MiB for the thread that freed them: of many passes, each in a thread of its own,
    that is as much again as their nets hold.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)
