"""How an ADMM run is going, and how it ended."""

import math
from collections.abc import Sequence
from enum import Enum

# So many rising updates in a row, ending above where it began, are no longer noise.
RISING_UPDATES = 3


class Status(Enum):
    """Status of an ADMM run."""

    RUNNING = "running"
    CONVERGED = "converged"
    EPOCHS_ENDED = "epochs ended"
    DIVERGED = "diverged"


def check_convergence(primal: Sequence[float], dual: Sequence[float], *, tolerance: float) -> Status:
    """The verdict after the latest Z-update.

    Args:
        primal: overall relative primal residual after each update so far.
        dual: overall relative dual residual, likewise.
        tolerance: both at or below it means converged.

    Returns:
        CONVERGED; DIVERGED if the residual is not finite, or rose ``RISING_UPDATES`` times in a row to above its
        first value; else RUNNING.
    """
    if not primal:
        return Status.RUNNING
    if not all(map(math.isfinite, (primal[-1], dual[-1]))):
        return Status.DIVERGED
    if primal[-1] <= tolerance and dual[-1] <= tolerance:
        return Status.CONVERGED
    tail = primal[-RISING_UPDATES - 1 :]
    rising = len(tail) > RISING_UPDATES and all(a < b for a, b in zip(tail, tail[1:], strict=False))
    return Status.DIVERGED if rising and primal[-1] > primal[0] else Status.RUNNING


def final(verdict: Status, primal: Sequence[float]) -> Status:
    """The verdict once training is over: still running then means that the epochs ended, or that it got worse."""
    if verdict is not Status.RUNNING and verdict is not Status.DIVERGED:
        return verdict
    worse = bool(primal) and not primal[-1] <= primal[0]
    return Status.DIVERGED if worse else Status.EPOCHS_ENDED
