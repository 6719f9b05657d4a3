"""A run with trainer.compile gives the history of one without, up to rounding."""

from dataclasses import replace

import pytest
import torch
from tiny_runs import tiny
from torch._dynamo.exc import TorchDynamoException
from torch.testing import assert_close
from train_script import rows

from hodec.experiment import pipeline

CURVES = ("train/loss", "admm/primal_residual", "admm/rho")


@pytest.fixture
def compiler():
    """Skips where torch.compile has no C++ compiler that does."""
    torch._dynamo.reset()
    try:
        torch.compile(lambda x: x.sin() + 1)(torch.ones(3))
    except TorchDynamoException as error:
        pytest.skip(f"no C++ compiler that torch.compile can use: {str(error).splitlines()[0]}")


@pytest.mark.slow
@pytest.mark.usefixtures("compiler")
def test_a_compiled_run_has_the_same_history(tmp_path):
    # At a learning rate at which rounding does not grow over the steps
    plain = tiny(dense_epochs=2, retrain_epochs=1, optimizer={"lr": 0.01, "retrain_lr": 0.002})
    compiled = replace(plain, trainer=replace(plain.trainer, compile=True))
    torch._dynamo.reset()
    runs = [pipeline.run(config, tmp_path / str(k)) for k, config in enumerate((plain, compiled))]
    histories = [rows(tmp_path / str(k)) for k in range(2)]
    assert [row["phase"] for row in histories[1]] == ["admm", "admm", "retrain"]
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
    for ours, theirs in zip(*histories, strict=True):
        for key in CURVES:
            assert_close(ours.get(key), theirs.get(key), rtol=1e-4, atol=1e-4)
    assert runs[0]["reduction"] == runs[1]["reduction"]
