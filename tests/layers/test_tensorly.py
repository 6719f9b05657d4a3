"""tensorly in and out: the same weight, memory shared, and no backend left changed."""

import copy
import sys

import numpy as np
import pytest
import torch
from torch import nn

from hodec.errors import ConvertError, RankError
from hodec.formats.modes import Modes
from hodec.layers.base import FactorizedLayer
from hodec.methods import METHODS

tensorly = pytest.importorskip("tensorly")

CASES = [
    ("tt", "conv2d", nn.Conv2d(8, 12, 3, padding=1)),
    ("tt", "conv_transpose2d", nn.ConvTranspose2d(8, 12, 3, stride=2)),
    ("tt", "linear", nn.Linear(8, 12)),
    ("tt", "embedding", nn.Embedding(24, 12)),
    ("tt_classical", "conv2d", nn.Conv2d(8, 12, 3)),
    ("tucker", "conv2d", nn.Conv2d(8, 12, (3, 2), bias=False)),
    ("tucker", "conv_transpose1d", nn.ConvTranspose1d(8, 12, 3)),
    ("cp", "conv2d", nn.Conv2d(8, 12, 3)),
    ("cp", "conv3d", nn.Conv3d(8, 12, (3, 1, 2))),
    ("cp3", "conv2d", nn.Conv2d(8, 12, 3)),
]
every_case = pytest.mark.parametrize(("method", "kind", "dense"), CASES, ids=lambda v: v if isinstance(v, str) else "")


def layer_of(method: str, kind: str, dense: nn.Module) -> FactorizedLayer:
    cls = METHODS[method].layers[kind]
    shape = tuple(cls.layer_type.to_oihw(dense.weight).shape)
    modes = Modes.split(shape[1], shape[0], 2 if cls.format.uses_modes else 1)
    ranks = cls.format.fit_ranks(shape, modes, [3] * len(cls.format.max_ranks(shape, modes)))
    return cls.from_dense(dense, ranks, modes=modes)


def weight_of(layer: FactorizedLayer, tensor: object) -> torch.Tensor:
    """The weight (O, I, ..) that a tensorly tensor of this layer stands for."""
    whole = torch.as_tensor(tensor.to_tensor())
    if layer.format.tensorly_type == "tt":
        return layer.format.to_weight(whole[None], layer.shape, layer.modes)[0]
    return whole.reshape(layer.shape)


@every_case
@pytest.mark.parametrize("backend", ["numpy", "pytorch"])
def test_there_and_back(method: str, kind: str, dense: nn.Module, backend: str):
    layer = layer_of(method, kind, copy.deepcopy(dense)).eval()
    with tensorly.backend_context(backend):
        tensor = layer.to_tensorly()
        assert tensorly.get_backend() == backend
        expected = layer.layer_type.to_oihw(layer.dense_weight())
        torch.testing.assert_close(weight_of(layer, tensor), expected, rtol=1e-4, atol=1e-5)
    again = type(layer).from_tensorly(dense.eval(), tensor)  # under another backend than that of the tensor
    assert tensorly.get_backend() == "numpy"
    assert (again.ranks, again.modes, again.training) == (layer.ranks, layer.modes, False)
    torch.testing.assert_close(again.dense_weight(), layer.dense_weight(), rtol=1e-4, atol=1e-5)
    if layer.bias is not None:
        torch.testing.assert_close(again.bias, dense.bias, rtol=0, atol=0)


def test_memory_is_shared():
    layer = layer_of("tt", "conv2d", nn.Conv2d(8, 12, 3))
    tensor = layer.to_tensorly()
    with torch.no_grad():
        layer.in_cores[0].mul_(2)
    np.testing.assert_array_equal(tensor[0], layer.in_cores[0].detach().numpy())
    with tensorly.backend_context("pytorch"):
        layer.to_tensorly().to_tensor().square().sum().backward()
    assert all(p.grad is not None for p in layer.in_cores)


def test_decompositions_of_tensorly_come_in():
    dense = nn.Conv2d(8, 12, 3)
    weight = dense.weight.detach().numpy()
    tucker = tensorly.decomposition.tucker(weight, rank=[5, 4, 2, 3])  # the kernel's axes compressed too
    layer = METHODS["tucker"].layers["conv2d"].from_tensorly(dense, tucker)
    assert layer.ranks == (4, 5)
    np.testing.assert_allclose(layer.dense_weight().detach().numpy(), tucker.to_tensor(), atol=1e-5)
    cp = tensorly.decomposition.parafac(weight, 6, n_iter_max=5, init="random", normalize_factors=True, random_state=0)
    layer = METHODS["cp"].layers["conv2d"].from_tensorly(dense, cp)
    np.testing.assert_allclose(layer.dense_weight().detach().numpy(), cp.to_tensor(), atol=1e-5)
    x = torch.randn(2, 8, 5, 5)
    wanted = nn.functional.conv2d(x, torch.as_tensor(cp.to_tensor()), dense.bias)
    torch.testing.assert_close(layer(x), wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("method", ["svd", "weight_svd", "spatial_svd"])
def test_formats_without_a_tensorly_type_say_so(method: str):
    layer = layer_of(method, "conv2d", nn.Conv2d(8, 12, 3))
    with pytest.raises(ConvertError, match="tensorly has no type for the factors of"):
        layer.to_tensorly()
    with pytest.raises(ConvertError, match="tensorly has no type"):
        type(layer).from_tensorly(nn.Conv2d(8, 12, 3), None)


def test_tensors_that_do_not_fit_are_refused():
    dense, layer = nn.Conv2d(8, 12, 3), layer_of("tt", "conv2d", nn.Conv2d(8, 12, 3))
    tensor = layer.to_tensorly()
    with pytest.raises(ConvertError, match=r"the tensor has shape \(2, 4, 9, 3, 4\).*give modes="):
        type(layer).from_tensorly(nn.Conv2d(8, 16, 3), tensor)
    with pytest.raises(ConvertError, match="a TTTensor was given; Tucker2 takes a TuckerTensor"):
        METHODS["tucker"].layers["conv2d"].from_tensorly(dense, tensor)
    large = tensorly.cp_tensor.CPTensor((None, [np.ones((n, 100), np.float32) for n in (12, 8, 3, 3)]))
    with pytest.raises(RankError, match="72"):
        METHODS["cp"].layers["conv2d"].from_tensorly(dense, large)


def test_a_missing_tensorly_is_named(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "tensorly", None)
    with pytest.raises(ConvertError, match=r"pip install 'hodec\[tensorly\]'"):
        layer_of("tt", "conv2d", nn.Conv2d(8, 12, 3)).to_tensorly()


def test_numpy_gets_bfloat16_as_float32():
    layer = layer_of("tucker", "conv2d", nn.Conv2d(8, 12, 3)).to(torch.bfloat16)
    core, factors = layer.to_tensorly()
    assert {part.dtype for part in (core, *factors)} == {np.dtype("float32")}
    with tensorly.backend_context("pytorch"):
        wanted = layer.to_tensorly()
    torch.testing.assert_close(torch.from_numpy(core), wanted[0].float(), rtol=0, atol=0)
