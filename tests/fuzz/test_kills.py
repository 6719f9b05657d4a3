"""Runs that are stopped at random moments end with the bits of one that was not; ``kills.py`` does it 50 times."""

import signal

import pytest
from kills import batter


@pytest.mark.parametrize(
    ("signals", "kills"), [((signal.SIGKILL,), 12), ((signal.SIGTERM, signal.SIGINT, signal.SIGHUP), 9)]
)
@pytest.mark.slow
def test_runs_killed_at_random_end_with_the_same_bits(tmp_path, signals, kills):
    count = batter(tmp_path, kills, seed=2, signals=signals)
    assert count.kills >= kills
    assert count.runs >= 1
