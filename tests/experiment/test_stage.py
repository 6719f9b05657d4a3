"""A run begins where another stands, and a finished one trains on."""

import json
import shutil

import pytest
import yaml
from tiny_runs import FINISHED, tiny
from train_script import result, rows

from hodec.errors import CheckpointError, ConfigError
from hodec.experiment import phases, pipeline


def no_admm(monkeypatch):
    monkeypatch.setattr(phases, "_admm", lambda *_: pytest.fail("ADMM was repeated"))


@pytest.mark.parametrize("phase", ["pretrain", "admm", "truncated"])
def test_a_run_from_a_stage_of_another_is_that_run(finished, tmp_path, monkeypatch, phase):
    if phase != "pretrain":
        no_admm(monkeypatch)
    source = shutil.copytree(finished[0], tmp_path / "source")
    metrics = pipeline.run(tiny(**FINISHED, init_stage=str(source / phase)), tmp_path / "run")
    assert metrics["weights_sha256"] == finished[1]["weights_sha256"]
    assert result(tmp_path / "run") == result(finished[0])
    assert [row["phase"] for row in rows(tmp_path / "run")] == [row["phase"] for row in rows(finished[0])]
    shutil.rmtree(source)  # a finished run needs the other one no more
    pipeline.run(tiny(**FINISHED, init_stage=str(source / phase)), tmp_path / "run")


def test_retraining_varies_without_a_second_admm(finished, tmp_path, monkeypatch):
    no_admm(monkeypatch)
    changed = tiny(**FINISHED, init_stage=str(finished[0] / "admm"), retrain_epochs=1, optimizer={"retrain_lr": 0.5})
    metrics = pipeline.run(changed, tmp_path / "run")
    assert metrics["dense"] == finished[1]["dense"]
    assert metrics["weights_sha256"] != finished[1]["weights_sha256"]


@pytest.mark.parametrize("changed", [{"admm": {"pull": 0.5}}, {"dense_epochs": 1}, {"seed": 1}, {"tt_ranks": 3}])
def test_what_the_stage_was_trained_by_may_not_differ(finished, tmp_path, changed):
    """The run would state it as its own."""
    with pytest.raises(ConfigError, match=r"trained by other settings \(they differ in .*, which this run would state"):
        pipeline.run(tiny(**FINISHED, init_stage=str(finished[0] / "admm"), **changed), tmp_path / "run")


@pytest.mark.parametrize(
    ("also", "changed"),
    [
        ({"optimizer": {"joint_schedule": True}}, {"retrain_epochs": 3}),
        ({"distill": {"weight": 0.5, "dense": True}}, {"distill": {"weight": 0.6, "dense": True}}),
    ],
)
def test_what_reaches_back_into_the_stage_may_not_differ(tmp_path, also, changed):
    """Retraining is a part of one schedule, or its teacher taught the dense net too."""
    common = {"pretrain_epochs": 1, "dense_epochs": 1, "retrain_epochs": 1} | also
    pipeline.run(tiny(**common), tmp_path / "source")
    with pytest.raises(ConfigError, match=r"differ in (retrain_epochs|distill\.weight)\)"):
        pipeline.run(tiny(**common | changed, init_stage=str(tmp_path / "source" / "admm")), tmp_path / "run")
    if "retrain_epochs" in changed:
        with pytest.raises(ConfigError, match="differ in retrain_epochs"):
            pipeline.run(tiny(**common | changed), tmp_path / "source")


def test_pretraining_that_a_rule_brought_along_is_used(tmp_path, monkeypatch):
    """It is as long as ADMM, which may be of another length after it, or absent: then its epochs have to be given."""
    same = {"dense_epochs": 1, "retrain_epochs": 0}
    pipeline.run(tiny(**same, ranks={"name": "budget", "macs": 0.5}, tt_ranks=None), tmp_path / "source")
    stage = str(tmp_path / "source" / "pretrain")
    for later in ({}, {"dense_epochs": 0, "ranks": {"name": "budget", "macs": 0.5}, "tt_ranks": None}):
        with pytest.raises(ConfigError, match=r"differ in pretrain_epochs\).*took 1 epochs: pretrain_epochs=1"):
            pipeline.run(tiny(**same | later, init_stage=stage), tmp_path / "refused")
        shutil.rmtree(tmp_path / "refused")
    monkeypatch.setattr(phases, "fit_phase", lambda *_, **__: pytest.fail("pretraining was repeated"))
    metrics = pipeline.run(
        tiny(dense_epochs=0, retrain_epochs=0, pretrain_epochs=1, init_stage=stage), tmp_path / "run"
    )
    source = json.loads((tmp_path / "source" / "metrics.json").read_text())
    assert metrics["pretrained"] == source["pretrained"]


def test_stages_that_are_not_there_are_one_message(finished, tmp_path):
    source = shutil.copytree(finished[0], tmp_path / "source")
    for stage, words in (
        (tmp_path / "none" / "admm", "run.json does not exist"),
        (source / "retrain", "one of pretrain, admm, dense, truncated"),
        (source / "dense", "has not finished phase dense; it has finished: pretrain, admm, truncated"),
    ):
        with pytest.raises((CheckpointError, ConfigError), match=words):
            pipeline.run(tiny(**FINISHED, init_stage=str(stage)), tmp_path / stage.name)
    content = bytearray((source / "phases" / "admm.safetensors").read_bytes())
    content[-3] ^= 1
    (source / "phases" / "admm.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"admm\.safetensors is missing or was altered"):
        pipeline.run(tiny(**FINISHED, init_stage=str(source / "admm")), tmp_path / "altered")
    assert not (tmp_path / "altered" / "run.json").exists()


def test_a_finished_run_trains_on(tmp_path, monkeypatch):
    """At a constant rate it is the run that had been longer from the start; else the schedule is another."""
    same = {"optimizer": {"schedule": "constant"}, "dense_epochs": 1}
    pipeline.run(tiny(**same, retrain_epochs=3), tmp_path / "long")
    pipeline.run(tiny(**same, retrain_epochs=1), tmp_path / "run")
    no_admm(monkeypatch)
    pipeline.run(tiny(**same, retrain_epochs=3), tmp_path / "run")
    assert result(tmp_path / "run") == result(tmp_path / "long")
    assert [row["epoch"] for row in rows(tmp_path / "run")] == [0, 0, 1, 2]
    assert yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["retrain_epochs"] == 3
    assert "evaluate" in json.loads((tmp_path / "run" / "run.json").read_text())["phases"]
    with pytest.raises(ConfigError, match="differ in retrain_epochs"):
        pipeline.run(tiny(**same, retrain_epochs=2), tmp_path / "run")
