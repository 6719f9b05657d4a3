"""What is no net, plan or optimizer is told of as such, before any work."""

from collections.abc import Callable

import pytest
import torch
from torch import nn

import hodec
from hodec.errors import HodecError

X = torch.zeros(1, 16)
NET = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4))
PLAN = hodec.make_plan(NET, 4, method="svd", example_input=X)
SMALL = hodec.convert(NET, PLAN)


def sgd(net: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(net.parameters(), 0.1)


@pytest.mark.parametrize("use", [
    lambda net: hodec.make_plan(net, 4, method="svd", example_input=X),
    lambda net: hodec.convert(net, PLAN),
    lambda net: hodec.merge(net),
    lambda net: hodec.compress(net, macs=0.5, example_input=X),
    lambda net: hodec.fuse(net, example_input=X),
    lambda net: hodec.fit_to_data(net, PLAN, [X]),
    lambda net: hodec.collect_covariances(net, PLAN, [X]),
    lambda net: hodec.save(net, "small.safetensors"),
    lambda net: hodec.to_onnx(net, "small.onnx", example_input=X),
    lambda net: hodec.to_program(net, "small.pt2", example_input=X),
    lambda net: hodec.Admm(net, PLAN, sgd(NET)),
    lambda net: hodec.FadeIn(net, NET),
    lambda net: hodec.FadeIn(SMALL, net),
    lambda net: hodec.FeatureDistillation(net, NET),
    lambda net: hodec.FeatureDistillation(SMALL, net),
    lambda net: hodec.FactorSGD(net, 0.1),
    lambda net: hodec.param_groups(net, lr=0.1),
])  # fmt: skip
def test_weights_in_the_place_of_a_net(use: Callable[[object], object]) -> None:
    with pytest.raises(HodecError, match="model: a OrderedDict given; allowed: an nn.Module; load these weights into"):
        use(NET.state_dict())


@pytest.mark.parametrize("use", [
    lambda plan: hodec.convert(NET, plan),
    lambda plan: hodec.fit_to_data(NET, plan, [X]),
    lambda plan: hodec.collect_covariances(NET, plan, [X]),
    lambda plan: hodec.collect_output_gradients(NET, plan, [X]),
    lambda plan: hodec.conversion_errors(NET, plan),
    lambda plan: hodec.save(SMALL, "small.safetensors", plan),
    lambda plan: hodec.Admm(NET, plan, sgd(NET)),
])  # fmt: skip
def test_a_file_in_the_place_of_a_plan(use: Callable[[object], object]) -> None:
    with pytest.raises(HodecError, match=r"plan: a str given; allowed: a Plan; Plan.load\(path\) reads one"):
        use("plan.json")


@pytest.mark.parametrize(("given", "words"), [
    (NET.parameters, "a generator given, of Parameter"),
    (lambda: None, "a NoneType given"),
    (lambda: [sgd(NET), 3], "a list given, of int"),
])  # fmt: skip
def test_what_is_no_optimizer(given: Callable[[], object], words: str) -> None:
    with pytest.raises(HodecError, match=f"optimizer: {words}; allowed: an optimizer, or several in a list"):
        hodec.Admm(NET, PLAN, given())


@pytest.mark.parametrize("steps", [2.5, 0, -1])
def test_steps_that_are_no_count(steps: float) -> None:
    with pytest.raises(HodecError, match=f"steps_per_epoch: {steps} given; allowed: a whole number from 1"):
        hodec.Admm(NET, PLAN, sgd(NET), steps_per_epoch=steps)
