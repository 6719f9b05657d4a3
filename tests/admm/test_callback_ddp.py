"""Two processes hold one Z: they train the net that one process trains."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from admm_fits import Users, admm, cosine, fit, new_net, samples, sgd
from torch.testing import assert_close
from torch.utils.data import DataLoader, TensorDataset

SCRIPT = Path(__file__).parent / "two_processes.py"


def two_processes(folder, how):
    done = start(folder, how)
    assert done.returncode == 0, done.stderr[-3000:]
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in (0, 1)]


def start(folder, how):
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{SCRIPT.parent}:{os.environ.get('PYTHONPATH', '')}"}
    command = [sys.executable, str(SCRIPT), str(folder), how]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=300, check=False)


@pytest.mark.slow
@pytest.mark.parametrize("how", ["together", "apart", "learned"])
def test_both_processes_hold_the_same_state(tmp_path, how):
    """Even where their decompositions differ: one process decides."""
    first, second = two_processes(tmp_path, how)
    assert second["ranks"] == first["ranks"]
    if how == "learned":
        assert set(first["ranks"]["conv1"]) == {1}  # those of the first process
    assert_close(second, first, rtol=0, atol=0)


@pytest.mark.slow
def test_row_34_a_dual_that_differs_in_one_process_stops_both(tmp_path):
    """Z stays equal, which is sent: without a look at the weights the two would train different nets in silence."""
    done = start(tmp_path, "planted")
    assert done.returncode != 0
    assert "epoch 1, step 8: the weights of 1 layers differ between the processes, most of all conv2" in done.stderr
    assert not list(tmp_path.glob("*.pt"))


@pytest.mark.slow
def test_two_processes_train_what_one_does(tmp_path):
    first, _ = two_processes(tmp_path, "together")
    net = new_net()
    net.dropout.p = 0.0
    callback = admm(net, ranks=2, track_truncated=True, tolerance=0.0)
    data = DataLoader(TensorDataset(*samples()), batch_size=8)
    fit(Users(net, lambda m: cosine(sgd(m), 12)), callback, epochs=3, data=data, val=data)
    assert_close(first["weights"], dict(net.state_dict()), rtol=1e-4, atol=1e-5)
    assert first["primal"] == pytest.approx(callback.admm.primal, rel=1e-3)
    assert first["truncated"] == pytest.approx(callback.latest["admm/truncated_accuracy"], abs=1 / 32)
