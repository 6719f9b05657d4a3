"""What parents read of a converted layer beside its output: the dense weight, and the settings of the dense layer."""

import copy

import pytest
import torch
from torch import nn

import hodec
from hodec.errors import ConvertError
from hodec.layers.base import FactorizedLayer
from hodec.layers.tt import TTLinear

SETTINGS = {
    "conv2d": (
        "in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups", "padding_mode",
        "output_padding",
    ),
    "linear": ("in_features", "out_features"),
    "embedding": ("num_embeddings", "embedding_dim", "padding_idx", "max_norm", "scale_grad_by_freq", "sparse"),
}  # fmt: skip


@pytest.mark.parametrize("method", ["tt", "svd"])
@pytest.mark.parametrize("kind", SETTINGS)
def test_a_converted_layer_answers_as_the_dense_one_and_so_does_the_fused_one(method: str, kind: str):
    dense = {
        "conv2d": nn.Conv2d(8, 12, (3, 1), stride=(2, 1), padding=(1, 0), bias=False),
        "linear": nn.Linear(16, 12),
        "embedding": nn.Embedding(8, 12, padding_idx=1),
    }[kind]
    x = {"conv2d": torch.randn(2, 8, 6, 6), "linear": torch.randn(2, 16), "embedding": torch.zeros(2, 3).long()}[kind]
    net = nn.Sequential(dense).eval()
    small = hodec.convert(net, hodec.make_plan(net, hodec.ranks.Manual(2), method=method, example_input=x))
    for layer in (small[0], hodec.fuse(small, example_input=x, target="macs")[0]):
        assert {name: getattr(layer, name) for name in SETTINGS[kind]} == {
            name: getattr(dense, name) for name in SETTINGS[kind]
        }
        for read in (lambda w: w.dtype, lambda w: w.device, lambda w: w.shape, lambda w: w.size(0), lambda w: w.ndim):
            assert read(layer.weight) == read(dense.weight)
        assert "weight" not in dict(layer.named_parameters()) or isinstance(layer, nn.Linear | nn.Conv2d)


@pytest.fixture
def layer() -> TTLinear:
    return TTLinear(16, 12, ranks=(3,))


def test_type_and_shape_are_read_without_computing_anything(layer: TTLinear, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(FactorizedLayer, "dense_weight", lambda self: pytest.fail("the weight was computed"))
    weight = layer.weight
    assert (weight.dtype, weight.device, weight.shape) == (torch.float32, torch.device("cpu"), (12, 16))
    assert isinstance(weight, torch.Tensor)
    assert layer.half().weight.dtype == torch.float16


def test_its_values_are_those_of_the_factors_and_gradients_reach_these(layer: TTLinear):
    x = torch.randn(5, 16)
    torch.testing.assert_close(nn.functional.linear(x, layer.weight, layer.bias), layer(x))
    layer.weight.square().sum().backward()
    assert all(bool(core.grad.abs().sum() > 0) for core in layer.cores)
    with torch.no_grad():
        layer.cores[0].data.mul_(2)
        torch.testing.assert_close(layer.weight @ x.T, layer.dense_weight() @ x.T)


def test_it_is_in_no_state_and_copies_have_their_own(layer: TTLinear):
    assert [name for name in layer.state_dict() if "weight" in name] == []
    assert [name for name, _ in layer.named_parameters() if "weight" in name] == []
    other = copy.deepcopy(layer)
    with torch.no_grad():
        other.cores[0].zero_()
    assert other.weight.abs().sum() == 0 < layer.weight.abs().sum()


@pytest.mark.parametrize(
    "write",
    [
        lambda layer: layer.weight.data.normal_(),
        lambda layer: nn.init.xavier_uniform_(layer.weight),
        lambda layer: layer.weight.copy_(torch.ones(12, 16)),
        lambda layer: layer.weight.__setitem__(0, 1.0),
    ],
)
def test_what_is_written_to_it_is_not_lost_in_silence(layer: TTLinear, write):
    with torch.no_grad(), pytest.raises(ConvertError, match=r"computed from its factors.*write to its parameters"):
        write(layer)


def test_nothing_can_be_tied_to_it(layer: TTLinear):
    with pytest.raises(KeyError, match="already exists"):
        layer.weight = nn.Parameter(torch.ones(12, 16))


def test_a_fused_product_still_has_its_values():
    net, x = nn.Sequential(nn.Linear(16, 12)).eval(), torch.randn(2, 16)
    small = hodec.convert(net, hodec.make_plan(net, hodec.ranks.Manual(2), method="svd", example_input=x))
    fused = hodec.fuse(small, example_input=x, target="macs")
    assert isinstance(fused[0], nn.Sequential)
    torch.testing.assert_close(fused[0].weight + 0, small[0].dense_weight())
