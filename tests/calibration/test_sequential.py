"""Layers fitted one after the other: what earlier ones lost is made up for, and nothing else of the net is touched."""

import copy
import threading

import pytest
import torch
import torch.nn.functional as F
from small_nets import IMAGE, SmallResNet, Tokens, Twice, assert_untouched, snapshot
from swaps import planned
from torch import Tensor, nn
from torch.testing import assert_close

from hodec.calibration import sequential
from hodec.calibration.input_covariance import collect_covariances
from hodec.calibration.output_gradients import collect_output_gradients
from hodec.calibration.sequential import TOGETHER, fit_to_data
from hodec.conversion.batchnorm import reestimate_batchnorm
from hodec.conversion.swap import convert
from hodec.errors import ConfigError, DataError
from hodec.methods import METHODS


def images(generator: torch.Generator, count: int = 64, channels: int = 6) -> Tensor:
    """Images whose channels and neighbours say much the same."""
    mix = torch.randn(channels, channels, generator=generator) * 2.0 ** -torch.arange(channels)
    x = torch.randn(count, channels, 12, 12, generator=generator)
    return torch.einsum("oi,nihw->nohw", mix, x + x.roll(1, 2) + x.roll(1, 3))


def settled(generator: torch.Generator) -> tuple[nn.Module, Tensor]:
    """A net whose BatchNorm has the statistics of its data, and such data."""
    torch.manual_seed(0)
    net, x = SmallResNet(), images(generator)
    with torch.no_grad():
        for _ in range(50):
            net(x)
    return net.eval(), x


@torch.no_grad()
def error(net: nn.Module, other: nn.Module, x: Tensor) -> float:
    return float((net.eval()(x) - other.eval()(x)).norm() / net(x).norm())


