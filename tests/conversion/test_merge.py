"""merge: a converted model with dense layers again."""

import pytest
import torch
from small_nets import IMAGE, SmallResNet, Twice
from swaps import factorized, planned
from torch import nn

import hodec
from hodec.methods import METHODS


@pytest.mark.parametrize("method", METHODS)
def test_outputs_classes_and_settings_are_those_of_before(method: str):
    model = SmallResNet().double().eval()
    x = torch.randn(IMAGE).double()
    small = hodec.convert(model, planned(model, 4, x, method=method))
    dense = hodec.merge(small)
    assert factorized(small)
    assert not factorized(dense)
    assert [repr(m) for m in dense.modules()] == [repr(m) for m in model.modules()]
    assert list(dense.state_dict()) == list(model.state_dict())
    torch.testing.assert_close(dense(x), small(x), rtol=1e-9, atol=1e-9)
    assert not hasattr(dense, "hodec_plan")
    again = hodec.convert(dense, planned(dense, 4, x, method=method))  # it can be planned and converted anew
    torch.testing.assert_close(again(x), small(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("method", ["tt", "svd"])
@pytest.mark.parametrize(
    "layer",
    [
        nn.ConvTranspose2d(8, 12, 3, stride=2, padding=1, output_padding=1, bias=False),
        nn.Conv1d(8, 12, 3, padding="same", padding_mode="reflect"),
        nn.Linear(8, 12, bias=False),
        nn.Embedding(8, 12, padding_idx=1),
    ],
    ids=lambda layer: type(layer).__name__,
)
def test_layers_of_every_kind(layer: nn.Module, method: str):
    sizes = {"ConvTranspose2d": (2, 8, 5, 5), "Conv1d": (2, 8, 5), "Linear": (2, 8)}
    name = type(layer).__name__
    x = torch.randn(sizes[name]).to(torch.float64) if name in sizes else torch.tensor([[1, 2], [3, 1]])
    net = nn.Sequential(layer).to(torch.float64).eval()
    plan = planned(net, 2, x, method=method, allow_larger=True)
    small = hodec.convert(net, plan)
    dense = hodec.merge(small)
    assert repr(dense) == repr(net)
    torch.testing.assert_close(dense(x), small(x), rtol=1e-9, atol=1e-9)


def test_hooks_modes_frozen_layers_and_shared_modules_are_kept():
    model = SmallResNet()
    model.conv1.weight.requires_grad_(False)
    model.layer1.eval()
    small = hodec.convert(model, planned(model, 4, torch.randn(IMAGE)))
    small.conv1.register_forward_hook(lambda module, args, out: out * 2)
    dense = hodec.merge(small)
    assert not dense.conv1.weight.requires_grad
    assert dense.conv1.bias.requires_grad
    assert dense.layer1["conv1"].weight.requires_grad
    assert [m.training for m in dense.modules()] == [m.training for m in model.modules()]
    x = torch.randn(2, *IMAGE[1:])
    with torch.no_grad():
        torch.testing.assert_close(dense.eval()(x), small.eval()(x), rtol=1e-4, atol=1e-4)
    shared = hodec.merge(hodec.convert(Twice(), planned(Twice(), 3, torch.randn(1, 6, 8, 8))))
    assert shared.first is shared.second
    assert type(shared.first) is nn.Conv2d


def test_half_precision_is_multiplied_in_full():
    model = nn.Sequential(nn.Linear(64, 64)).to(torch.bfloat16)
    x = torch.randn(2, 64, dtype=torch.bfloat16)
    small = hodec.convert(model, planned(model, 4, x, method="svd"))
    exact = hodec.merge(small.double())[0].weight
    torch.testing.assert_close(
        hodec.merge(small.to(torch.bfloat16))[0].weight, exact.to(torch.bfloat16), rtol=0, atol=0
    )
