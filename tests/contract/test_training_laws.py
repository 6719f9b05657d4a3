"""Laws of training factors: what the Gram matrices are, and what a step depends on."""

import pytest
import torch
from cases import Case, every_case, relative
from torch import Tensor

from hodec.layers.base import FactorizedLayer, factor_parameters
from hodec.optim.cores import cores_of, grams, through
from hodec.optim.factor_sgd import FactorSGD


def product(layer: FactorizedLayer) -> Tensor:
    """The weight that the factors stand for."""
    return layer.format.reconstruct(layer.factors(), layer.shape, layer.modes)


def made(case: Case) -> FactorizedLayer:
    torch.manual_seed(0)
    return case.layer(case.dense())


def descend(layer: FactorizedLayer, target: Tensor, **options: object) -> None:
    """One step towards a weight."""
    optimizer = FactorSGD(layer, 0.1, momentum=0.0, **options)  # type: ignore[arg-type]
    (product(layer) - target).square().sum().backward()
    optimizer.step()


@every_case
def test_grams_tell_how_far_the_weight_moves_with_one_factor(case: Case) -> None:
    layer = made(case)
    cores, before = cores_of(layer), product(layer).detach()
    for core, gram in zip(cores, grams(cores), strict=True):
        change = torch.randn_like(core.values)
        told = (change * through(core._replace(values=change), *gram).view_as(change)).sum()
        core.values.add_(change)
        moved = (product(layer).detach() - before).square().sum()
        core.values.sub_(change)
        torch.testing.assert_close(told, moved, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("factors", ["muon", "scaled_gd"])
@every_case
def test_a_step_of_the_product_is_the_same_however_the_factors_share_its_scale(case: Case, factors: str) -> None:
    one, other = made(case), made(case)
    first, second = factor_parameters(other)[:2]
    with torch.no_grad():
        first.mul_(8.0)
        second.div_(8.0)
    target = case.weight()
    for layer in (one, other):
        descend(layer, target, factors=factors)
    assert relative(product(one), product(other)) < 1e-9


@every_case
def test_plain_descent_depends_on_how_the_factors_share_the_scale(case: Case) -> None:
    """What the two laws above are good for, and that they can fail."""
    one, other = made(case), made(case)
    first, second = factor_parameters(other)[:2]
    with torch.no_grad():
        first.mul_(8.0)
        second.div_(8.0)
    for layer in (one, other):
        descend(layer, case.weight(), factors="sgd", factor_lr=1e-4)
    assert relative(product(one), product(other)) > 1e-6


@every_case
def test_muon_keeps_the_norm_of_a_factor_and_moves_it_by_its_rate(case: Case) -> None:
    layer = made(case)
    before = [p.detach().clone() for p in factor_parameters(layer)]
    descend(layer, case.weight(), factors="muon", factor_lr=0.01)
    for was, now in zip(before, factor_parameters(layer), strict=True):
        torch.testing.assert_close(now.norm(), was.norm(), rtol=1e-9, atol=0.0)
        assert 0 < relative(now, was) < 0.0101


@every_case
def test_decay_of_the_product_is_its_gradient(case: Case) -> None:
    layer = made(case)
    (product(layer).square().sum() / 2).backward()
    wanted = [0.3 * p.grad for p in factor_parameters(layer) if p.grad is not None]
    before = [p.detach().clone() for p in factor_parameters(layer)]
    for parameter in layer.parameters():
        parameter.grad = torch.zeros_like(parameter)
    FactorSGD(layer, 1.0, factors="sgd", momentum=0.0, weight_decay=0.3, decay="product").step()
    for was, now, gradient in zip(before, factor_parameters(layer), wanted, strict=True):
        assert relative(was - now, gradient) < 1e-9


@pytest.mark.parametrize("factors", ["muon", "scaled_gd"])
@every_case
def test_it_comes_nearer_to_a_weight_nearby(case: Case, factors: str) -> None:
    layer, goal = made(case), made(case)
    with torch.no_grad():
        for parameter in factor_parameters(goal):
            turned = parameter + 0.3 * torch.randn_like(parameter) * parameter.square().mean().sqrt()
            parameter.copy_(turned * parameter.norm() / turned.norm())
        target = product(goal)
    optimizer = FactorSGD(layer, 0.05, factors=factors, momentum=0.0, factor_lr=0.02 if factors == "muon" else None)
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        loss = (product(layer) - target).square().sum()
        loss.backward()
        losses.append(float(loss.detach()))
        optimizer.step()
    assert min(losses) < 0.5 * losses[0]
