"""The candidates of a layer in the greedy rule: ranks at even shares of its cost, and those rounded to multiples."""

from collections.abc import Iterable
from dataclasses import dataclass
from fractions import Fraction

from hodec.plan.layer import LayerPlan
from hodec.ranks.base import Candidate
from hodec.ranks.ratio import LayerCost, ranks_for_ratio
from hodec.ranks.rounding import Rounding


@dataclass(frozen=True)
class Meter:
    """A cost that counts.

    Attributes:
        name: ``macs``, ``params`` or ``latency_ms``.
        after, before: planned layer -> what it costs factorized, and dense.
    """

    name: str
    after: LayerCost
    before: LayerCost

    def ratio(self, layer: LayerPlan) -> float:
        """Share of its dense cost that a layer keeps."""
        return self.after(layer) / self.before(layer)


# Costs that a plan knows by itself.
COUNTED = {
    "macs": Meter("macs", lambda layer: layer.macs_after, lambda layer: layer.macs_before),
    "params": Meter("params", lambda layer: layer.params_after, lambda layer: layer.params_before),
}


@dataclass(frozen=True)
class Curve:
    """Candidates of one layer, cheapest first; each saves something and costs nowhere more than dense.

    Attributes:
        measured: those that are evaluated.
        offered: those that may be chosen, which are the same where nothing is rounded.
        dense: what the layer costs dense.
    """

    measured: tuple[LayerPlan, ...]
    offered: tuple[LayerPlan, ...]
    dense: float


def curve_of(candidate: Candidate, meter: Meter, *, count: int, multiplicity: int) -> Curve:
    """The curve of a layer.

    Args:
        meter: shares are of this cost.
        count: n of the shares 1/n .. (n-1)/n.
        multiplicity: offered ranks are multiples of this, rounded up, or the most that the layer allows.
    """
    costs = (meter.after, meter.before)
    shares = (Fraction(i, count) for i in range(1, count))  # exact: a cost of just i/n must count as within
    wanted = (ranks_for_ratio(candidate, share, meter.name, costs=costs) for share in shares)
    measured = _worthwhile((candidate.planned(ranks) for ranks in wanted), meter)
    rounding = Rounding(multiplicity)
    offered = _worthwhile((_rounded(candidate, layer, rounding) for layer in measured), meter)
    return Curve(measured, offered, meter.before(candidate.planned(candidate.most)))


def _rounded(candidate: Candidate, layer: LayerPlan, rounding: Rounding) -> LayerPlan:
    ranks, _ = rounding.apply(candidate, layer.ranks)
    if ranks == layer.ranks:
        return layer
    note = f"ranks {list(layer.ranks)} became {list(ranks)}: multiplicity={rounding.round_to}"
    return candidate.planned(ranks, (note,))


def _worthwhile(layers: Iterable[LayerPlan], meter: Meter) -> tuple[LayerPlan, ...]:
    """One layer plan for each ranks, without those that would not be worth it, cheapest first."""
    by_ranks: dict[tuple[int, ...], LayerPlan] = {}
    for layer in layers:
        if layer.saves() and meter.after(layer) < meter.before(layer):
            by_ranks.setdefault(layer.ranks, layer)
    return tuple(sorted(by_ranks.values(), key=meter.after))
