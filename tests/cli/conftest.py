"""Fixtures of the verbs' tests."""

import numpy as np
import pytest

from hodec.onnx_graph import trial_file

from small_graphs import conv_net  # isort: skip


@pytest.fixture
def quick_bench(monkeypatch):
    """Files are timed for a tenth of a second: no test is about their times."""
    measured = trial_file.bench_files
    monkeypatch.setattr(trial_file, "bench_files", lambda *files, **how: measured(*files, **{**how, "seconds": 0.1}))


@pytest.fixture(autouse=True)
def _own_cache(monkeypatch, tmp_path_factory):
    monkeypatch.setenv("HODEC_CACHE", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture
def source(tmp_path):
    return conv_net(tmp_path / "in.onnx")


@pytest.fixture
def data(tmp_path):
    generator = np.random.default_rng(0)
    x = np.tensordot(generator.standard_normal((48, 4)), generator.standard_normal((4, 8, 10, 12)), 1)
    np.savez(tmp_path / "calib.npz", x=x.astype(np.float32))
    return tmp_path / "calib.npz"
