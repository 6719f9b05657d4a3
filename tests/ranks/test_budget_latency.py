"""Budget with a latency in milliseconds as its target."""

import pytest
import torch
from rank_cases import NO_MODEL
from torch import nn

from hodec.cost.metric import GivenTimes
from hodec.errors import ConfigError, PlanError
from hodec.models import build_model
from hodec.plan.layer import LayerPlan
from hodec.ranks import Budget, Manual, make_plan
from hodec.ranks.selection.select import Selection

PICTURE = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def test_a_time_below_0_or_without_a_net_is_refused():
    with pytest.raises(ConfigError, match="^latency_ms: -1 given; allowed: .*a number above 0"):
        Budget(latency_ms=-1)
    with pytest.raises(PlanError, match="latency_ms=5.* is measured by running the net"):
        Budget(latency_ms=5).choose({}, NO_MODEL)


def after(layer: LayerPlan) -> float:
    """An overhead for each launched layer: what is small gains nothing."""
    return 0.02 + layer.macs_after * 1e-6


def before(layer: LayerPlan) -> float:
    return 0.01 + layer.macs_before * 1e-6


def test_latency_is_a_target_like_the_others():
    model = build_model("resnet20", in_channels=3, num_classes=10)
    reports: list[Selection] = []
    rule = Budget(latency_ms=22.0, latency_table=GivenTimes(after, before, 1.5), report=reports.append)
    plan = make_plan(model, rule, example_input=PICTURE, method="svd", exclude=["linear"])
    time_ms = 1.5 + sum(after(layer) for layer in plan.values())
    every = make_plan(model, Manual(1), method="svd", example_input=PICTURE, exclude=["linear"])
    time_ms += sum(before(layer) for name, layer in every.items() if name not in plan)
    assert len(every) == 19
    assert 22.0 * 0.995 <= time_ms <= 22.0
    assert all(after(layer) < before(layer) for layer in plan.values())
    assert reports[0].multipliers["latency_ms"] > 0


@pytest.mark.parametrize("target", [50.0, 49.0])
def test_a_latency_that_the_dense_net_meets_is_said_to_be_met(target):
    model = nn.Sequential(nn.Conv2d(3, 24, 3), nn.Conv2d(24, 24, 3))
    times = GivenTimes(lambda layer: 1.0, lambda layer: 20.0, 9.0)
    message = rf"the dense net meets latency_ms={target:g} already: it takes 49 ms \(by the given tables\)"
    with pytest.raises(PlanError, match=message) as error:
        make_plan(model, Budget(latency_ms=target, latency_table=times), method="svd", example_input=PICTURE)
    assert "\n" not in str(error.value)


def test_a_latency_just_below_that_of_the_dense_net_is_a_target():
    model = nn.Sequential(nn.Conv2d(3, 24, 3), nn.Conv2d(24, 24, 3))
    times = GivenTimes(lambda layer: 19.0, lambda layer: 20.0, 9.0)
    plan = make_plan(
        model, Budget(latency_ms=48.9, tolerance=0.1, latency_table=times), method="svd", example_input=PICTURE
    )
    assert len(plan) == 1


def test_a_latency_that_the_dense_net_meets_does_no_harm_beside_another_target():
    model = nn.Sequential(nn.Conv2d(3, 24, 3), nn.Conv2d(24, 24, 3))
    times = GivenTimes(lambda layer: 1.0, lambda layer: 20.0, 9.0)
    plan = make_plan(
        model, Budget(0.5, latency_ms=50.0, tolerance=0.1, latency_table=times), method="svd", example_input=PICTURE
    )
    assert plan.reduction["macs"] > 0.45
