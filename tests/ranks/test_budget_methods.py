"""Budget over several methods: each layer takes the one that loses least of it."""

import copy
import json

import numpy as np
import pytest
import torch
from small_nets import IMAGE, SmallResNet
from tiny_runs import tiny
from torch import Tensor, nn

from hodec.calibration.input_covariance import collect_covariances
from hodec.conversion.swap import conversion_errors, convert
from hodec.errors import ConfigError, PlanError
from hodec.experiment import pipeline
from hodec.formats.base import Format
from hodec.formats.layer_types import LAYER_TYPES
from hodec.formats.modes import Modes
from hodec.models import build_model
from hodec.plan.plan import Plan
from hodec.ranks import Budget, LayerContext, Manual, Ratio, make_plan
from hodec.ranks.greedy.stats import GreedyStats
from hodec.ranks.selection.select import Selection

X = torch.randn(IMAGE, generator=torch.Generator().manual_seed(0))
PICTURE = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
ALL = ["tt", "tucker", "spatial_svd", "svd", "weight_svd"]


@pytest.fixture(scope="module")
def resnet() -> nn.Module:
    torch.manual_seed(5)
    return build_model("resnet8", in_channels=3, num_classes=10)  # of tiny_runs


def planned(
    model: nn.Module, x: Tensor, methods: list[str] | None, method: str = "tt", **settings: object
) -> tuple[Plan, Selection]:
    """The plan, and the selection behind it."""
    reports: list[Selection] = []
    rule = Budget(methods=methods, report=reports.append, **({"macs": 0.4, "tolerance": 0.2} | settings))
    return make_plan(model, rule, method=method, example_input=x, n_modes=1), reports[0]


def lost(model: nn.Module, plan: Plan) -> float:
    """The sum over layers of the squared relative error, as measured."""
    return sum(error**2 for error in conversion_errors(model, plan).values())


def test_each_layer_takes_the_method_that_fits_its_weight():
    """One weight is a sum of four K x 1 by 1 x K kernels, the other a 3 x 3 kernel between five channels a side."""
    generator = torch.Generator().manual_seed(1)
    net = nn.Sequential(nn.Conv2d(32, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 32, 3, padding=1))
    rows, columns = torch.randn(32, 4, 3, generator=generator), torch.randn(4, 32, 3, generator=generator)
    first, core, last = (torch.randn(size, generator=generator) for size in ((32, 5), (5, 5, 3, 3), (5, 32)))
    with torch.no_grad():
        net[0].weight.copy_(torch.einsum("orc,rik->oikc", rows, columns))
        net[2].weight.copy_(torch.einsum("op,pqkc,qi->oikc", first, core, last))
    plan, selection = planned(net, torch.randn(1, 32, 8, 8), ["tucker", "spatial_svd"], macs=0.12)
    assert [plan[name].method for name in ("0", "2")] == ["spatial_svd", "tucker"]
    assert selection.loss < 1e-6
    errors = conversion_errors(net, plan, convert(net, plan))
    assert max(errors.values()) < 1e-3
    alone = [planned(net, torch.randn(1, 32, 8, 8), [method], macs=0.12)[1] for method in ("tucker", "spatial_svd")]
    assert min(one.loss for one in alone) > 0.05


@pytest.mark.parametrize(
    "targets",
    [
        *(pytest.param(one, marks=pytest.mark.slow) for one in ({"macs": 0.3}, {"params": 0.25})),
        {"macs": 0.253, "params": 0.204},
    ],
)
def test_a_choice_of_methods_loses_no_more_than_the_best_of_them(resnet, targets):
    settings = {"macs": None} | targets
    plan, mixed = planned(resnet, PICTURE, ALL, tolerance=0.005, **settings)
    losses = {method: lost(resnet, planned(resnet, PICTURE, [method], **settings)[0]) for method in ALL}
    assert lost(resnet, plan) <= min(losses.values()) * 1.002, losses  # single ranks are filled in one after the other
    assert mixed.loss == pytest.approx(lost(resnet, plan), rel=0.02)
    kept = {key: 1 - plan.reduction[key] for key in targets}
    shares = [kept[key] / target for key, target in targets.items()]
    assert 0.995 <= max(shares) <= 1
    assert all(layer.saves() and layer.method in ALL for layer in plan.values())


def test_one_method_among_is_that_method(resnet):
    alone, _ = planned(resnet, PICTURE, ["spatial_svd"])
    plan = make_plan(resnet, Budget(macs=0.4), method="spatial_svd", example_input=PICTURE)
    assert alone.to_dict() == plan.to_dict()


def test_repeated_names_count_once(resnet):
    assert planned(resnet, PICTURE, ["svd", "svd"])[0].to_dict() == planned(resnet, PICTURE, ["svd"])[0].to_dict()


