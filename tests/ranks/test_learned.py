"""Learned: ranks that follow from alpha and rho, alone and inside ADMM's updates."""

import pytest
import torch
from small_nets import IMAGE, SmallResNet
from torch import Tensor, nn

from hodec.admm.updates import project_layers, start, step
from hodec.conversion.swap import convert
from hodec.cost.count import count_cost
from hodec.errors import ConfigError, PlanError, TrainingError
from hodec.plan.layer import LayerPlan
from hodec.plan.plan import Plan
from hodec.ranks import Learned, Manual, make_plan

X = torch.randn(IMAGE, generator=torch.Generator().manual_seed(0))
PLANTED = 5


def planted(generator: torch.Generator, rows: int, cols: int, *, noise: float = 0.01, rank: int = PLANTED) -> Tensor:
    """A matrix of this rank whose singular values are all 1, and noise whose largest is about ``noise``."""
    left, right = (torch.linalg.qr(torch.randn(n, rank, generator=generator))[0] for n in (rows, cols))
    dirt = torch.randn(rows, cols, generator=generator) / (rows**0.5 + cols**0.5)
    return left @ right.T + noise * dirt


def decaying(shape: tuple[int, ...]) -> Tensor:
    """A weight most of whose norm is in few directions on either side, as in trained nets."""
    out, inp, *kernel = shape
    falls = [torch.exp(-torch.arange(n) / n * 5) for n in (out, inp)]
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    return torch.einsum("oi...,o,i->oi...", noise, *falls)


def planned(model: nn.Module, rule: Learned, x: Tensor, **settings: object) -> Plan:
    return make_plan(model, rule, example_input=x, **settings)


def linear_plan() -> Plan:
    model = nn.Sequential(nn.Linear(40, 40))
    return make_plan(model, Manual(3), method="svd", example_input=torch.randn(1, 40))


def kept(plan: Plan, key: str) -> float:
    """Share of the dense cost; full ranks stand for a dense layer."""
    totals = {"macs": plan.dense_macs, "params": plan.dense_params}
    saved = sum(getattr(p, f"{key}_before") - getattr(p, f"{key}_after") for p in plan.values() if p.saves())
    return 1 - saved / totals[key]


def learned_ranks(
    layer: LayerPlan, weight: Tensor, *, alpha: float, rho: float, metric: str = "macs", **limits: int
) -> tuple[int, ...]:
    """The ranks that one layer takes for W + U = ``weight``."""
    rule = Learned(alpha=alpha, metric=metric, **limits)
    return rule.update(Plan({"layer": layer}, {}, "learned", 1, 1), {"layer": weight}, {"layer": rho})["layer"].ranks


# -- one layer -----------------------------------------------------------------------------------------------------


def test_a_planted_rank_is_found_over_three_decades_of_alpha(generator: torch.Generator):
    layer, weight = linear_plan()["0"], planted(generator, 40, 40)
    # A rank costs 80 MACs, holds 1/2 of the loss while it is planted and 5e-5 where it is noise.
    for alpha in (5.0, 50.0, 500.0, 5000.0):
        assert learned_ranks(layer, weight, alpha=alpha, rho=1.0) == (PLANTED,)
    assert learned_ranks(layer, weight, alpha=7000.0, rho=1.0) < (PLANTED,)


def test_it_is_the_argmin_over_all_ranks(generator: torch.Generator):
    layer, weight = linear_plan()["0"], torch.randn(40, 40, generator=generator)
    tails = [float(s) for s in torch.linalg.svdvals(weight.double()).square()]
    for alpha, rho in ((1e3, 0.1), (1e4, 0.5), (1e5, 2.0), (3e5, 1.0)):
        values = {r: alpha * 80e-6 * r + rho / 2 * sum(tails[r:]) for r in range(1, 20)}
        values[40] = alpha * 1600e-6  # dense
        assert learned_ranks(layer, weight, alpha=alpha, rho=rho) == (min(values, key=values.get),)


