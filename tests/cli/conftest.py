"""Fixtures of the verbs' tests."""

import pytest

from hodec.onnx_graph import trial_file


@pytest.fixture
def quick_bench(monkeypatch):
    """Files are timed for a tenth of a second: no test is about their times."""
    measured = trial_file.bench_files
    monkeypatch.setattr(trial_file, "bench_files", lambda *files, **how: measured(*files, **{**how, "seconds": 0.1}))
