"""Ranks by hand: a cap, a demand, or globs of either."""

import logging

import pytest
import torch
from small_nets import IMAGE, SmallResNet, Tokens
from torch import nn

from hodec.errors import ConfigError, PlanError
from hodec.plan.plan import Plan
from hodec.ranks import RULES, Manual, make_plan


def planned(ranks: object, **settings: object) -> Plan:
    return make_plan(SmallResNet(), Manual(ranks), example_input=torch.randn(IMAGE), allow_larger=True, **settings)


def test_the_rule_is_in_the_table():
    assert RULES["manual"] is Manual
    assert Manual.name == "manual"
    assert not Manual.reads_weights


# -- one number ------------------------------------------------------------------------------------------------


def test_row_8_a_number_is_a_cap_and_what_it_clips_is_noted(caplog):
    with caplog.at_level(logging.INFO):
        plan = planned(6)
    assert plan["layer1.conv2"].ranks == (4, 6, 6, 6)
    assert plan["layer1.conv2"].notes == ("rank 6 clipped to [4, 6, 6, 6], the most its modes allow",)
    assert plan["fc"].ranks == (6,)
    assert plan["fc"].notes == ()
    assert "ranks clipped in 4 layers (conv1, ..)" in caplog.text
    assert "clipped to [4, 6, 6, 6]" in str(plan.to_dict())


def test_row_8_a_cap_above_everything_gives_full_ranks():
    plan = planned(10**6)
    for layer in plan.values():
        assert layer.ranks == layer.format.max_ranks(layer.shape, layer.modes)


def test_a_cap_that_nothing_clips_says_nothing(caplog):
    with caplog.at_level(logging.INFO):
        plan = planned(2)
    assert all(layer.notes == () and set(layer.ranks) == {2} for layer in plan.values())
    assert caplog.text == ""


# -- lists -----------------------------------------------------------------------------------------------------


def test_a_list_has_one_cap_for_each_rank():
    plan = planned([2, 3, 3, 2], include=["conv1", "layer1.*"])
    assert {layer.ranks for layer in plan.values()} == {(2, 3, 3, 2)}
    assert all(layer.notes == () for layer in plan.values())


def test_a_list_is_clipped_layer_by_layer_with_a_note():
    plan = planned([3, 16, 3, 2], include=["conv1", "layer1.*"])
    assert plan["conv1"].ranks == (2, 6, 3, 2)
    assert plan["conv1"].notes == ("ranks [3, 16, 3, 2] clipped to [2, 6, 3, 2], the most its modes allow",)


def test_row_10_another_number_of_ranks_is_refused_with_ranks_that_fit():
    with pytest.raises(PlanError, match=r"fc \(linear, method tt\) needs 1 rank, got 4: \[2, 2, 2, 2\]") as caught:
        planned([2, 2, 2, 2])
    assert "Allowed: tt_ranks={*:[2,2,2,2],fc:8}" in str(caught.value)
    plan = planned({"*": [2, 2, 2, 2], "fc": 8})
    assert plan["layer1.conv2"].ranks == (2, 2, 2, 2)
    with pytest.raises(PlanError, match=r"conv1 .*needs 4 ranks, got 3: \[2, 2, 2\], and so in 4 more.*tt_ranks=8$"):
        planned([2, 2, 2])


# -- globs -----------------------------------------------------------------------------------------------------


def test_the_last_glob_that_matches_wins():
    plan = planned({"*conv*": 5, "layer1.*": 3, "layer1.conv2": [2, 3, 4, 2], "fc": 2})
    assert max(plan["conv1"].ranks) == 5
    assert max(plan["layer1.conv1"].ranks) == 3
    assert plan["layer1.conv2"].ranks == (2, 3, 4, 2)
    assert plan["fc"].ranks == (2,)
    turned = planned({"layer1.conv2": [2, 3, 4, 2], "layer1.*": 3})
    assert turned["layer1.conv2"].ranks == (3, 3, 3, 3)


def test_layers_that_no_glob_matches_stay_dense_with_the_reason():
    plan = planned({"layer1.*": 3})
    assert set(plan) == {"layer1.conv1", "layer1.conv2", "layer1.shortcut"}
    assert plan.skipped == {"conv1": "no glob of tt_ranks matches it", "fc": "no glob of tt_ranks matches it"}


def test_row_21_a_glob_that_matches_nothing_is_an_error_with_near_matches():
    with pytest.raises(PlanError, match=r"tt_ranks 'layer1\.cnv1' matches no layer\. Did you mean: layer1\.conv1"):
        planned({"layer1.cnv1": 3})


def test_keys_that_are_numbers_in_yaml_are_globs_too():
    model = nn.Sequential(nn.Conv2d(6, 12, 3), nn.Conv2d(12, 12, 3))
    plan = make_plan(model, Manual({0: 3, "1": 4}), example_input=torch.randn(IMAGE), allow_larger=True)
    assert (max(plan["0"].ranks), max(plan["1"].ranks)) == (3, 4)


# -- nonsense --------------------------------------------------------------------------------------------------

NONSENSE = [
    0, -1, 2.0, 2.5, "16", "", True, False, [], (), [0, 2, 2, 2], [2, -2, 2, 2], [2, 2.0, 2, 2], ["2"] * 4,
    [True] * 4, [None], [[2, 2]], {}, {"*": 0}, {"*": "8"}, {"*": None}, {"*": []}, {"*": [2, 2.5]}, {"*": {"a": 1}},
]  # fmt: skip


@pytest.mark.parametrize("ranks", NONSENSE, ids=repr)
def test_row_9_nonsense_is_one_error_that_names_the_key_before_any_model_is_seen(ranks: object):
    with pytest.raises(ConfigError, match=r"^tt_ranks.*: .* given; allowed: 16, a list") as caught:
        Manual(ranks)
    assert "Traceback" not in str(caught.value)


def test_sequences_convert_their_own_modes_and_ranks():
    plan = make_plan(Tokens(), Manual(3), example_input=torch.randn(2, 5, 16))
    assert {name: layer.ranks for name, layer in plan.items()} == {"up": (3,), "down": (3,)}


def test_without_ranks_the_default_is_the_cap():
    assert {max(layer.ranks) for layer in planned(None).values()} == {8}
    with pytest.raises(ConfigError, match="^default: 0 given"):
        Manual(default=0)
