"""A dense training that ends where the stable ranks have come to rest leaves its other epochs to retraining."""

import json
import shutil

import pytest
import torch
from tiny_runs import files_of, killed_at, stopped_before, tiny
from torch import nn
from train_script import result, rows

import hodec
from hodec.conversion.swap import stable_ranks
from hodec.errors import CheckpointError, ConfigError
from hodec.experiment import pipeline, switching
from hodec.experiment.arms import race
from hodec.experiment.arms.spec import Candidate, check_alike
from hodec.experiment.arms.trial import run_trial
from hodec.experiment.switching import change_of

AT_ONCE = {"name": "off", "switch_below": 1e9}
CONSTANT = {"optimizer": {"schedule": "constant"}}
# Of four epochs the first two are done, two are left.
SWITCHED = tiny(dense_epochs=4, retrain_epochs=1, admm=AT_ONCE, **CONSTANT)
FACTS = {"after": 2, "left": 2}


@pytest.fixture(scope="module")
def switched(tmp_path_factory):
    folder = tmp_path_factory.mktemp("switched") / "run"
    return folder, pipeline.run(SWITCHED, folder)


def epochs(folder):
    return [(row["phase"], row["epoch"]) for row in rows(folder)]


def numbers(folder):
    """The rows without the seconds they took."""
    return [{key: value for key, value in row.items() if key != "seconds"} for row in rows(folder)]


# -- the measure ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("layer", "size"), [(nn.Linear(16, 16), (1, 16)), (nn.Conv2d(16, 16, 1), (1, 16, 8, 8))])
def test_the_stable_rank_is_the_share_of_the_largest_singular_value(layer, size):
    net = nn.Sequential(layer)
    plan = hodec.make_plan(net, 2, method="svd", example_input=torch.zeros(size))
    values = torch.zeros(16)
    for given, expected in (([1.0] * 16, 16), ([2.0, 1.0, 1.0], 1.5), ([3.0], 1), ([0.0], 0)):
        values[:], values[: len(given)] = 0, torch.tensor(given)
        rotations = [torch.linalg.qr(torch.randn(16, 16)).Q for _ in range(2)]
        weight = rotations[0] @ values.diag() @ rotations[1]
        layer.weight.data.copy_(weight.reshape(layer.weight.shape))
        assert stable_ranks(net, plan) == pytest.approx({"0": expected}, rel=1e-5)


def test_the_change_is_relative_and_a_mean_over_the_layers():
    assert change_of({"a": 4.0, "b": 2.0}, {"a": 5.0, "b": 2.0}) == pytest.approx(0.125)
    assert change_of({"a": 4.0, "b": 2.0}, {"a": 3.0, "b": 3.0}) == pytest.approx(0.375)
    assert change_of({"a": 0.0}, {"a": 1.0}) == 1


# -- a run ---------------------------------------------------------------------------------------------------


def test_a_run_that_switched_is_the_run_of_these_lengths(switched, tmp_path):
    folder, metrics = switched
    other = pipeline.run(tiny(dense_epochs=2, retrain_epochs=3, admm={"name": "off"}, **CONSTANT), tmp_path)
    assert metrics["weights_sha256"] == other["weights_sha256"]
    assert epochs(folder) == epochs(tmp_path) == [("dense", 0), ("dense", 1), *(("retrain", i) for i in range(3))]
    assert "switch" not in other
    written = json.loads((folder / "metrics.json").read_text())["switch"]
    assert written == metrics["switch"] == FACTS | {"change": rows(folder)[1]["switch/change"]}
    assert 0 < written["change"] < 1


def test_the_log_says_when_it_switched(tmp_path, caplog):
    with caplog.at_level("INFO"):
        pipeline.run(tiny(dense_epochs=3, retrain_epochs=0, admm=AT_ONCE), tmp_path)
    assert "the dense training ends after 2 of 3 epochs: stable ranks moved by 0." in caplog.text
    assert "less than admm.switch_below=1e+09; the other 1 go to retraining" in caplog.text
    assert epochs(tmp_path)[2:] == [("retrain", 0)], "though none was asked for: the sum is"


def test_a_run_that_never_switched_is_the_plain_one(tmp_path):
    lengths = {"dense_epochs": 2, "retrain_epochs": 1, "optimizer": {"joint_schedule": True}}
    plain = pipeline.run(tiny(**lengths, admm={"name": "off"}), tmp_path / "plain")
    for name, below in (("never", 1e-9), ("at the end", 1e9)):  # the last epoch leaves none
        metrics = pipeline.run(tiny(**lengths, admm={"name": "off", "switch_below": below}), tmp_path / name)
        assert metrics["weights_sha256"] == plain["weights_sha256"]
        assert (metrics["switch"]["after"], metrics["switch"]["left"]) == (None, 0)


