"""What a run leaves behind is whole, and what was broken since is noticed."""

import errno
import json
import os
import pickle
import zipfile

import pytest
import torch
from tiny_runs import files_of
from torch import nn

from hodec.errors import CheckpointError, ConfigError
from hodec.experiment.run_folder import Outcome, RunFolder, checkpoint_epoch, damage, previous
from hodec.io import atomic as files
from hodec.io.tensors import load_tensors, save_tensors


def opened(path, differences=()):
    return RunFolder.open(path, "seed: 0\n", list(differences))


def lightning_like(epoch):
    """As much of a Lightning checkpoint as is read here."""
    progress = {"epoch_progress": {"current": {"processed": epoch}}}
    return {"loops": {"fit_loop": progress}, "weights": torch.arange(5000.0) + epoch}


def with_checkpoints(tmp_path):
    """A folder with the checkpoints of epochs 2 and, before it, 1."""
    folder = opened(tmp_path)
    path = folder.checkpoint("admm")
    path.parent.mkdir()
    torch.save(lightning_like(2), path)
    torch.save(lightning_like(1), previous(path))
    return folder, path


def flip_one_bit(path, where):
    content = bytearray(path.read_bytes())
    content[where] ^= 1
    path.write_bytes(bytes(content))


def test_a_new_folder_keeps_its_settings(tmp_path):
    folder = opened(tmp_path / "a" / "b")
    assert (folder.path / "config.yaml").read_text() == "seed: 0\n"
    assert not folder.phases
    assert not folder.done("admm")
    assert folder.rows() == []
    assert folder.readable_checkpoint("admm") is None


def test_other_settings_are_refused_by_name(tmp_path):
    with pytest.raises(ConfigError, match=r"other settings \(they differ in seed, admm\.rho\).*hydra\.run\.dir"):
        opened(tmp_path, ["seed", "admm.rho"])
    assert not (tmp_path / "config.yaml").exists()


def test_a_folder_that_cannot_be_written_is_named_at_the_start(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"file/run cannot be written \(Not a directory\).*hydra\.run\.dir=PATH"):
        opened(tmp_path / "file" / "run")


def test_finished_phases_are_remembered(tmp_path):
    opened(tmp_path).finish("plan", {"seconds": 1.5})
    again = opened(tmp_path)
    assert again.done("plan")
    assert again.phases["plan"] == {"seconds": 1.5}


@pytest.mark.parametrize("text", ["", "{", '{"phases": 3}', "[]"])
def test_a_broken_state_file_is_one_message(tmp_path, text):
    opened(tmp_path)
    (tmp_path / "run.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"run\.json"):
        opened(tmp_path)


def keep(folder, phase, net, **facts):
    """Compute a phase that results in ``net``."""
    return folder.memo(phase, pytest.fail, lambda: Outcome(net, facts))


def read(folder, phase, blank):
    """Read a phase into ``blank``; it must not be computed again."""
    return folder.memo(phase, lambda: blank, lambda: pytest.fail("it was computed again"))


def test_a_phase_is_computed_once_and_read_bit_for_bit(tmp_path):
    net, blank = (nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)) for _ in range(2))
    factors = {"a:b": [torch.rand(2, 3) for _ in range(11)], "c": [torch.rand(4)]}
    folder = opened(tmp_path)
    computed = folder.memo("admm", pytest.fail, lambda: Outcome(net, {"seconds": 2.0}, factors))
    assert (computed.net, computed.factors) == (net, factors)
    again = read(opened(tmp_path), "admm", blank)
    assert again.net is blank
    torch.testing.assert_close(blank.state_dict(), net.state_dict(), rtol=0, atol=0)
    torch.testing.assert_close(again.factors, factors, rtol=0, atol=0)
    assert again.facts["seconds"] == 2.0


