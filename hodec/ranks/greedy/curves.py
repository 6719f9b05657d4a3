"""The ranks of a layer that the greedy rule compares: at even ratios of its cost, and those rounded to multiples."""

from collections.abc import Iterable
from dataclasses import dataclass
from fractions import Fraction

from hodec.cost.metric import CostMetric
from hodec.plan.layer import LayerPlan
from hodec.ranks.context import LayerContext
from hodec.ranks.ratio import ranks_for_ratio
from hodec.ranks.rule import Limits


@dataclass(frozen=True)
class SensitivityCurve:
    """One layer at several ranks, cheapest first; each saves something and costs nowhere more than dense.

    Attributes:
        measured: the layer plans that are evaluated.
        offered: those that may be chosen, which are the same where nothing is rounded.
    """

    measured: tuple[LayerPlan, ...]
    offered: tuple[LayerPlan, ...]


def curve_of(layer: LayerContext, metric: CostMetric, *, ratios: int, multiplicity: int) -> SensitivityCurve:
    """The curve of a layer.

    Args:
        ratios: n of the ratios 1/n .. (n-1)/n of the layer's cost.
        multiplicity: offered ranks are multiples of this, rounded up, or the most that the layer allows.
    """
    shares = (Fraction(i, ratios) for i in range(1, ratios))  # exact: a cost of just i/n must count as within
    measured = _worthwhile((layer.planned(ranks_for_ratio(layer, share, metric)) for share in shares), metric)
    limits = Limits(round_to=multiplicity)
    return SensitivityCurve(measured, _worthwhile((_rounded(layer, one, limits) for one in measured), metric))


def _rounded(layer: LayerContext, planned: LayerPlan, limits: Limits) -> LayerPlan:
    ranks, _ = limits.limited(layer, planned.ranks)
    if ranks == planned.ranks:
        return planned
    note = f"ranks {list(planned.ranks)} became {list(ranks)}: multiplicity={limits.multiple(layer)}"
    return layer.planned(ranks, (note,))


def _worthwhile(planned: Iterable[LayerPlan], metric: CostMetric) -> tuple[LayerPlan, ...]:
    """One layer plan for each ranks, without those that would not be worth it, cheapest first."""
    by_ranks: dict[tuple[int, ...], LayerPlan] = {}
    for layer in planned:
        if layer.saves() and metric.factorized(layer) < metric.dense(layer):
            by_ranks.setdefault(layer.ranks, layer)
    return tuple(sorted(by_ranks.values(), key=metric.factorized))
