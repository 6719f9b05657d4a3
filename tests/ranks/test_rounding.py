"""Ranks brought to multiples, a least and a most: never beyond the layer, never in silence."""

import pytest
import torch
from rank_cases import CONV_METHODS, candidate, conv_weight

from hodec.errors import ConfigError
from hodec.ranks.rounding import Rounding, check_metric, check_share

MATRIX = candidate(torch.ones(20, 50))


def test_without_limits_nothing_changes_and_nothing_is_said():
    assert Rounding().apply(MATRIX, [13]) == ((13,), ())


@pytest.mark.parametrize(
    ("limits", "given", "expected"),
    [
        ({"round_to": 8}, 9, 16),
        ({"round_to": 8}, 16, 16),
        ({"round_to": 8}, 1, 8),
        ({"round_to": 8}, 17, 20),  # the layer's full rank
        ({"round_to": 64}, 3, 20),
        ({"min_rank": 5}, 3, 5),
        ({"min_rank": 5}, 6, 6),
        ({"min_rank": 500}, 3, 20),
        ({"max_rank": 7}, 9, 7),
        ({"max_rank": 7}, 6, 6),
        ({"max_rank": 14, "round_to": 4}, 13, 12),  # the multiple below max_rank
        ({"max_rank": 14, "round_to": 4}, 11, 12),
        ({"max_rank": 3, "round_to": 4}, 2, 3),  # no multiple fits
        ({"max_rank": 7, "min_rank": 5, "round_to": 4}, 1, 7),  # no multiple fits between the two
        ({"min_rank": 5, "round_to": 4}, 1, 8),
    ],
)
def test_limits_in_order_least_multiple_most(limits: dict[str, int], given: int, expected: int):
    ranks, notes = Rounding(**limits).apply(MATRIX, [given])
    assert ranks == (expected,)
    assert bool(notes) == (expected != given)


def test_the_note_names_before_after_and_the_settings_that_did_it():
    _, notes = Rounding(round_to=4, min_rank=6, max_rank=7).apply(MATRIX, [5])
    assert notes == ("ranks [5] became [7]: min_rank=6, round_to=4, max_rank=7",)
    _, notes = Rounding(round_to=8).apply(MATRIX, [18])
    assert notes == ("ranks [18] became [20]: round_to=8, the most that the layer and the other ranks allow",)


@pytest.mark.parametrize("method", CONV_METHODS)
@pytest.mark.parametrize("limits", [{}, {"round_to": 8}, {"min_rank": 7}, {"max_rank": 5}, {"round_to": 10**6}])
def test_what_comes_out_always_fits_the_layer(method: str, limits: dict[str, int]):
    one = candidate(conv_weight(), method)
    for rank in (1, 3, 5, 1000):
        ranks, notes = Rounding(**limits).apply(one, [rank] * len(one.most))
        assert one.planned(ranks).ranks == ranks
        assert bool(notes) == (ranks != (rank,) * len(one.most))


@pytest.mark.parametrize("key", ["round_to", "min_rank", "max_rank"])
@pytest.mark.parametrize("value", [0, -1, 2.0, True, "8"], ids=repr)
def test_nonsense_names_the_key(key: str, value: object):
    with pytest.raises(ConfigError, match=rf"ranks\.{key}={value!r} is not a whole number of at least 1"):
        Rounding(**{key: value})


def test_a_most_below_the_least_is_refused():
    with pytest.raises(ConfigError, match=r"ranks\.max_rank=4 is below ranks\.min_rank=8; give ranks\.max_rank=8"):
        Rounding(min_rank=8, max_rank=4)


@pytest.mark.parametrize("value", [0, -0.1, 1.01, float("nan"), float("inf"), True, "0.5", None], ids=repr)
def test_shares_out_of_range_name_their_key(value: object):
    with pytest.raises(ConfigError, match=r"ranks\.keep=.* is not a share above 0 and at most 1"):
        check_share("ranks.keep", value)


def test_shares_and_metrics_in_range():
    assert check_share("ranks.keep", 1) == 1.0
    assert check_share("ranks.keep", 0.25) == 0.25
    assert check_metric("params") == "params"
    with pytest.raises(ConfigError, match=r"ranks\.metric='flops' is not one of macs, params"):
        check_metric("flops")
