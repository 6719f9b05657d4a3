"""The search over hand-made scores: what it picks, step by step on paper, at ties, on flat curves and at the ends."""

import random

import pytest

from hodec.errors import PlanError
from hodec.ranks.greedy.search import CLOSE, NetCosts, Picks, check_reachable, interpolated, pick, search, smoothed

# Scores are small whole numbers, so that the bisection of 0..64 meets some of them exactly.
SCORES = {"a": (0, 40, 64), "b": (32, 48, 56), "c": (20, 20, 20)}
DENSE = {"a": 60.0, "b": 30.0, "c": 10.0}
CUTS = {name: tuple(share * cost for share in (0.25, 0.5, 0.75)) for name, cost in DENSE.items()}
COSTS = NetCosts(CUTS, DENSE)

# target -> threshold, picks, share of the cost that is left
GOLDEN: dict[float, tuple[float, Picks, float]] = {
    # 32 at once: a 30, b 7.5 (its most severe score is 32 too: a tie is cut), c dense 10
    0.475: (32, {"a": 1, "b": 0, "c": None}, 0.475),
    # 32: 0.475, up; 48: a 45, b 15 (a tie again), c 10
    0.7: (48, {"a": 2, "b": 1, "c": None}, 0.7),
    # 32: 0.475, up; 48: 0.7, down; 40: 0.55, up; everything from there to 48: 0.7, down to 40 again
    0.6: (40, {"a": 1, "b": 1, "c": None}, 0.55),
    # 32, 16, 8 .. keep more; the least score of all is the last resort
    0.25: (0, {"a": 0, "b": 0, "c": 0}, 0.25),
    # 32: 0.475, down; 16: a 30, b 7.5, c 2.5
    0.4: (16, {"a": 1, "b": 0, "c": 0}, 0.4),
}


@pytest.mark.parametrize("target", GOLDEN)
def test_golden_a_hand_made_table(target: float):
    found = search(SCORES, COSTS, target)
    threshold, picks, ratio = GOLDEN[target]
    assert found.picks == picks
    assert found.ratio == pytest.approx(ratio, abs=1e-12)
    assert found.threshold == threshold


def test_target_1_cuts_only_what_scores_as_high_as_anything():
    found = search(SCORES, COSTS, 1.0)
    assert found.picks == {"a": 2, "b": None, "c": None}
    assert found.ratio == pytest.approx(0.85)
    assert 64 - 64e-4 <= found.threshold <= 64


def test_what_is_not_factorized_counts():
    # the same picks as for 0.55 of the layers alone: (55 + 100) / 200
    found = search(SCORES, NetCosts(CUTS, DENSE, rest=100.0), 0.775)
    assert found.picks == {"a": 1, "b": 1, "c": None}
    assert found.ratio == pytest.approx(0.775)


def test_the_target_is_met_from_either_side_within_a_thousandth():
    for target in (0.475 - 0.9 * CLOSE, 0.475 + 0.9 * CLOSE):
        assert search(SCORES, COSTS, target).ratio == pytest.approx(0.475)
    assert search(SCORES, COSTS, 0.475 - 1.1 * CLOSE).ratio == pytest.approx(0.4)


def test_defect_d_a_layer_whose_most_severe_score_ties_with_the_threshold_is_cut():
    assert pick((32, 48, 56), 32) == 0
    flat = {name: (5.0, 5.0, 5.0) for name in DENSE}
    for target in (0.3, 0.9, 1.0):
        found = search(flat, COSTS, target)
        assert found.picks == {"a": 0, "b": 0, "c": 0}
        assert found.ratio == pytest.approx(0.25)


@pytest.mark.parametrize(
    ("threshold", "expected"),
    [(20, 0), (30, 0), (30.1, 2), (80, 2), (80.1, None), (90, None)],
)
def test_picks_on_a_curve_that_is_not_monotonic(threshold: float, expected: int | None):
    """Between severe and mild the walk starts at mild and ends before the first score below."""
    assert pick((30, 20, 90, 80), threshold) == expected


