"""A run is named for what it did."""

import math

import pytest

from hodec.admm.stopping import Verdict, final, judge


def verdict(primal, dual=None, tolerance=1e-3):
    return judge(primal, dual or [1.0] * len(primal), tolerance=tolerance)


@pytest.mark.parametrize(
    ("primal", "expected"),
    [
        ([], Verdict.RUNNING),
        ([0.9], Verdict.RUNNING),
        ([0.9, 0.5, 0.4, 0.3], Verdict.RUNNING),
        ([0.5, 0.6, 0.7], Verdict.RUNNING),  # twice may be noise
        ([0.5, 0.6, 0.7, 0.8], Verdict.DIVERGED),
        ([0.9, 0.3, 0.4, 0.5, 0.6], Verdict.RUNNING),  # rises, but from below where it began
        ([0.5, 0.3, 0.6, 0.7, 0.8], Verdict.DIVERGED),
        ([0.5, 0.6, 0.6, 0.8, 0.9], Verdict.RUNNING),  # a rest in between
        ([0.5, math.nan], Verdict.DIVERGED),
        ([0.5, math.inf], Verdict.DIVERGED),
    ],
)
def test_verdict_of_the_primal_residual(primal, expected):
    assert verdict(primal) is expected


def test_converged_means_both_residuals():
    assert verdict([0.5, 1e-3], [0.5, 1e-3]) is Verdict.CONVERGED
    assert verdict([0.5, 1e-4], [0.5, 2e-3]) is Verdict.RUNNING
    assert verdict([0.5, 2e-3], [0.5, 1e-4]) is Verdict.RUNNING
    assert verdict([0.5, 0.1], [0.5, math.nan]) is Verdict.DIVERGED


def test_tolerance_zero_never_stops():
    assert verdict([1e-9], [1e-9], tolerance=0.0) is Verdict.RUNNING


@pytest.mark.parametrize(
    ("last", "primal", "expected"),
    [
        (Verdict.CONVERGED, [0.5, 1e-4], Verdict.CONVERGED),
        (Verdict.RUNNING, [0.5, 0.2], Verdict.EPOCHS_ENDED),
        (Verdict.RUNNING, [0.5, 0.6], Verdict.DIVERGED),
        (Verdict.DIVERGED, [0.5, 0.6, 0.7, 0.8, 0.4], Verdict.EPOCHS_ENDED),
        (Verdict.DIVERGED, [0.5, math.nan], Verdict.DIVERGED),
        (Verdict.RUNNING, [], Verdict.EPOCHS_ENDED),
    ],
)
def test_final_verdict(last, primal, expected):
    assert final(last, primal) is expected
