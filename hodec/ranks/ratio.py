"""Ranks for a given share of each layer's cost."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from hodec.cost.metric import COUNTED, METRICS
from hodec.options import setting
from hodec.ranks.rule import Choice, Limits, RankRule

if TYPE_CHECKING:
    from collections.abc import Mapping
    from fractions import Fraction

    from hodec.cost.metric import CostMetric
    from hodec.ranks.context import LayerContext, NetContext

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Ratio(RankRule, Limits):
    """The largest ranks at which each layer costs no more than a share of what it costs dense.

    Ranks go down from full in proportion to each other. A layer that is above the target even at its least ranks
    keeps those, with a note. Where ``round_to`` is given, the ranks are the largest multiples within the target. An
    embedding, which takes no MACs when dense, goes by ``params``, and so does a weight that is ``rebuilt`` at any rank,
    whose MACs stay.

    Source: AIMET user guide, compression ratio of weight SVD and spatial SVD. Unlike there, a 1x1 convolution before
        a strided one is counted at the resolution of the input, where it runs.
    """

    name = "ratio"

    target: float = setting(0.5, "share of each layer's dense cost to keep", above=0, high=1)
    metric: str = setting("macs", "cost that the target is a share of", choices=COUNTED)

    def choose(self, layers: Mapping[str, LayerContext], net: NetContext) -> dict[str, Choice]:
        """One choice a layer: ranks within the target, or the least ranks with a note; equal layers are sought once."""
        found: dict[object, tuple[Choice, str]] = {}
        choices: dict[str, Choice] = {}
        for name, layer in layers.items():
            key = replace(layer.dense, aliases=(), notes=()), layer.block
            if key not in found:
                found[key] = self._search(layer)
            choices[name], warning = found[key]
            if warning:
                log.warning("%s %s", name, warning)
        return choices

    def _search(self, layer: LayerContext) -> tuple[Choice, str]:
        """The choice for a layer, and what to warn of."""
        metric, least = METRICS[self.metric], layer.planned(scaled_ranks(layer, 1))
        if metric.dense(layer.dense) in (0, metric.factorized(least)):
            metric = METRICS["params"]
        # a cost of exactly the target counts as within it: 0.29 * 100 is 28.999999999999996
        limit = self.target * metric.dense(layer.dense) * (1 + 1e-12)
        for step in range(max(layer.full_ranks), 0, -1):
            ranks, notes = self.limited(layer, scaled_ranks(layer, step))
            planned = layer.planned(ranks)
            if metric.factorized(planned) <= limit:
                return Choice(ranks, notes), ""
        ratio = metric.ratio(planned)
        note = f"even ranks {list(ranks)} keep {ratio:.3f} of the dense {metric.name}, above the target {self.target:g}"
        warning = f"keeps {ratio:.2f} of its dense cost at its least ranks, above the target"
        return Choice(ranks, (*notes, note)), warning


def ranks_for_ratio(layer: LayerContext, ratio: float | Fraction, metric: CostMetric) -> tuple[int, ...]:
    """The largest ranks, in proportion to full ones, at which a layer costs no more than a share of its dense cost.

    Args:
        ratio: above 0 and at most 1; a fraction where a cost of exactly that share must count as within it.

    Returns:
        The ranks; the least ones where even those cost more.
    """
    limit = ratio * metric.dense(layer.dense)
    for step in range(max(layer.full_ranks), 0, -1):
        ranks = scaled_ranks(layer, step)
        if metric.factorized(layer.planned(ranks)) <= limit:
            break
    return ranks


def scaled_ranks(layer: LayerContext, step: int) -> tuple[int, ...]:
    """Ranks in proportion to full ranks of which the largest is ``step``, 1..max(full); each at least 1, fitted."""
    highest = max(layer.full_ranks)
    return layer.fit([max(1, round(step * full / highest)) for full in layer.full_ranks])
