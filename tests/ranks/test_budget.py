"""Budget: one target for the whole net, met from below, with the least loss."""

import itertools
import time

import numpy as np
import pytest
import torch
from rank_cases import context, conv_weight
from small_nets import IMAGE, SmallResNet, Tokens
from torch import nn

from hodec.conversion.swap import convert
from hodec.cost.count import count_cost
from hodec.errors import ConfigError, PlanError, Use
from hodec.models import build_model
from hodec.plan.plan import Plan
from hodec.ranks import make_plan, spectra
from hodec.ranks.budget import Budget
from hodec.ranks.selection.knapsack import not_dominated, solve
from hodec.ranks.selection.select import Selection
from hodec.ranks.spectra import Spectrum, TruncationLoss

X = torch.randn(IMAGE, generator=torch.Generator().manual_seed(0))
PICTURE = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def budget(model: nn.Module, x: torch.Tensor, settings: dict[str, object], **plan: object) -> tuple[Plan, Selection]:
    """The plan, and the selection behind it."""
    reports: list[Selection] = []
    made = make_plan(model, Budget(**settings, report=reports.append), example_input=x, **plan)
    return made, reports[0]


def kept(plan: Plan) -> dict[str, float]:
    return {key: 1 - cut for key, cut in plan.reduction.items()}


def assert_met(plan: Plan, targets: dict[str, float]) -> None:
    """Every target holds, one of them closely; no layer is enlarged."""
    shares = {key: kept(plan)[key] / target for key, target in targets.items()}
    assert max(shares.values()) <= 1, shares
    assert max(shares.values()) >= 0.995, shares
    assert all(layer.saves() for layer in plan.values())


# -- the knapsack ------------------------------------------------------------------------------------------------


def random_options(generator: np.random.Generator, layers: int, options: int, limits: int):
    """Convex and not so convex layers: loss falls with cost, and the last option is dense."""
    losses, costs = [], []
    for _ in range(layers):
        cost = np.sort(generator.random((options, limits)), axis=0) * generator.uniform(0.3, 3)
        loss = np.sort(generator.random(options))[::-1] ** generator.uniform(0.5, 3) * generator.uniform(0.3, 3)
        losses.append(np.append(loss, 0.0))
        costs.append(np.vstack([cost, cost[-1] * 1.2]))
    return losses, costs


def brute_force(losses: list[np.ndarray], costs: list[np.ndarray], limits: np.ndarray) -> float:
    best = np.inf
    for picks in itertools.product(*(range(len(loss)) for loss in losses)):
        cost = sum(c[p] for c, p in zip(costs, picks))
        if (cost <= limits).all():
            best = min(best, sum(loss[p] for loss, p in zip(losses, picks)))
    return best


@pytest.mark.parametrize("limits", [1, 2, 3])
@pytest.mark.parametrize("seed", range(8))
def test_it_is_as_good_as_trying_everything(limits: int, seed: int):
    generator = np.random.default_rng(seed)
    losses, costs = random_options(generator, layers=3, options=7, limits=limits)
    least, most = (np.sum([getattr(c, layer_type)(0) for c in costs], axis=0) for layer_type in ("min", "max"))
    allowed = least + generator.uniform(0.1, 0.9, limits) * (most - least)
    found, best = solve(losses, costs, allowed), brute_force(losses, costs, allowed)
    assert (sum(c[p] for c, p in zip(costs, found.picks)) <= allowed).all()
    assert found.loss == pytest.approx(sum(loss[p] for loss, p in zip(losses, found.picks)))
    assert found.bound <= best + 1e-9
    assert best - 1e-9 <= found.loss <= best * 1.05 + 1e-9  # and so within the gap to the bound


def test_it_mostly_is_the_best_there_is():
    hits = 0
    for seed in range(40):
        generator = np.random.default_rng(100 + seed)
        losses, costs = random_options(generator, layers=3, options=7, limits=1)
        allowed = generator.uniform(0.2, 0.8, 1) * sum(c[-1] for c in costs)
        best = brute_force(losses, costs, allowed)
        found = solve(losses, costs, allowed)
        hits += found is not None and found.loss <= best + 1e-9
        assert (found is None) == np.isinf(best)
    assert hits >= 36


def test_limits_that_nothing_keeps_have_no_solution():
    assert solve([np.array([1.0, 0.0])], [np.array([[2.0], [3.0]])], [1.0]) is None


def test_a_limit_above_everything_costs_nothing():
    found = solve([np.array([1.0, 0.0])], [np.array([[2.0], [3.0]])], [5.0])
    assert found.picks == [1]
    assert found.loss == found.bound == 0


