"""Whole runs, a second each: what they leave behind, and what they refuse."""

import csv
import json
import logging
import math
import shutil
from dataclasses import asdict
from itertools import islice

import pytest
import torch
import yaml
from tiny_runs import FINISHED, dense_net, files_of, stopped_before, tiny

import hodec
from hodec.admm.updates import project_layers
from hodec.conversion.batchnorm import reestimate_batchnorm
from hodec.conversion.swap import convert
from hodec.cost.count import count_cost
from hodec.errors import CheckpointError, ConfigError, PlanError, TrainingError
from hodec.experiment import loggers, phases, pipeline
from hodec.experiment.data.images import build_data
from hodec.experiment.data.loaders import train_loader
from hodec.export import checkpoint
from hodec.io.tensors import load_tensors
from hodec.plan.plan import Plan


def rows(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def phase_weights(folder, phase):
    net = dense_net()
    net.load_state_dict(load_tensors(folder / "phases" / f"{phase}.safetensors"))
    return net


# -- what a run leaves -----------------------------------------------------------------------------------------


def test_files_of_a_run(finished):
    folder, _ = finished
    names = {path.name for path in folder.iterdir()}
    assert names >= {
        "config.yaml", "plan.json", "spectra.json", "metrics.json", "metrics.jsonl", "metrics.csv", "run.json",
        "compressed.safetensors", "compressed.json", "phases", "checkpoints",
    }  # fmt: skip
    assert not [path for path in folder.rglob("*.part")]
    settings = yaml.safe_load((folder / "config.yaml").read_text())
    assert settings["pretrain_epochs"] == 1
    assert settings["distill"]["weight"] == 0.5


def test_metrics_say_what_was_won_and_lost(finished):
    folder, result = finished
    metrics = json.loads((folder / "metrics.json").read_text())
    assert metrics == result
    for name in ("pretrained", "dense", "truncated", "compressed"):
        assert 0 <= metrics[name]["test_accuracy"] <= 1
        assert metrics[name]["params"] > 0
        assert metrics[name]["macs"] > 0
    assert metrics["truncated"]["params"] == metrics["compressed"]["params"] < metrics["dense"]["params"]
    assert metrics["reduction"]["params"] == 1 - metrics["compressed"]["params"] / metrics["dense"]["params"]
    assert metrics["reduction"]["macs"] == 1 - metrics["compressed"]["macs"] / metrics["dense"]["macs"]
    assert metrics["admm"]["status"] in ("epochs ended", "converged", "diverged")
    last = [row for row in rows(folder) if row["phase"] == "admm"][-1]
    assert metrics["admm"]["primal_residual"] == last["admm/primal_residual"]
    assert metrics["seed"] == 0
    assert metrics["data"]["images"] == {"train": 48, "validation": 16, "test": 16}
    assert metrics["versions"].keys() >= {"hodec", "python", "torch", "pytorch-lightning", "threads", "device"}
    assert metrics["versions"]["threads"] == 1
    assert metrics["command"].startswith("python ")
    assert metrics["seconds"].keys() == {"pretrain", "admm", "retrain"}
    nets = ("pretrained", "dense", "truncated", "compressed")
    assert [name for name in nets if "latency_ms" in metrics[name]] == ["dense", "compressed"]
    assert metrics["dense"]["latency_ms"] > 0
    assert metrics["latency"].keys() == {"batch", "device"}
    assert metrics["latency"]["batch"] == 1
    assert metrics["latency"]["device"].endswith(", 1 thread")


def test_a_given_net_is_measured_too_where_admm_changes_it(finished, tmp_path):
    folder, metrics = finished
    given = str(folder / "phases" / "pretrain.safetensors")
    under_admm = pipeline.run(tiny(init=given, dense_epochs=1, retrain_epochs=0), tmp_path / "admm")
    assert under_admm["pretrained"] == metrics["pretrained"]
    as_it_came = pipeline.run(tiny(init=given, dense_epochs=0, retrain_epochs=0), tmp_path / "none")
    assert "pretrained" not in as_it_came
    assert as_it_came["dense"] == {**metrics["pretrained"], "latency_ms": as_it_came["dense"]["latency_ms"]}


def test_costs_are_those_of_the_plan_and_of_the_model(finished):
    folder, metrics = finished
    plan = Plan.load(folder / "plan.json")
    assert (plan.params_before, plan.params_after) == (metrics["dense"]["params"], metrics["compressed"]["params"])
    assert (plan.macs_before, plan.macs_after) == (metrics["dense"]["macs"], metrics["compressed"]["macs"])
    small = checkpoint.load(folder / "compressed.safetensors", dense_net())
    assert asdict(count_cost(small, torch.zeros(1, 3, 8, 8))) == {
        "params": metrics["compressed"]["params"],
        "macs": metrics["compressed"]["macs"],
    }


def test_a_row_per_epoch(finished):
    folder, _ = finished
    found = rows(folder)
    assert [(row["phase"], row["epoch"]) for row in found] == [
        ("pretrain", 0), ("admm", 0), ("admm", 1), ("retrain", 0), ("retrain", 1),
    ]  # fmt: skip
    for row in found:
        assert row.keys() >= {"lr", "seconds", "train/loss", "train/accuracy", "val/loss", "val/accuracy"}
        assert all(math.isfinite(value) for value in row.values() if isinstance(value, float))
    admm = found[1]
    assert admm.keys() >= {
        "admm/rho", "admm/pull", "admm/primal_residual", "admm/dual_residual", "admm/truncated_accuracy", "admm/layers",
    }  # fmt: skip
    assert admm["admm/layers"].keys() == set(Plan.load(folder / "plan.json"))
    with (folder / "metrics.csv").open() as f:
        table = list(csv.DictReader(f))
    assert [row["step"] for row in table] == ["0", "1", "2", "3", "4"]
    assert float(table[1]["admm/primal_residual"]) == admm["admm/primal_residual"]


def test_the_saved_model_is_the_retrained_one(finished):
    folder, metrics = finished
    small = checkpoint.load(folder / "compressed.safetensors", dense_net())
    assert checkpoint.weights_digest(small) == metrics["weights_sha256"]
    trained = load_tensors(folder / "phases" / "retrain.safetensors")
    torch.testing.assert_close(small.state_dict(), dict(trained), rtol=0, atol=0)
    facts = checkpoint.read_structure(folder / "compressed.safetensors")["facts"]
    assert facts == {"model": "resnet8", "in_channels": 3, "num_classes": 4, "image_size": [8, 8]}


def test_conversion_starts_from_the_weights_that_admm_left(finished):
    folder, metrics = finished
    dense, plan = phase_weights(folder, "admm"), Plan.load(folder / "plan.json")
    weights = {name: dense.get_submodule(name).weight.detach() for name in plan}
    for name, cut in project_layers(plan, weights).items():
        assert metrics["conversion"][name] == pytest.approx(
            float((cut - weights[name]).norm() / weights[name].norm()), rel=1e-4
        )
    small = convert(dense, plan)
    truncated = load_tensors(folder / "phases" / "truncated.safetensors")
    for name, parameter in small.named_parameters():
        torch.testing.assert_close(truncated[name], parameter.detach(), rtol=0, atol=0)


def test_batchnorm_is_estimated_anew_from_training_batches(finished):
    folder, _ = finished
    dense, plan, config = phase_weights(folder, "admm"), Plan.load(folder / "plan.json"), tiny()
    small = convert(dense, plan)
    loader = train_loader(build_data(config.data), seed=config.seed)
    assert reestimate_batchnorm(small, (images for images, _ in islice(loader, config.bn_batches))) == 2
    kept = load_tensors(folder / "phases" / "truncated.safetensors")
    torch.testing.assert_close(kept, dict(small.state_dict()), rtol=0, atol=0)
    assert (kept["bn1.running_var"] - dense.state_dict()["bn1.running_var"]).abs().max() > 1e-3


def test_phases_hand_their_weights_on(finished):
    """The first epoch of ADMM starts from the pretrained net: rows and weights follow from each other."""
    folder, _ = finished
    state = json.loads((folder / "run.json").read_text())["phases"]
    assert list(state) == ["plan", "pretrain", "admm", "truncated", "retrain", "evaluate"]
    digests = [state[name]["sha256"] for name in ("pretrain", "admm", "truncated", "retrain")]
    assert len(set(digests)) == 4


def test_a_finished_run_is_only_read(finished, monkeypatch):
    folder, metrics = finished
    before = files_of(folder)

    def fail(*args, **kwargs):
        raise AssertionError("a finished run must not compute anything")

    monkeypatch.setattr(pipeline, "build_data", fail)
    assert pipeline.run(tiny(**FINISHED), folder) == metrics
    assert files_of(folder) == before


def test_the_same_seed_gives_the_same_bits_and_another_another(finished, tmp_path):
    folder, metrics = finished
    again = pipeline.run(tiny(**FINISHED), tmp_path / "again")
    assert (folder / "compressed.safetensors").read_bytes() == (tmp_path / "again/compressed.safetensors").read_bytes()
    changing = {"seconds", "latency", "dense", "compressed"}
    assert {k: v for k, v in again.items() if k not in changing} == {
        k: v for k, v in metrics.items() if k not in changing
    }
    for name in ("dense", "compressed"):
        assert again[name] | {"latency_ms": 0.0} == metrics[name] | {"latency_ms": 0.0}
    assert pipeline.run(tiny(**FINISHED, seed=1), tmp_path / "other")["weights_sha256"] != metrics["weights_sha256"]


# -- starting from files ---------------------------------------------------------------------------------------


def test_weights_and_plan_from_files(finished, tmp_path):
    folder, _ = finished
    weights = folder / "phases" / "admm.safetensors"
    plan = tmp_path / "mine.json"
    Plan.load(folder / "plan.json").without("conv1").replace("layer3.0.conv2", ranks=(2, 2)).save(plan)
    config = tiny(init=str(weights), plan=str(plan), dense_epochs=0, retrain_epochs=0)
    metrics = pipeline.run(config, tmp_path / "run")
    used = Plan.load(tmp_path / "run" / "plan.json")
    assert "conv1" not in used
    assert used["layer3.0.conv2"].ranks == (2, 2)
    assert metrics["dense"]["test_accuracy"] == finished[1]["dense"]["test_accuracy"]


def test_weights_of_another_model_are_refused(finished, tmp_path):
    config = tiny(init=str(finished[0] / "compressed.safetensors"))
    with pytest.raises(CheckpointError, match="checkpoint of another model: .* tensors fit; differing: "):
        pipeline.run(config, tmp_path)
    config = tiny(init=str(finished[0] / "phases" / "admm.safetensors"), model={"name": "resnet32"})
    with pytest.raises(CheckpointError, match="checkpoint of another model"):
        pipeline.run(config, tmp_path / "b")


def test_a_plan_of_another_model_is_refused_before_any_training(finished, tmp_path):
    plan = finished[0] / "plan.json"
    text = plan.read_text().replace("layer3.0.conv2", "layer9.0.conv2")
    (tmp_path / "other.json").write_text(text)
    with pytest.raises(PlanError, match=r"layer9\.0\.conv2, which this model lacks"):
        pipeline.run(tiny(plan=str(tmp_path / "other.json"), admm={"name": "off"}), tmp_path / "bad")
    assert not (tmp_path / "bad" / "metrics.jsonl").exists()


def test_an_emptied_plan_is_refused(finished, tmp_path):
    plan = Plan.load(finished[0] / "plan.json")
    for name in list(plan):
        plan = plan.without(name)
    plan.save(tmp_path / "empty.json")
    with pytest.raises(PlanError, match=r"empty\.json has no layers"):
        pipeline.run(tiny(plan=str(tmp_path / "empty.json")), tmp_path / "run")


# -- what is refused -------------------------------------------------------------------------------------------


def test_other_settings_in_the_same_folder_are_refused_by_name(finished):
    folder, _ = finished
    before = files_of(folder)
    with pytest.raises(ConfigError, match=r"other settings \(they differ in seed, admm\.rho\)"):
        pipeline.run(tiny(**FINISHED, seed=3, admm={"rho": 1e-3}), folder)
    assert files_of(folder) == before


@pytest.mark.parametrize(
    "free",
    [
        pytest.param({"report": True}, marks=pytest.mark.slow),  # the report is written below
        {"logger": {"name": "wandb", "project": "x"}},
        {"trainer": {"threads": 2}},
    ],
)
def test_settings_that_change_no_result_may_differ(finished, tmp_path, free):
    folder, metrics = shutil.copytree(finished[0], tmp_path / "run"), finished[1]
    assert pipeline.run(tiny(**FINISHED, **free), folder) == metrics


def test_settings_that_are_newer_than_the_folder_have_their_defaults_there(finished, tmp_path):
    folder, metrics = shutil.copytree(finished[0], tmp_path / "run"), finished[1]
    settings = yaml.safe_load((folder / "config.yaml").read_text())
    del settings["admm"]["distribute_projection"], settings["trainer"]["compile"], settings["random_factors"]
    (folder / "config.yaml").write_text(yaml.safe_dump(settings))
    assert pipeline.run(tiny(**FINISHED), folder) == metrics
    with pytest.raises(ConfigError, match=r"they differ in .*admm\.distribute_projection"):
        pipeline.run(tiny(**FINISHED, random_factors=True, admm={"distribute_projection": False}), folder)


def test_an_unfinished_run_of_0_1_0_is_refused_and_left_as_it_is(finished, tmp_path):
    folder = stopped_before("retrain", finished[0], tmp_path / "run")
    state = json.loads((folder / "run.json").read_text())["phases"]
    (folder / "run.json").write_text(json.dumps({"stages": state}))
    before = files_of(folder)
    with pytest.raises(CheckpointError, match=r"begun by hodec 0\.1\.0, whose unfinished runs .*hydra\.run\.dir=PATH"):
        pipeline.run(tiny(**FINISHED), folder)
    assert files_of(folder) == before


def test_a_folder_below_a_file_is_refused_at_once(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(pipeline, "build_data", lambda *a: pytest.fail("data was read first"))
    with pytest.raises(ConfigError, match=r"cannot be written .*hydra\.run\.dir=PATH"):
        pipeline.run(tiny(), tmp_path / "file" / "run")


@pytest.mark.parametrize("text", ["a: [", "just text", "\x00", "admm: off_it_is", "admm: [1]", "admm:"])
def test_damaged_settings_in_the_folder_are_one_message(tmp_path, text):
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises((CheckpointError, ConfigError), match=r"config\.yaml|other settings"):
        pipeline.run(tiny(), tmp_path)


def test_bad_settings_are_refused_before_anything_is_made(tmp_path):
    with pytest.raises(ConfigError, match=r"pull: 2\.0 given; allowed: a number above 0 and below 1"):
        pipeline.run(tiny(admm={"pull": 2.0}), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_row_41_a_batch_larger_than_the_data_is_one_message(tmp_path):
    with pytest.raises(ConfigError, match=r"^batch_size=512 is larger"):
        pipeline.run(tiny(data={"batch_size": 512}), tmp_path)


def test_the_report_is_written_into_the_folder(finished, tmp_path, caplog):
    """Of a run that is done but for its evaluation: no phase is trained again."""
    caplog.set_level(logging.INFO)
    folder = stopped_before("evaluate", finished[0], tmp_path / "run")
    pipeline.run(tiny(**FINISHED, report=True), folder)
    assert (folder / "report.html").stat().st_size > 10_000
    assert "fewer parameters" in caplog.text


def test_public_names_are_there():
    for name in hodec.__all__:
        assert getattr(hodec, name) is not None


def test_loggers_are_closed_whatever_happens(tmp_path, monkeypatch):
    closed = []

    class Logger:
        def log_metrics(self, metrics, step):
            pass

        def finalize(self, status):
            closed.append(status)

    monkeypatch.setitem(loggers.LOGGERS, "csv", lambda config, folder: Logger())
    pipeline.run(tiny(dense_epochs=0, retrain_epochs=0), tmp_path / "good")
    monkeypatch.setattr(phases, "fit_phase", lambda *a, **k: (_ for _ in ()).throw(TrainingError("broke")))
    with pytest.raises(TrainingError):
        pipeline.run(tiny(), tmp_path / "bad")
    assert closed == ["success", "failed"]


# -- the machine -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("accelerator", ["gpu", "cuda", "mps"])
def test_devices_that_are_not_there_are_refused_before_any_work(tmp_path, monkeypatch, accelerator):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    monkeypatch.setattr(pipeline, "build_data", lambda _: pytest.fail("work was begun"))
    words = rf"accelerator={accelerator}, devices=1: this machine has none, .* allowed here: accelerator=cpu"
    with pytest.raises(ConfigError, match=words):
        pipeline.run(tiny(trainer={"accelerator": accelerator}), tmp_path)


def test_more_devices_than_there_are_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ConfigError, match=r"has 2 of them, .* allowed here: devices=2"):
        pipeline.run(tiny(trainer={"accelerator": "cuda", "devices": 4}), tmp_path)
