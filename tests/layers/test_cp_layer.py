"""CP layers: every setting of the dense convolution, at full rank and below it."""

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from hodec.errors import RankError
from hodec.formats.calls import CallSites
from hodec.layers import staged as cp
from hodec.layers.staged import StagedConv

LAYERS = [
    cp.CPConv1d, cp.CPConv2d, cp.CPConv3d, cp.CPConvTranspose1d, cp.CPConvTranspose2d, cp.CPConvTranspose3d,
    cp.CP3Conv2d, cp.CP3ConvTranspose2d,
]  # fmt: skip
DENSE = {
    "conv1d": nn.Conv1d, "conv2d": nn.Conv2d, "conv3d": nn.Conv3d, "conv_transpose1d": nn.ConvTranspose1d,
    "conv_transpose2d": nn.ConvTranspose2d, "conv_transpose3d": nn.ConvTranspose3d,
}  # fmt: skip
ANY = [{}, {"kernel_size": 1, "stride": 2}, {"stride": 2, "padding": 1}, {"dilation": 2}, {"bias": False}]
PLANE = [{"kernel_size": (3, 1), "padding": (1, 1), "stride": (1, 2)}, {"kernel_size": (1, 3), "stride": (2, 1)}]
FORWARD = [
    {"padding": "same", "dilation": 2},
    *({"padding": 1, "padding_mode": mode} for mode in ("reflect", "replicate", "circular")),
]
TRANSPOSED = [{"stride": 2, "padding": 1, "output_padding": 1}, {"kernel_size": 1, "stride": 2, "output_padding": 1}]
every_layer = pytest.mark.parametrize("cls", LAYERS, ids=lambda c: c.__name__)


def dense_layer(cls: type[StagedConv], settings: dict[str, object] | None = None, channels: int = 5) -> nn.Module:
    torch.manual_seed(0)
    return DENSE[cls.layer_type.name](4, channels, **{"kernel_size": 3, **(settings or {})}).double()


def image(cls: type[StagedConv]) -> Tensor:
    return torch.randn(2, 4, *(7, 6, 5)[: cls.layer_type.dims], dtype=torch.float64)


def settings_of(cls: type[StagedConv]) -> list[dict[str, object]]:
    return [*ANY, *(PLANE if cls.layer_type.dims == 2 else []), *(TRANSPOSED if cls.layer_type.transposed else FORWARD)]


@every_layer
def test_equals_the_dense_layer_of_its_weight(cls: type[StagedConv]):
    for settings in settings_of(cls):
        dense, x = dense_layer(cls, settings), image(cls)
        layer = cls.like(dense, [3], initialize=True).adopt(dense)
        twin = copy.deepcopy(dense)
        twin.weight.data.copy_(layer.dense_weight())
        torch.testing.assert_close(layer(x), twin(x), rtol=0, atol=1e-10, msg=lambda m, s=settings: f"{s}: {m}")


@every_layer
def test_full_rank_is_the_dense_layer(cls: type[StagedConv]):
    dense, x = dense_layer(cls), image(cls)
    shape = (5, 4, *dense.kernel_size)
    layer = cls.from_dense(dense, cls.format.max_ranks(shape, None))
    torch.testing.assert_close(layer(x), dense(x), rtol=0, atol=1e-9)


@every_layer
@pytest.mark.parametrize("channels", [5, 1], ids=["five", "one"])
def test_cost_is_what_torch_counts(cls: type[StagedConv], channels: int):
    for settings in settings_of(cls):
        layer, x = cls.like(dense_layer(cls, settings, channels), [min(2, channels)]).eval(), image(cls)
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            y = layer(x)
        call_sites = CallSites.once(x.shape[2:], y.shape[2:])
        macs = cls.format.macs(layer.shape, layer.ranks, layer.modes, call_sites=call_sites, execution="merged")
        assert macs * len(x) == counter.get_total_flops() / 2 or settings.get("padding")  # padding adds positions
        stored = sum(p.numel() for p in layer.kernels)
        assert stored == cls.format.params(layer.shape, layer.ranks, layer.modes)


@every_layer
def test_every_kernel_learns_also_from_a_zero_weight(cls: type[StagedConv]):
    dense, x = dense_layer(cls), image(cls)
    layer = cls.from_dense(dense, [3])
    layer(x).square().sum().backward()
    assert all(float(p.grad.norm()) > 0 for p in layer.parameters())
    nn.init.zeros_(dense.weight)
    layer = cls.from_dense(dense, [3])
    assert float(layer.dense_weight().detach().abs().max()) == 0
    layer(x).sum().backward()
    assert max(float(k.grad.norm()) for k in layer.kernels) > 1e-3


def test_kernels_are_stored_as_they_run():
    shapes = [tuple(k.shape) for k in cp.CPConv2d(8, 12, (5, 3), ranks=[4]).kernels]
    assert shapes == [(4, 8, 1, 1), (4, 1, 5, 1), (4, 1, 1, 3), (12, 4, 1, 1)]
    assert [tuple(k.shape) for k in cp.CP3Conv2d(8, 12, 3, ranks=[4]).kernels] == [
        (4, 8, 1, 1), (4, 1, 3, 3), (12, 4, 1, 1),
    ]  # fmt: skip


def test_a_rank_above_the_exact_one_is_refused():
    with pytest.raises(RankError, match="72"):
        cp.CPConv2d(8, 12, 3, ranks=[73])


def test_huge_weights_do_not_overflow():
    for seed in range(4):
        torch.manual_seed(seed)
        dense = nn.Conv2d(8, 12, 3)
        dense.weight.data.div_(dense.weight.data.abs().max()).mul_(1e38)
        for cls in (cp.CPConv2d, cp.CP3Conv2d):
            layer = cls.from_dense(dense, [3])
            assert bool(layer.dense_weight().isfinite().all())
