"""Latency at the end of a run: measured, and nothing else changed by it."""

import copy
import json
from types import SimpleNamespace

import pytest
import torch
from tiny_runs import dense_net, tiny

from hodec.conversion.swap import convert
from hodec.errors import ConfigError
from hodec.experiment.config.objectives import value_of
from hodec.experiment.data.images import build_data
from hodec.experiment.data.loaders import val_loader
from hodec.experiment.lit import evaluate
from hodec.experiment.main import check_validation
from hodec.experiment.pipeline import run
from hodec.experiment.results import latency, spectra  # before the tests of this folder replace it
from hodec.export import checkpoint
from hodec.plan.plan import Plan
from hodec.ranks import make_plan


@pytest.fixture
def nets(finished):
    dense = dense_net()
    return {"dense": dense, "compressed": convert(dense, Plan.load(finished[0] / "plan.json"))}


RUN = SimpleNamespace(example=torch.zeros(1, 3, 8, 8), device=torch.device("cpu"))


def test_latency_is_measured_and_leaves_the_nets_and_the_random_numbers(nets):
    before, state = copy.deepcopy(nets), torch.get_rng_state()
    times = latency(nets, RUN, seconds=0.1)
    assert list(times) == ["dense", "compressed"]
    assert all(0 < ms < 1000 for ms in times.values())
    assert torch.equal(torch.get_rng_state(), state)
    for name, net in nets.items():
        assert checkpoint.weights_digest(net) == checkpoint.weights_digest(before[name])
        assert [m.training for m in net.modules()] == [m.training for m in before[name].modules()]


def test_a_net_that_cannot_be_fused_has_no_latency_and_stops_nothing(nets, caplog):
    class Broken(torch.nn.Module):
        def forward(self, x):
            raise ValueError("no")

    assert latency({**nets, "broken": Broken()}, RUN, seconds=0.0) == {}
    assert "latency is not measured: the model does not run" in caplog.text


def test_spectra_are_the_singular_values_that_ranks_cut():
    net = torch.nn.Sequential(torch.nn.Linear(200, 100), torch.nn.ReLU(), torch.nn.Linear(100, 5))
    plan = make_plan(net, 8, method="svd", example_input=torch.zeros(1, 200), exclude="2")
    ((one,),) = spectra(net, plan).values()
    values = torch.linalg.svdvals(net[0].weight.detach())
    assert (one["rank"], one["full"], one["at"][:9], one["at"][-1]) == (8, 100, list(range(1, 10)), 100)
    assert len(one["at"]) < 50
    shares = (values / values[0])[torch.tensor(one["at"]) - 1]
    torch.testing.assert_close(torch.tensor(one["values"]), shares, rtol=1e-3, atol=1e-6)


# -- files of hodec 0.1.0 ----------------------------------------------------------------------------------------------

OLD = {"layer_type": "kind", "call_sites": "runs", "resolved_execution": "runs_as"}


def old_plan(plan):
    """A plan of today as 0.1.0 wrote it."""
    layers = {
        name: {OLD.get(key, key): value for key, value in layer.items()} for name, layer in plan["layers"].items()
    }
    assert all({"kind", "runs", "runs_as"} <= layer.keys() for layer in layers.values())
    return {**plan, "version": 1, "layers": layers}


def test_a_plan_of_0_1_0_loads(finished, tmp_path):
    path = finished[0] / "plan.json"
    (tmp_path / "plan.json").write_text(json.dumps(old_plan(json.loads(path.read_text()))))
    assert Plan.load(tmp_path / "plan.json").to_dict() == Plan.load(path).to_dict()


def test_a_compressed_model_of_0_1_0_loads(finished, tmp_path):
    path = finished[0] / "compressed.safetensors"
    structure = json.loads(path.with_suffix(".json").read_text())
    old = {**structure, "hodec": "0.1.0", "plan": old_plan(structure["plan"])}
    (tmp_path / "compressed.json").write_text(json.dumps(old))
    (tmp_path / "compressed.safetensors").write_bytes(path.read_bytes())
    net = checkpoint.load(tmp_path / "compressed.safetensors")
    assert checkpoint.weights_digest(net) == finished[1]["weights_sha256"]


# -- selection ---------------------------------------------------------------------------------------------------------


def test_the_validation_accuracy_stands_beside_each_test_accuracy(finished):
    metrics = finished[1]
    for name in ("pretrained", "dense", "truncated", "compressed"):
        assert 0 <= metrics[name]["validation_accuracy"] <= 1
    net = checkpoint.load(finished[0] / "compressed.safetensors")
    data = build_data(tiny().data)
    assert metrics["compressed"]["validation_accuracy"] == evaluate(net, val_loader(data))
    assert value_of(metrics, "validation_accuracy", None) == [metrics["compressed"]["validation_accuracy"]]


def test_images_won_and_lost_add_up_to_the_change_of_the_accuracy(finished):
    metrics = finished[1]
    images = metrics["data"]["images"]["test"]
    for name in ("pretrained", "dense"):
        change = metrics["against"][name]["won"] - metrics["against"][name]["lost"]
        assert change == round(images * (metrics["compressed"]["test_accuracy"] - metrics[name]["test_accuracy"]))


def test_without_a_validation_split_there_is_no_validation_accuracy(tmp_path):
    metrics = run(tiny(data={"val_fraction": 0.0}, dense_epochs=1, retrain_epochs=0), tmp_path / "run")
    assert "validation_accuracy" not in metrics["compressed"]
    assert value_of(metrics, "validation_accuracy", None) is None
    with pytest.raises(ConfigError, match="objective: 'validation_accuracy' given without .* val_fraction=0.1"):
        check_validation(tiny(data={"val_fraction": 0.0}))
    check_validation(tiny(data={"val_fraction": 0.0}, objective="macs"))
    check_validation(tiny())
