"""Limits: ranks brought to multiples, a least and a most: never beyond the layer, never in silence."""

import pytest
import torch
from rank_cases import CONV_METHODS, context, conv_weight

from hodec.errors import ConfigError, Use
from hodec.ranks import Limits

MATRIX = context(torch.ones(20, 50))


def test_without_limits_nothing_changes_and_nothing_is_said():
    assert Limits().limited(MATRIX, [13]) == ((13,), ())


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
    ranks, notes = Limits(**limits).limited(MATRIX, [given])
    assert ranks == (expected,)
    assert bool(notes) == (expected != given)


def test_the_note_names_before_after_and_the_settings_that_did_it():
    _, notes = Limits(round_to=4, min_rank=6, max_rank=7).limited(MATRIX, [5])
    assert notes == ("ranks [5] became [7]: min_rank=6, round_to=4, max_rank=7",)
    _, notes = Limits(round_to=8).limited(MATRIX, [18])
    assert notes == ("ranks [18] became [20]: round_to=8, the most that the layer and the other ranks allow",)


@pytest.mark.parametrize("method", CONV_METHODS)
@pytest.mark.parametrize("limits", [{}, {"round_to": 8}, {"min_rank": 7}, {"max_rank": 5}, {"round_to": 10**6}])
def test_what_comes_out_always_fits_the_layer(method: str, limits: dict[str, int]):
    one = context(conv_weight(), method)
    for rank in (1, 3, 5, 1000):
        ranks, notes = Limits(**limits).limited(one, [rank] * len(one.full_ranks))
        assert one.planned(ranks).ranks == ranks
        assert bool(notes) == (ranks != (rank,) * len(one.full_ranks))


@pytest.mark.parametrize("key", ["round_to", "min_rank", "max_rank"])
@pytest.mark.parametrize("value", [0, -1, 2.0, True, "8"], ids=repr)
def test_nonsense_names_the_key(key: str, value: object):
    with pytest.raises(ConfigError, match=rf"^{key}: {value!r} given; allowed: .*a whole number at least 1"):
        Limits(**{key: value})


def test_a_most_below_the_least_is_refused_in_the_words_of_each_surface():
    with pytest.raises(ConfigError, match="max_rank=4 is below min_rank=8; give max_rank=8 or more") as error:
        Limits(min_rank=8, max_rank=4)
    assert error.value.told(Use.in_flags) == "--max-rank 4 is below --min-rank 8; give --max-rank 8 or more"
