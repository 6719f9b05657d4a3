"""Targets in front of a ReLU."""

import torch
from swaps import planned
from torch import Tensor, nn

from hodec.calibration.fit import fit_layer
from hodec.calibration.moments import FitMoments
from hodec.calibration.responses import Responses

ROWS, INPUTS, OUTPUTS = 400, 8, 6


def setting(generator: torch.Generator):
    """Patches, what is wanted, and behind it scale, shift, the sum in the dense net and what is added in the small."""
    x = torch.randn(ROWS, INPUTS, generator=generator, dtype=torch.float64)
    net = nn.Sequential(nn.Linear(INPUTS, OUTPUTS))
    weight = torch.randn(OUTPUTS, INPUTS, generator=generator)
    wanted = (x @ weight.double().mT).float() + 0.3
    scale, shift = 1 + torch.rand(OUTPUTS, generator=generator), torch.randn(OUTPUTS, generator=generator)
    beside = torch.randn(ROWS, OUTPUTS, generator=generator)
    layer = planned(net, 2, x[:1].float(), method="svd", allow_larger=True)["0"]
    return layer, weight, x, wanted, scale, shift, wanted * scale + shift + beside, beside


def loss(fit, x: Tensor, scale: Tensor, shift: Tensor, z: Tensor, beside: Tensor) -> tuple[float, float]:
    """The bound that the turns lower, and the squared error behind the ReLU."""
    near = (x @ fit.weight.flatten(1).mT + fit.bias) * scale + shift + beside
    bound = torch.where(z > 0, z - near, near.clamp_min(0)).square().sum()
    return float(bound), float((z.relu() - near.relu()).square().sum())


def test_each_turn_lowers_the_bound_and_the_responses_come_nearer(generator):
    layer, weight, x, wanted, scale, shift, z, beside = setting(generator)
    scale = torch.full_like(scale, 1.5)  # a fit counts all outputs alike
    z = wanted * scale + shift + beside
    responses, moments = Responses(scale, shift), FitMoments(layer.shape)
    moments.add(x, wanted)
    responses.add(x, wanted, z, beside)
    found, now = [], moments
    for _ in range(6):
        fit = fit_layer(layer, weight, now, damping=1e-9)
        found.append(loss(fit, x, scale, shift, z, beside))
        now = responses.towards(fit, moments)
    bounds = [bound for bound, _ in found]
    assert all(after <= before * 1.002 for before, after in zip(bounds, bounds[1:], strict=False))
    assert found[-1][1] < 0.97 * found[0][1]  # much of it is what is added, which no weight changes
    assert all(true <= bound * 1.0001 for bound, true in found)


def test_wanted_values_are_those_of_the_rows(generator):
    layer, weight, x, wanted, scale, shift, z, beside = setting(generator)
    responses, moments = Responses(scale, shift), FitMoments(layer.shape)
    moments.add(x, wanted)
    for part in (slice(0, 150), slice(150, None)):
        responses.add(x[part], wanted[part], z[part], beside[part])
    fit = fit_layer(layer, weight, moments)
    given = x @ fit.weight.mT + fit.bias
    near = given * scale + shift + beside
    expected = FitMoments(layer.shape)
    expected.add(x, torch.where(z > 0, (z - shift - beside) / scale, torch.minimum(given, -(shift + beside) / scale)))
    found = responses.towards(fit, moments)
    assert torch.allclose(found.yx, expected.yx, rtol=1e-2, atol=1)
    assert torch.allclose(found.yy, expected.yy, rtol=1e-2)
    assert found.xx is moments.xx
    assert not torch.allclose(moments.yx, expected.yx, rtol=1e-2, atol=1)  # those of the first fit stay
    assert bool((near > 0).any())


def test_what_there_is_no_room_for_is_stood_for(generator, monkeypatch):
    layer, weight, x, wanted, scale, shift, z, beside = setting(generator)
    monkeypatch.setattr("hodec.calibration.responses.KEPT", ROWS * INPUTS)
    once, twice = FitMoments(layer.shape), FitMoments(layer.shape)
    responses = Responses(scale, shift)
    for moments in (once, twice, twice):
        moments.add(x, wanted)
    responses.add(x, wanted, z, beside)
    one = responses.towards(fit_layer(layer, weight, once), once)
    responses.add(x, wanted, z, beside)
    assert len(responses.rows) == 1
    two = responses.towards(fit_layer(layer, weight, twice), twice)
    assert torch.allclose(2 * one.yx, two.yx, rtol=1e-4, atol=1e-2)
