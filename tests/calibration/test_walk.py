"""Passes that stand still and go on."""

import os
import platform
import threading
from pathlib import Path

import pytest
import torch
from torch import Tensor

from hodec.calibration.walk import Walk, give_back


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


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries are not told")
def test_what_a_pass_freed_goes_back_to_the_system():
    kept: list[Tensor] = []

    def run() -> None:
        torch.ones(2**21)  # 8 MiB: behind the first of a size, glibc keeps blocks of that size
        blocks = [torch.ones(2**20) for _ in range(12)]
        kept.append(blocks[-1])  # above them: what is free below is not given back by itself
        del blocks
        walk.stop()

    walk = Walk(run)
    walk.on()
    before = resident()
    give_back()
    assert before - resident() > 20 * 2**20
    walk.leave()


def resident() -> int:
    """Bytes of memory that the process holds."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