@pytest.mark.parametrize("method", ["svd", "spatial_svd", "tucker", "cp"])
def test_unseen_outputs_are_nearer_than_with_covariances_of_the_dense_net(method: str, generator):
    net, x = settled(generator)
    data, unseen = list(x.split(16)), images(generator)
    plan = planned(net, 4, x[:1], method=method, include=["layer1.*"], allow_larger=True)
    before = snapshot(net)
    near = fit_to_data(net, plan, data)
    assert_untouched(net, before)
    white = convert(net, plan, covariances=collect_covariances(net, plan, data))
    assert error(net, near, unseen) < 0.8 * error(net, white, unseen)
    assert_close(near(unseen), convert(near, plan)(unseen), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("method", METHODS)
def test_full_ranks_leave_the_outputs(method: str, generator):
    net, x = settled(generator)
    plan = planned(net, 10_000, x[:1], method=method, allow_larger=True, n_modes=2)
    near = fit_to_data(net, plan, [x])
    assert error(net, near, images(generator)) < (2e-2 if plan["conv1"].format.iterative else 1e-3)


def test_a_bias_is_fitted_where_there_is_one_and_in_batchnorm_otherwise(generator):
    net, x = settled(generator)
    plan = planned(net, 2, x[:1], method="svd", include=["conv1", "layer1.conv1"], allow_larger=True)
    near = fit_to_data(net, plan, [x], positions=None, turns=0)
    taken = {}
    for name, one in (("dense", net), ("near", near)):
        for layer in ("bn1", "layer1.bn1"):
            hook = one.get_submodule(layer).register_forward_hook(
                lambda _m, _a, out, key=(name, layer): taken.__setitem__(key, out)
            )
            one(x)
            hook.remove()
    for layer in ("bn1", "layer1.bn1"):
        means = [taken[name, layer].mean((0, 2, 3)) for name in ("dense", "near")]
        assert_close(*means, rtol=1e-3, atol=1e-3)
    assert near.layer1["conv1"].bias is None
    assert not torch.equal(near.layer1["bn1"].running_mean, net.layer1["bn1"].running_mean)
    assert torch.equal(near.layer1["bn1"].running_var, net.layer1["bn1"].running_var)


def test_without_bias_and_batchnorm_outputs_are_met_as_they_are(generator):
    torch.manual_seed(0)
    net, x = Tokens().eval(), torch.randn(64, 6, 16, generator=generator) + 1
    plan = planned(net, 3, x[:1], method="svd", allow_larger=True)
    near = fit_to_data(net, plan, x.split(16))
    assert near.down.bias is None
    assert not torch.equal(near.up.bias, net.up.bias)
    assert error(net, near, x) < error(net, convert(net, plan), x)
    hidden = F.gelu(near.up(x)).flatten(0, 1).detach().double()  # the last layer alone: regression without a constant
    wanted = net(x).flatten(0, 1).detach().double()
    best = torch.linalg.lstsq(hidden, wanted).solution
    fitted = hidden @ best
    directions = torch.linalg.svd(fitted, full_matrices=False).Vh[: plan["down"].ranks[0]]
    least = (wanted - fitted @ directions.mT @ directions).norm()
    assert float((near(x).detach().flatten(0, 1) - wanted).norm()) < 1.03 * float(least)


def test_a_layer_that_is_called_twice_is_fitted_to_both(generator):
    torch.manual_seed(0)
    net, x = Twice().eval(), images(generator)
    plan = planned(net, 2, x[:1], method="svd", allow_larger=True)
    near = fit_to_data(net, plan, x.split(16))
    assert error(net, near, x) < error(net, convert(net, plan), x)


class SharedNorm(nn.Module):
    """Two layers before one BatchNorm."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = (nn.Conv2d(6, 6, 3, padding=1, bias=False) for _ in range(2))
        self.norm = nn.BatchNorm2d(6)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.one(x)) + self.norm(self.two(x))


class AlsoBeside(SharedNorm):
    """A layer whose output goes into BatchNorm, and past it."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.one(x)
        return self.two(torch.relu(self.norm(y))) + y


@pytest.mark.parametrize("made", [SharedNorm, AlsoBeside])
def test_a_batchnorm_that_is_not_a_layers_own_keeps_its_statistics(made: type[nn.Module], generator):
    torch.manual_seed(0)
    net, x = made(), images(generator).relu() + 1
    for _ in range(50):
        net(x)
    plan = planned(net.eval(), 2, x[:1], method="svd", allow_larger=True)
    near = fit_to_data(net, plan, x.split(16))
    assert_close(near.norm.running_mean, net.norm.running_mean, rtol=0, atol=0)
    assert error(net, near, x) < 0.9 * error(net, convert(net, plan), x)


def test_what_meets_no_patches_is_projected(generator):
    class Tagger(nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.rnn = nn.Embedding(40, 32), nn.LSTM(32, 64, batch_first=True)
            self.norm = nn.utils.parametrizations.weight_norm(nn.Linear(64, 64))
            self.out = nn.Linear(64, 64)

        def forward(self, x):
            return self.out(self.norm(self.rnn(self.table(x))[0]))

    torch.manual_seed(0)
    net, tokens = Tagger().eval(), torch.randint(0, 40, (32, 6), generator=generator)
    plan = planned(net, 4, tokens[:1], method="svd", allow_larger=True)
    assert {"table", "norm", "out"} < set(plan)
    near = fit_to_data(net, plan, tokens.split(8))
    small = convert(near, plan)
    assert_close(small.table.dense_weight(), near.table.weight, rtol=1e-4, atol=1e-4)
    assert error(net, small, tokens) < error(net, convert(net, plan), tokens)


def test_sums_and_rectifiers_bring_unseen_outputs_nearer(generator):
    """The block's two last layers make up for what the block before lost, on both sides of the sum."""
    net, x = settled(generator)
    plan = planned(net, 4, x[:1], method="svd", include=["conv1", "layer1.*"], allow_larger=True)
    data, unseen = list(x.split(16)), images(generator)
    errors = {
        (sums, turns): error(net, fit_to_data(net, plan, data, sums=sums, turns=turns), unseen)
        for sums, turns in ((False, 0), (False, 3), (True, 3))
    }
    assert errors[True, 3] < 0.9 * errors[False, 0]
    assert errors[True, 3] < errors[False, 3]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_nets_of_other_types_are_fitted_alike(dtype: torch.dtype, generator):
    net, x = settled(generator)
    net, x = net.to(dtype), x.to(dtype)
    plan = planned(net, 3, x[:1], method="svd", include=["layer1.*"], allow_larger=True)
    near = fit_to_data(net, plan, x.split(16))
    assert error(net, near, x) < 0.9 * error(net, convert(net, plan), x)


def test_what_is_beside_a_sum_is_made_up_for(generator):
    """A layer that can do all meets the sum as well as a layer can that sees the sum."""

    class Beside(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lossy, self.whole = nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            return self.lossy(x) + self.whole(x)

    torch.manual_seed(0)
    net, x = Beside(), torch.randn(200, 8, generator=generator)
    plan = planned(net, {"lossy": 1, "whole": 8}, x[:1], method="svd", allow_larger=True)
    data = list(x.split(50))
    assert error(net, fit_to_data(net, plan, data), x) < 0.01
    assert error(net, fit_to_data(net, plan, data, sums=False), x) > 0.2


def test_output_roots_decide_what_is_kept(generator):
    net, x = settled(generator)
    plan = planned(net, 3, x[:1], method="svd", include="layer1.conv1", allow_larger=True)
    root = torch.diag(torch.tensor([10.0] * 3 + [1.0] * 21, dtype=torch.float64))

    @torch.no_grad()
    def off(near: nn.Module) -> float:
        first = [one.layer1["conv1"](F.relu(one.bn1(one.conv1(x))))[:, :3] for one in (net, near)]
        means = [one.layer1["bn1"].running_mean[:3, None, None] for one in (net, near)]
        return float(((first[0] - means[0]) - (first[1] - means[1])).norm())

    plain = fit_to_data(net, plan, [x], turns=0)
    assert off(fit_to_data(net, plan, [x], turns=0, output_roots={"layer1.conv1": root})) < 0.5 * off(plain)


def test_more_batches_than_go_together_are_fitted_as_well(generator):
    """On all positions the sums are the same, however the data are read."""
    net, x = settled(generator)
    plan = planned(net, 4, x[:1], method="svd", include=["layer1.*"], allow_larger=True)
    few, many = list(x.split(16)), list(x.split(3))
    assert len(few) <= TOGETHER < len(many)
    nets = [fit_to_data(net, plan, data, positions=None) for data in (few, iter(many))]
    assert_close(*(one(x) for one in nets), rtol=1e-3, atol=1e-3)
    assert error(net, nets[1], x) < error(net, convert(net, plan), x)


def test_memory_is_given_back_where_layers_meet_much(generator, monkeypatch):
    net, x = settled(generator)
    plan = planned(net, 4, x[:1], method="svd", include="layer1.*", allow_larger=True)
    given = []
    monkeypatch.setattr(sequential, "give_back", lambda: given.append(1))
    fit_to_data(net, plan, [x], solver="none")
    assert given == []
    monkeypatch.setattr(sequential, "LARGE", 1)
    fit_to_data(net, plan, [x], solver="none")
    assert given


def test_an_error_on_the_way_comes_through_and_leaves_nothing(generator):
    class Refusing(SmallResNet):
        def forward(self, x: Tensor) -> Tensor:
            if len(x) == 7:
                raise ValueError("seven images")
            return super().forward(x)

    net, x = Refusing(), images(generator)
    plan = planned(net, 2, x[:1], method="svd", allow_larger=True)
    before, threads = snapshot(net), threading.active_count()
    with pytest.raises(DataError, match=r"on a batch .*7x6x12x12\): ValueError: seven images; the forward of Refusing"):
        fit_to_data(net, plan, [x[:8], x[:7]])
    assert_untouched(net, before)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in net.modules())
    assert threading.active_count() == threads


def test_a_batch_that_the_net_does_not_take_is_named(generator):
    net, x = settled(generator)
    plan, bad = planned(net, 4, x[:1], method="svd", allow_larger=True), [x[:8], x[:8, :5]]
    for call in (fit_to_data, collect_covariances, collect_output_gradients):
        with pytest.raises(
            DataError, match=r"does not run on a batch of the data \(float32 \dx5x12x12\): RuntimeError"
        ):
            call(net, plan, bad)
    with pytest.raises(
        DataError, match=r"does not run on a batch of the data \(float32 1x6\): ValueError: Expected more"
    ):
        reestimate_batchnorm(nn.Sequential(nn.BatchNorm1d(6)), [x[:1, :, 0, 0]])


class Experts(nn.Module):
    """Two layers, of which the first gets the rows that begin with more than 9; without any it is called or not."""

    def __init__(self, *, called: bool) -> None:
        super().__init__()
        self.one, self.two, self.called = nn.Linear(8, 8), nn.Linear(8, 8), called

    def forward(self, x: Tensor) -> Tensor:
        sent = x[:, 0] > 9
        rest = self.two(x[~sent])
        return torch.cat([self.one(x[sent]), rest]) if self.called or sent.any() else rest


@pytest.mark.parametrize("called", [True, False])
@pytest.mark.parametrize("count", [2, TOGETHER + 1])
def test_an_expert_without_a_token_is_projected(count: int, called: bool, generator, caplog):
    torch.manual_seed(0)
    net, x = Experts(called=called), torch.randn(8 * count, 8, generator=generator)
    example = torch.cat([x[:1], x[:1] + 99])
    plan = planned(net, 2, example, method="svd", allow_larger=True)
    projected = copy.deepcopy(net)
    for name, layer in plan.items():
        weight = projected.get_submodule(name).weight
        weight.data = layer.project(weight.data)
    near = fit_to_data(net, plan, x.split(8))
    assert "one gets no data of " in caplog.text
    assert_close(near.one.weight, projected.one.weight)
    assert error(net, near, x) < error(net, projected, x)
    caplog.clear()
    data = [torch.cat([x, x + 99]), x]  # the second batch alone lacks such rows
    assert error(net, fit_to_data(net, plan, data), data[0]) < error(net, projected, data[0])
    assert not caplog.text


@pytest.mark.parametrize(("name", "given"), [("positions", 0), ("turns", -1)])
def test_settings_out_of_range_are_refused(name: str, given: int, generator):
    net, x = settled(generator)
    plan = planned(net, 4, x[:1], method="svd", allow_larger=True)
    with pytest.raises(ConfigError, match=f"{name}: {given} given; allowed: a whole number from {given + 1}"):
        fit_to_data(net, plan, [x], **{name: given})


def test_no_data_are_refused(generator):
    net, x = settled(generator)
    with pytest.raises(DataError, match="no batch to fit to"):
        fit_to_data(net, planned(net, 4, x[:1], method="svd", allow_larger=True), [])
    assert IMAGE[1:] == x.shape[1:]