@pytest.mark.parametrize("harm", ["altered", "missing"])
def test_altered_phase_weights_are_refused(tmp_path, harm):
    folder = opened(tmp_path)
    model = nn.Linear(20, 20)
    keep(folder, "admm", model)
    path = tmp_path / "phases" / "admm.safetensors"
    flip_one_bit(path, -8) if harm == "altered" else path.unlink()
    with pytest.raises(CheckpointError, match=r"admm\.safetensors is missing or was altered.*run\.json"):
        read(folder, "admm", model)


def test_a_second_process_reads_but_never_writes(tmp_path):
    """Where several train together, two would write BatchNorm statistics that differ."""
    model, blank = nn.Linear(3, 3), nn.Linear(3, 3)
    keep(opened(tmp_path), "pretrain", model)
    before = files_of(tmp_path)
    second = RunFolder.open(tmp_path, "seed: 0\n", writes=False)
    read(second, "pretrain", blank)
    torch.testing.assert_close(blank.state_dict(), model.state_dict(), rtol=0, atol=0)
    assert keep(second, "admm", model, seconds=1.0).net is model
    second.drop_rows("admm", 0)
    assert second.done("admm")
    assert files_of(tmp_path) == before


# -- checkpoints of the phase under way ------------------------------------------------------------------------


def test_the_latest_checkpoint_is_taken(tmp_path):
    folder, path = with_checkpoints(tmp_path)
    assert folder.readable_checkpoint("admm") == path
    assert checkpoint_epoch(path) == 2


HARMS = {
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:-100]),
    "half": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "empty": lambda path: path.write_bytes(b""),
    "text": lambda path: path.write_text("not a checkpoint"),
    "one bit in a tensor": lambda path: flip_one_bit(path, path.stat().st_size // 2),
}


@pytest.mark.parametrize("harm", HARMS)
def test_row_29_a_broken_checkpoint_gives_way_to_the_one_before(tmp_path, harm):
    folder, path = with_checkpoints(tmp_path)
    HARMS[harm](path)
    assert damage(path)
    assert folder.readable_checkpoint("admm") == previous(path)
    assert checkpoint_epoch(previous(path)) == 1


def test_a_checkpoint_with_nan_gives_way_to_the_one_before(tmp_path):
    """One that an earlier version wrote: the same command would fail for ever."""
    folder, path = with_checkpoints(tmp_path)
    content = torch.load(path, weights_only=True)
    content["optimizer_states"] = [{"state": {0: {"momentum_buffer": torch.tensor([1.0, float("nan")])}}}]
    torch.save(content, path)
    assert damage(path) == "it holds NaN in optimizer_states.0.state.0.momentum_buffer"
    assert folder.readable_checkpoint("admm") == previous(path)


