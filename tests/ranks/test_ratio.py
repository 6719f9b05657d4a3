"""Ranks for a share of the cost: the shapes and costs of the published splits, and costs that are the measured ones."""

import math

import pytest
import torch
from rank_cases import CONV_METHODS, chosen, context, conv_weight
from small_nets import IMAGE, SmallResNet, Tokens
from torch import nn

from hodec.conversion.swap import convert
from hodec.cost.count import count_cost
from hodec.cost.metric import METRICS
from hodec.errors import ConfigError
from hodec.ranks import Choice, make_plan
from hodec.ranks.ratio import Ratio, scaled_ranks


def test_the_rule_asks_for_no_trained_weights():
    assert Ratio.name == "ratio"
    assert not Ratio.reads_weights


# -- golden values -----------------------------------------------------------------------------------------------

STRIDED = {  # kernel, target, rank, share of the dense cost
    "3x3": (3, 0.612, 128, 0.611111),
    "1x1": (1, 0.75, 64, 0.75),
}


@pytest.mark.parametrize("case", STRIDED)
def test_stride_2_is_counted_at_the_input_where_the_first_convolution_runs(case: str):
    kernel, target, rank, share = STRIDED[case]
    model = nn.Sequential(nn.Conv2d(256, 512, kernel, stride=2, padding=kernel // 2, bias=False)).eval()
    x = torch.randn(1, 256, 4, 4)
    plan = make_plan(model, Ratio(target), method="weight_svd", example_input=x)
    layer = plan["0"]
    assert layer.ranks == (rank,)
    assert layer.macs_after / layer.macs_before == pytest.approx(share, abs=1e-6)
    assert count_cost(convert(model, plan), x).macs == layer.macs_after


SPLITS = {  # method, layer, input -> shapes of the two kernels at rank k
    "weight_svd conv": ("weight_svd", nn.Conv2d(16, 24, 3, bias=False), (16, 6, 6), [("k", 16, 1, 1), (24, "k", 3, 3)]),
    "weight_svd fc": ("weight_svd", nn.Linear(40, 24, bias=False), (40,), [("k", 40), (24, "k")]),
    "spatial_svd conv": (
        "spatial_svd", nn.Conv2d(16, 24, 3, bias=False), (16, 6, 6), [("k", 16, 3, 1), (24, "k", 1, 3)]),
}  # fmt: skip


@pytest.mark.parametrize("case", SPLITS)
def test_the_splits_have_the_published_shapes(case: str):
    method, layer, shape, expected = SPLITS[case]
    model, x = nn.Sequential(layer).eval(), torch.randn(1, *shape)
    plan = make_plan(model, Ratio(0.5), method=method, example_input=x)
    (rank,) = plan["0"].ranks
    assert rank > 1
    shapes = [tuple(p.shape) for p in convert(model, plan)[0].parameters()]
    assert shapes == [tuple(rank if n == "k" else n for n in kernel) for kernel in expected]


def test_the_search_starts_at_the_published_full_ranks():
    weight = torch.randn(24, 16, 3, 5)
    assert context(weight, "weight_svd").full_ranks == (16,)
    assert context(weight, "spatial_svd").full_ranks == (min(16 * 3, 24 * 5),)


# -- the largest ranks within the target ---------------------------------------------------------------------------


@pytest.mark.parametrize("metric", ["macs", "params"])
@pytest.mark.parametrize("method", CONV_METHODS)
def test_no_larger_step_would_fit(method: str, metric: str):
    one = context(conv_weight(24, 16), method)
    for target in (0.2, 0.5, 0.8, 1.0):
        choice = chosen(Ratio(target, metric), one)
        limit = target * METRICS[metric].dense(one.dense)
        if not choice.notes:
            assert METRICS[metric].factorized(one.planned(choice.ranks)) <= limit
        steps = [scaled_ranks(one, step) for step in range(1, max(one.full_ranks) + 1)]
        larger = steps[steps.index(choice.ranks) :]
        assert all(METRICS[metric].factorized(one.planned(r)) > limit for r in larger if r != choice.ranks)


@pytest.mark.parametrize("method", CONV_METHODS)
def test_steps_go_from_1_to_full_in_proportion(method: str):
    one = context(conv_weight(24, 16), method)
    assert scaled_ranks(one, max(one.full_ranks)) == one.full_ranks
    half = scaled_ranks(one, max(one.full_ranks) // 2)
    for rank, full in zip(half, one.full_ranks, strict=True):
        assert 1 <= rank <= math.ceil(full / 2) + 1


def test_more_target_never_means_smaller_ranks():
    one = context(conv_weight(), "weight_svd")
    ranks = [chosen(Ratio(t / 20), one).ranks for t in range(1, 21)]
    assert ranks == sorted(ranks)
    assert ranks[0] < ranks[-1]


def test_a_layer_above_the_target_at_its_least_keeps_rank_1_with_a_note():
    choice = chosen(Ratio(0.01), context(conv_weight(), "weight_svd"))
    assert choice.ranks == (1,)
    share = (12 + 24 * 9) / (24 * 12 * 9)
    assert choice.notes == (f"even ranks [1] keep {share:.3f} of the dense macs, above the target 0.01",)


def test_a_cost_of_exactly_the_target_is_within_it():
    one = context(torch.ones(20, 20))  # 40 numbers a rank of 400
    for rank in range(1, 11):
        assert chosen(Ratio(1 - (10 - rank) / 10), one) == Choice((rank,))


def test_multiples_stay_within_the_target():
    one = context(torch.ones(64, 64))  # 128 numbers a rank of 4096: target 0.6 allows rank 19
    assert chosen(Ratio(0.6), one).ranks == (19,)
    assert chosen(Ratio(0.6, round_to=8), one).ranks == (16,)
    least = chosen(Ratio(0.1, round_to=8), one)
    assert least.ranks == (8,)
    assert least.notes[-1] == "even ranks [8] keep 0.250 of the dense macs, above the target 0.1"
    assert chosen(Ratio(0.6, max_rank=5), one).ranks == (5,)
    assert chosen(Ratio(0.1, min_rank=6), one).ranks == (6,)


# -- whole nets ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["weight_svd", "spatial_svd", "tucker", "tt"])
def test_predicted_costs_are_the_measured_ones(method: str):
    model, x = SmallResNet().eval(), torch.randn(IMAGE)
    plan = make_plan(model, Ratio(0.6), method=method, example_input=x, exclude=["fc"])
    small = count_cost(convert(model, plan), x)
    assert (plan.params_after, plan.macs_after) == (small.params, small.macs)
    for layer in plan.values():
        assert layer.macs_after <= 0.6 * layer.macs_before or layer.notes


def test_linear_layers_over_sequences_are_not_cut_to_rank_1():
    model, x = Tokens().eval(), torch.randn(2, 50, 16)
    plan = make_plan(model, Ratio(0.7), method="svd", example_input=x)
    assert {name: layer.ranks for name, layer in plan.items()} == {"up": (7,), "down": (4,)}
    assert count_cost(convert(model, plan), x).macs == plan.macs_after
    short = make_plan(model, Ratio(0.7), method="svd", example_input=x[:, :3])
    assert {name: layer.ranks for name, layer in short.items()} == {name: p.ranks for name, p in plan.items()}


def test_embeddings_cost_no_macs_and_go_by_parameters():
    one = context(torch.randn(20, 100), "svd", layer_type="embedding")
    (rank,) = chosen(Ratio(0.5, "macs"), one).ranks
    assert rank == 1000 // 120


@pytest.mark.parametrize("method", ["svd", "tt"])
def test_a_weight_that_is_rebuilt_at_any_rank_goes_by_parameters(method: str):
    net = nn.Sequential(nn.LSTM(24, 32, batch_first=True))
    plan = make_plan(net, Ratio(0.5), method=method, example_input=torch.randn(2, 5, 24))
    for layer in plan.values():
        assert layer.macs_after == layer.macs_before
        assert 0.4 < layer.params_after / layer.params_before <= 0.5
        assert not layer.notes


# -- settings ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", [0, -1, 1.5, float("nan"), "0.5", True], ids=repr)
def test_targets_out_of_range_are_refused(target: object):
    with pytest.raises(ConfigError, match=r"^target: .* given; allowed: a number above 0 and at most 1"):
        Ratio(target)


def test_other_settings_out_of_range_are_refused():
    with pytest.raises(ConfigError, match=r"^metric: 'latency' given; allowed: .*macs \| params"):
        Ratio(0.5, "latency")
    with pytest.raises(ConfigError, match=r"^round_to: 0 given"):
        Ratio(0.5, round_to=0)