def test_a_single_ratio_is_cut_or_not():
    assert pick((7,), 7) == 0
    assert pick((7,), 7.5) is None


def test_unreachable_targets_name_the_least_that_is_reachable():
    with pytest.raises(PlanError, match=r"target=0\.2 cannot be reached.*0\.2500 of the cost is left"):
        search(SCORES, COSTS, 0.2)
    with pytest.raises(PlanError, match=r"0\.6250 of the cost is left, 0\.5000 in.*Give target=0\.625 or more"):
        check_reachable(NetCosts(CUTS, DENSE, rest=100.0), 0.5)
    check_reachable(COSTS, 0.25)


@pytest.mark.parametrize("scale", [1e-300, 1e-12, 1.0, 1e12])
@pytest.mark.parametrize("shift", [0.0, -64.0, 1.0])
def test_it_ends_and_picks_the_same_at_any_scale_of_the_scores(scale: float, shift: float):
    scores = {name: [(s + shift) * scale for s in each] for name, each in SCORES.items()}
    for target, (_, picks, _) in GOLDEN.items():
        if target != 0.25:  # whose end depends on the rounding of the shift
            assert search(scores, COSTS, target).picks == picks


def test_scores_that_are_neighbours_among_floating_point_numbers_end_too():
    low, high = 1.0, 1.0 + 2**-52
    found = search({"a": (low, high, high), "b": (low, low, high), "c": (low, low, low)}, COSTS, 0.3)
    assert found.picks == {"a": 0, "b": 0, "c": 0}


def test_no_threshold_would_come_closer_from_below():
    """Over random tables: what is found is at or below the target, and the best of all thresholds that are."""
    draw = random.Random(0)
    for _ in range(200):
        names = [f"layer{i}" for i in range(draw.randint(1, 6))]
        scores = {n: [draw.randint(0, 50) / 50 for _ in range(draw.randint(1, 9))] for n in names}
        dense = {n: draw.randint(1, 100) for n in names}
        cuts = {n: [dense[n] * (i + 1) / 10 for i in range(len(each))] for n, each in scores.items()}
        costs, target = NetCosts(cuts, dense, rest=draw.randint(0, 50)), draw.uniform(0.2, 1)
        least = costs.ratio(dict.fromkeys(names, 0))
        if least > target + CLOSE:
            continue
        found = search(scores, costs, target)
        assert found.ratio <= target + CLOSE
        assert found.picks == {n: pick(each, found.threshold) for n, each in scores.items()}
        reachable = [costs.ratio({n: pick(each, s / 50) for n, each in scores.items()}) for s in range(51)]
        top = max(max(each) for each in scores.values())
        below = [r for s, r in enumerate(reachable) if r <= target and s / 50 <= top]
        assert found.ratio >= max(below, default=least) - CLOSE


# -- scores of ranks that were not evaluated -----------------------------------------------------------------------

MEASURED = (0.25, 0.5, 0.75), (10.0, 30.0, 40.0)


@pytest.mark.parametrize(
    ("ratio", "score"), [(0.25, 10), (0.3, 14), (0.375, 20), (0.5, 30), (0.6, 34), (0.75, 40), (0.875, 70), (0.1, 10)]
)
def test_defect_e_interpolation_uses_the_interval_that_the_ratio_lies_in(ratio: float, score: float):
    assert interpolated(ratio, *MEASURED, baseline=100.0) == pytest.approx(score)


def test_smoothed_scores_never_fall_and_stay_near():
    assert smoothed((0.1, 0.4, 0.6, 0.8), (3.0, 1.0, 2.0, 5.0)) == pytest.approx([2, 2, 2, 5])
    assert smoothed((0.1, 0.4), (1.0, 2.0)) == [1, 2]
    assert smoothed((0.5,), (7.0,)) == [7]
