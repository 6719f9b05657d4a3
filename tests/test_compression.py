"""hodec.compress: plan and conversion in one call, with data where there is some."""

import copy

import pytest
import torch
from torch import nn

import hodec
from hodec.errors import ConfigError, PlanError


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.Conv2d(32, 32, 3, padding=1),
        nn.BatchNorm2d(32), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10),
    ).eval()  # fmt: skip


def loader(count: int = 4) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Images whose channels say much the same, with labels."""
    g = torch.Generator().manual_seed(1)
    mix = torch.randn(3, 1, generator=g)
    return [
        (mix[None, :, :, None] * torch.randn(16, 1, 12, 12, generator=g) + 3, torch.zeros(16)) for _ in range(count)
    ]


def test_a_share_is_met_and_the_given_net_stays():
    model = net()
    before = copy.deepcopy(model.state_dict())
    small = hodec.compress(model, example_input=torch.zeros(1, 3, 12, 12), macs=0.4)
    assert small.hodec_plan.macs_after <= 0.4 * small.hodec_plan.macs_before
    assert {layer.method for layer in small.hodec_plan.values()} <= {"spatial_svd", "svd"}
    assert all(torch.equal(a, b) for a, b in zip(before.values(), model.state_dict().values(), strict=True))
    assert all(torch.equal(small.state_dict()[k], before[k]) for k in before if "running" in k)


@pytest.mark.parametrize("make", [list, iter], ids=["a list", "an iterator"])
def test_data_brings_the_outputs_nearer(make):
    model, data = net(), loader()
    x = loader(5)[-1][0]
    errors = []
    for given in (None, make(data)):
        small = hodec.compress(model, example_input=x[:1], macs=0.2, loader=given)
        errors.append(float((small(x) - model(x)).norm() / model(x).norm()))
    assert errors[1] < 0.8 * errors[0]
    assert not torch.equal(small[1].running_mean, model[1].running_mean)


def test_the_loader_alone_is_enough_and_other_rules_serve():
    small = hodec.compress(net(), loader=loader(), rule=4, method="tt", include=[nn.Conv2d], exclude="0")
    assert dict(small.hodec_plan).keys() == {"3"}
    assert small.hodec_plan["3"].method == "tt"


def test_weights_inside_modules_go_along():
    class Tagger(nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn, self.out = nn.LSTM(32, 64, batch_first=True), nn.Linear(64, 64)

        def forward(self, x):
            return self.out(self.rnn(x)[0])

    small = hodec.compress(Tagger(), loader=[torch.randn(4, 6, 32)], params=0.5)
    assert any(name.startswith("rnn.") for name in small.hodec_plan)


def test_bad_input_is_refused_before_any_work():
    with pytest.raises(ConfigError, match="needs example_input.* or a loader"):
        hodec.compress(net())
    with pytest.raises(ConfigError, match="the loader has no batch"):
        hodec.compress(net(), loader=[])
    with pytest.raises(ConfigError, match="give them to the rule"):
        hodec.compress(net(), example_input=torch.zeros(1, 3, 12, 12), macs=0.5, rule="energy")
    with pytest.raises(PlanError):
        hodec.compress(net(), example_input=torch.zeros(1, 3, 12, 12), macs=1e-9)
