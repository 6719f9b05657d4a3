"""hodec.compress: plan and conversion in one call, with data where there is some."""

import copy

import pytest
import torch
from torch import nn

import hodec
from hodec.errors import ConfigError, DataError, HodecError, PlanError


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
        small = hodec.compress(model, example_input=x[:1], macs=0.2, data=given)
        errors.append(float((small(x) - model(x)).detach().norm() / model(x).detach().norm()))
    assert errors[1] < 0.8 * errors[0]
    assert not torch.equal(small[1].running_mean, model[1].running_mean)


def test_the_loader_alone_is_enough_and_other_rules_serve():
    small = hodec.compress(net(), data=loader(), rule=4, method="tt", include=[nn.Conv2d], exclude="0")
    assert dict(small.hodec_plan).keys() == {"3"}
    assert small.hodec_plan["3"].method == "tt"


def test_a_loader_of_unknown_length_serves():
    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            yield from loader()

    data = torch.utils.data.DataLoader(Stream(), batch_size=None)
    assert hodec.compress(net(), data=data, include="3").hodec_plan.keys() == {"3"}


def test_weights_inside_modules_go_along():
    class Tagger(nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn, self.out = nn.LSTM(32, 64, batch_first=True), nn.Linear(64, 64)

        def forward(self, x):
            return self.out(self.rnn(x)[0])

    small = hodec.compress(Tagger(), data=[torch.randn(4, 6, 32)], params=0.5)
    assert any(name.startswith("rnn.") for name in small.hodec_plan)


def test_bad_input_is_refused_before_any_work():
    with pytest.raises(ConfigError, match="needs example_input.* or data"):
        hodec.compress(net())
    with pytest.raises(ConfigError, match="data has no batch"):
        hodec.compress(net(), data=[])
    with pytest.raises(ConfigError, match="give them to the rule"):
        hodec.compress(net(), example_input=torch.zeros(1, 3, 12, 12), macs=0.5, rule="energy")
    with pytest.raises(PlanError):
        hodec.compress(net(), example_input=torch.zeros(1, 3, 12, 12), macs=1e-9)


@pytest.mark.parametrize(("setting", "words"), [({"macs": 1.5}, "macs"), ({"on_error": "leave"}, "raise, skip")])
def test_a_bad_setting_is_refused_before_data_are_read(setting, words):
    class Unread:
        def __iter__(self):
            raise AssertionError("read")

    with pytest.raises(HodecError, match=words):
        hodec.compress(net(), example_input=torch.zeros(1, 3, 12, 12), data=Unread(), **setting)


# -- within an allowed drop ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def digits() -> tuple[nn.Module, list[tuple[torch.Tensor, torch.Tensor]], tuple[torch.Tensor, torch.Tensor]]:
    """A net trained on real digits, batches of what it was trained on, and digits that it never saw."""
    from sklearn.datasets import load_digits

    torch.manual_seed(0)
    found = load_digits()
    x, y = torch.tensor(found.images, dtype=torch.float32)[:, None] / 16, torch.tensor(found.target)
    model = nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(16, 32, 3, padding=1),
        nn.BatchNorm2d(32), nn.ReLU(), nn.Conv2d(32, 32, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(512, 10),
    )  # fmt: skip
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(4):
        for at in range(0, 1200, 50):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x[at : at + 50]), y[at : at + 50]).backward()
            optimizer.step()
    return model.eval(), list(zip(x[:256].split(32), y[:256].split(32), strict=True)), (x[1400:], y[1400:])


def accuracy(model: nn.Module, batches) -> float:
    """The share of right classes."""
    right = sum(int((model(x).argmax(1) == y).sum()) for x, y in batches)
    return right / sum(len(y) for _, y in batches)


@pytest.mark.parametrize("score", [accuracy, pytest.param(None, marks=pytest.mark.slow)], ids=["a score", "agreement"])
def test_the_smallest_net_within_the_allowed_drop(score, digits):
    model, data, unseen = digits
    held = []

    def noted(net, batches):
        held.append({id(batch) for batch in batches})
        return score(net, batches)

    small = hodec.compress(model, data=data, max_drop=0.02, evaluate=score and noted, exclude="0")
    report = small.compress_report
    assert report.dense - report.small <= 0.02
    assert report.held_out == 2
    assert all(batches == {id(batch) for batch in data[-2:]} for batches in held)
    shares = [share for share, found in report.tried if report.dense - found <= 0.02]
    assert small.hodec_plan.macs_after <= min(shares) * small.hodec_plan.macs_before
    assert min(shares) < 0.6
    assert accuracy(small, [unseen]) > accuracy(model, [unseen]) - 0.05
    assert f"{report.small:.4g} of {report.dense:.4g}" in str(report)


def test_a_drop_that_nothing_keeps_is_an_error(digits):
    model, data, _ = digits

    def spoiled(net, batches):
        return 1.0 if net is model else 0.5

    with pytest.raises(PlanError, match="nothing pays: no net within 0.1 of the dense net's 1 was found; the nearest"):
        hodec.compress(model, data=data, max_drop=0.1, evaluate=spoiled)


def test_scores_that_cannot_be_used_are_refused(digits):
    model, data, _ = digits
    rolls = iter(range(100))
    for evaluate, message in (
        (lambda *_: next(rolls), "gave 0 and then 1"),
        (lambda *_: float("nan"), "gave nan; allowed"),
        (lambda *_: None, "gave None; allowed: a finite number"),
        (lambda *_: torch.ones(2), "gave tensor"),
    ):
        with pytest.raises(DataError, match=message):
            hodec.compress(model, data=data, max_drop=0.1, evaluate=evaluate)
    for few in (data[:1], [(data[0][0][:3], data[0][1][:3])] * 2):
        with pytest.raises(DataError, match="at least two batches"):
            hodec.compress(model, data=few, max_drop=0.1)
    for settings, message in (
        ({"evaluate": accuracy, "data": data}, "give max_drop"),
        ({"max_drop": 0.1, "example_input": data[0][0]}, "give data together with max_drop"),
        ({"max_drop": 0.1, "data": data, "macs": 0.5}, "leave macs, params and rule out"),
        ({"max_drop": -1, "data": data}, "max_drop=-1 given"),
    ):
        with pytest.raises(ConfigError, match=message):
            hodec.compress(model, **settings)
