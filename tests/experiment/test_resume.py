"""A run that was killed anywhere and started again ends with the bits of one that was not."""

import json
import os
import signal

import pytest
import torch
from tiny_runs import FINISHED, Killed, killed_at, stopped_before, tiny
from train_script import SETTINGS, Forked, StartedSmall, finish, kill_within, result, rows

from hodec.errors import CheckpointError
from hodec.experiment import pipeline
from hodec.experiment.run_folder import checkpoint_epoch, previous


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The run that nothing happened to."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    finish(Forked(*SETTINGS, f"hydra.run.dir={folder}", log=folder.parent / "log"))
    return folder


def phases(folder):
    return json.loads((folder / "run.json").read_text())["phases"]


def numbers(folder):
    """The rows without the seconds they took."""
    return [{key: value for key, value in row.items() if key != "seconds"} for row in rows(folder)]


def has_all_seconds(folder, phase):
    """Whether a phase took as long as its epochs, whichever start trained them."""
    return phases(folder)[phase]["seconds"] >= sum(row["seconds"] for row in rows(folder) if row["phase"] == phase)


def kill_and_go_on(kind, tmp_path, phase):
    """Start, kill within an epoch, start again by the same command; returns the folder and the exit code."""
    folder, argv = tmp_path / "run", [*SETTINGS, f"hydra.run.dir={tmp_path / 'run'}"]
    code = kill_within(kind(*argv, log=tmp_path / "first.log"), folder, phase)
    assert phase not in phases(folder)
    assert not (folder / "metrics.json").exists()
    finish(kind(*argv, log=tmp_path / "second.log"))
    assert f"going on with phase {phase} after" in (tmp_path / "second.log").read_text()
    return folder, code


@pytest.mark.parametrize("phase", ["admm", pytest.param("retrain", marks=pytest.mark.slow)])
def test_killed_in_mid_epoch(whole, tmp_path, phase):
    folder, code = kill_and_go_on(Forked, tmp_path, phase)
    assert code == -signal.SIGKILL
    assert has_all_seconds(folder, phase)
    assert result(folder) == result(whole)
    assert numbers(folder) == numbers(whole)


@pytest.mark.slow
@pytest.mark.parametrize("phase", ["admm", "retrain"])
def test_killed_in_mid_epoch_as_a_new_process(whole, tmp_path, phase):
    folder, _ = kill_and_go_on(StartedSmall, tmp_path, phase)
    assert result(folder) == result(whole)
    assert numbers(folder) == numbers(whole)


