"""A search over data: what it runs, what it keeps in memory, and which layers go back to dense."""

import weakref
from dataclasses import replace

import pytest

from hodec.calibration.moments import FitMoments
from hodec.onnx_graph import calibrate, compress, judge, search, sensitivity
from hodec.onnx_graph.chance import Loss
from hodec.onnx_graph.compress import compress_file

from test_onnx_compress import DATA, MACS, net_of_low_rank  # isort: skip


@pytest.fixture(autouse=True)
def _own_cache(monkeypatch, tmp_path_factory):
    monkeypatch.setenv("HODEC_CACHE", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture
def source(tmp_path):
    return net_of_low_rank(tmp_path / "in.onnx")


def test_trials_that_have_lost_run_no_more_and_the_file_is_the_same(source, tmp_path, monkeypatch):
    runs, files, trials = [], [], []
    fixed, real = compress.TrialGraph.fixed, judge.Judge.trial_loss

    def counted(self, taps=(), tried=None):
        run = fixed(self, taps, tried)
        return run if taps else lambda feeds: runs.append(1) or run(feeds)

    monkeypatch.setattr(compress.TrialGraph, "fixed", counted)
    for early in (real, judge.Judge.loss):
        monkeypatch.setattr(judge.Judge, "trial_loss", lambda *a, early=early: trials.append(early(*a)) or trials[-1])
        monkeypatch.setenv("HODEC_CACHE", str(tmp_path / early.__name__))
        runs.append(0)
        compress_file(source, out := tmp_path / f"{early.__name__}.onnx", data=DATA, loss="error", max_drop=0.1, **MACS)
        files.append(out.read_bytes())
    at = runs.index(0, 1)
    assert files[0] == files[1]
    assert at - 1 < len(runs) - at - 1
    assert any(not one.is_whole for one in trials)


@pytest.mark.parametrize(("enough", "tries"), [(1, 1), (2, 3), (3, 3), (9, 6)])
def test_as_few_layers_go_back_to_dense_as_are_enough(source, monkeypatch, enough, tries):
    """A net of 12 layers, each of which hurts; the cheapest trial that is accepted is found by few."""
    names, judged = [f"l{k}" for k in range(12)], []

    class Plan(dict):
        def without(self, name, reason):
            return Plan({key: one for key, one in self.items() if key != name})

    def seen(self, share, plan, tried):
        assert list(tried) == list(plan)
        judged.append(12 - len(plan))
        return search.Trial(share, plan, tried, Loss(1.0, 0.0), 0.5)

    task = compress.Task(compress.Calibration(DATA), loss="error")
    found, _ = compress.prepared(source, None, task, methods=["svd"], threads=1, force=False)
    monkeypatch.setattr(search.Search, "_by_harm", lambda self, trial: names)
    monkeypatch.setattr(search.Search, "_cost", lambda self, plan: 1 - len(plan) / 20)
    monkeypatch.setattr(search.Search, "judged", seen)
    monkeypatch.setattr(search.Search, "accepts", lambda self, trial: 12 - len(trial.plan) >= enough)
    failed = search.Trial(0.4, Plan.fromkeys(names), dict.fromkeys(names), Loss(0.0, 1.0), 0.4)
    best = found._mended(failed, None)
    assert len(best.plan) == 12 - enough
    assert len(judged) <= tries
    assert found._mended(replace(failed, tried={}), best) is best


def test_sums_are_freed_once_they_are_used(source, tmp_path, monkeypatch):
    """A layer's sums take more than its activations: those of one group are in memory, of the dense net or a trial."""
    alive, most = weakref.WeakSet(), []

    class Counted(FitMoments):
        def __init__(self, *args, **settings):
            super().__init__(*args, **settings)
            alive.add(self)
            most.append(len(alive))

    monkeypatch.setattr(calibrate, "FitMoments", Counted)
    monkeypatch.setattr(sensitivity, "MEMORY", 1)  # a group for each layer
    task = compress.Task(compress.Calibration(DATA), loss="error", max_drop=0.2)
    found, _ = compress.prepared(source, None, task, methods=["svd"], threads=1, force=False)
    found.target = "macs"
    assert found.best() is not None
    assert len(most) > 3  # a trial follows the tables
    assert max(most) == 1
    assert not found.tables._problems  # which quick fits kept
