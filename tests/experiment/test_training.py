"""The parts of one fit: seeds per epoch, quiet logs, loaders, the line a person reads."""

import logging
import warnings
from types import SimpleNamespace

import pytest
import torch
from tiny_runs import tiny

from hodec.experiment.data.images import build_data
from hodec.experiment.training import (
    PHASES,
    LitData,
    SeedEpochs,
    epoch_line,
    make_trainer,
    quiet_lightning,
    warn_of_slow_precision,
)


def draws(seed, phase, epoch):
    torch.manual_seed(12345)
    SeedEpochs(seed, phase).on_train_epoch_start(SimpleNamespace(current_epoch=epoch), None)
    return tuple(torch.rand(3).tolist())


def test_random_numbers_are_a_function_of_seed_phase_and_epoch():
    """What dropout draws in an epoch does not depend on whether the run was resumed before it."""
    cases = [(seed, phase, epoch) for seed in (0, 1) for phase in PHASES for epoch in (0, 1, 7)]
    found = {case: draws(*case) for case in cases}
    assert len(set(found.values())) == len(cases)
    assert found == {case: draws(*case) for case in cases}
    assert draws(2**32 - 1, "retrain", 10_000)


def test_lightnings_voice_comes_back_even_after_an_error():
    logger = logging.getLogger("pytorch_lightning")
    level = logger.level

    def fail():
        with quiet_lightning():
            assert logger.level == logging.WARNING
            raise ValueError("within")

    with pytest.raises(ValueError, match="within"):
        fail()
    assert logger.level == level


def test_warnings_that_matter_are_not_hidden():
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        with quiet_lightning():
            warnings.warn("The 'train_dataloader' does not have many workers which may be slow", stacklevel=1)
            warnings.warn("the gradient exploded", stacklevel=1)
    assert [str(one.message) for one in seen] == ["the gradient exploded"]


@pytest.mark.parametrize(("fraction", "batches"), [(0.25, 1), (0.0, 0)])
def test_validation_batches_are_those_of_the_split(fraction, batches):
    config = tiny(data={"val_fraction": fraction})
    module = LitData(build_data(config.data), config)
    module.trainer = make_trainer(config, 1, [])
    assert len(module.val_dataloader()) == batches
    assert len(module.train_dataloader()) == (64 - 16 * batches) // 16


def test_the_line_of_an_epoch():
    row = {"phase": "admm", "epoch": 2, "lr": 0.1, "train/loss": 0.5, "val/accuracy": 0.91234, "seconds": 12.34}
    assert epoch_line(row, 15) == "admm 3/15  loss 0.5000  val 91.23%  12.3 s"
    row |= {"admm/primal_residual": 0.25, "admm/truncated_accuracy": 0.5, "admm/rho": 0.0123456}
    assert epoch_line(row, 15).endswith("|W-Z|/|W| 0.2500  truncated 50.00%  rho 0.0123  12.3 s")


@pytest.mark.parametrize(
    ("precision", "capabilities", "warned"),
    [
        ("bf16-mixed", {"avx512_f": True, "avx512_bf16": False}, True),
        ("bf16-mixed", {"avx512_f": True, "avx512_bf16": True}, False),
        ("bf16-mixed", {"neon": True, "bf16": True}, False),
        ("bf16-mixed", {}, False),
        ("32-true", {"avx512_f": True, "avx512_bf16": False}, False),
    ],
)
def test_bfloat16_without_units_for_it_is_warned_of(monkeypatch, caplog, precision, capabilities, warned):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    warn_of_slow_precision(tiny(trainer={"precision": precision}))
    assert ("trainer.precision=32-true" in caplog.text) == warned