@pytest.mark.parametrize(("number", "expected"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_asked_to_stop(tmp_path, number, expected):
    """Lightning alone exits with 0 and 1; a scheduler must see what happened, a person how to go on."""
    folder = tmp_path / "run"
    child = Forked(*SETTINGS, f"hydra.run.dir={folder}", log=tmp_path / "log")
    assert kill_within(child, folder, "admm", number=number) == expected
    text = child.log.read_text()
    assert f"stopped by {signal.Signals(number).name} in phase admm; go on with: python train.py data=fake" in text
    assert f"hydra.run.dir={folder}\n" in text
    assert "Traceback" not in text
    assert checkpoint_epoch(folder / "checkpoints" / "admm.ckpt") >= 1
    finish(Forked(*SETTINGS, f"hydra.run.dir={folder}", log=tmp_path / "log"))
    assert has_all_seconds(folder, "admm"), "with those of the epoch that was under way"


# -- in this process, killed at every write -------------------------------------------------------------------


CONFIG = tiny(**FINISHED)


def check_every(writes, finished, tmp_path, monkeypatch):
    for write in writes:
        folder = tmp_path / str(write)
        if not killed_at(CONFIG, folder, write, monkeypatch):
            return write
        pipeline.run(CONFIG, folder)
        assert result(folder) == result(finished), f"killed at write {write}"
        assert numbers(folder) == numbers(finished), f"killed at write {write}"
        assert (folder / "metrics.csv").read_text().count("\n") == 6, f"killed at write {write}"
        assert phases(folder).keys() == phases(finished).keys()
    return None


@pytest.mark.parametrize("write", [12, pytest.param(22, marks=pytest.mark.slow)])
def test_killed_before_a_file_is_in_its_place(finished, tmp_path, monkeypatch, write):
    assert check_every([write], finished[0], tmp_path, monkeypatch) is None


@pytest.mark.slow
def test_killed_at_any_write(finished, tmp_path, monkeypatch):
    writes = check_every(range(1, 100), finished[0], tmp_path, monkeypatch)
    assert writes is not None
    assert writes > 25


def test_killed_twice(finished, tmp_path, monkeypatch):
    for write in (9, 6):
        assert killed_at(CONFIG, tmp_path, write, monkeypatch)
    pipeline.run(CONFIG, tmp_path)
    assert result(tmp_path) == result(finished[0])


LEARNING = tiny(
    pretrain_epochs=1,
    dense_epochs=2,
    retrain_epochs=0,
    tt_ranks=None,
    ranks={"name": "learned", "macs": 0.9, "max_rank": 12},
    method={"name": "cp"},
    include=["layer1.0.conv1"],
)
# In the second epoch of ADMM, which goes on from a checkpoint; after ADMM, before its plan is written.
WRITES = (13, 18)


def test_learned_ranks_and_factors_go_on_where_they_were(tmp_path, monkeypatch):
    """Formats that are found by iteration would end elsewhere, had the factors been forgotten."""
    pipeline.run(LEARNING, tmp_path / "whole")
    expected = json.loads((tmp_path / "whole" / "plan.json").read_text())
    assert phases(tmp_path / "whole")["admm"]["plan"] == expected
    assert (tmp_path / "whole" / "phases" / "admm_factors.safetensors").exists()
    for write in WRITES:
        folder = tmp_path / str(write)
        assert killed_at(LEARNING, folder, write, monkeypatch)
        pipeline.run(LEARNING, folder)
        assert result(folder) == result(tmp_path / "whole"), f"killed at write {write}"
        assert numbers(folder) == numbers(tmp_path / "whole"), f"killed at write {write}"
        assert json.loads((folder / "plan.json").read_text()) == expected


# -- broken files --------------------------------------------------------------------------------------------


@pytest.fixture
def stopped(finished, tmp_path):
    """A run whose phase admm has trained, with both its checkpoints, but is not noted as finished."""
    folder = stopped_before("admm", finished[0], tmp_path / "run")
    path = folder / "checkpoints" / "admm.ckpt"
    assert (checkpoint_epoch(path), checkpoint_epoch(previous(path))) == (2, 1)
    return folder, path


def truncate(path):
    path.write_bytes(path.read_bytes()[:-50])


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(bytes(content))


@pytest.mark.parametrize(
    "harm", [pytest.param(truncate, marks=pytest.mark.slow), flip, lambda path: path.unlink(), None]
)
def test_a_broken_checkpoint_gives_way_to_the_one_before(finished, stopped, monkeypatch, harm):
    folder, path = stopped
    if harm:
        harm(path)
    monkeypatch.setattr(pipeline.phases, "compress", lambda *a: (_ for _ in ()).throw(Killed()))
    with pytest.raises(Killed):
        pipeline.run(CONFIG, folder)
    again, before = phases(folder)["admm"], phases(finished[0])["admm"]
    assert has_all_seconds(folder, "admm")
    assert again | {"seconds": 0} == before | {"seconds": 0}  # the SHA-256 of the weights, and how ADMM ended
    assert numbers(folder) == [row for row in numbers(finished[0]) if row["phase"] != "retrain"]


def test_two_broken_checkpoints_are_one_message(stopped):
    folder, path = stopped
    truncate(path)
    flip(previous(path))
    with pytest.raises(CheckpointError, match=r"admm\.ckpt is not readable .* nor is an earlier one; remove .*"):
        pipeline.run(CONFIG, folder)


class Trap:
    """Unpickled carelessly, it makes a folder."""

    def __init__(self, target):
        self.target = str(target)

    def __reduce__(self):
        return (os.mkdir, (self.target,))


def test_row_30_a_malicious_checkpoint_is_never_executed(stopped):
    """It has all that a checkpoint has, whole and with the right checksums, and a trap."""
    folder, path = stopped
    content = torch.load(path, weights_only=True)
    torch.save({**content, "trap": Trap(folder / "trace")}, path)
    with pytest.raises(CheckpointError, match=r"admm\.ckpt is not readable \(it holds more than tensors .*remove it"):
        pipeline.run(CONFIG, folder)
    assert not (folder / "trace").exists()


def test_altered_phase_weights_are_refused(finished, tmp_path):
    folder = stopped_before("retrain", finished[0], tmp_path / "run")
    flip(folder / "phases" / "admm.safetensors")
    with pytest.raises(CheckpointError, match=r"admm\.safetensors is missing or was altered"):
        pipeline.run(CONFIG, folder)