def test_layers_that_only_one_method_knows_are_factorized():
    """spatial_svd has no layer for one-dimensional convolutions, and tt of one mode a side none for linear ones."""
    net = nn.Sequential(nn.Conv1d(16, 32, 3, padding=1), nn.Flatten(), nn.Linear(32 * 8, 64))
    plan, _ = planned(net, torch.randn(1, 16, 8), ["spatial_svd", "tt"])
    assert [(name, layer.method) for name, layer in plan.layers.items()] == [("0", "tt"), ("2", "spatial_svd")]
    alone, _ = planned(net, torch.randn(1, 16, 8), ["spatial_svd"], macs=0.6)
    assert alone.skipped == {"0": "method spatial_svd has no layer for Conv1d"}


def test_what_no_method_knows_is_skipped_with_a_reason():
    net = nn.Sequential(nn.Conv2d(16, 16, 3, padding=1, groups=16), nn.Conv2d(16, 64, 3))
    plan, _ = planned(net, torch.randn(1, 16, 8, 8), ["svd", "tt"])
    assert plan.skipped["0"].startswith("depthwise convolution (groups=16)")
    net = nn.Sequential(nn.Embedding(7, 8), nn.Linear(8, 64))
    rule = Budget(params=0.5, tolerance=0.2, methods=["spatial_svd", "tucker"])
    plan = make_plan(net, rule, example_input=torch.zeros(1, 3, dtype=torch.int64))
    assert plan.skipped["0"] == "method spatial_svd or tucker has no layer for Embedding"


def test_given_modes_are_those_of_the_methods_that_use_them():
    net = nn.Sequential(nn.Conv2d(64, 64, 3, padding=1))
    split = {"0": Modes((8, 8), (4, 16))}
    rule = Budget(macs=0.1, tolerance=0.2, methods=["tt", "spatial_svd"])
    plan = make_plan(net, rule, example_input=torch.randn(1, 64, 8, 8), modes=split)
    assert plan["0"].method in ("tt", "spatial_svd")
    assert plan["0"].method == "spatial_svd" or plan["0"].modes == split["0"]
    seen: dict[str, LayerContext] = {}

    class Watched(Budget):
        def choose(self, layers, net):
            seen.update({one.method: one for one in (layers["0"], *layers["0"].others)})
            return super().choose(layers, net)

    make_plan(
        net,
        Watched(macs=0.1, tolerance=0.2, methods=["tt", "spatial_svd"]),
        example_input=torch.randn(1, 64, 8, 8),
        modes=split,
    )
    assert seen["tt"].modes == split["0"]
    assert seen["spatial_svd"].modes == Modes((64,), (64,))


def test_modes_have_to_fit_a_layer_and_a_method():
    net, x = nn.Sequential(nn.Conv2d(64, 64, 3), nn.Flatten(), nn.Linear(64 * 4, 64)), torch.randn(1, 64, 4, 4)
    with pytest.raises(PlanError, match="method svd or tucker splits no channels into modes"):
        make_plan(net, Budget(macs=0.4, methods=["svd", "tucker"]), example_input=x, modes={"0": Modes((8, 8), (8, 8))})
    with pytest.raises(PlanError, match="modes 'nope' matches no layer"):
        make_plan(net, Budget(macs=0.4, methods=["svd", "tt"]), example_input=x, modes={"nope": Modes((8, 8), (8, 8))})
    net = nn.Sequential(nn.Conv2d(8, 4, 1), nn.Flatten(), nn.Linear(256, 64))
    rule, x = Budget(params=0.4, tolerance=0.2, methods=["tt_classical", "tt"]), torch.randn(1, 8, 8, 8)
    plan = make_plan(net, rule, example_input=x, modes={"2": Modes((16, 16), (8, 8))}, n_modes=1)
    assert plan["2"].modes == Modes((16, 16), (8, 8))  # tt_classical knows no linear layers


def test_an_execution_is_that_of_the_methods_that_have_it():
    net = nn.Sequential(nn.Conv2d(64, 64, 3), nn.Conv2d(64, 64, 3))
    rule = Budget(macs=0.3, methods=["tt", "svd"])
    plan = make_plan(net, rule, example_input=torch.randn(1, 64, 8, 8), execution="chain")
    assert all(layer.execution == ("chain" if layer.method == "tt" else "auto") for layer in plan.values())


def test_cp_is_compared_by_what_it_loses_not_by_where_it_starts():
    """The orthogonal start of a CP loses far more than the CP it ends at."""
    torch.manual_seed(3)
    factors = [torch.randn(side, 4) for side in (12, 8, 3, 3)]
    net = nn.Sequential(nn.Conv2d(8, 12, 3))
    with torch.no_grad():
        net[0].weight.copy_(torch.einsum("or,ir,kr,cr->oikc", *factors))
    plan, selection = planned(net, torch.randn(1, 8, 8, 8), ["spatial_svd", "cp"], macs=0.17)
    alone, _ = planned(net, torch.randn(1, 8, 8, 8), ["spatial_svd"], macs=0.17)
    assert plan["0"].method == "cp"
    assert selection.loss < 0.02
    assert lost(net, alone) > 0.1


