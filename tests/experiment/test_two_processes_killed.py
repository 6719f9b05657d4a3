"""Two processes that train together are killed within an epoch: the same command goes on from there, to the bit."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from train_script import DEADLINE, ROOT, result, rows

# 74 batches an epoch in each process: several ask each other every 50 batches whether a checkpoint is due.
SETTINGS = (
    "data=fake", "data.fake_size=660", "data.fake_classes=4", "data.image_size=8", "data.batch_size=4", "tt_ranks=4",
    "data.augment=true", "data.crop_padding=1", "method.n_modes=1", "dense_epochs=2", "retrain_epochs=1",
    "bn_batches=1", "trainer.accelerator=cpu", "trainer.threads=1", "trainer.devices=2", "report=false",
    "trainer.checkpoint_minutes=0.0001",
)  # fmt: skip


def start(folder, log):
    """train.py in a session of its own, which both of its processes are in."""
    command = [sys.executable, str(ROOT / "train.py"), *SETTINGS, f"hydra.run.dir={folder}"]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    with log.open("ab") as out:
        return subprocess.Popen(command, stdout=out, stderr=out, env=env, cwd=log.parent, start_new_session=True)


def within_an_epoch(folder):
    """The epoch and the batches done of a checkpoint that was written within one; None while there is none."""
    path = folder / "checkpoints" / "admm.ckpt"
    if not path.exists() or len(rows(folder)) < 1:
        return None
    state = torch.load(path, map_location="cpu", weights_only=True)
    # one of the end of an epoch holds no state of its own
    kept = next((value for name, value in state["callbacks"].items() if name.startswith("KeepCheckpoint")), None)
    return (state["epoch"], kept["loader"]["batch"]) if kept else None


def killed_within_an_epoch(folder, log):
    child, end = start(folder, log), time.monotonic() + DEADLINE
    try:
        while (place := within_an_epoch(folder)) is None or place < (1, 2):
            assert child.poll() is None, log.read_text()[-3000:]
            assert time.monotonic() < end, log.read_text()[-3000:]
            time.sleep(0.01)
    finally:
        os.killpg(child.pid, signal.SIGKILL)
        child.wait()
    return place


@pytest.mark.slow
def test_two_processes_killed_within_an_epoch_go_on_within_it(tmp_path):
    whole, folder = tmp_path / "whole", tmp_path / "run"
    assert start(whole, tmp_path / "whole.log").wait(DEADLINE) == 0, (tmp_path / "whole.log").read_text()[-3000:]
    epoch, batch = killed_within_an_epoch(folder, tmp_path / "run.log")
    assert (epoch, batch) == (1, 51)
    assert "admm" not in json.loads((folder / "run.json").read_text())["phases"]
    assert start(folder, tmp_path / "run.log").wait(DEADLINE) == 0, (tmp_path / "run.log").read_text()[-3000:]
    assert "going on with phase admm after 1 of 2 epochs" in (tmp_path / "run.log").read_text()
    assert result(folder) == result(whole)
    strip = [[{k: v for k, v in row.items() if k != "seconds"} for row in rows(one)] for one in (folder, whole)]
    assert strip[0] == strip[1]
