"""Ranks that keep a share of the squared norm: the least that do, and what the whole weight then loses."""

import pytest
import torch
from rank_cases import CONV_METHODS, chosen, context, conv_weight, with_singular_values
from small_nets import IMAGE, SmallResNet

from hodec.errors import ConfigError
from hodec.methods import METHODS
from hodec.ranks import Choice, LayerContext, make_plan
from hodec.ranks.energy import Energy

FLAT = context(with_singular_values(torch.ones(10, dtype=torch.float64), 10, 30))
FALLING = context(with_singular_values(torch.tensor([4.0, 3, 2, 1], dtype=torch.float64), 4, 9))


def energy(one: LayerContext, keep: float, **limits: int) -> Choice:
    return chosen(Energy(keep, **limits), one)


def test_the_rule_needs_trained_weights():
    assert Energy.name == "energy"
    assert Energy.reads_weights


@pytest.mark.parametrize("tenths", range(1, 11))
def test_a_flat_spectrum_keeps_exactly_its_share_of_the_ranks(tenths: int):
    """Sums of binary fractions must not cost one more rank."""
    assert energy(FLAT, tenths / 10) == Choice((tenths,))


@pytest.mark.parametrize(
    ("keep", "rank"), [(16 / 30, 1), (0.54, 2), (25 / 30, 2), (0.84, 3), (29 / 30, 3), (0.97, 4), (1, 4), (1e-9, 1)]
)
def test_the_least_rank_that_keeps_the_share(keep: float, rank: int):
    assert energy(FALLING, keep).ranks == (rank,)


@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e12])
def test_keeping_everything_gives_the_numerical_rank(scale: float):
    low = context(scale * with_singular_values(torch.arange(5, 0, -1).double(), 12, 40))
    assert energy(low, 1.0).ranks == (5,)
    assert energy(context(low.site.weight.float()), 1.0).ranks == (5,)


def test_a_zero_weight_has_rank_1():
    assert energy(context(torch.zeros(6, 8)), 1.0).ranks == (1,)


# CP keeps less than its unfoldings do
PROMISED = [method for method in CONV_METHODS if not METHODS[method].format("conv2d").iterative]


@pytest.mark.parametrize("method", PROMISED)
@pytest.mark.parametrize("keep", [0.5, 0.9, 0.99])
def test_the_weight_keeps_what_the_docstring_promises(method: str, keep: float):
    one = context(conv_weight().double(), method)
    weight, ranks = one.site.weight, energy(one, keep).ranks
    unfoldings = one.format.unfoldings(weight, one.modes)
    lost = float((weight - one.format.project(weight, ranks, one.modes)).square().sum() / weight.square().sum())
    assert lost <= len(unfoldings) * (1 - keep) + 1e-9


def test_tucker_ranks_are_ordered_in_out():
    generator = torch.Generator().manual_seed(0)
    core = torch.randn(7, 3, 3, 3, generator=generator)
    outer, inner = torch.randn(32, 7, generator=generator), torch.randn(24, 3, generator=generator)
    weight = torch.einsum("or,rshw,is->oihw", outer, core, inner).double()
    assert energy(context(weight, "tucker"), 1 - 1e-9).ranks == (3, 7)


@pytest.mark.parametrize("method", CONV_METHODS)
def test_keeping_more_never_gives_smaller_ranks(method: str):
    one = context(conv_weight(), method)
    ranks = [sum(energy(one, keep / 10).ranks) for keep in range(1, 11)]
    assert ranks == sorted(ranks)
    if method in PROMISED:
        assert energy(one, 1.0).ranks == one.full_ranks
    else:  # as many as the longest side has
        assert energy(one, 1.0).ranks == (max(one.site.shape),)


def test_limits_are_obeyed_and_noted():
    assert energy(FLAT, 0.3, round_to=4) == Choice((4,), ("ranks [3] became [4]: round_to=4",))
    assert energy(FLAT, 0.3, min_rank=5).ranks == (5,)
    assert energy(FLAT, 0.9, max_rank=5).ranks == (5,)


def test_in_a_plan():
    plan = make_plan(SmallResNet(), Energy(0.4), method="svd", example_input=torch.randn(IMAGE))
    assert plan.rule == "energy"
    assert len(plan) > 0
    assert all(layer.saves() for layer in plan.values())


@pytest.mark.parametrize("keep", [0, -0.5, 1.1, 90, float("nan"), "0.9", None, True], ids=repr)
def test_shares_out_of_range_are_refused(keep: object):
    with pytest.raises(ConfigError, match=r"^keep: .*above 0 and at most 1"):
        Energy(keep)
