"""FactorSGD as an optimizer: groups, state, what it leaves alone."""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import hodec
from hodec.errors import ConfigError
from hodec.layers.base import factor_parameters
from hodec.optim.factor_sgd import FactorSGD, factorized_layers, newton_schulz, param_groups


@pytest.fixture
def net() -> nn.Module:
    torch.manual_seed(0)
    dense = nn.Sequential(
        nn.Conv2d(4, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.Flatten(), nn.Linear(128, 6)
    )
    plan = hodec.make_plan(dense, 3, method="tucker", example_input=torch.randn(2, 4, 8, 8), exclude="0")
    return hodec.convert(dense, plan)


def step(net: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor) -> None:
    optimizer.zero_grad()
    net(x).square().mean().backward()
    optimizer.step()


def test_groups_have_every_parameter_once(net: nn.Module) -> None:
    groups = param_groups(net, lr=0.1, factor_lr=0.01, weight_decay=1e-4, factor_decay=0.0)
    assert [group["name"] for group in groups] == ["others", "factors"]
    assert [(group["lr"], group["weight_decay"]) for group in groups] == [(0.1, 1e-4), (0.01, 0.0)]
    listed = [id(p) for group in groups for p in group["params"]]
    assert sorted(listed) == sorted(id(p) for p in net.parameters())
    factors = sum(sum(p.numel() for p in layer.parameters()) for layer in factorized_layers(net))
    biases = sum(layer.bias.numel() for layer in factorized_layers(net))
    assert sum(p.numel() for p in groups[1]["params"]) == factors - biases


def test_groups_serve_any_optimizer(net: nn.Module) -> None:
    optimizer = torch.optim.AdamW(param_groups(net, lr=1e-3, factor_lr=1e-4))
    step(net, optimizer, torch.randn(2, 4, 8, 8))
    assert [group["lr"] for group in optimizer.param_groups] == [1e-3, 1e-4]


def test_a_dense_net_is_trained_as_by_sgd() -> None:
    torch.manual_seed(0)
    one = nn.Sequential(nn.Linear(5, 7), nn.ReLU(), nn.Linear(7, 3))
    other = copy.deepcopy(one)
    ours = FactorSGD(one, 0.1, weight_decay=1e-3)
    theirs = torch.optim.SGD(other.parameters(), 0.1, momentum=0.9, nesterov=True, weight_decay=1e-3)
    for seed in range(3):
        x = torch.randn(4, 5, generator=torch.Generator().manual_seed(seed))
        step(one, ours, x)
        step(other, theirs, x)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize("factors", ["muon", "scaled_gd", "sgd"])
def test_it_goes_on_exactly_from_its_state(net: nn.Module, factors: str) -> None:
    batches = [torch.randn(2, 4, 8, 8) for _ in range(4)]
    optimizer = FactorSGD(net, 0.05, factors=factors, weight_decay=1e-3)
    for x in batches[:2]:
        step(net, optimizer, x)
    again, state = copy.deepcopy(net), copy.deepcopy(optimizer.state_dict())
    resumed = FactorSGD(again, 0.05, factors=factors, weight_decay=1e-3)
    resumed.load_state_dict(state)
    for x in batches[2:]:
        step(net, optimizer, x)
        step(again, resumed, x)
    for (name, a), b in zip(net.state_dict().items(), again.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


@pytest.mark.parametrize("factors", ["muon", "scaled_gd"])
def test_frozen_factors_stay(net: nn.Module, factors: str) -> None:
    layer = factorized_layers(net)[0]
    frozen = next(iter(layer.parameters())).requires_grad_(False)
    before, others = frozen.clone(), [p.clone() for p in layer.parameters()]
    step(net, FactorSGD(net, 0.05, factors=factors), torch.randn(2, 4, 8, 8))
    assert torch.equal(frozen, before)
    assert any(not torch.equal(a, b) for a, b in zip(others, layer.parameters(), strict=True))


@pytest.mark.parametrize("factors", ["muon", "scaled_gd"])
def test_half_precision_is_trained(net: nn.Module, factors: str) -> None:
    net = net.bfloat16()
    step(net, FactorSGD(net, 0.05, factors=factors), torch.randn(2, 4, 8, 8).bfloat16())
    assert all(p.isfinite().all() and p.dtype is torch.bfloat16 for p in net.parameters())


@pytest.mark.parametrize("factors", ["muon", "scaled_gd"])
def test_zero_factors_do_not_become_nan(net: nn.Module, factors: str) -> None:
    with torch.no_grad():
        for parameter in factorized_layers(net)[0].parameters():
            parameter.zero_()
    step(net, FactorSGD(net, 0.05, factors=factors), torch.randn(2, 4, 8, 8))
    assert all(p.isfinite().all() for p in net.parameters())


def test_gradients_are_there_after_a_step(net: nn.Module) -> None:
    step(net, FactorSGD(net, 0.05, factors="muon"), torch.randn(2, 4, 8, 8))
    assert all(p.grad is not None for p in net.parameters())


def test_hooks_are_called_once_a_step_whatever_optimizers_there_are(net: nn.Module) -> None:
    torch.optim.SGD(net.parameters(), 0.1)  # from now on torch calls hooks around SGD's own step
    optimizer, calls = FactorSGD(net, 0.05), list[object]()
    optimizer.register_step_pre_hook(lambda *_: calls.append("before"))
    optimizer.register_step_post_hook(lambda *_: calls.append("behind"))
    step(net, optimizer, torch.randn(2, 4, 8, 8))
    assert calls == ["before", "behind"]


@pytest.mark.parametrize("factors", ["muon", "sgd"])
def test_a_copy_trains_the_copied_net(net: nn.Module, factors: str) -> None:
    optimizer, x = FactorSGD(net, 0.05, factors=factors, weight_decay=1e-3, decay="product"), torch.randn(2, 4, 8, 8)
    again, copied = copy.deepcopy((net, optimizer))
    step(net, optimizer, x)
    step(again, copied, x)
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), again.parameters(), strict=True))