def test_one_method_in_a_list_has_its_losses_measured():
    torch.manual_seed(4)
    net, x = nn.Sequential(nn.Conv2d(8, 10, 3)), torch.randn(1, 8, 8, 8)
    plan, listed = planned(net, x, ["cp"], macs=0.3)
    by_start, told = planned(net, x, None, "cp", macs=0.3)
    assert listed.loss == pytest.approx(lost(net, plan), rel=0.1)
    assert told.loss > 1.1 * lost(net, by_start)


def test_a_text_is_no_list_of_methods():
    with pytest.raises(ConfigError, match=r"^methods: 'tt' given; allowed: null or a list of methods"):
        Budget(macs=0.4, methods="tt")


def test_scores_of_a_search_go_with_one_method():
    stats = GreedyStats("macs", 0.5, 0.48, 0.8, 0.9375, 0.71, 0.48, 0.625, {}, {}, {})
    with pytest.raises(ConfigError, match="weights of one method's ranks are given, but methods names 2"):
        Budget(macs=0.4, weights=stats, methods=["tt", "svd"])


def test_unknown_methods_are_named():
    with pytest.raises(PlanError, match=r"unknown method 'spatial_sdv'; .*spatial_svd"):
        planned(SmallResNet(), X, ["tt", "spatial_sdv"])


def test_metrics_go_with_one_method():
    """Each method mixes other axes of a weight, so that the covariances of one are none for another."""
    net, x = SmallResNet().eval(), torch.randn(64, *IMAGE[1:])
    first = make_plan(net, Manual(4), method="tucker", example_input=X)
    covariances = collect_covariances(net, first, [x])
    with pytest.raises(ConfigError, match="methods names 2; allowed: one"):
        planned(net, X, ["tucker", "spatial_svd"], covariances=covariances)
    assert planned(net, X, ["tucker"], covariances=covariances)[0]


def test_a_mixed_plan_is_saved_read_and_converted(tmp_path):
    torch.manual_seed(7)
    net = SmallResNet().eval()
    plan, _ = planned(net, X, ["spatial_svd", "tucker", "svd"], macs=0.5)
    plan.save(tmp_path / "plan.json")
    again = Plan.load(tmp_path / "plan.json")
    assert again.to_dict() == plan.to_dict()
    small = convert(net, again)
    for name, layer in again.layers.items():
        dense = LAYER_TYPES[layer.layer_type].to_oihw(net.get_submodule(name).weight.detach())
        expected = layer.format.project(dense, layer.ranks, layer.modes)
        found = LAYER_TYPES[layer.layer_type].to_oihw(small.get_submodule(name).dense_weight().detach())
        np.testing.assert_allclose(found, expected, atol=1e-4)


@pytest.mark.slow
def test_a_run_with_several_methods(tmp_path):
    ranks = {"name": "budget", "macs": 0.4, "methods": ["spatial_svd", "svd"]}
    pipeline.run(tiny(tt_ranks=None, ranks=ranks, method={"name": "tt"}, report=True), tmp_path / "run")
    plan = json.loads((tmp_path / "run" / "plan.json").read_text())
    assert {layer["method"] for layer in plan["layers"].values()} <= {"spatial_svd", "svd"}
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert 0.598 <= metrics["reduction"]["macs"] <= 0.61
    assert metrics["admm"]["status"] in ("epochs ended", "converged")


@pytest.mark.parametrize("rule", [Ratio(0.4), Manual(4)])
def test_other_rules_take_the_method_of_the_plan(rule):
    plan = make_plan(SmallResNet(), rule, method="svd", example_input=X)
    assert {layer.method for layer in plan.values()} == {"svd"}


def test_an_empty_list_of_methods_is_refused():
    with pytest.raises(ConfigError, match=r"^methods: \[\] given"):
        Budget(macs=0.4, methods=[])


def test_what_ranks_lose_is_measured_once_for_each_weight(resnet: nn.Module, monkeypatch: pytest.MonkeyPatch):
    first, _ = planned(resnet, PICTURE, ["cp3", "tucker"])
    projected: list[tuple[int, ...]] = []
    project = Format.project

    def counted(fmt: Format, weight: Tensor, ranks: tuple[int, ...], modes: Modes) -> Tensor:
        projected.append(tuple(weight.shape))
        return project(fmt, weight, ranks, modes)

    monkeypatch.setattr(Format, "project", counted)
    again, _ = planned(resnet, PICTURE, ["cp3", "tucker"], macs=0.5)
    assert projected == []
    assert planned(resnet, PICTURE, ["cp3", "tucker"])[0].to_dict() == first.to_dict()
    assert again.to_dict() != first.to_dict()
    other = copy.deepcopy(resnet)
    with torch.no_grad():
        name = next(name for name, layer in first.items() if layer.ranks)
        other.get_parameter(f"{name}.weight").mul_(
            torch.linspace(0.5, 1, other.get_parameter(f"{name}.weight").shape[0])[:, None, None, None]
        )
    planned(other, PICTURE, ["cp3", "tucker"])
    assert set(projected) == {tuple(other.get_parameter(f"{name}.weight").shape)}
