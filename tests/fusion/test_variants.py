"""Every variant of a layer does what the layer does."""

import pytest
import torch
from small_nets import NORMS, dense_layer
from torch import nn

from hodec.formats.modes import Modes
from hodec.formats.ops import Op
from hodec.fusion.batchnorm import Call
from hodec.fusion.variants import CHAIN, DENSE, MERGED, joined, multiplied, partitions, plain, variants_of
from hodec.layers.base import FactorizedLayer
from hodec.layers.embedding import SVDEmbedding
from hodec.methods import METHODS

CASES = [(name, kind) for name, method in METHODS.items() for kind in method.layers if kind != "embedding"]
SETTINGS = {
    "plain": {},
    "strided": {"stride": 2, "padding": 1},
    "dilated": {"dilation": 2, "padding": 2, "bias": False},
    "same": {"padding": "same"},
    "circular": {"padding": 1, "padding_mode": "circular"},
    "output_padding": {"stride": 2, "padding": 1, "output_padding": 1},
}
ONLY_TRANSPOSED = {"plain", "strided", "dilated", "output_padding"}


def made(method: str, kind: str, count: int = 2, cap: int = 3, **settings: object) -> FactorizedLayer:
    """A factorized layer 12 -> 8 in float64, in evaluation mode."""
    cls = METHODS[method].layers[kind]
    dense = dense_layer(kind, 12, 8, 3, **settings)
    shape = cls.layer_type.to_oihw(dense.weight).shape
    modes = Modes.split(shape[1], shape[0], max(count, cls.format.min_modes) if cls.format.uses_modes else 1)
    most = cls.format.max_ranks(shape, modes)
    ranks = cls.format.fit_ranks(shape, modes, [min(cap, r) for r in most])
    return cls.from_dense(dense.double(), ranks, modes=modes).eval()


def given(layer: FactorizedLayer) -> torch.Tensor:
    dims = layer.layer_type.dims
    return torch.randn(2, 12, *(8, 7, 6)[:dims], dtype=torch.float64) if dims else torch.randn(2, 12).double()


def norm_for(layer: FactorizedLayer) -> nn.Module:
    """A batch norm with statistics and weights of a trained one."""
    norm = NORMS[max(1, layer.layer_type.dims)](8).double().eval()
    nn.init.uniform_(norm.weight, 0.5, 2.0)
    nn.init.normal_(norm.bias)
    nn.init.normal_(norm.running_mean)
    nn.init.uniform_(norm.running_var, 0.5, 2.0)
    return norm


def assert_all_variants(layer: FactorizedLayer, *, folded: bool, least: int = 1) -> set[str]:
    x, norm = given(layer), norm_for(layer) if folded else None
    expected = layer(x) if norm is None else norm(layer(x))
    found = variants_of(layer, [Call(tuple(x.shape), tuple(expected.shape))], norm)
    assert len(found) >= least
    assert list(found)[-1] == DENSE
    for name, variant in found.items():
        module = variant.build()
        assert not isinstance(module, FactorizedLayer), name
        torch.testing.assert_close(module(x), expected, rtol=1e-10, atol=1e-10, msg=lambda m, name=name: f"{name}: {m}")
    return set(found)


@pytest.mark.parametrize(("method", "kind"), CASES)
@pytest.mark.parametrize("folded", [False, True], ids=["bare", "norm"])
def test_every_variant_does_what_the_layer_does(method, kind, folded):
    assert_all_variants(made(method, kind, cap=2), folded=folded)


PLANAR = [
    (method, kind, setting)
    for method, kind in CASES
    for setting in SETTINGS
    if setting in {"conv2d": set(SETTINGS) - {"output_padding"}, "conv_transpose2d": ONLY_TRANSPOSED}.get(kind, ())
]


@pytest.mark.parametrize(("method", "kind", "setting"), PLANAR)
def test_with_the_settings_of_a_convolution(method, kind, setting):
    assert_all_variants(made(method, kind, cap=2, **SETTINGS[setting]), folded=True)


@pytest.mark.parametrize("count", [1, 2, 3])
def test_a_train_has_a_chain_only_with_modes(count):
    names = assert_all_variants(made("tt", "conv2d", count, cap=1), folded=True, least=2)
    assert (CHAIN in names) == (count > 1)
    assert MERGED in names


def test_neighbours_are_multiplied_where_that_is_cheaper_than_dense():
    x = torch.randn(1, 12, 8, 7).double()
    layer = made("tucker", "conv2d", cap=3)
    found = variants_of(layer, [Call(tuple(x.shape), (1, 8, 6, 5))], None)
    assert list(found) == [MERGED, "1x1, 3x3", "3x3, 1x1", DENSE]
    assert found[DENSE].macs == 12 * 8 * 9 * 30
    assert found[MERGED].macs == 12 * 3 * 56 + 3 * 3 * 9 * 30 + 3 * 8 * 30
    assert found["3x3, 1x1"].macs == (12 * 3 * 9 + 3 * 8) * 30


def test_a_variant_as_costly_as_dense_is_not_offered():
    layer = made("tucker", "conv2d", cap=12)
    assert list(variants_of(layer, [Call((1, 12, 8, 7), (1, 8, 6, 5))], None)) == [DENSE]


def test_an_embedding_stays_itself():
    layer = SVDEmbedding(50, 16, ranks=(2,))
    found = variants_of(layer, [Call((2, 5), (2, 5, 16))], None)
    assert list(found) == [MERGED]
    tokens = torch.tensor([[1, 2, 49]])
    torch.testing.assert_close(found[MERGED].build()(tokens), layer(tokens))


@pytest.mark.parametrize("method", ["tucker", "spatial_svd", "svd"])
def test_all_ops_multiplied_are_the_dense_weight(method):
    layer = made(method, "conv2d")
    ops = layer.ops["merged"]
    kernel = multiplied(ops, layer.op_kernels("merged"))
    torch.testing.assert_close(kernel, layer.dense_weight(), rtol=1e-10, atol=1e-10)
    assert joined(ops) == Op((8, 12, 3, 3), (0, 1))


def test_depthwise_neighbours_stay_depthwise():
    a, b = torch.randn(4, 1, 3, 1), torch.randn(4, 1, 1, 5)
    ops = [Op((4, 1, 3, 1), (0,), depthwise=True), Op((4, 1, 1, 5), (1,), depthwise=True)]
    assert joined(ops) == Op((4, 1, 3, 5), (0, 1), depthwise=True)
    torch.testing.assert_close(multiplied(ops, [a, b]), a * b)


def test_rows_are_cut_in_every_way():
    assert sorted([len(run) for run in cut] for cut in partitions(3)) == [[1, 1, 1], [1, 2], [2, 1], [3]]


def test_plain_modules_share_nothing_with_the_layer_and_take_no_gradients():
    layer = made("tucker", "conv2d")
    module = plain(layer, layer.ops["merged"], layer.op_kernels("merged"), bias=layer.bias)
    assert [type(m) for m in module] == [nn.Conv2d] * 3
    assert not any(p.requires_grad for p in module.parameters())
    mine = {p.data_ptr() for p in layer.parameters()}
    assert not mine & {p.data_ptr() for p in module.parameters()}
