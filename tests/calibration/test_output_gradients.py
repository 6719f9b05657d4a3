"""Second moments of gradients: the Jacobian's, whatever the net does with its outputs."""

import pytest
import torch
import torch.nn.functional as F
from small_nets import SmallResNet, assert_untouched, snapshot
from swaps import planned
from torch import Tensor, nn
from torch.testing import assert_close

import hodec
from hodec.calibration.output_gradients import TwoSided, collect_output_gradients
from hodec.errors import ConfigError, DataError, TrainingError


def test_roots_and_importances_are_those_of_the_jacobian(generator):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4, bias=False), nn.Linear(4, 3))
    x = torch.randn(4000, 6, generator=generator)
    plan = planned(net, 2, x[:1], method="svd", allow_larger=True)
    found = collect_output_gradients(net, plan, x.split(2000), damping=1e-6)
    second, third = net[1].weight.detach().double(), net[2].weight.detach().double()
    jacobians = {"0": third @ second, "1": third, "2": torch.eye(3, dtype=torch.float64)}
    outputs = {"0": net[0](x), "1": net[:2](x), "2": net(x)}
    energies = {}
    for name, jacobian in jacobians.items():
        gram, y = jacobian.mT @ jacobian, outputs[name].detach().double()
        root = found[name].root
        assert_close(root @ root, gram / gram.diagonal().mean(), rtol=0.1, atol=0.1)
        energies[name] = float((y @ jacobian.mT).square().sum())
    mean = sum(energies.values()) / 3
    for name, energy in energies.items():
        assert abs(found[name].importance - energy / mean) < 0.1 * energy / mean


class InPlace(nn.Module):
    """What a layer gives is changed in place behind it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.last = nn.Conv2d(6, 8, 3), nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(F.relu_(self.conv(x))).mean((2, 3))


def test_changes_in_place_and_frozen_weights_are_no_matter(generator):
    torch.manual_seed(0)
    net, x = InPlace(), torch.randn(16, 6, 8, 8, generator=generator)
    plan = planned(net, 2, x[:1], method="svd", allow_larger=True)
    found = collect_output_gradients(net, plan, [x])
    net.requires_grad_(False)
    before = snapshot(net)
    again = collect_output_gradients(net, plan, [x])
    assert_untouched(net, before)
    assert found.keys() == {"conv", "last"}
    for name, one in found.items():
        assert torch.equal(one.root, again[name].root)
    dead = InPlace()
    with torch.no_grad():
        dead.conv.bias.fill_(-100)  # the ReLU lets nothing through
    assert collect_output_gradients(dead, plan, [x]).keys() == {"last"}


def test_ranks_by_what_the_net_loses(generator):
    """A layer whose outputs hardly count gets the lower ranks, though it is the same layer."""

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.loud, self.quiet = nn.Linear(32, 32), nn.Linear(32, 32)

        def forward(self, x: Tensor) -> Tensor:
            return self.loud(x) + 0.01 * self.quiet(x)

    torch.manual_seed(0)
    net, x = Two(), torch.randn(256, 32, generator=generator)
    net.quiet.load_state_dict(net.loud.state_dict())
    small = hodec.compress(net, data=list(x.split(64)), macs=0.5, method="svd")
    assert small.hodec_plan["quiet"].ranks[0] < 0.5 * (
        small.hodec_plan["loud"].ranks[0] if "loud" in small.hodec_plan else 32
    )


def test_split_outputs_are_not_mixed(generator):
    torch.manual_seed(0)
    net, x = SmallResNet().eval(), torch.randn(8, 6, 12, 12, generator=generator)
    for method, mixed in (("svd", True), ("tt", False)):
        plan = planned(net, 2, x[:1], method=method, include="layer1.conv2", allow_larger=True)
        gradient = collect_output_gradients(net, plan, [x])["layer1.conv2"]
        covariance = hodec.collect_covariances(net, plan, [x])["layer1.conv2"]
        both = TwoSided(covariance, gradient).check("layer1.conv2", plan["layer1.conv2"])
        weight = net.layer1["conv2"].weight.detach()
        white = covariance.apply(weight)
        expected = torch.einsum("po,oihw->pihw", gradient.root, white) if mixed else white
        assert_close(both.apply(weight), expected)


def test_a_net_without_a_layer_that_meets_patches_is_compressed(generator):
    net, x = nn.Sequential(nn.Conv2d(32, 32, 3, groups=2)), torch.randn(8, 32, 6, 6, generator=generator)
    assert list(hodec.compress(net, data=[x, x], macs=0.5).hodec_plan) == ["0"]


def test_a_net_that_gives_no_numbers_is_refused(generator):
    net = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    plan = planned(net, 2, torch.zeros(1, 8), method="svd", allow_larger=True)
    with torch.no_grad():
        net[1].bias[0] = torch.nan
    with pytest.raises(TrainingError, match="layer 1: its output on the calibration data"):
        collect_output_gradients(net, plan, [torch.randn(8, 8, generator=generator)])


def test_bad_requests_are_refused(generator):
    net, x = SmallResNet(), torch.randn(8, 6, 12, 12, generator=generator)
    plan = planned(net, 2, x[:1], method="svd", allow_larger=True)
    with pytest.raises(ConfigError, match="damping: 0 given"):
        collect_output_gradients(net, plan, [x], damping=0)
    with torch.inference_mode(), pytest.raises(ConfigError, match=r"not in torch\.inference_mode"):
        collect_output_gradients(net, plan, [x])
    with pytest.raises(DataError, match="no batch to collect gradients from"):
        collect_output_gradients(net, plan, [])

    class Classes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = net

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x).argmax(1)

    plan = planned(Classes(), 2, x[:1], method="svd", allow_larger=True)
    with pytest.raises(DataError, match="no tensor of numbers"):
        collect_output_gradients(Classes(), plan, [x])