def test_options_that_another_beats_are_dropped_and_of_equal_ones_one_is_kept():
    losses = np.array([0.5, 0.5, 0.4, 0.6, 0.0, 0.4])
    costs = np.array([[2, 2], [2, 1], [3, 3], [2, 2], [9, 9], [3, 3]], dtype=float)
    assert not_dominated(losses, costs).tolist() == [1, 2, 4]


# -- losses ------------------------------------------------------------------------------------------------------


def test_losses_lie_between_the_largest_tail_and_the_bound():
    found = [Spectrum(k, torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)) for k in (0, 1)]
    losses = TruncationLoss(found)
    assert losses.at((1, 2)) == pytest.approx(1 - 0.5 * 0.8)
    assert losses.at((3, 3)) == pytest.approx(0, abs=1e-12)
    assert TruncationLoss(found[:1]).at((2,)) == pytest.approx(0.2)
    assert losses.path(10) == [[3, 3], [2, 2], [1, 1]]


def test_spectra_are_remembered_by_the_numbers_not_by_the_tensor(monkeypatch):
    calls = []
    original = spectra.truncation_spectra
    monkeypatch.setattr(spectra, "truncation_spectra", lambda layer: calls.append(layer.name) or original(layer))
    monkeypatch.setattr(spectra, "_cache", type(spectra._cache)())
    model = SmallResNet()
    first, _ = budget(model, X, {"macs": 0.5}, method="tucker")
    count = len(calls)
    assert count == 5
    again, _ = budget(model, X, {"macs": 0.5}, method="tucker")
    assert len(calls) == count
    assert first == again
    with torch.no_grad():
        model.layer1["conv2"].weight.data.mul_(2).add_(0.1)
    budget(model, X, {"macs": 0.4}, method="tucker")
    assert calls[count:] == ["layer1.conv2"]


def test_no_more_is_remembered_than_asked_for(monkeypatch):
    monkeypatch.setattr(spectra, "_cache", type(spectra._cache)())
    for seed in range(4):
        spectra.remembered(spectra.key_of(context(conv_weight(seed=seed))), list, size=2)
    assert len(spectra._cache) == 2


# -- targets are met ---------------------------------------------------------------------------------------------

NETS = ["resnet32", "resnet56"]
ROWS = [{"macs": 0.40, "params": 0.35}, {"macs": 0.28, "params": 0.20}, {"macs": 0.38, "params": 0.33}]
METHODS = {
    "tt_1": {"method": "tt", "n_modes": 1},
    "tt_2": {"method": "tt", "n_modes": 2},
    "tucker": {"method": "tucker"},
    "svd": {"method": "svd"},
    "spatial_svd": {"method": "spatial_svd"},
}


def row_id(row: dict[str, float]) -> str:
    return "_".join(f"{key}{value}" for key, value in row.items())


@pytest.mark.parametrize("row", [ROWS[0], *(pytest.param(row, marks=pytest.mark.slow) for row in ROWS[1:])], ids=row_id)
@pytest.mark.parametrize("how", METHODS)
@pytest.mark.parametrize("net", [NETS[0], pytest.param(NETS[1], marks=pytest.mark.slow)])
def test_row_2_targets_of_cifar_nets_are_met(net: str, how: str, row: dict[str, float]):
    model = build_model(net, in_channels=3, num_classes=10)
    plan, selection = budget(model, PICTURE, row, **METHODS[how])
    assert_met(plan, row)
    assert selection.loss <= selection.bound * 1.02


@pytest.mark.slow
@pytest.mark.parametrize("how", METHODS)
@pytest.mark.parametrize(("net", "macs"), [("resnet18", 0.32), ("resnet50", 0.37)])
def test_row_2_targets_of_imagenet_nets_are_met(net: str, macs: float, how: str):
    model = build_model(f"torchvision/{net}", in_channels=3, num_classes=1000)
    plan, _ = budget(model, torch.randn(1, 3, 224, 224), {"macs": macs}, **METHODS[how])
    assert_met(plan, {"macs": macs})


@pytest.mark.parametrize("target", [0.3, 0.45, 0.6, 0.75, 0.9, 0.97])
@pytest.mark.parametrize("metric", ["macs", "params"])
def test_row_2_targets_of_a_small_net_are_met(metric: str, target: float):
    plan, _ = budget(SmallResNet(), X, {metric: target, "tolerance": 0.02}, method="svd")
    assert target * 0.98 <= kept(plan)[metric] <= target
    assert all(layer.saves() for layer in plan.values())


