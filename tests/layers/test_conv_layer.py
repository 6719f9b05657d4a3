"""Convolution settings and channel counts that trained networks have."""

import pytest
import torch
from torch import nn

from hodec.errors import PlanError, RankError
from hodec.formats.modes import Modes
from hodec.layers.tt import ClassicalTTConv2d, TTConv2d, TTLinear


@pytest.mark.parametrize(("inp", "out"), [(3, 17), (17, 127), (1, 8), (8, 1)])
@pytest.mark.parametrize("cls", [TTConv2d, ClassicalTTConv2d])
def test_row_12_prime_and_few_channels(cls: type, inp: int, out: int):
    dense = nn.Conv2d(inp, out, 3, padding=1).double().eval()
    modes = Modes.split(inp, out, 2)
    layer = cls.from_dense(dense, cls.format.max_ranks(tuple(dense.weight.shape), modes))
    x = torch.randn(2, inp, 6, 6).double()
    torch.testing.assert_close(layer(x), dense(x), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("cls", [TTConv2d, ClassicalTTConv2d])
def test_modes_may_be_given(cls: type):
    dense = nn.Conv2d(24, 8, 3)
    modes = Modes((6, 4), (1, 8))
    ranks = cls.format.fit_ranks((8, 24, 3, 3), modes, [5] * len(cls.format.max_ranks((8, 24, 3, 3), modes)))
    layer = cls.from_dense(dense, ranks, modes=modes)
    assert layer.modes == modes
    assert layer.ranks == ranks
    with pytest.raises(PlanError, match="do not fit 24 -> 8 channels"):
        cls.from_dense(dense, ranks, modes=Modes((6, 4), (2, 8)))


@pytest.mark.parametrize("channels_last", [False, True])
def test_memory_formats(channels_last: bool):
    dense = nn.Conv2d(8, 12, 3, padding=1)
    layer = TTConv2d.from_dense(dense, (2, 8, 9, 4)).eval()
    x = torch.randn(2, 8, 6, 6)
    expected = layer(x)
    if channels_last:
        layer, x = layer.to(memory_format=torch.channels_last), x.to(memory_format=torch.channels_last)
    torch.testing.assert_close(layer(x), expected, rtol=1e-5, atol=1e-5)


def test_row_14_a_channels_last_dense_layer():
    dense = nn.Conv2d(8, 12, 3).to(memory_format=torch.channels_last)
    layer = TTConv2d.from_dense(dense, TTConv2d.format.max_ranks((12, 8, 3, 3), Modes.split(8, 12, 2)))
    torch.testing.assert_close(layer.dense_weight(), dense.weight, rtol=1e-5, atol=1e-6)


def test_the_settings_are_shown_where_they_are_not_the_default():
    text = repr(TTConv2d(8, 12, 3, ranks=(2, 3, 3, 4), stride=2, padding=1, bias=False))
    for part in ("8 -> 12, 3x3", "ranks=[2, 3, 3, 4]", "stride=(2, 2)", "padding=(1, 1)", "bias=False"):
        assert part in text
    assert "dilation" not in text


def test_ranks_of_the_wrong_number_are_refused_with_the_number_needed():
    with pytest.raises(RankError, match="needs 4 ranks, got 2"):
        TTConv2d(8, 12, 3, ranks=(2, 3))
    with pytest.raises(RankError, match="needs 1 ranks, got 2"):
        TTLinear(8, 12, ranks=(2, 3))


@pytest.mark.parametrize("lead", [(), (5,), (2, 3), (2, 3, 4)], ids=str)
@pytest.mark.parametrize("execution", ["merged", "chain"])
def test_linear_takes_any_leading_axes(lead: tuple[int, ...], execution: str):
    layer = TTLinear(8, 12, ranks=(4,), execution=execution).eval()
    x = torch.randn(*lead, 8)
    y = layer(x)
    assert y.shape == (*lead, 12)
    torch.testing.assert_close(y, nn.functional.linear(x, layer.dense_weight(), layer.bias), rtol=1e-5, atol=1e-5)


def test_an_empty_batch_passes():
    with torch.no_grad():
        for execution in ("merged", "chain"):
            conv = TTConv2d(8, 12, 3, ranks=(2, 3, 3, 4), execution=execution).eval()
            assert conv(torch.ones(0, 8, 5, 5)).shape == (0, 12, 3, 3)


def test_compiled_layers_answer_the_same():
    """The remembered merge must not end in a compiled graph as a constant."""
    layer = TTConv2d(8, 12, 3, ranks=(2, 3, 3, 4)).eval()
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    x = torch.randn(1, 8, 5, 5)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), layer(x))
        layer.kernel.mul_(2)
        torch.testing.assert_close(compiled(x), layer(x))