def test_scaled_gradients_decay_the_product_by_decaying_the_factors(net: nn.Module) -> None:
    nets, x = [net, copy.deepcopy(net)], torch.randn(2, 4, 8, 8)
    for one, decay in zip(nets, ("factors", "product"), strict=True):
        step(one, FactorSGD(one, 0.05, factors="scaled_gd", weight_decay=0.1, decay=decay), x)
    assert all(torch.equal(a, b) for a, b in zip(*(one.parameters() for one in nets), strict=True))


@pytest.mark.parametrize("shape", [(3, 4, 9), (2, 9, 4), (1, 5, 5)])
def test_newton_schulz_makes_singular_values_alike(shape: tuple[int, int, int]) -> None:
    turned = newton_schulz(torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64))
    values = torch.linalg.svdvals(turned)
    assert turned.shape == shape
    assert values.min() > 0.6
    assert values.max() < 1.25


@pytest.mark.parametrize(("options", "words"), [({"factors": "adam"}, "muon"), ({"decay": "all"}, "product")])
def test_unknown_words_are_refused(net: nn.Module, options: dict[str, str], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        FactorSGD(net, 0.1, **options)


@pytest.mark.parametrize("options", [{"lr": -1}, {"factor_lr": -3}, {"weight_decay": -0.1}, {"lr": float("nan")}])
def test_rates_and_decays_below_zero_are_refused(net: nn.Module, options: dict[str, float]) -> None:
    ((name, number),) = options.items()
    with pytest.raises(ConfigError, match=f"{name}: {number} given; allowed: a number of at least 0"):
        FactorSGD(net, **{"lr": 0.1, **options})


@pytest.mark.parametrize("factors", ["muon", "scaled_gd", "sgd"])
@pytest.mark.parametrize("method", ["svd", "tt"])
def test_factors_that_layers_share_move_once_a_step(factors: str, method: str) -> None:
    """An embedding and the head behind it, which has its weight."""
    torch.manual_seed(0)
    dense = nn.Sequential(nn.Embedding(96, 32), nn.Linear(32, 32), nn.Linear(32, 96))
    dense[2].weight = dense[0].weight
    tokens = torch.arange(24).reshape(2, 12)
    plan = hodec.make_plan(dense, 4, method=method, example_input=tokens, allow_larger=True)
    net = hodec.convert(dense, plan)
    optimizer = FactorSGD(net, 0.05, factors=factors, factor_lr=0.01)
    assert optimizer.layers == [net[2], net[1]]
    step(net, optimizer, tokens)
    for parameter in factor_parameters(net[2]):  # the first step's momentum is the gradient itself
        torch.testing.assert_close(optimizer.state[parameter]["momentum_buffer"], parameter.grad)
    assert factor_parameters(net[0]) == factor_parameters(net[2])


# -- what moves, and by which group ----------------------------------------------------------------------------------


class TwoLayers(nn.Module):
    """A net one of whose layers the loss may leave out."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body, self.aside = nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, x: Tensor, share: float = 1.0) -> Tensor:
        h = self.body(x).relu()
        return h + share * self.aside(h)


@pytest.fixture
def two() -> nn.Module:
    dense = TwoLayers()
    return hodec.convert(dense, hodec.make_plan(dense, 4, method="svd", example_input=torch.zeros(2, 16)))


def train(net: nn.Module, optimizer: torch.optim.Optimizer, share: float, steps: int) -> None:
    for k in range(steps):
        x = torch.randn(8, 16, generator=torch.Generator().manual_seed(k))
        optimizer.zero_grad(set_to_none=False)
        (net(x, share) - x).square().mean().backward()
        optimizer.step()


def test_a_factor_that_the_loss_leaves_out_stands_still(two: nn.Module) -> None:
    optimizer = FactorSGD(two, 0.02, factors="muon")
    train(two, optimizer, 1.0, 5)
    before = [p.detach().clone() for p in factor_parameters(two.aside)]
    train(two, optimizer, 0.0, 600)  # the momentum is far below the least float32 by then
    assert all(torch.equal(a, b) for a, b in zip(before, factor_parameters(two.aside), strict=True))
    train(two, optimizer, 1.0, 1)
    assert not torch.equal(before[0], next(iter(factor_parameters(two.aside))))
    assert all(p.isfinite().all() for p in two.parameters())


@pytest.mark.parametrize("size", [1e-18, 1e-25, 1e-37])
def test_newton_schulz_of_small_numbers(size: float) -> None:
    matrix = torch.randn(1, 4, 6, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(newton_schulz(matrix * size), newton_schulz(matrix), atol=1e-3, rtol=1e-3)


def test_a_zero_factor_is_told_of(two: nn.Module, caplog: pytest.LogCaptureFixture) -> None:
    FactorSGD(two, 0.02, factors="muon")
    with torch.no_grad():
        next(iter(factor_parameters(two.aside))).zero_()
    FactorSGD(two, 0.02, factors="scaled_gd")
    assert not caplog.records
    FactorSGD(two, 0.02, factors="muon")
    assert "cannot move a factor that is 0, as in aside" in caplog.text


def test_muon_keeps_norms_in_half_precision(two: nn.Module) -> None:
    two.bfloat16()
    factors = [p for layer in factorized_layers(two) for p in factor_parameters(layer)]
    before = [float(p.detach().float().norm()) for p in factors]
    optimizer, x = FactorSGD(two, 0.02, factors="muon"), torch.randn(8, 16).bfloat16()
    for _ in range(200):
        optimizer.zero_grad()
        (two(x) - x).square().mean().backward()
        optimizer.step()
    assert [float(p.detach().float().norm()) for p in factors] == pytest.approx(before, rel=0.05)


@pytest.mark.parametrize("factors", ["muon", "scaled_gd", "sgd"])
def test_a_factor_in_another_group_moves_by_its_rate(two: nn.Module, factors: str) -> None:
    optimizer = FactorSGD(two, 0.02, factors=factors)
    moved = list(factor_parameters(two.aside))
    group = next(one for one in optimizer.param_groups if one["name"] == "factors")
    group["params"] = [p for p in group["params"] if all(p is not one for one in moved)]
    optimizer.add_param_group({"params": moved, "lr": 0.0})
    before = [p.detach().clone() for p in two.parameters()]
    train(two, optimizer, 1.0, 2)
    still = [id(p) for a, p in zip(before, two.parameters(), strict=True) if torch.equal(a, p)]
    assert {*still} == {*map(id, moved)}


@pytest.mark.parametrize("factors", ["muon", "scaled_gd", "sgd"])
def test_to_maximize_is_to_minimize_what_is_below_zero(two: nn.Module, factors: str) -> None:
    nets = two, copy.deepcopy(two)
    for net, sign in zip(nets, (1, -1), strict=True):
        optimizer = FactorSGD(net, 0.02, factors=factors, weight_decay=0.1, decay="product")
        for group in optimizer.param_groups:
            group["maximize"] = sign < 0
        x = torch.ones(8, 16)
        (sign * (net(x) - x).square().mean()).backward()
        optimizer.step()
    for a, b in zip(*(net.parameters() for net in nets), strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5)


def test_the_decay_of_the_product_is_the_groups(two: nn.Module) -> None:
    optimizer = FactorSGD(two, 0.02, factors="sgd", weight_decay=0.5, decay="product")
    assert {group["weight_decay"] for group in optimizer.state_dict()["param_groups"]} == {0.5}
    first = next(iter(factor_parameters(two.aside)))
    gradient = torch.autograd.grad(two.aside.dense_weight().square().sum() / 2, first)[0]
    before = first.detach().clone()
    step_without_loss(two, optimizer)
    # the first step of momentum with look-ahead is 1.9 gradients long
    torch.testing.assert_close(first.detach() - before, -0.02 * 1.9 * 0.5 * gradient, atol=1e-6, rtol=1e-3)
    for group in optimizer.param_groups:
        group["weight_decay"] = 0.0
    optimizer.state.clear()
    before = first.detach().clone()
    step_without_loss(two, optimizer)
    assert torch.equal(first.detach(), before)


def step_without_loss(net: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    for parameter in net.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()


def test_a_new_group_has_the_decay_that_was_given(two: nn.Module) -> None:
    optimizer = FactorSGD(two, 0.02, weight_decay=0.5)
    optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2))]})
    assert optimizer.param_groups[-1]["weight_decay"] == 0.5


@pytest.mark.parametrize("made", [FactorSGD, param_groups])
def test_what_is_no_net_or_no_number_is_refused(two: nn.Module, made: Callable[..., object]) -> None:
    with pytest.raises(ConfigError, match="model: a generator given; allowed: an nn.Module"):
        made(two.parameters(), lr=0.1)
    with pytest.raises(ConfigError, match="lr: '0.1' given; allowed: a number of at least 0"):
        made(two, lr="0.1")