def test_what_the_plan_promises_the_converted_net_costs():
    model = build_model("resnet20", in_channels=3, num_classes=10)
    plan, _ = budget(model, PICTURE, {"macs": 0.3})
    small, dense = count_cost(convert(model, plan), PICTURE), count_cost(model, PICTURE)
    assert 0.3 * 0.995 <= small.macs / dense.macs <= 0.3


def test_tokens_have_a_budget_too():
    plan, _ = budget(Tokens(), torch.randn(2, 5, 16), {"params": 0.7, "tolerance": 0.05}, method="svd")
    assert 0.65 <= kept(plan)["params"] <= 0.7


def test_a_tighter_target_loses_more():
    model = build_model("resnet20", in_channels=3, num_classes=10)
    losses = [budget(model, PICTURE, {"macs": macs})[1].loss for macs in (0.6, 0.45, 0.3, 0.2)]
    assert losses == sorted(losses)
    both = budget(model, PICTURE, {"macs": 0.3, "params": 0.2})[1].loss
    assert both >= losses[2] - 1e-6


def test_it_loses_less_than_equal_ranks_at_the_same_cost():
    model = build_model("resnet20", in_channels=3, num_classes=10)
    with torch.no_grad():  # one stage with nearly nothing in it: that is where to save
        for module in model.modules():
            if isinstance(module, nn.Conv2d) and module.out_channels == 64:
                u, s, v = torch.linalg.svd(module.weight.flatten(1), full_matrices=False)
                module.weight.copy_(((u[:, :4] * s[:4]) @ v[:4]).reshape(module.weight.shape))
    plan, selection = budget(model, PICTURE, {"macs": 0.55}, method="svd")
    assert {p.ranks for p in plan.values() if p.shape[0] == 64 and p.shape[1] == 64} == {(4,)}
    assert selection.loss < 4


def test_exactly_low_rank_weights_need_not_use_the_whole_budget():
    model = nn.Sequential(nn.Linear(40, 40), nn.Linear(40, 40))
    with torch.no_grad():
        for layer in model:
            layer.weight.copy_(torch.randn(40, 3) @ torch.randn(3, 40))
    plan, selection = budget(model, torch.randn(1, 40), {"macs": 0.6}, method="svd")
    assert {layer.ranks for layer in plan.values()} == {(3,)}
    assert selection.loss < 1e-9


# -- settings ----------------------------------------------------------------------------------------------------


def test_weights_protect_layers():
    model = build_model("resnet20", in_channels=3, num_classes=10)
    plain, _ = budget(model, PICTURE, {"macs": 0.4}, method="svd")
    guarded, _ = budget(model, PICTURE, {"macs": 0.4, "weights": {"*": 1, "layer2.*": 100.0}}, method="svd")
    cost = {k: sum(p.macs_after for n, p in plan.items() if n.startswith("layer2")) +
            sum(9 * 16 * 32 * 16 * 16 for n in plan.skipped if n.startswith("layer2"))
            for k, plan in (("plain", plain), ("guarded", guarded))}  # fmt: skip
    assert cost["guarded"] > cost["plain"]
    with pytest.raises(PlanError, match=r"^weights 'laier2\.\*' matches no layer"):
        budget(model, PICTURE, {"macs": 0.4, "weights": {"laier2.*": 2}})


def test_weights_by_norm_count_absolute_errors():
    model = nn.Sequential(nn.Linear(40, 40), nn.Linear(40, 40))
    with torch.no_grad():
        model[1].weight.mul_(10)
    plan, _ = budget(model, torch.randn(1, 40), {"macs": 0.5, "weights": "norm", "tolerance": 0.03}, method="svd")
    ranks = {name: plan[name].ranks[0] if name in plan else 40 for name in ("0", "1")}
    assert ranks["1"] > 2 * ranks["0"]


def test_ranks_keep_to_the_rounding():
    model = build_model("resnet20", in_channels=3, num_classes=10)
    settings = {"macs": 0.4, "round_to": 4, "min_rank": 8, "max_rank": 24, "tolerance": 0.02}
    plan, _ = budget(model, PICTURE, settings, method="svd")
    assert {layer.ranks[0] for layer in plan.values()} <= {8, 12, 16, 20, 24}
    assert 0.4 * 0.98 <= kept(plan)["macs"] <= 0.4


