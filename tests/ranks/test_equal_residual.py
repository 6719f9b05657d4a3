"""Equal residuals in all layers, one index for the whole net, and an objective whose sign is right."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from rank_cases import NO_MODEL, context
from small_nets import IMAGE, SmallResNet, assert_untouched, snapshot
from torch import nn

from hodec.conversion.swap import conversion_errors, convert
from hodec.cost.count import count_cost
from hodec.errors import ConfigError, PlanError
from hodec.layers.base import FactorizedLayer
from hodec.plan.plan import Plan
from hodec.ranks import EqualResidual, make_plan
from hodec.ranks.equal_residual import ResidualLevel

X = torch.randn(IMAGE, generator=torch.Generator().manual_seed(0))


def planned(
    rule: EqualResidual, model: nn.Module | None = None, method: str = "weight_svd", **settings: object
) -> tuple[Plan, tuple[ResidualLevel, ...]]:
    """The plan, and the levels that were tried."""
    model, reports = model or SmallResNet().eval(), []
    rule = replace(rule, report=reports.append)
    plan = make_plan(model, rule, method=method, example_input=X, exclude=["fc"], **settings)
    return plan, reports[0]


def cost(model: nn.Module) -> float:
    """Share of the dense net's parameters, a stand-in for what a net can."""
    return count_cost(model, X).params / count_cost(SmallResNet(), X).params


# -- the sign ------------------------------------------------------------------------------------------------------


def test_where_accuracy_does_not_change_the_cheapest_net_wins():
    """An objective of the wrong sign would keep the most."""
    rule = EqualResidual(lambda model: 0.7, 10)
    plan, levels = planned(rule)
    assert min(level.ratio for level in levels) == pytest.approx(1 - plan.reduction["macs"])
    assert {layer.ranks for layer in plan.values()} == {(1,)}


def test_where_accuracy_is_all_the_most_accurate_net_wins():
    rule = EqualResidual(lambda model: 1000 * cost(model), 10, metric="params")
    plan, levels = planned(rule)
    assert max(level.ratio for level in levels) == pytest.approx(1 - plan.reduction["params"])


def test_a_larger_weight_never_keeps_more():
    def accuracy(model: nn.Module) -> float:
        return 1 - (1 - cost(model)) ** 2

    rules = [EqualResidual(accuracy, 10, metric="params", weight=weight) for weight in (0.1, 0.5, 1, 1.5, 9)]
    kept = [1 - planned(rule)[0].reduction["params"] for rule in rules]
    assert kept == sorted(kept, reverse=True)
    assert kept[0] > kept[-1]


def test_the_objective_is_the_documented_one_and_its_least_is_taken():
    accuracies = iter([0.9, 0.88, 0.86, 0.5, 0.2, 0.1])  # the dense net first
    rule = EqualResidual(lambda model: next(accuracies), 5, weight=0.5)
    plan, levels = planned(rule)
    for level in levels:
        assert level.objective == pytest.approx(0.9 - level.accuracy + 0.5 * level.ratio)
    best = min(levels, key=lambda level: level.objective)
    assert 1 - plan.reduction["macs"] == pytest.approx(best.ratio)


def test_ties_go_to_the_cheaper_net():
    rule = EqualResidual(lambda model: cost(model), 8, metric="params")  # the objective is 1 throughout
    plan, levels = planned(rule)
    assert {round(level.objective, 9) for level in levels} == {1.0}
    assert plan.reduction["params"] == pytest.approx(1 - min(level.ratio for level in levels), abs=0.2)


# -- one index for all layers --------------------------------------------------------------------------------------


def at_level(number: int, indices: int = 10, **settings: object) -> EqualResidual:
    """A rule whose evaluation likes only its level of this number, counted from 0 (it sees the dense net first)."""
    calls = []

    def evaluate(model: nn.Module) -> float:
        calls.append(model)
        return 100.0 if len(calls) == number + 2 else 0.0

    return EqualResidual(evaluate, indices, **settings)


@pytest.mark.parametrize("number", [0, 2, 4])
def test_all_layers_have_the_residual_nearest_to_the_winning_index(number: int):
    model, rule = SmallResNet().eval(), at_level(number)
    plan, levels = planned(rule, model, include=["layer1.*"])
    index = levels[number].index
    for name, error in conversion_errors(model, plan).items():
        layer = plan[name]
        ranks = range(1, layer.format.max_ranks(layer.shape, layer.modes)[0] + 1)
        options = {rank: plan.replace(name, ranks=[rank]) for rank in ranks}
        saving = {rank: one for rank, one in options.items() if one[name].saves()}
        errors = [conversion_errors(model, one)[name] for one in saving.values()]
        assert abs(error - index / 10) == pytest.approx(min(abs(e - index / 10) for e in errors), abs=1e-5)
        assert f"index {index} of 10 for all layers" in layer.notes[-1]


@pytest.mark.parametrize("method", ["tucker", "tt", "spatial_svd"])
def test_methods_with_several_ranks_or_unfoldings_too(method: str):
    rule = EqualResidual(cost, 6)
    plan, levels = planned(rule, method=method)
    assert 1 <= len(levels) <= 6
    assert all(layer.saves() for layer in plan.values())