@pytest.mark.parametrize("method", ["svd", "tucker", "tt", "spatial_svd"])
def test_no_price_gives_full_ranks_and_a_high_one_the_least(method: str):
    plan = make_plan(SmallResNet(), Manual(2), method=method, example_input=X)
    weights = dict(SmallResNet().named_parameters())
    for name, layer in plan.items():
        weight = weights[f"{name}.weight"].detach()
        most = layer.format.max_ranks(layer.shape, layer.modes)
        assert learned_ranks(layer, weight, alpha=0.0, rho=1.0) == most
        assert learned_ranks(layer, weight, alpha=1e-12, rho=1.0) == most
        assert learned_ranks(layer, weight, alpha=1e9, rho=1.0) == (1,) * len(most)


@pytest.mark.parametrize("metric", ["macs", pytest.param("params", marks=pytest.mark.slow)])
@pytest.mark.parametrize("method", ["svd", "tucker", "tt", "spatial_svd"])
def test_a_larger_alpha_never_gives_a_larger_rank(method: str, metric: str):
    plan = make_plan(SmallResNet(), Manual(2), method=method, example_input=X)
    for name, layer in plan.items():
        weight = decaying(layer.shape)
        last, different = layer.format.max_ranks(layer.shape, layer.modes), set()
        for alpha in torch.logspace(-4, 7, 23, dtype=torch.float64).tolist():
            ranks = learned_ranks(layer, weight, alpha=alpha, rho=1.0, metric=metric)
            assert all(now <= before for now, before in zip(ranks, last, strict=True)), (
                name,
                alpha,
                last,
                ranks,
            )
            last = ranks
            different.add(ranks)
        assert len(different) > 2 or name == "fc", name


def test_only_the_ratio_of_alpha_to_rho_matters():
    plan = make_plan(SmallResNet(), Manual(2), method="tucker", example_input=X)
    layer = plan["layer1.conv2"]
    weight = decaying(layer.shape)
    first = learned_ranks(layer, weight, alpha=10.0, rho=0.3)
    assert first == learned_ranks(layer, weight, alpha=20.0, rho=0.6)
    assert (1, 1) < first < (24, 24)


def test_stored_layouts_are_read_as_they_are_stored(generator: torch.Generator):
    model = nn.Sequential(nn.ConvTranspose2d(24, 12, 3))
    layer = make_plan(model, Manual(2), method="svd", example_input=torch.randn(1, 24, 6, 6))["0"]
    matrix = planted(generator, 12, 24 * 9, rank=3)  # outputs x (inputs, kernel)
    stored = matrix.reshape(12, 24, 3, 3).transpose(0, 1)
    assert learned_ranks(layer, stored, alpha=10.0, rho=1.0) == (3,)


def test_rounding_holds(generator: torch.Generator):
    layer, weight = linear_plan()["0"], planted(generator, 40, 40)
    assert learned_ranks(layer, weight, alpha=50.0, rho=1.0, round_to=4) == (8,)
    assert learned_ranks(layer, weight, alpha=50.0, rho=1.0, max_rank=3) in {(3,), (40,)}


# -- inside the updates ----------------------------------------------------------------------------------------------


