"""Whole sweeps: jobs beside each other, one that fails, a kill and a second start; Optuna with two objectives."""

import csv
import json
import signal

import pytest
from train_script import StartedSmall, finished, wait

TINY = (
    "data=fake", "data.fake_size=64", "data.fake_classes=4", "data.image_size=8", "data.batch_size=16",
    "data.val_fraction=0.25", "method.n_modes=1", "dense_epochs=2", "retrain_epochs=1", "bn_batches=1",
    "trainer.accelerator=cpu", "trainer.threads=1", "report=false",
)  # fmt: skip
RHOS = ("1e-4", "1e-3", "1e30", "1e-2", "1e-1")  # the third ends in NaN


def table(folder):
    with (folder / "sweep.csv").open(newline="", encoding="utf-8") as f:
        return list(csv.DictReader(f))


@pytest.mark.slow
def test_jobs_beside_each_other_with_one_that_fails_and_a_kill(tmp_path):
    sweep = tmp_path / "sweep"
    argv = ("-m", *TINY, "tt_ranks=4", f"admm.rho={','.join(RHOS)}", f"hydra.sweep.dir={sweep}")
    argv += ("hydra/launcher=joblib", "hydra.launcher.n_jobs=2")
    child = StartedSmall(*argv, log=tmp_path / "first")
    assert wait(child, lambda: bool(finished(sweep))) is None
    child.kill(signal.SIGTERM)
    assert wait(child) == 128 + signal.SIGTERM, child.log.read_text()
    assert (sweep / "sweep.html").exists(), "a page after SIGTERM too"
    states = [one["state"] for one in table(sweep)]
    assert "finished" in states
    done = {path: path.stat().st_mtime_ns for path in finished(sweep)}
    assert 0 < len(done) < 4

    code = wait(again := StartedSmall(*argv, log=tmp_path / "second"))
    assert code == 2, again.log.read_text()
    rows = table(sweep)
    assert [float(one["admm.rho"]) for one in rows] == [float(rho) for rho in RHOS]
    assert [one["state"] for one in rows] == ["finished", "finished", "failed", "finished", "finished"]
    assert "TrainingError" in rows[2]["error"]
    assert {path: path.stat().st_mtime_ns for path in done} == done, "finished jobs are not repeated"
    best = json.loads((sweep / "sweep.json").read_text())["best"]
    scores = {one["run"]: float(one["validation_accuracy"]) for one in rows if one["validation_accuracy"]}
    assert scores[best] == max(scores.values())


@pytest.mark.slow
def test_optuna_searches_for_the_front_of_accuracy_and_macs(tmp_path):
    sweep = tmp_path / "sweep"
    argv = ("-m", *TINY, "hydra/sweeper=accuracy_macs", "objective=[validation_accuracy,macs]")
    argv += ("admm.rho=interval(1e-4,1e-1)", "tt_ranks=range(2,9)", "hydra.sweeper.n_trials=4")
    child = StartedSmall(*argv, f"hydra.sweep.dir={sweep}", log=tmp_path / "log")
    assert wait(child) == 0, child.log.read_text()
    best = (sweep / "optimization_results.yaml").read_text()
    assert "solutions" in best
    rows = table(sweep)
    assert len(rows) == 4
    assert {one["state"] for one in rows} == {"finished"}
    found = {(float(one["validation_accuracy"]), float(one["macs"])) for one in rows}
    for score, macs in found:
        inside = any(a >= score and m <= macs and (a, m) != (score, macs) for a, m in found)
        assert inside or (str(score) in best and str(macs) in best), "the front is on validation accuracy and MACs"
    assert (sweep / "sweep-tradeoff.png").exists()


@pytest.mark.slow
def test_optuna_without_a_validation_split_fails_with_the_way_out(tmp_path):
    argv = ("-m", *TINY, "data.val_fraction=0.0", "hydra/sweeper=accuracy", "tt_ranks=range(2,9)")
    argv = tuple(one for one in argv if one != "data.val_fraction=0.25")
    argv += ("hydra.sweeper.n_trials=1", f"hydra.sweep.dir={tmp_path / 'sweep'}")
    child = StartedSmall(*argv, log=tmp_path / "log")
    wait(child)
    text = child.log.read_text()
    assert "'validation_accuracy' given without a validation split; allowed: data.val_fraction=0.1" in text
