"""The search of the greedy rule, over numbers alone: one score threshold for the whole net, found by bisection."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from hodec.errors import PlanError, Use

# The search ends this close to the target, in shares of the whole cost: the ratios of layers, 1/n apart, are coarser
# for every n below 1000.
CLOSE = 1e-3

Picks = dict[str, int | None]


@dataclass(frozen=True)
class NetCosts:
    """What a net costs, layer by layer.

    Attributes:
        factorized: layer -> costs at its ratios, most severe (cheapest) first.
        dense: layer -> its cost when left dense.
        rest: everything else in the net.
    """

    factorized: Mapping[str, Sequence[float]]
    dense: Mapping[str, float]
    rest: float = 0.0

    @property
    def total(self) -> float:
        """Cost of the dense net."""
        return self.rest + sum(self.dense.values())

    def ratio(self, picks: Picks) -> float:
        """Share of the dense net's cost that is left."""
        left = sum(self.dense[name] if at is None else self.factorized[name][at] for name, at in picks.items())
        return (self.rest + left) / self.total


@dataclass(frozen=True)
class SearchResult:
    """Outcome of a search.

    Attributes:
        threshold: the score that layers were cut down to.
        picks: layer -> position of its ratio, most severe first; None leaves it dense.
        ratio: share of the whole dense cost that is left.
    """

    threshold: float
    picks: Picks
    ratio: float


def search(
    scores: Mapping[str, Sequence[float]], costs: NetCosts, target: float, *, narrow: float = 1e-4
) -> SearchResult:
    """Cut every layer as far as one common score threshold lets it; the threshold is the one that meets the target.

    Bisection over the range of all scores: a net above the target lowers the threshold, one below raises it. It ends
    within ``CLOSE`` of the target, on either side, or else at the highest threshold found that stays below it.

    Args:
        scores: layer -> scores at its ratios, most severe first; finite, higher is better, at least one.
        costs: at the same ratios.
        target: share of the whole dense cost to keep, above 0 and at most 1.
        narrow: it also ends when the threshold is known to this share of the range of all scores.

    Raises:
        PlanError: even the most severe ratios of all layers keep more than the target.

    Source: AIMET documentation, greedy compression ratio selection; here a score equal to the threshold reaches it.
    """

    def at(threshold: float) -> SearchResult:
        picks = {name: pick(each, threshold) for name, each in scores.items()}
        return SearchResult(threshold, picks, costs.ratio(picks))

    check_reachable(costs, target)
    every = [score for each in scores.values() for score in each]
    low, high = min(every), max(every)
    end = narrow * (high - low)
    while True:
        middle = low + (high - low) / 2
        result = at(middle)
        if abs(result.ratio - target) <= CLOSE:
            return result
        if high - low <= end or not low < middle < high:  # the latter: neighbours among floating-point numbers
            return at(low)
        low, high = (low, middle) if result.ratio > target else (middle, high)


def pick(scores: Sequence[float], threshold: float) -> int | None:
    """The position that a threshold gives one layer, or None for dense.

    Dense if the mildest ratio scores below the threshold; the most severe if that one reaches it, whatever lies
    between; else the last one that is reached before a score falls below on the way from mild to severe.

    Args:
        scores: most severe ratio first, at least one.
    """
    if scores[-1] < threshold:
        return None
    if scores[0] >= threshold:
        return 0
    at = len(scores) - 1
    while scores[at - 1] >= threshold:
        at -= 1
    return at


def check_reachable(costs: NetCosts, target: float) -> None:
    """Refuse a target that the most severe ratios of all layers do not reach; no score is needed to know.

    Raises:
        PlanError: naming the least share of the cost that is reachable.
    """
    least = costs.ratio(dict.fromkeys(costs.factorized, 0))
    if least <= target + CLOSE:
        return
    raise PlanError(
        f"greedy: {{target}} cannot be reached: with every layer at its most severe ratio {least:.4f} of the cost is "
        f"left, {costs.rest / costs.total:.4f} in what is not factorized. Give {{allowed}} or more, more {{ratios}} "
        "(they start at 1/n), a lower {multiplicity}, or ignore fewer layers",
        target=Use("ranks.target", f"{target:g}"),
        allowed=Use("ranks.target", f"{math.ceil(least * 1e4) / 1e4:g}"),
        ratios=Use("ranks.ratios"),
        multiplicity=Use("ranks.multiplicity"),
    )


def smoothed(ratios: Sequence[float], scores: Sequence[float]) -> list[float]:
    """The nearest scores, in least squares, that nowhere fall as the ratio rises."""
    from scipy.optimize import isotonic_regression  # slow to import, and only this needs it

    order = sorted(range(len(ratios)), key=ratios.__getitem__)
    rising = isotonic_regression([scores[i] for i in order]).x
    return [float(rising[order.index(i)]) for i in range(len(ratios))]


def interpolated(ratio: float, ratios: Sequence[float], scores: Sequence[float], *, baseline: float) -> float:
    """The score at ``ratio``, on the line between the two measured ratios around it; at ratio 1 lies the baseline.

    Args:
        ratios: measured ones, rising, all below 1.
        baseline: score of the dense net.
    """
    return float(np.interp(ratio, [*ratios, 1.0], [*scores, baseline]))