def test_weights_scaled_down_have_the_same_plan():
    model = build_model("resnet20", in_channels=3, num_classes=10)
    before, _ = budget(model, PICTURE, {"macs": 0.4})
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                module.weight.mul_(2.0**-10)
    after, _ = budget(model, PICTURE, {"macs": 0.4})
    assert {n: p.ranks for n, p in before.items()} == {n: p.ranks for n, p in after.items()}


def test_layers_left_dense_have_a_reason():
    plan, _ = budget(SmallResNet(), X, {"macs": 0.9, "tolerance": 0.05}, method="svd")
    assert plan.skipped
    assert "the budget is met with less loss when other layers are factorized instead" in plan.skipped.values()
    tiny = nn.Sequential(nn.Conv2d(6, 64, 3, padding=1), nn.Flatten(2), nn.Linear(144, 1))
    plan, _ = budget(tiny, X, {"macs": 0.5, "tolerance": 0.3}, method="svd")
    assert plan.skipped == {"2": "no ranks within its limits save anything"}


# -- what cannot be ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [0, 1, -0.1, 1.5, 40, "0.4", True, float("nan"), [0.4]], ids=repr)
@pytest.mark.parametrize("key", ["macs", "params", "tolerance"])
def test_row_9_targets_are_shares(key: str, value: object):
    settings = {"macs": 0.4, key: value}
    with pytest.raises(ConfigError, match=rf"^{key}: .* given; allowed: .*a number above 0 and below 1"):
        Budget(**settings)


def test_no_target_at_all_is_half_of_the_macs_and_a_given_one_stands_alone():
    assert Budget().targets == {"macs": 0.5}
    assert Budget(params=0.3).targets == {"params": 0.3}
    assert Budget(0.4, 0.3).targets == {"macs": 0.4, "params": 0.3}
    assert Budget(latency_ms=5.0).targets == {}


@pytest.mark.parametrize(
    "weights", [2, "norms", [1], {"a": -1}, {"a": "x"}, {"a": float("inf")}, {"a": True}], ids=repr
)
def test_senseless_weights_are_refused(weights: object):
    with pytest.raises(ConfigError, match="^weights: "):
        Budget(macs=0.4, weights=weights)


def test_row_2_an_unreachable_target_says_the_least_that_is_and_that_works():
    model = build_model("resnet20", in_channels=3, num_classes=10)
    with pytest.raises(PlanError, match=r"macs=0\.01 \(least reachable: 0\.\d+, of which 0\.\d+ in what is not "
                       r"factorized\) cannot be met.*larger target, include more layers") as caught:  # fmt: skip
        budget(model, PICTURE, {"macs": 0.01, "params": 0.5}, method="svd", exclude=["conv1"])
    least = float(str(caught.value).split("least reachable: ")[1].split(",")[0])
    plan, _ = budget(model, PICTURE, {"macs": least, "tolerance": 0.1}, method="svd", exclude=["conv1"])
    assert kept(plan)["macs"] <= least
    assert "params" not in str(caught.value)
    assert caught.value.told(Use.in_flags).startswith("budget: --macs 0.01 (least reachable: ")


def test_row_2_ranks_too_coarse_for_the_target_give_the_nearest_below_it_with_a_note(caplog):
    model, x = nn.Sequential(nn.Linear(64, 64)), torch.randn(1, 64)
    plan, _ = budget(model, x, {"macs": 0.7, "round_to": 16}, method="svd")
    assert plan["0"].ranks == (16,)
    assert plan["0"].notes == ("budget: macs=0.7 is met by 0.5, the nearest found below it: ranks are coarse",)
    assert plan["0"].notes[0] in caplog.text
    assert f"note: {plan['0'].notes[0]}: 0" in str(plan)
    for settings in ({"macs": 0.5}, {"macs": 0.7, "tolerance": 0.3}):
        plan, _ = budget(model, x, {**settings, "round_to": 16}, method="svd")
        assert (plan["0"].ranks, plan["0"].notes) == ((16,), ())


# -- speed -------------------------------------------------------------------------------------------------------


def test_row_2_a_hundred_layers_take_a_moment():
    generator = torch.Generator().manual_seed(0)
    widths = [(64, 96, 128)[i] for i in torch.randint(0, 3, (101,), generator=generator).tolist()]
    model = nn.Sequential(*(nn.Conv2d(i, o, 3, padding=1) for i, o in itertools.pairwise(widths)))
    x = torch.randn(1, widths[0], 8, 8)
    started = time.process_time()
    plan, _ = budget(model, x, {"macs": 0.35}, n_modes=1)
    assert time.process_time() - started < 5
    assert_met(plan, {"macs": 0.35})
