"""What uses covariances: converting, the Z-update of ADMM, and a net trained on real data that loses less by them."""

import pytest
import torch
import torch.nn.functional as F
from small_nets import IMAGE, SmallResNet, Tokens
from swaps import factorized, planned
from torch import Tensor, nn
from torch.testing import assert_close

from hodec.admm.updates import project_layers
from hodec.calibration.input_covariance import collect_covariances, whitened_projection
from hodec.conversion.swap import convert
from hodec.methods import METHODS


@pytest.mark.parametrize("method", METHODS)
def test_converting_takes_the_nearest_weight_in_the_metric(method: str):
    net, x = SmallResNet(), torch.randn(IMAGE)
    plan = planned(net, 4, x, method=method, allow_larger=True)
    covariances = collect_covariances(net, plan, [x])
    left_out, *some = plan
    small = factorized(convert(net, plan, covariances={name: covariances[name] for name in some}))
    for name, layer in small.items():
        weight = net.get_submodule(name).weight.detach()
        expected = (
            whitened_projection(plan[name], weight, covariances[name]) if name in some else plan[name].project(weight)
        )
        if not layer.format.iterative:
            assert_close(layer.dense_weight().detach(), expected, rtol=1e-4, atol=1e-5)
    assert left_out in small
    bare = convert(net, plan, decompose=False, covariances=covariances)
    assert set(factorized(bare)) == set(small)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_converting_nets_of_other_types(dtype: torch.dtype):
    net, x = Tokens().to(dtype).eval(), torch.randn(4, 6, 16).to(dtype)
    plan = planned(net, 5, x, method="svd", allow_larger=True)
    covariances = collect_covariances(net, plan, [x])
    small = convert(net, plan, covariances=covariances)
    assert {p.dtype for p in small.parameters()} == {dtype}
    nearest = whitened_projection(plan["up"], net.up.weight.detach().double(), covariances["up"])
    found = small.up.dense_weight().detach()
    assert float((found - nearest).norm() / nearest.norm()) < (1e-10 if dtype == torch.float64 else 0.02)


def test_layers_with_and_without_metrics_are_projected_together(generator):
    net, x = SmallResNet(), torch.randn(IMAGE, generator=generator)
    plan = planned(net, 4, x, n_modes=1)
    covariances = collect_covariances(net, plan, [x])
    del covariances["conv1"]
    tensors = {name: net.get_submodule(name).weight.detach() for name in plan}
    result = project_layers(plan, tensors, covariances)
    assert list(result) == list(tensors)
    for name, z in result.items():
        expected = plan[name].project(tensors[name])
        if name in covariances:
            assert float((z - expected).norm() / expected.norm()) > 1e-3
            expected = whitened_projection(plan[name], tensors[name], covariances[name])
        assert_close(z, expected, rtol=0, atol=1e-5)
        assert z.dtype == torch.float32
    only = {"layer1.conv2": tensors["layer1.conv2"]}
    assert list(project_layers(plan, only, covariances)) == list(only)


@pytest.fixture(scope="module")
def digits() -> tuple[nn.Module, Tensor, Tensor]:
    """A small net trained on real digits, images for the covariances, and others to measure on."""
    from sklearn.datasets import load_digits

    torch.manual_seed(0)
    found = load_digits()
    x, y = torch.tensor(found.images, dtype=torch.float32)[:, None] / 16, torch.tensor(found.target)
    net = nn.Sequential(
        nn.Conv2d(1, 8, 3, stride=2, padding=1), nn.ReLU(), nn.Conv2d(8, 16, 3, padding=1), nn.ReLU(),
        nn.Conv2d(16, 16, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(256, 10),
    )  # fmt: skip
    optimizer = torch.optim.Adam(net.parameters(), lr=5e-3)
    for _ in range(4):
        for at in range(0, 1200, 50):
            optimizer.zero_grad()
            F.cross_entropy(net(x[at : at + 50]), y[at : at + 50]).backward()
            optimizer.step()
    assert (net(x[1400:]).argmax(1) == y[1400:]).float().mean() > 0.85
    return net.eval(), x[:200], x[1400:]


@pytest.mark.parametrize("method", METHODS)
def test_a_net_trained_on_digits_keeps_more_of_its_output(method: str, digits):
    net, calibration, unseen = digits
    plan = planned(net, 5, calibration[:1], method=method, n_modes=1, include=["2", "4"], allow_larger=True)
    covariances = collect_covariances(net, plan, calibration.split(50))
    with torch.no_grad():
        errors = [float((convert(net, plan, covariances=m)(unseen) - net(unseen)).norm()) for m in (covariances, None)]
    assert errors[0] < 0.9 * errors[1]
