"""Ranks for a given share of each layer's cost."""

import logging
from collections.abc import Callable, Mapping
from fractions import Fraction
from functools import partial

from hodec.plan.layer import LayerPlan
from hodec.ranks.base import Candidate, Choice
from hodec.ranks.rounding import Rounding, check_metric, check_share

log = logging.getLogger(__name__)

LayerCost = Callable[[LayerPlan], float]

# A cost of exactly the target counts as within it: 0.29 * 100 is 28.999999999999996.
SLACK = 1e-12


class Ratio:
    """The largest ranks at which each layer costs no more than a share of what it costs dense.

    Ranks go down from full in proportion to each other. A layer that is above the target even at its least ranks
    keeps those, with a note. Where ``round_to`` is given, the ranks are the largest multiples within the target.

    Args:
        target: share of the layer's dense cost to keep, above 0 and at most 1.
        metric: ``macs`` or ``params``; an embedding, which takes no MACs when dense, always goes by ``params``.
        round_to, min_rank, max_rank: see ``Rounding``.

    Raises:
        ConfigError: a setting out of range.

    Source: AIMET user guide, compression ratio of weight SVD and spatial SVD. Unlike there, a 1x1 convolution before
        a strided one is counted at the resolution of the input, where it runs.
    """

    name = "ratio"
    reads_weights = False

    def __init__(
        self,
        target: float,
        metric: str = "macs",
        *,
        round_to: int = 1,
        min_rank: int = 1,
        max_rank: int | None = None,
    ) -> None:
        self.target = check_share("ranks.target", target)
        self.metric = check_metric(metric)
        self.rounding = Rounding(round_to, min_rank, max_rank)

    def choose(self, candidates: Mapping[str, Candidate]) -> dict[str, Choice]:
        """One choice a layer; none stays dense here."""
        return {name: self._one(name, candidate) for name, candidate in candidates.items()}

    def _one(self, name: str, candidate: Candidate) -> Choice:
        highest = max(candidate.most)
        for step in range(highest, 0, -1):
            ranks, notes = self.rounding.apply(candidate, scaled_ranks(candidate, step))
            layer = candidate.planned(ranks)
            if cost_of(layer, self.metric) <= self.target * dense_cost_of(layer, self.metric) * (1 + SLACK):
                return Choice(ranks, notes)
        share = cost_of(layer, self.metric) / dense_cost_of(layer, self.metric)
        log.warning("%s keeps %.2f of its dense cost at its least ranks, above the target", name, share)
        note = f"even ranks {list(ranks)} keep {share:.3f} of the dense {self.metric}, above the target {self.target:g}"
        return Choice(ranks, (*notes, note))


def ranks_for_ratio(
    candidate: Candidate,
    ratio: float | Fraction,
    metric: str = "macs",
    *,
    costs: tuple[LayerCost, LayerCost] | None = None,
) -> tuple[int, ...]:
    """The largest ranks, in proportion to full ones, at which a layer costs no more than a share of its dense cost.

    Its least ranks where even those cost more.

    Args:
        ratio: above 0 and at most 1; a fraction where a cost of exactly that share must count as within it.
        metric: ``macs`` or ``params``.
        costs: what a planned layer costs factorized and dense, where it is to be another metric.
    """
    after, before = costs or (partial(cost_of, metric=metric), partial(dense_cost_of, metric=metric))
    limit = ratio * before(candidate.planned(candidate.most))
    for step in range(max(candidate.most), 0, -1):
        ranks = scaled_ranks(candidate, step)
        if after(candidate.planned(ranks)) <= limit:
            break
    return ranks


def scaled_ranks(candidate: Candidate, step: int) -> tuple[int, ...]:
    """Ranks in proportion to full ranks of which the largest is ``step``, 1..max(full); each at least 1, fitted."""
    highest = max(candidate.most)
    ranks = [max(1, round(step * most / highest)) for most in candidate.most]
    return tuple(candidate.format.fit_ranks(candidate.site.shape, candidate.modes, ranks))


def cost_of(layer: LayerPlan, metric: str) -> int:
    """What a factorized layer costs in this metric; a layer that costs nothing dense is measured in parameters."""
    return layer.params_after if metric == "params" or not layer.macs_before else layer.macs_after


def dense_cost_of(layer: LayerPlan, metric: str) -> int:
    """What the dense layer costs, in the same metric as ``cost_of``."""
    return layer.params_before if metric == "params" or not layer.macs_before else layer.macs_before