@pytest.mark.parametrize("warmup", [0, 2])
def test_one_schedule_covers_the_epochs_as_they_were_done(tmp_path, warmup):
    optimizer = {"schedule": "linear", "lr": 0.1, "retrain_lr": None, "joint_schedule": True, "warmup_epochs": warmup}
    metrics = pipeline.run(tiny(dense_epochs=6, retrain_epochs=2, admm=AT_ONCE, optimizer=optimizer), tmp_path)
    done = metrics["switch"]["after"]
    assert done == max(2, warmup + 1), "an epoch of the warm-up tells nothing"
    rates = [row["lr"] for row in rows(tmp_path)]
    assert len(rates) == 8
    begin = 6 / 8 * (done - warmup) / (6 - warmup)  # the fraction of the schedule that the dense training came to
    left = [0.1 * (1 - begin) * (1 - i / (8 - done)) for i in range(8 - done)]
    assert rates[done:] == pytest.approx(left)
    if not warmup:
        assert rates == pytest.approx([0.1 * (1 - epoch / 8) for epoch in range(8)])


# -- going on ------------------------------------------------------------------------------------------------


def test_killed_just_after_the_switch(switched, tmp_path, monkeypatch):
    """Its checkpoint is written, the phase is not noted; and then again within retraining."""
    folder = stopped_before("dense", switched[0], tmp_path / "run")
    assert killed_at(SWITCHED, folder, 10, monkeypatch)
    state = json.loads((folder / "run.json").read_text())["phases"]
    assert state["dense"]["switch"] == switched[1]["switch"]
    assert "retrain" not in state
    assert (folder / "checkpoints" / "retrain.ckpt").exists()
    pipeline.run(SWITCHED, folder)
    assert result(folder) == result(switched[0])
    assert numbers(folder) == numbers(switched[0])


@pytest.mark.parametrize(
    "write", [6, 9, 14, *(pytest.param(n, marks=pytest.mark.slow) for n in range(3, 22) if n not in (6, 9, 14))]
)
def test_killed_at_a_write(switched, tmp_path, monkeypatch, write):
    assert killed_at(SWITCHED, tmp_path, write, monkeypatch)
    pipeline.run(SWITCHED, tmp_path)
    assert result(tmp_path) == result(switched[0])
    assert numbers(tmp_path) == numbers(switched[0])


def test_a_finished_run_is_only_read(switched):
    before = files_of(switched[0])
    assert pipeline.run(SWITCHED, switched[0]) == switched[1]
    assert files_of(switched[0]) == before


def test_a_finished_run_trains_on(switched, tmp_path, caplog):
    folder, longer = shutil.copytree(switched[0], tmp_path / "run"), dict(dense_epochs=4, retrain_epochs=2, **CONSTANT)
    whole = pipeline.run(tiny(**longer, admm=AT_ONCE), tmp_path / "whole")
    with caplog.at_level("INFO"):
        assert pipeline.run(tiny(**longer, admm=AT_ONCE), folder)["weights_sha256"] == whole["weights_sha256"]
    assert "retraining goes on from 3 to 4 epochs" in caplog.text
    assert epochs(folder) == epochs(tmp_path / "whole")


@pytest.mark.parametrize("phase", ["dense", "truncated"])
def test_a_run_from_a_stage_takes_the_epochs_that_were_left(switched, tmp_path, monkeypatch, phase):
    monkeypatch.setattr(switching, "stable_ranks", lambda *_: pytest.fail("the dense training was repeated"))
    same = {"dense_epochs": 4, "retrain_epochs": 1, **CONSTANT, "init_stage": str(switched[0] / phase)}
    metrics = pipeline.run(tiny(**same, admm=AT_ONCE), tmp_path / "run")
    assert metrics["weights_sha256"] == switched[1]["weights_sha256"]
    assert metrics["switch"] == switched[1]["switch"]
    with pytest.raises(ConfigError, match=r"trained by other settings \(they differ in admm\.switch_below\)"):
        pipeline.run(tiny(**same, admm={"name": "off", "switch_below": 0.5}), tmp_path / "other")


@pytest.mark.parametrize("switch", [3, {}, {"after": 2}, {"after": "2", "left": 2}, {"after": 2, "left": -1}])
def test_an_altered_state_is_one_message(switched, tmp_path, switch):
    folder = shutil.copytree(switched[0], tmp_path / "run")
    state = json.loads((folder / "run.json").read_text())
    state["phases"]["dense"]["switch"] = switch
    (folder / "run.json").write_text(json.dumps(state))
    with pytest.raises(CheckpointError, match="phase dense has no switch that could be read"):
        pipeline.run(SWITCHED, folder)


def test_an_arm_that_switches_has_the_epochs_of_the_others(switched, tmp_path):
    arm = Candidate("switched", (), SWITCHED)
    check_alike(
        tmp_path, {"switched": [arm], "direct": [Candidate("direct", (), tiny(dense_epochs=0, retrain_epochs=5))]}
    )
    found = run_trial(arm, 0, tmp_path, lambda: race._data(arm), test=True)
    assert found.test() == switched[1]["compressed"]["test_accuracy"]
    assert epochs(tmp_path / arm.folder(0)) == epochs(switched[0])


@pytest.mark.parametrize("below", [0, -1, "soon", float("nan")])
def test_a_share_that_is_none_is_refused(below):
    with pytest.raises(ConfigError, match=r"switch_below: .* given; allowed: .*above 0"):
        tiny(admm={"name": "off", "switch_below": below})
