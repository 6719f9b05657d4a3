"""Every form that a layer can be given does what the layer does."""

import pytest
import torch
from torch import nn

from hodec.formats.modes import Modes
from hodec.fusion.batchnorm import Call
from hodec.fusion.parts import Part, merged, partitions, parts_of, plain
from hodec.fusion.variants import CHAIN, DENSE, MERGED, variants_of
from hodec.layers.base import FactorizedLayer
from hodec.layers.svd import SVDEmbedding
from hodec.methods import METHODS

LAYERS = {
    "conv1d": nn.Conv1d,
    "conv2d": nn.Conv2d,
    "conv3d": nn.Conv3d,
    "conv_transpose1d": nn.ConvTranspose1d,
    "conv_transpose2d": nn.ConvTranspose2d,
    "conv_transpose3d": nn.ConvTranspose3d,
}
NORMS = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
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
    dense = nn.Linear(12, 8, **settings) if kind == "linear" else LAYERS[kind](12, 8, 3, **settings)
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


def assert_all_forms(layer: FactorizedLayer, *, folded: bool, least: int = 1) -> set[str]:
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


@pytest.mark.parametrize(("method", "kind"), [c for c in CASES if c[0] != "tt_classical"])
@pytest.mark.parametrize("folded", [False, True], ids=["bare", "norm"])
def test_every_form_does_what_the_layer_does(method, kind, folded):
    assert_all_forms(made(method, kind, cap=2), folded=folded)


PLANAR = [
    (method, kind, setting)
    for method, kind in CASES
    for setting in SETTINGS
    if method != "tt_classical"  # its chain stays a factorized layer
    and setting in {"conv2d": set(SETTINGS) - {"output_padding"}, "conv_transpose2d": ONLY_TRANSPOSED}.get(kind, ())
]


@pytest.mark.parametrize(("method", "kind", "setting"), PLANAR)
def test_with_the_settings_of_a_convolution(method, kind, setting):
    assert_all_forms(made(method, kind, cap=2, **SETTINGS[setting]), folded=True)


def test_the_classical_train_becomes_dense_or_stays_itself():
    layer = made("tt_classical", "conv2d")
    x = given(layer)
    for variant in variants_of(layer, [Call(tuple(x.shape), (2, 8, 6, 5))], norm_for(layer)).values():
        torch.testing.assert_close(variant.build()(x).shape, torch.Size((2, 8, 6, 5)))


@pytest.mark.parametrize("count", [1, 2, 3])
def test_a_train_has_a_chain_only_with_modes(count):
    names = assert_all_forms(made("tt", "conv2d", count, cap=1), folded=True, least=2)
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


def test_a_form_as_costly_as_dense_is_not_offered():
    layer = made("tucker", "conv2d", cap=12)
    assert list(variants_of(layer, [Call((1, 12, 8, 7), (1, 8, 6, 5))], None)) == [DENSE]


def test_an_embedding_keeps_its_form():
    layer = SVDEmbedding(50, 16, ranks=(2,))
    found = variants_of(layer, [Call((2, 5), (2, 5, 16))], None)
    assert list(found) == [MERGED]
    tokens = torch.tensor([[1, 2, 49]])
    torch.testing.assert_close(found[MERGED].build()(tokens), layer(tokens))


@pytest.mark.parametrize("method", ["tucker", "spatial_svd", "svd"])
def test_all_parts_multiplied_are_the_dense_weight(method):
    layer = made(method, "conv2d")
    whole = parts_of(layer)[0]
    for part in parts_of(layer)[1:]:
        whole = merged(whole, part)
    torch.testing.assert_close(whole.kernel, layer.dense_weight(), rtol=1e-10, atol=1e-10)
    assert whole.axes == (0, 1)


def test_depthwise_neighbours_stay_depthwise():
    a = Part(torch.randn(4, 1, 3, 1), (0,), depthwise=True)
    b = Part(torch.randn(4, 1, 1, 5), (1,), depthwise=True)
    both = merged(a, b)
    assert both.depthwise
    torch.testing.assert_close(both.kernel, a.kernel * b.kernel)
    assert both.kernel.shape == (4, 1, 3, 5)


def test_rows_are_cut_in_every_way():
    parts = [Part(torch.ones(1, 1)) for _ in range(3)]
    assert sorted([len(run) for run in cut] for cut in partitions(parts)) == [[1, 1, 1], [1, 2], [2, 1], [3]]


def test_plain_modules_share_nothing_with_the_layer_and_take_no_gradients():
    layer = made("tucker", "conv2d")
    module = plain(layer, parts_of(layer), layer.bias)
    assert [type(m) for m in module] == [nn.Conv2d] * 3
    assert not any(p.requires_grad for p in module.parameters())
    mine = {p.data_ptr() for p in layer.parameters()}
    assert not mine & {p.data_ptr() for p in module.parameters()}
