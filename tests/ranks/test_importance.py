"""What makes one layer's error count more than another's: globs, norms, measured scores, measured inputs."""

import pytest
import torch
from torch import nn

from hodec.calibration.input_covariance import collect_covariances
from hodec.conversion.swap import convert
from hodec.errors import PlanError
from hodec.ranks import Budget, Greedy, Manual, make_plan
from hodec.ranks.greedy.stats import CurvePoint, GreedyStats
from hodec.ranks.selection.importance import importance

X = torch.zeros(1, 24)


@pytest.fixture
def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(24, 24), nn.ReLU(), nn.Linear(24, 24))


def ranks(model: nn.Module, rule: Budget) -> dict[str, int]:
    plan = make_plan(model, rule, method="svd", example_input=X)
    return {name: plan[name].ranks[0] if name in plan else 24 for name in ("0", "2")}


def stats(table: dict[str, list[tuple[int, float]]], baseline: float = 1.0) -> GreedyStats:
    points = {name: tuple(CurvePoint((r,), r / 12, score) for r, score in rows) for name, rows in table.items()}
    return GreedyStats("macs", 0.5, 0.5, 0.9, baseline, 0.9, 0.5, 0.5, {}, {}, points)


def test_scores_move_ranks_to_the_layer_that_loses_more_of_them(net):
    alike = ranks(net, Budget(macs=0.5, tolerance=0.1))
    fragile = stats({"0": [(3, 0.1), (6, 0.5)], "2": [(3, 0.99), (6, 1.0)]})
    moved = ranks(net, Budget(macs=0.5, tolerance=0.1, weights=fragile))
    assert abs(alike["0"] - alike["2"]) <= 2
    assert moved["0"] > alike["0"]
    assert moved["2"] < alike["2"]


def test_weights_by_scores_are_the_loss_per_error(net):
    captured = {}

    class Spy(Budget):
        def choose(self, layers, net):
            captured.update(layers)
            return super().choose(layers, net)

    make_plan(net, Spy(macs=0.5, tolerance=0.1), method="svd", example_input=X)
    found = importance(stats({"0": [(6, 0.4)], "2": [(6, 0.9)]}), captured)
    errors = {}
    for name in ("0", "2"):
        s = torch.linalg.svdvals(captured[name].site.weight.double()).square()
        errors[name] = float(s[6:].sum() / s.sum())
    assert found["0"] / found["2"] == pytest.approx((0.6 / errors["0"]) / (0.1 / errors["2"]))
    assert sum(found.values()) == pytest.approx(2)
    # without scores, or without a loss: the least of the others; scores above the dense net's are no loss
    assert importance(stats({"0": [(6, 0.4)]}), captured) == {"0": 1.0, "2": 1.0}
    assert importance(stats({"0": [(6, 1.2)], "2": [(6, 1.0)]}), captured) == {"0": 1.0, "2": 1.0}


def test_the_stats_of_a_greedy_search_serve(net):
    target = net(torch.randn(64, 24, generator=torch.Generator().manual_seed(1))).detach()
    x = torch.randn(64, 24, generator=torch.Generator().manual_seed(1))
    found: list[GreedyStats] = []
    rule = Greedy(lambda model: -float((model(x).detach() - target).square().mean()), ratios=4, report=found.append)
    make_plan(net, rule, method="svd", example_input=X)
    assert ranks(net, Budget(macs=0.5, tolerance=0.1, weights=found[0]))


def test_metrics_spend_ranks_where_outputs_need_them(net):
    """Inputs of the first layer that fill three directions only: three ranks lose next to nothing there."""
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(512, 3, generator=generator) @ torch.randn(3, 24, generator=generator)
    first = make_plan(net, Manual(24), method="svd", example_input=X, allow_larger=True)
    covariances = collect_covariances(net, first, [x])
    plain, aware = (
        ranks(net, Budget(macs=0.4, tolerance=0.1)),
        ranks(net, Budget(macs=0.4, tolerance=0.1, covariances=covariances)),
    )
    assert aware["0"] < plain["0"]
    assert aware["2"] > plain["2"]

    def error(rule: Budget, **how: object) -> float:
        small = convert(net, make_plan(net, rule, method="svd", example_input=X), **how)
        return float((small(x) - net(x)).detach().norm() / net(x).detach().norm())

    budget = Budget(macs=0.4, tolerance=0.1, covariances=covariances)
    both = {name: m for name, m in covariances.items() if name in make_plan(net, budget, method="svd", example_input=X)}
    assert error(budget, covariances=both) < 0.5 * error(Budget(macs=0.4, tolerance=0.1))


def test_metrics_of_another_method_are_refused(net):
    covariances = collect_covariances(
        net, make_plan(net, Manual(4), method="svd", example_input=X), [torch.randn(8, 24)]
    )
    with pytest.raises(PlanError, match="collect the covariances with this plan"):
        make_plan(net, Budget(macs=0.6, covariances=covariances), method="tt", example_input=X)