def train(
    targets: dict[str, Tensor], plan: Plan, learner: Learned, *, rho: float, rounds: int = 30
) -> tuple[Plan, dict[str, Tensor], list[tuple[int, ...]]]:
    """ADMM on sum of |W - target|^2 / 2, whose W-step is exact; ranks after each Z-update."""
    weights, history = dict(targets), []

    def project(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        nonlocal plan
        plan = learner.update(plan, tensors, dict.fromkeys(tensors, rho))
        history.append(tuple(r for layer in plan.values() for r in layer.ranks))
        return project_layers(plan, tensors)

    states = start(weights, dict.fromkeys(weights, rho), project)
    for _ in range(rounds):
        weights = {name: (targets[name] + rho * (s.z - s.u)) / (1 + rho) for name, s in states.items()}
        states, _ = step(weights, states, project)
    return plan, {name: s.z for name, s in states.items()}, history


def test_alternating_updates_find_the_planted_rank_and_stay_there(generator: torch.Generator):
    target = planted(generator, 40, 40, noise=0.05)
    plan, z, history = train({"0": target}, linear_plan(), Learned(alpha=300.0), rho=0.5)
    assert plan["0"].ranks == (PLANTED,)
    assert history[-20:] == [(PLANTED,)] * 20
    assert int(torch.linalg.matrix_rank(z["0"], rtol=1e-4)) == PLANTED


def test_ranks_can_grow_again(generator: torch.Generator):
    plan = linear_plan()
    weak, strong = (planted(generator, 40, 40, rank=r) for r in (2, 9))
    learner = Learned(alpha=300.0)
    down = learner.update(plan, {"0": weak}, {"0": 1.0})
    assert down["0"].ranks == (2,)
    assert learner.update(down, {"0": strong}, {"0": 1.0})["0"].ranks == (9,)


def test_a_target_finds_its_own_alpha_and_shares_it_out(generator: torch.Generator):
    model = nn.Sequential(nn.Linear(40, 40, bias=False), nn.Linear(40, 40, bias=False))
    plan = make_plan(model, Manual(4), method="svd", example_input=torch.randn(1, 40))
    targets = {"0": planted(generator, 40, 40, rank=3), "1": planted(generator, 40, 40, rank=9)}
    learner = Learned(macs=0.3)  # 12 ranks of 80 are 960 of 3200
    plan, _, _ = train(targets, plan, learner, rho=0.5)
    assert (plan["0"].ranks, plan["1"].ranks) == ((3,), (9,))
    assert kept(plan, "macs") == pytest.approx(0.3)


@pytest.mark.parametrize("targets", [{"macs": 0.5}, {"params": 0.4}, {"macs": 0.6, "params": 0.4}], ids=str)
@pytest.mark.parametrize("method", ["svd", *(pytest.param(more, marks=pytest.mark.slow) for more in ("tucker", "tt"))])
def test_targets_hold_after_each_update(targets: dict[str, float], method: str):
    model = SmallResNet()
    rule = Learned(**targets)
    plan = planned(model, rule, X, method=method)
    generator = torch.Generator().manual_seed(1)
    for _ in range(3):
        noise = {name: torch.randn(plan[name].stored_shape, generator=generator) for name in plan}
        plan = rule.update(plan, noise, dict.fromkeys(plan, 0.1))
        shares = {key: kept(plan, key) / target for key, target in targets.items()}
        assert 0.9 < max(shares.values()) <= 1 + 1e-12
    small = count_cost(convert(model, rule.freeze(plan)), X)
    dense = count_cost(model, X)
    for key, target in targets.items():
        assert getattr(small, key) <= target * getattr(dense, key)


def test_update_returns_a_new_plan_of_the_same_layers():
    rule = Learned(alpha=1.0)
    plan = planned(SmallResNet(), rule, X, method="svd")
    ranks = {name: layer.ranks for name, layer in plan.items()}
    weights = {name: torch.randn(layer.stored_shape) for name, layer in plan.items()}
    after = rule.update(plan, weights, dict.fromkeys(plan, 1.0))
    assert list(after) == list(plan)
    assert {name: layer.ranks for name, layer in plan.items()} == ranks
    assert {name: layer.ranks for name, layer in after.items()} != ranks
    assert all(after[name].notes == plan[name].notes for name in plan)
    assert (after.dense_macs, after.skipped, after.rule) == (plan.dense_macs, plan.skipped, "learned")
    assert rule.update(plan, weights, dict.fromkeys(plan, 0.0)) is plan


def test_layers_that_do_not_train_keep_their_ranks_and_count():
    plan = planned(SmallResNet(), Learned(macs=0.5), X, method="svd")
    first, *rest = plan
    learner = Learned(macs=0.5)
    after = learner.update(plan, {n: torch.randn(plan[n].stored_shape) for n in rest}, dict.fromkeys(rest, 1.0))
    assert after[first] == plan[first]
    assert kept(after, "macs") <= 0.5
    with pytest.raises(PlanError, match=r"learned: macs=0\.1 cannot be met by the layers that train"):
        Learned(macs=0.1).update(plan, {first: torch.randn(plan[first].stored_shape)}, {first: 1.0})


def test_freeze_leaves_dense_what_saves_nothing():
    plan = planned(SmallResNet(), Learned(alpha=1.0), X, method="svd")
    weights = {name: torch.randn(layer.stored_shape) for name, layer in plan.items()}
    learner = Learned(alpha=0.0)
    full = learner.update(plan, weights, dict.fromkeys(plan, 1.0))
    with pytest.raises(PlanError, match=r"no layer has ranks that save anything; give a larger alpha"):
        learner.freeze(full)
    kept_ranks = plan["layer1.conv2"].ranks
    mixed = learner.freeze(full.replace("layer1.conv2", ranks=kept_ranks))
    assert list(mixed) == ["layer1.conv2"]
    assert mixed.skipped["conv1"] == "learned ranks [12] would save nothing"


# -- the rule --------------------------------------------------------------------------------------------------------


def test_with_alpha_training_starts_at_the_largest_ranks_that_save():
    plan = planned(SmallResNet(), Learned(alpha=1.0), X, method="svd")
    for name, layer in plan.items():
        assert layer.saves()
        assert layer.notes == ("the largest ranks that save something; training changes them",)
        assert not plan.replace(name, ranks=[layer.ranks[0] + 1])[name].saves()


def test_with_a_target_training_starts_within_it():
    plan = planned(SmallResNet(), Learned(macs=0.5), X, method="svd")
    assert len(plan) == 5
    assert kept(plan, "macs") <= 0.5
    with pytest.raises(PlanError, match="least reachable"):
        planned(SmallResNet(), Learned(macs=0.001), X, method="svd")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"alpha": 1.0, "macs": 0.5}, "learned: both alpha=1.0 and targets are given; allowed: alpha, or targets"),
        ({"alpha": -1.0}, "alpha: -1.0 given; allowed: null or a number at least 0"),
        ({"alpha": "1"}, "alpha: '1' given"),
        ({"alpha": float("nan")}, "alpha: nan given"),
        ({"macs": 1.5}, "macs: 1.5 given; allowed: null or a number above 0 and below 1"),
        (
            {"alpha": 1.0, "metric": "mac"},
            "metric: 'mac' given; allowed: macs | params",
        ),
        ({"alpha": 1.0, "round_to": 0}, "round_to: 0 given; allowed: null or a whole number at least 1"),
    ],
    ids=str,
)
def test_row_9_senseless_settings_are_refused(settings: dict[str, object], message: str):
    with pytest.raises(ConfigError) as caught:
        Learned(**settings)
    assert message in str(caught.value)


def test_without_alpha_and_targets_it_is_half_of_the_macs():
    assert Learned().targets == {"macs": 0.5}
    assert Learned(params=0.3).targets == {"params": 0.3}
    assert Learned(alpha=0.1).targets == {}


def test_broken_weights_are_named():
    plan = planned(SmallResNet(), Learned(alpha=1.0), X, method="svd")
    broken = torch.full(plan["conv1"].stored_shape, float("nan"))
    with pytest.raises(TrainingError, match="layer conv1: .*NaN"):
        Learned(alpha=1.0).update(plan, {"conv1": broken}, {"conv1": 1.0})


def test_a_zero_weight_takes_the_least_ranks():
    layer = linear_plan()["0"]
    assert learned_ranks(layer, torch.zeros(40, 40), alpha=1.0, rho=1.0) == (1,)
