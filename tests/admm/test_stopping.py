"""A run is named for what it did."""

import math

import pytest

from hodec.admm.stopping import Status, check_convergence, final_status


def status(primal, dual=None, tolerance=1e-3):
    return check_convergence(primal, dual or [1.0] * len(primal), tolerance=tolerance)


@pytest.mark.parametrize(
    ("primal", "expected"),
    [
        ([], Status.RUNNING),
        ([0.9], Status.RUNNING),
        ([0.9, 0.5, 0.4, 0.3], Status.RUNNING),
        ([0.5, 0.6, 0.7], Status.RUNNING),  # twice may be noise
        ([0.5, 0.6, 0.7, 0.8], Status.DIVERGED),
        ([0.9, 0.3, 0.4, 0.5, 0.6], Status.RUNNING),  # rises, but from below where it began
        ([0.5, 0.3, 0.6, 0.7, 0.8], Status.DIVERGED),
        ([0.5, 0.6, 0.6, 0.8, 0.9], Status.RUNNING),  # a rest in between
        ([0.5, math.nan], Status.DIVERGED),
        ([0.5, math.inf], Status.DIVERGED),
    ],
)
def test_status_of_the_primal_residual(primal, expected):
    assert status(primal) is expected


def test_converged_means_both_residuals():
    assert status([0.5, 1e-3], [0.5, 1e-3]) is Status.CONVERGED
    assert status([0.5, 1e-4], [0.5, 2e-3]) is Status.RUNNING
    assert status([0.5, 2e-3], [0.5, 1e-4]) is Status.RUNNING
    assert status([0.5, 0.1], [0.5, math.nan]) is Status.DIVERGED


def test_tolerance_zero_never_stops():
    assert status([1e-9], [1e-9], tolerance=0.0) is Status.RUNNING


@pytest.mark.parametrize(
    ("last", "primal", "expected"),
    [
        (Status.CONVERGED, [0.5, 1e-4], Status.CONVERGED),
        (Status.RUNNING, [0.5, 0.2], Status.EPOCHS_ENDED),
        (Status.RUNNING, [0.5, 0.6], Status.DIVERGED),
        (Status.DIVERGED, [0.5, 0.6, 0.7, 0.8, 0.4], Status.EPOCHS_ENDED),
        (Status.DIVERGED, [0.5, math.nan], Status.DIVERGED),
        (Status.RUNNING, [], Status.EPOCHS_ENDED),
    ],
)
def test_final_status(last, primal, expected):
    assert final_status(last, primal) is expected
