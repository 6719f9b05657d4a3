"""How an ADMM run is going, and how it ended."""

import math
from collections.abc import Sequence
from enum import Enum


class Status(Enum):
    """Status of an ADMM run."""

    RUNNING = "running"
    CONVERGED = "converged"
    EPOCHS_ENDED = "epochs ended"
    DIVERGED = "diverged"


def check_convergence(primal: Sequence[float], dual: Sequence[float], *, tolerance: float, rising: int = 3) -> Status:
    """The status after the latest Z-update. Source: Boyd et al., section 3.3.1, with relative residuals.

    Args:
        primal: overall relative primal residual after each update so far.
        dual: overall relative dual residual, likewise.
        tolerance: both at or below it means converged.
        rising: updates in a row after each of which the primal residual rose; fewer may be noise.

    Returns:
        CONVERGED; DIVERGED if a residual is not finite, or the primal one rose ``rising`` times in a row to above its
        first value; else RUNNING.
    """
    if not primal:
        return Status.RUNNING
    if not all(map(math.isfinite, (primal[-1], dual[-1]))):
        return Status.DIVERGED
    if primal[-1] <= tolerance and dual[-1] <= tolerance:
        return Status.CONVERGED
    tail = primal[-rising - 1 :]
    rose = len(tail) > rising and all(a < b for a, b in zip(tail, tail[1:], strict=False))
    return Status.DIVERGED if rose and primal[-1] > primal[0] else Status.RUNNING


def final_status(status: Status, primal: Sequence[float]) -> Status:
    """The status once training is over: where it was still running, the epochs ended, or the residual got worse."""
    if status not in (Status.RUNNING, Status.DIVERGED):
        return status
    worse = bool(primal) and not primal[-1] <= primal[0]
    return Status.DIVERGED if worse else Status.EPOCHS_ENDED