def test_what_was_predicted_for_the_winner_is_what_the_converted_net_costs():
    model = SmallResNet().eval()
    rule = at_level(2)
    plan, levels = planned(rule, model)
    dense, small = count_cost(model, X), count_cost(convert(model, plan), X)
    assert levels[2].ratio == pytest.approx(small.macs / dense.macs)


# -- evaluations ---------------------------------------------------------------------------------------------------


def test_the_net_is_evaluated_converted_in_evaluation_mode_at_most_once_an_index():
    seen = []

    def evaluate(model: nn.Module) -> torch.Tensor:
        assert not model.training
        seen.append(sum(isinstance(m, FactorizedLayer) for m in model.modules()))
        return model(X).mean()

    planned(EqualResidual(evaluate, 12), SmallResNet().train())
    assert seen[0] == 0
    assert set(seen[1:]) == {4}
    assert len(seen) <= 13


def test_equal_ranks_are_not_evaluated_twice():
    rule = EqualResidual(lambda model: 0.0, 50)
    _, levels = planned(rule, include=["layer1.shortcut"])
    assert len(levels) < 12
    assert [level.index for level in levels] == sorted(level.index for level in levels)


def test_nothing_that_evaluate_does_reaches_the_given_model():
    model = SmallResNet().train()
    before = snapshot(model)

    def vandal(net: nn.Module) -> float:
        with torch.no_grad():
            for parameter in net.parameters():
                parameter.zero_()
        return 0.5

    planned(EqualResidual(vandal, 4), model)
    assert_untouched(model, before)


BAD_RESULTS = {"nan": float("nan"), "infinite": float("inf"), "nothing": None, "text": "good"}


@pytest.mark.parametrize("case", BAD_RESULTS)
def test_a_dense_accuracy_that_is_no_number_is_refused(case: str):
    with pytest.raises(PlanError, match="equal_residual: evaluate "):
        planned(EqualResidual(lambda model: BAD_RESULTS[case], 4))


def test_indices_at_which_the_net_breaks_down_are_passed_over():
    accuracies = iter([0.9, 0.8, float("nan"), float("nan"), float("nan")])
    rule = EqualResidual(lambda model: next(accuracies), 4)
    plan, levels = planned(rule)
    assert plan.reduction["macs"] == pytest.approx(1 - levels[0].ratio)
    broken = iter([0.9] + [float("nan")] * 4)
    with pytest.raises(PlanError, match="no finite accuracy for any converted model"):
        planned(EqualResidual(lambda model: next(broken), 4))


# -- limits, refusals ----------------------------------------------------------------------------------------------


def test_limits_are_obeyed_and_the_residual_is_that_of_the_rounded_ranks():
    model = SmallResNet().eval()
    plan, _ = planned(EqualResidual(lambda model: 0.0, 5, round_to=4), model, include=["layer1.conv2"])
    layer = plan["layer1.conv2"]
    assert layer.ranks[0] % 4 == 0
    error = conversion_errors(model, plan)["layer1.conv2"]
    assert layer.notes[-1].startswith(f"residual {error:.3f}")


def test_layers_that_no_rank_makes_cheaper_stay_dense():
    model = nn.Sequential(nn.Conv2d(6, 24, 3, padding=1), nn.Conv2d(24, 2, 1)).eval()
    rule = EqualResidual(lambda model: 0.0, 4, min_rank=2)
    plan = make_plan(model, rule, method="weight_svd", example_input=X)
    assert plan.skipped == {"1": "no rank makes it cheaper"}
    with pytest.raises(PlanError, match="no layer is left to factorize.*no rank makes it cheaper"):
        make_plan(model, rule, method="weight_svd", example_input=X, include=["1"])


def test_it_needs_an_evaluation_and_a_net():
    layers = {"a": context(torch.ones(8, 8))}
    with pytest.raises(ConfigError, match="equal_residual: evaluate is missing"):
        make_plan(SmallResNet(), EqualResidual(), method="svd", example_input=X)
    with pytest.raises(PlanError, match="equal_residual evaluates the net: that takes a model with a Python class"):
        EqualResidual(lambda model: 0.0, 4).choose(layers, NO_MODEL)


BAD_SETTINGS: dict[str, Callable[[], EqualResidual]] = {
    "^evaluate: 'x' given; allowed: a function model -> accuracy": lambda: EqualResidual("x"),
    "^indices: 1 ": lambda: EqualResidual(cost, 1),
    "^indices: 51 ": lambda: EqualResidual(cost, 51),
    r"^indices: 2\.0 ": lambda: EqualResidual(cost, 2.0),
    "^metric: 'flops'": lambda: EqualResidual(cost, metric="flops"),
    "^weight: 0 ": lambda: EqualResidual(cost, weight=0),
    "^weight: nan ": lambda: EqualResidual(cost, weight=float("nan")),
    "^min_rank: 0 ": lambda: EqualResidual(cost, min_rank=0),
}


@pytest.mark.parametrize("message", BAD_SETTINGS)
def test_settings_out_of_range_name_their_key(message: str):
    with pytest.raises(ConfigError, match=message):
        BAD_SETTINGS[message]()
