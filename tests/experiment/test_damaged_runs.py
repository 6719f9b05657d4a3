"""Folders that a kill, a full disk or an editor left its marks in: one message, or the run goes on."""

import errno
import json
import resource
import shutil
from contextlib import contextmanager

import pytest
from tiny_runs import FINISHED, files_of, stopped_before, tiny

from hodec.errors import CheckpointError, HodecError, TrainingError
from hodec.experiment import phases, pipeline, training
from hodec.experiment.lit import LitClassifier
from hodec.experiment.report import render
from hodec.experiment.run_folder import RunFolder, checkpoint_epoch, damage


def rows(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


# -- full disks ------------------------------------------------------------------------------------------------


def test_training_goes_on_when_the_disk_is_full(tmp_path, monkeypatch, caplog):
    """From the second epoch on neither checkpoints nor rows can be written: what is there stays, the run ends."""
    whole = pipeline.run(tiny(retrain_epochs=0), tmp_path / "whole")
    save_checkpoint, append_row = training.Trainer.save_checkpoint, RunFolder.append_row

    def save_half(trainer, path, *args):
        if trainer.current_epoch == 0:
            return save_checkpoint(trainer, path, *args)
        path.write_bytes(b"half of it")
        raise OSError(errno.ENOSPC, "No space left on device")

    def append_first(folder, row):
        if row["epoch"] == 0:
            return append_row(folder, row)
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(training.Trainer, "save_checkpoint", save_half)
    monkeypatch.setattr(RunFolder, "append_row", append_first)
    metrics = pipeline.run(tiny(retrain_epochs=0), tmp_path / "full")
    assert metrics["weights_sha256"] == whole["weights_sha256"]
    assert [row["epoch"] for row in rows(tmp_path / "full")] == [0]
    kept = list((tmp_path / "full" / "checkpoints").iterdir())
    assert [path.name for path in kept] == ["admm.ckpt"]
    assert not damage(kept[0])
    assert checkpoint_epoch(kept[0]) == 1
    for words in ("could not be written ([Errno 28] No space left on device); training goes on", "a row of the curves"):
        assert words in caplog.text


# -- no space ----------------------------------------------------------------------------------------------------


@contextmanager
def files_up_to(size):
    """No file of this process may grow larger; the system refuses what is more, as a full disk does."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("phase", ["admm", "truncated", pytest.param("retrain", marks=pytest.mark.slow), "evaluate"])
def test_a_full_disk_at_the_end_of_a_phase_is_one_message_and_the_run_goes_on(finished, tmp_path, phase):
    """The limit is below the weights of the dense net, or below those of the factorized one."""
    folder = stopped_before(phase, finished[0], tmp_path / "run")
    size = {"admm": 200_000, "truncated": 9_000, "retrain": 9_000, "evaluate": 9_000}[phase]
    words = r"could not be written: there is no space left.*the same command goes on|there is no space left; make room"
    with files_up_to(size), pytest.raises(CheckpointError, match=words):
        pipeline.run(tiny(**FINISHED), folder)
    assert not list(folder.rglob("*.part"))
    assert not (folder / "run.lock").exists()
    pipeline.run(tiny(**FINISHED), folder)
    assert (folder / "compressed.safetensors").read_bytes() == (finished[0] / "compressed.safetensors").read_bytes()


# -- killed while the report is written ------------------------------------------------------------------------


@pytest.mark.parametrize("written", [pytest.param([], marks=pytest.mark.slow), ["report.md"]])
def test_a_run_that_was_killed_while_it_wrote_its_report_gets_it(finished, tmp_path, monkeypatch, written):
    monkeypatch.setattr(render, "draw_all", lambda run: [render.draw(render.LEAD, run)])  # the others take seconds
    folder = shutil.copytree(finished[0], tmp_path / "run")
    for name in written:
        (folder / name).write_text("# the report of a run that was killed\n")
    pipeline.run(tiny(**FINISHED, report=True), folder)
    assert (folder / "report.html").stat().st_size > 10_000
    assert "test accuracy" in (folder / "report.md").read_text()
    before = files_of(folder)
    pipeline.run(tiny(**FINISHED, report=True), folder)
    assert files_of(folder) == before, "a finished run with its report is only read"


# -- files that were altered between two starts ------------------------------------------------------------------


def edit(path, change):
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


EDITS = {
    "a rank": lambda plan: plan["layers"]["layer2.0.conv1"].update(ranks=[2, 2]),
    "a layer dropped": lambda plan: plan["layers"].pop("layer2.0.conv1"),
    "a note": lambda plan: plan["layers"]["layer2.0.conv1"].update(notes=["mine"]),
}


@pytest.mark.parametrize(("phase", "change"), [*zip(("admm", "truncated", "retrain"), EDITS)])
def test_a_plan_that_was_edited_since_is_refused(finished, tmp_path, phase, change):
    """Between ADMM and conversion it would be obeyed: the net would get ranks that it was not trained for."""
    folder = stopped_before(phase, finished[0], tmp_path / "run")
    edit(folder / "plan.json", EDITS[change])
    with pytest.raises(CheckpointError, match=r"plan\.json was altered since this run made it.*plan=.*hydra\.run\.dir"):
        pipeline.run(tiny(**FINISHED), folder)


ODD = {
    "an entry that is none": lambda state: state["phases"].update(admm=3),
    "no digest": lambda state: state["phases"]["pretrain"].pop("sha256"),
    "a digest that is none": lambda state: state["phases"]["pretrain"].update(sha256=["x"]),
    "an unknown phase": lambda state: state["phases"].update(admmm={}),
    "seconds in words": lambda state: state["phases"]["pretrain"].update(seconds="long"),
    "no errors": lambda state: state["phases"].update(truncated={"sha256": "0" * 64}),
    "no metrics": lambda state: state["phases"].update(evaluate={}),
    "metrics without a net": lambda state: state["phases"].update(evaluate={"metrics": {"compressed": {}}}),
    "ADMM in a word": lambda state: state["phases"].update(admm={"sha256": "0" * 64, "admm": "converged"}),
}


@pytest.mark.parametrize("change", ODD)
def test_an_odd_state_is_one_message(finished, tmp_path, change):
    folder = stopped_before("admm", finished[0], tmp_path / "run")
    edit(folder / "run.json", ODD[change])
    with pytest.raises(CheckpointError, match=r"run\.json: .*was altered.*hydra\.run\.dir=PATH"):
        pipeline.run(tiny(**FINISHED), folder)


@pytest.mark.parametrize("content", [b"\xff\xfe{}", b"[" * 10**5, b"null", b'{"phases": []}'])
@pytest.mark.parametrize("name", ["run.json", "config.yaml", "plan.json"])
def test_files_of_other_bytes_are_one_message(finished, tmp_path, name, content):
    folder = stopped_before("admm", finished[0], tmp_path / "run")
    (folder / name).write_bytes(content)
    with pytest.raises(
        HodecError, match=name.replace(".", r"\.") if name != "config.yaml" else "config.yaml|differ in"
    ):
        pipeline.run(tiny(**FINISHED), folder)


def test_what_a_killed_start_was_writing_is_removed(finished, tmp_path):
    shutil.copytree(finished[0], tmp_path / "run")
    parts = [tmp_path / "run" / ".run.json.x1.part", tmp_path / "run" / "phases" / ".admm.safetensors.x2.part"]
    for part in parts:
        part.write_bytes(b"half of")
    pipeline.run(tiny(**FINISHED), tmp_path / "run")
    assert not any(part.exists() for part in parts)


def test_lines_that_are_no_rows_are_named_and_left_out(finished, tmp_path, caplog):
    folder = stopped_before("admm", finished[0], tmp_path / "run")
    with (folder / "metrics.jsonl").open("ab") as f:
        f.write(b'3\n"text"\n[1]\n{"phase": 1}\n\xff\xfe\n' + b"[" * 10**5 + b"\n")
    (folder / "metrics.csv").write_bytes(b"a,b\n\xff,2\n")
    pipeline.run(tiny(**FINISHED), folder)
    assert [row["phase"] for row in rows(folder)] == [row["phase"] for row in rows(finished[0])]
    assert caplog.text.count("a line of metrics.jsonl is no row and is left out") >= 6
    assert "metrics.csv is no table of curves" in caplog.text


def test_other_images_than_those_it_was_begun_with_are_refused(finished, tmp_path):
    folder = stopped_before("admm", finished[0], tmp_path / "run")
    state = json.loads((finished[0] / "run.json").read_text())
    assert state["begun_with"].keys() == {"data", "hodec", "torch"}
    edit(folder / "run.json", lambda now: now.update(begun_with={**state["begun_with"], "data": "48 images, 0123"}))
    with pytest.raises(
        CheckpointError, match=r"was begun with other images \(then 48 images, 0123, now 48 \+ 16 images"
    ):
        pipeline.run(tiny(**FINISHED), folder)


def test_another_version_is_said(finished, tmp_path, caplog):
    folder = stopped_before("retrain", finished[0], tmp_path / "run")
    edit(folder / "run.json", lambda now: now.update(begun_with={"torch": "1.0"}))
    pipeline.run(tiny(**FINISHED), folder)
    assert "was begun with torch 1.0 and goes on with" in caplog.text


# -- NaN --------------------------------------------------------------------------------------------------------


def test_row_3_nan_stops_the_run_and_keeps_the_last_whole_epoch(tmp_path, monkeypatch):
    """A learning rate that blows up in the second epoch."""
    real = LitClassifier.training_step

    def step(module, batch, index):
        if module.current_epoch == 1 and index == 2:
            batch = (batch[0] * float("nan"), batch[1])
        return real(module, batch, index)

    monkeypatch.setattr(phases.LitClassifier, "training_step", step)
    with pytest.raises(TrainingError, match=r"the loss is nan at epoch 1, step 5.*Lower optimizer\.lr"):
        pipeline.run(tiny(), tmp_path)
    assert [row["epoch"] for row in rows(tmp_path)] == [0]
    assert (tmp_path / "checkpoints" / "admm.ckpt").exists()


@pytest.mark.parametrize(
    ("where", "named"),
    [
        ("weight", "net.conv1.weight"),
        ("running_var", "net.bn1.running_var"),
        ("momentum", "memory of net.conv1.weight"),
    ],
)
def test_nan_that_the_loss_does_not_show_takes_the_place_of_no_checkpoint(tmp_path, monkeypatch, where, named):
    """On a GPU the loss is looked at every 50 steps: here, never; a weight breaks in the last step of epoch 1."""
    real = LitClassifier.on_train_batch_end

    def end(module, *rest):
        real(module, *rest)
        if module.current_epoch == 1 and module.trainer.is_last_batch:
            first = module.net.conv1.weight
            broken = {
                "weight": first,
                "running_var": module.net.bn1.running_var,
                "momentum": module.trainer.optimizers[0].state[first]["momentum_buffer"],
            }[where]
            broken.data.flatten()[0] = float("nan")

    monkeypatch.setattr(LitClassifier, "on_train_batch_end", end)
    with pytest.raises(TrainingError, match=rf"{named} holds NaN or Inf after epoch 1: .*Lower optimizer\.lr"):
        pipeline.run(tiny(admm={"name": "off"}), tmp_path)
    kept = list((tmp_path / "checkpoints").glob("dense*.ckpt"))
    assert [checkpoint_epoch(path) for path in kept] == [1]
    assert not damage(kept[0])


def test_a_phase_that_ends_in_nan_is_not_kept(tmp_path, monkeypatch):
    real = phases.reestimate_batchnorm

    def broken(net, batches):
        count = real(net, batches)
        net.bn1.running_mean[0] = float("nan")
        return count

    monkeypatch.setattr(phases, "reestimate_batchnorm", broken)
    with pytest.raises(TrainingError, match=r"phase truncated ended with NaN in bn1\.running_mean: it is not kept"):
        pipeline.run(tiny(dense_epochs=0), tmp_path)
    assert not (tmp_path / "phases" / "truncated.safetensors").exists()
