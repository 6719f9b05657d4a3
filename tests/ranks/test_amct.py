"""AMCT's ranks: the published table whatever the weights, and the layers it would not touch, each with its reason."""

from dataclasses import replace

import pytest
import torch
from rank_cases import NO_MODEL, context
from torch import nn

from hodec.conversion.swap import convert
from hodec.errors import PlanError
from hodec.plan.plan import Plan
from hodec.ranks import make_plan
from hodec.ranks.amct import Amct, banded_rank
from hodec.ranks.evbmf import signals

TABLE = {  # (out, in, kernel height, kernel width) -> the ranks that can come out
    (64, 64, 3, 3): (32, 32),
    (128, 128, 3, 3): (64, 64),
    (256, 256, 3, 3): (160, 192),
    (512, 512, 3, 3): (304, 384),
}


def spectra(full: int) -> dict[str, torch.Tensor]:
    """From no signal to as many as EVBMF can see."""
    steps = torch.arange(full, dtype=torch.float64)
    found = {f"rank {full * share // 100}": (steps < full * share / 100) + 1e-3 for share in range(0, 50, 5)}
    return {"flat": torch.ones(full), "falling": 0.97**steps, **found}


def amct_rank(values: torch.Tensor, *kernel: int) -> int:
    """The rank for a kernel (out, in, height, width) with these singular values."""
    sides = min(kernel[2:]) * min(kernel[:2]), max(kernel[2:]) * max(kernel[:2])
    return banded_rank(signals(values, *sides), kernel)[0]


@pytest.mark.parametrize("kernel", TABLE, ids=str)
def test_the_published_table(kernel: tuple[int, int, int, int]):
    low, high = TABLE[kernel]
    full = kernel[2] * kernel[1]
    ranks = {name: amct_rank(values, *kernel) for name, values in spectra(full).items()}
    assert min(ranks.values()) == low
    assert max(ranks.values()) == high
    assert all(rank % 16 == 0 for rank in ranks.values())


def test_inside_the_band_it_is_vbmfs_rank_to_the_nearest_multiple():
    full = 768
    for signal in (165, 170, 180):
        values = torch.where(torch.arange(full) < signal, 1.0, 1e-3)
        assert signals(values, full, full) == signal
        assert amct_rank(values, 256, 256, 3, 3) == round(signal / 16) * 16


@pytest.mark.parametrize(
    ("kernel", "rank"),
    [
        ((64, 64, 5, 5), 48),  # band 45..53
        ((64, 3, 7, 7), 16),  # band 3..3, raised to one multiple
        ((256, 64, 3, 3), 32),
        ((64, 256, 3, 5), 32),
    ],
)
def test_other_sizes(kernel: tuple[int, int, int, int], rank: int):
    full = min(kernel[2:]) * min(kernel[:2])
    assert amct_rank(torch.ones(full), *kernel) == rank


def test_a_rank_is_never_above_the_number_of_singular_values():
    assert amct_rank(torch.ones(12), 4, 4, 3, 3) == 12


# -- the rule ------------------------------------------------------------------------------------------------------


def planned(model: nn.Module, channels: int = 64) -> Plan:
    return make_plan(model, Amct(), method="spatial_svd", example_input=torch.randn(1, channels, 9, 9))


def test_an_eligible_layer_is_split_as_in_the_table_and_the_note_says_why():
    model = nn.Sequential(nn.Conv2d(64, 64, 3, stride=2, bias=False)).eval()
    plan = planned(model)
    assert plan.rule == "amct"
    assert plan["0"].ranks == (32,)
    assert plan["0"].notes == ("VBMF's rank 0 became 32: band 27..32, multiples of 16",)
    assert plan["0"].params_after / plan["0"].params_before == pytest.approx(1 / 3)
    assert [tuple(p.shape) for p in convert(model, plan)[0].parameters()] == [(32, 64, 3, 1), (64, 32, 1, 3)]


REFUSED = {
    "dilation": (nn.Conv2d(64, 64, 3, dilation=2), "its dilation is not 1"),
    "stride": (nn.Conv2d(64, 64, 3, stride=(1, 3)), "its stride is 3 or more"),
    "flat kernel": (nn.Conv2d(64, 64, (2, 5)), "a side of its kernel is below 3"),
    "few channels": (nn.Conv2d(64, 32, 3), "it has fewer than 64 channels"),
    "hardly any": (nn.Conv2d(64, 2, 7), "kernel side times channels is below 16"),
    "transposed": (nn.ConvTranspose2d(64, 64, 3), "it is not a plain 2-D convolution"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_other_layers_stay_dense_with_the_reason(case: str):
    layer, reason = REFUSED[case]
    plan = planned(nn.Sequential(nn.Conv2d(64, 64, 3), layer).eval())
    assert set(plan) == {"0"}
    assert plan.skipped["1"] == f"Ascend's decomposition leaves it alone: {reason}"


def test_linear_layers_and_bfloat16_stay_dense():
    model = nn.Sequential(nn.Conv2d(64, 64, 3), nn.Flatten(), nn.Linear(64 * 49, 64))
    assert "not a plain 2-D convolution" in planned(model).skipped["2"]
    half = nn.Conv2d(64, 64, 3).bfloat16()
    layers = {"0": context(half.weight.detach(), "spatial_svd")}
    choice = Amct().choose(layers, replace(NO_MODEL, module=lambda name: half))["0"]
    assert choice.ranks is None
    assert "float16, float32 or float64" in choice.reason


def test_a_large_kernel_needs_few_channels_only():
    assert planned(nn.Sequential(nn.Conv2d(16, 48, 7, padding=3)), 16)["0"].ranks == (16,)


def test_another_method_is_refused():
    model, x = nn.Sequential(nn.Conv2d(64, 64, 3)), torch.randn(1, 64, 5, 5)
    with pytest.raises(PlanError, match="method=spatial_svd only, not for method=tucker"):
        make_plan(model, Amct(), method="tucker", example_input=x)