def test_a_checkpoint_that_unpacks_to_more_than_it_holds_is_never_unpacked(tmp_path, monkeypatch):
    folder, path = with_checkpoints(tmp_path)
    with zipfile.ZipFile(path, "a", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("bomb", b"\0" * 10**7)
    monkeypatch.setattr(zipfile.ZipFile, "testzip", lambda _: pytest.fail("it was unpacked"))
    assert "unpack to 10," in damage(path)


@pytest.mark.parametrize("harm", HARMS)
def test_two_broken_checkpoints_are_one_message(tmp_path, harm):
    folder, path = with_checkpoints(tmp_path)
    HARMS[harm](path)
    HARMS[harm](previous(path))
    with pytest.raises(CheckpointError, match=r"admm\.ckpt is not readable .*nor is an earlier one; remove .*"):
        folder.readable_checkpoint("admm")


def test_row_29_every_flipped_bit_of_the_weights_is_found(tmp_path, generator):
    """torch itself loads most of them without a word."""
    _, path = with_checkpoints(tmp_path)
    whole = path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        largest = max(archive.infolist(), key=lambda part: part.file_size)
    start = whole.index(torch.arange(5000.0)[100:110].add(2).numpy().tobytes())
    assert largest.file_size == 20000
    for offset in torch.randint(0, 15000, (40,), generator=generator).tolist():
        path.write_bytes(whole)
        flip_one_bit(path, start + offset)
        assert "altered" in damage(path)


def test_row_31_a_checkpoint_of_something_else_is_refused(tmp_path):
    path = tmp_path / "other.ckpt"
    torch.save({"epoch": 3}, path)
    with pytest.raises(CheckpointError, match=r"other\.ckpt is not readable \(KeyError"):
        checkpoint_epoch(path)


class Malicious:
    """Unpickled carelessly, it makes a file."""

    def __init__(self, target):
        self.target = str(target)

    def __reduce__(self):
        return (os.mkdir, (self.target,))


def test_row_30_a_malicious_checkpoint_runs_nothing(tmp_path):
    path, trace = tmp_path / "bad.ckpt", tmp_path / "trace"
    torch.save({"loops": Malicious(trace)}, path)
    with pytest.raises(CheckpointError, match="is not readable .*: remove it to go on") as error:
        checkpoint_epoch(path)
    assert "\n" not in str(error.value)
    assert not trace.exists()
    pickle.loads(pickle.dumps(Malicious(trace)))
    assert trace.exists(), "the test's pickle is harmless, so it proves nothing"


# -- rows ------------------------------------------------------------------------------------------------------


def rows_of(folder):
    return [(row["phase"], row["epoch"]) for row in folder.rows()]


def test_rows_are_appended_and_those_to_be_trained_again_dropped(tmp_path):
    folder = opened(tmp_path)
    for phase, epoch in [("admm", 0), ("admm", 1), ("admm", 2), ("retrain", 0)]:
        folder.append_row({"phase": phase, "epoch": epoch, "loss": 0.1 * epoch})
    folder.drop_rows("admm", 1)
    assert rows_of(folder) == [("admm", 0), ("retrain", 0)]
    folder.append_row({"phase": "retrain", "epoch": 1})
    assert rows_of(folder) == [("admm", 0), ("retrain", 0), ("retrain", 1)]


def test_a_line_cut_short_is_left_out(tmp_path):
    folder = opened(tmp_path)
    folder.append_row({"phase": "admm", "epoch": 0})
    with folder.metrics_path.open("a") as f:
        f.write('{"phase": "admm", "epo')
    assert rows_of(folder) == [("admm", 0)]
    folder.drop_rows("admm", 1)
    folder.append_row({"phase": "admm", "epoch": 1})
    assert [json.loads(line)["epoch"] for line in folder.metrics_path.read_text().splitlines()] == [0, 1]


# -- full disks ------------------------------------------------------------------------------------------------


def no_space(*args, **kwargs):
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_full_disk_leaves_the_file_before(tmp_path, monkeypatch):
    folder = opened(tmp_path)
    keep(folder, "admm", nn.Linear(3, 3))
    before = files_of(tmp_path)
    monkeypatch.setattr(files.os, "fsync", no_space)
    with pytest.raises(OSError, match="No space left"):
        keep(folder, "retrain", nn.Linear(3, 3))
    with pytest.raises(OSError, match="No space left"):
        folder.finish("evaluate", {})
    assert files_of(tmp_path) == before


# -- tensors ---------------------------------------------------------------------------------------------------


def test_tensors_that_share_memory_and_those_that_are_strided_are_kept(tmp_path, generator):
    base = torch.randn(4, 6, generator=generator)
    tensors = {"a": base, "b": base, "t": base.T, "part": base[:, 2:3], "scalar": torch.tensor(3)}
    save_tensors(tmp_path / "x.safetensors", tensors)
    torch.testing.assert_close(load_tensors(tmp_path / "x.safetensors"), tensors, rtol=0, atol=0)


@pytest.mark.parametrize("content", [None, b"", b"text", b"\xff" * 100])
def test_unreadable_tensors_are_one_message(tmp_path, content):
    path = tmp_path / "x.safetensors"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"x\.safetensors is not a readable safetensors file"):
        load_tensors(path)
