"""Within an epoch a run goes on as exactly as from its end."""

import random

import numpy as np
import pytest
import torch
from tiny_runs import tiny
from train_script import result, rows

from hodec.experiment import checkpoints, phases, pipeline
from hodec.experiment.checkpoints import random_state, restore_random_state
from hodec.experiment.lit import LitClassifier
from hodec.experiment.run_folder import checkpoint_epoch


class Killed(BaseException):
    """Not an Exception: nothing may catch it and go on."""


# Each epoch has 6 batches of 8; U, Z and rho change within it.
EVERY_STEP = tiny(
    data={"batch_size": 8},
    dense_epochs=2,
    retrain_epochs=1,
    admm={"update_every": "2steps"},
    trainer={"checkpoint_minutes": 1e-9},
)


@pytest.fixture(scope="module")
def noisy():
    """Each step draws from every generator of random numbers."""
    real = LitClassifier._trained

    def drawing(module, x):
        noise = torch.rand(len(x), 1, 1, 1) + random.random() + float(np.random.rand())
        return real(module, x * noise)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(LitClassifier, "_trained", drawing)
        yield


@pytest.fixture(scope="module")
def whole(noisy, tmp_path_factory):
    """The run that nothing happened to."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    pipeline.run(EVERY_STEP, folder)
    return folder


def numbers(folder):
    return [{key: value for key, value in row.items() if key != "seconds"} for row in rows(folder)]


def killed_after(config, folder, phase, epoch, batch, monkeypatch):
    """Run until a batch has been trained, and its checkpoint written where one is due."""
    real = LitClassifier.training_step

    def step(module, given, index):
        module_phase = "retrain" if (folder / "phases" / "truncated.safetensors").exists() else "admm"
        if (module_phase, module.current_epoch, index) == (phase, epoch, batch + 1):
            raise Killed
        return real(module, given, index)

    with monkeypatch.context() as patched:
        patched.setattr(phases.LitClassifier, "training_step", step)
        with pytest.raises(Killed):
            pipeline.run(config, folder)


@pytest.mark.parametrize(
    ("phase", "epoch", "batch"), [pytest.param("admm", 0, 1, marks=pytest.mark.slow), ("admm", 1, 2), ("retrain", 0, 3)]
)
def test_killed_within_an_epoch_it_goes_on_within_it(whole, tmp_path, monkeypatch, phase, epoch, batch):
    folder = tmp_path / "run"
    killed_after(EVERY_STEP, folder, phase, epoch, batch, monkeypatch)
    assert checkpoint_epoch(folder / "checkpoints" / f"{phase}.ckpt") == epoch
    seen = []
    real = LitClassifier.training_step
    monkeypatch.setattr(
        LitClassifier,
        "training_step",
        lambda m, given, index: seen.append((m.current_epoch, index)) or real(m, given, index),
    )
    pipeline.run(EVERY_STEP, folder)
    assert seen[0] == (epoch, batch + 1), "batches were trained again"
    assert result(folder) == result(whole)
    assert numbers(folder) == numbers(whole)


def test_gradients_that_wait_for_a_step_are_not_cut_off(tmp_path, monkeypatch, noisy):
    config = tiny(
        data={"batch_size": 8}, retrain_epochs=0, trainer={"checkpoint_minutes": 1e-9, "accumulate_grad_batches": 2}
    )
    pipeline.run(config, tmp_path / "whole")
    killed_after(config, tmp_path / "run", "admm", 1, 2, monkeypatch)
    pipeline.run(config, tmp_path / "run")
    assert result(tmp_path / "run") == result(tmp_path / "whole")
    assert numbers(tmp_path / "run") == numbers(tmp_path / "whole")


def test_checkpoints_within_an_epoch_wait_for_their_minutes(tmp_path, monkeypatch):
    written = []
    real = checkpoints.KeepCheckpoint._write
    monkeypatch.setattr(
        checkpoints.KeepCheckpoint, "_write", lambda self, *rest: written.append(rest[2]) or real(self, *rest)
    )
    pipeline.run(tiny(retrain_epochs=0), tmp_path / "ten minutes")
    assert written == ["epoch 0", "epoch 1"]
    written.clear()
    pipeline.run(tiny(retrain_epochs=0, trainer={"checkpoint_minutes": None}), tmp_path / "never")
    assert written == ["epoch 0", "epoch 1"]


def test_random_numbers_go_on_where_they_were():
    state = random_state()
    drawn = [random.random(), np.random.rand(), torch.rand(3).tolist(), np.random.randn(), random.gauss(0, 1)]
    restore_random_state(state)
    assert drawn == [random.random(), np.random.rand(), torch.rand(3).tolist(), np.random.randn(), random.gauss(0, 1)]
