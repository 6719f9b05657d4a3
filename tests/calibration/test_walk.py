"""Passes that stand still and go on."""

import threading

import pytest
import torch

from hodec.calibration.walk import Walk


def test_it_stands_where_it_is_told_to_and_goes_on():
    seen: list[object] = []

    def run() -> None:
        for k in range(3):
            seen.append(k)
            walk.stop()
        seen.append(torch.is_grad_enabled())

    walk = Walk(run)
    assert seen == []
    for k in range(3):
        walk.on()
        assert seen == list(range(k + 1))
        assert not walk.ended
    walk.on()
    assert seen[-1] is False
    assert walk.ended
    walk.on()  # nothing is left to do


def test_an_error_is_raised_where_one_waits_for_it():
    walk = Walk(lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        walk.on()
    assert walk.ended


def test_one_that_is_left_runs_no_further_and_its_thread_ends():
    seen = []

    def run() -> None:
        try:
            walk.stop()
            seen.append("went on")
        except Exception:  # as a model may do
            seen.append("took it for an error")

    before = threading.active_count()
    walk, never = Walk(run), Walk(run)
    walk.on()
    assert threading.active_count() == before + 1
    walk.leave()
    never.leave()
    assert threading.active_count() == before
    assert seen == []
