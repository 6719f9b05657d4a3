"""The program itself: exit codes, what a person reads, sweeps."""

import json
import os
import subprocess
import sys

import pytest
from train_script import ROOT, Forked, Started, wait

from hodec.errors import TrainingError
from hodec.experiment import pipeline
from hodec.io.atomic import sha256

TINY = (
    "data=fake", "data.fake_size=64", "data.fake_classes=4", "data.image_size=8", "data.batch_size=16", "tt_ranks=4",
    "method.n_modes=1", "dense_epochs=1", "retrain_epochs=1", "bn_batches=1", "trainer.accelerator=cpu",
    "trainer.threads=1", "report=false",
)  # fmt: skip


def train(tmp_path, *argv, kind=Forked):
    """Exit code and everything written to the terminal."""
    child = kind(*argv, log=tmp_path / "terminal")
    return wait(child), child.log.read_text()


def test_a_run_leaves_its_folder_and_says_the_result_and_is_not_run_again(tmp_path):
    folder = tmp_path / "run"
    code, text = train(tmp_path, *TINY, f"hydra.run.dir={folder}")
    assert code == 0, text
    metrics = json.loads((folder / "metrics.json").read_text())
    assert pipeline.summary(metrics) in text
    assert "7 layers factorized, 1 left dense" in text
    for words in ("admm 1/1", "retrain 1/1", "|W-Z|/|W|", "converted 7 layers"):
        assert words in text
    assert "Warning" not in text
    assert (folder / "train.log").read_text().count("fewer parameters") == 1
    again, text = train(tmp_path, *TINY, f"hydra.run.dir={folder}")
    assert again == 0
    assert "this run is finished" in text
    (tmp_path / "terminal").unlink()
    code, text = train(tmp_path, *TINY, f"hydra.run.dir={folder}", "seed=5", "admm.rho=1e-3")
    assert code == 2
    assert "they differ in seed, admm.rho" in text
    assert "Traceback" not in text


def test_row_23_every_mistake_in_the_settings_is_listed_at_once(tmp_path):
    code, text = train(tmp_path, "tt_rank=8", "admm.pull=3", "optimizer.nme=adam", f"hydra.run.dir={tmp_path / 'run'}")
    assert code == 2
    assert text.startswith("ConfigError: 3 problems")
    for word in ("tt_ranks", "admm.pull", "optimizer.nme: no such setting"):
        assert word in text
    assert "Traceback" not in text
    assert not (tmp_path / "run").exists()


def test_row_33_a_folder_that_cannot_be_made_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    code, text = train(tmp_path, *TINY, f"hydra.run.dir={tmp_path / 'file' / 'run'}")
    assert code == 2
    assert text.startswith("ConfigError: the run folder cannot be written")
    assert "hydra.run.dir=PATH" in text
    assert text.count("\n") == 1


def test_known_errors_are_one_line_and_unknown_ones_a_traceback(tmp_path, monkeypatch):
    for error, expected in ((TrainingError("the loss is nan"), 2), (ValueError("a bug"), 1)):

        def fail(config, folder, error=error):
            raise error

        monkeypatch.setattr(pipeline, "run", fail)
        code, text = train(tmp_path, *TINY, f"hydra.run.dir={tmp_path / str(expected)}")
        (tmp_path / "terminal").unlink()
        assert code == expected
        assert f"{type(error).__name__}: {error}" in text
        assert ("Traceback" in text) == (expected == 1)


def test_a_launcher_that_cannot_start_is_one_message(tmp_path):
    """As Ray without its cluster; this is joblib's own refusal."""
    argv = ("-m", *TINY, "seed=1,2", "hydra/launcher=joblib", "hydra.launcher.n_jobs=0")
    code, text = train(tmp_path, *argv, f"hydra.sweep.dir={tmp_path / 'sweep'}")
    assert code == 2
    assert "Traceback" not in text
    assert "could not be started or waited for, hydra_joblib_launcher: ValueError: n_jobs == 0 in Parallel" in text


def test_help_explains_the_main_settings(tmp_path):
    code, text = train(tmp_path, "--help")
    assert code == 0
    for word in ("tt_ranks", "admm.rho", "model=resnet32", "Examples"):
        assert word in text


@pytest.mark.slow
def test_two_processes_write_one_run(tmp_path):
    """Killed after its training, it goes on: what the folder holds fits together."""
    folder = tmp_path / "run"
    argv = [*TINY, "data.batch_size=8", "trainer.devices=2", f"hydra.run.dir={folder}"]
    argv.remove("data.batch_size=16")
    code, text = train(tmp_path, *argv, kind=Started)
    assert code == 0, text
    assert text.count("fewer parameters") == 1
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [row["phase"] for row in rows] == ["admm", "retrain"]
    metrics = json.loads((folder / "metrics.json").read_text())
    state = json.loads((folder / "run.json").read_text())["phases"]
    for phase in ("admm", "truncated", "retrain"):
        assert sha256(folder / "phases" / f"{phase}.safetensors") == state[phase]["sha256"]
    state.pop("evaluate")
    (folder / "run.json").write_text(json.dumps({"phases": state}))
    (folder / "metrics.json").unlink()
    code, text = train(tmp_path, *argv, kind=Started)
    assert code == 0, text
    assert json.loads((folder / "metrics.json").read_text())["weights_sha256"] == metrics["weights_sha256"]


def jobs(folder):
    return sorted(path for path in folder.iterdir() if (path / ".hydra").is_dir())


@pytest.mark.slow
def test_a_sweep_makes_a_folder_per_job_and_one_report(tmp_path):
    code, text = train(tmp_path, "-m", *TINY, "seed=1,2", f"hydra.sweep.dir={tmp_path / 'sweep'}", kind=Started)
    assert code == 0, text
    first, second = jobs(tmp_path / "sweep")
    for folder in (first, second):
        assert (folder / "metrics.json").exists()
    seeds = [json.loads((folder / "metrics.json").read_text())["seed"] for folder in (first, second)]
    assert seeds == [1, 2]
    reports = list((tmp_path / "sweep").glob("*.html"))
    assert len(reports) == 1
    assert "seed" in reports[0].read_text()


@pytest.mark.slow
def test_a_job_that_fails_does_not_stop_the_others(tmp_path):
    ranks = "tt_ranks=[1,1,1],4"
    argv = ["-m", *(one for one in TINY if not one.startswith("tt_ranks")), ranks]
    code, text = train(tmp_path, *argv, f"hydra.sweep.dir={tmp_path / 'sweep'}", kind=Started)
    assert code != 0
    assert "needs 2 ranks, got 3" in text
    finished = [(folder / "metrics.json").exists() for folder in jobs(tmp_path / "sweep")]
    assert finished == [False, True]
    assert list((tmp_path / "sweep").glob("*.html"))


def test_help_that_nobody_reads_ends_without_a_complaint():
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, str(ROOT / "train.py"), "--help"]
    done = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, timeout=120, check=False)
    os.close(write)
    assert (done.returncode, done.stderr) == (141, b"")
