"""Ranks by analytic variational Bayesian matrix factorization: all singular values that are not noise."""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from hodec.options import setting
from hodec.ranks.rule import Choice, Limits, RankRule

if TYPE_CHECKING:
    from hodec.ranks.context import LayerContext, NetContext

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Vbmf(RankRule, Limits):
    """Per unfolding, the number of singular values that the weight's own noise cannot explain.

    As published for ``svd``, ``weight_svd`` (one matrix) and ``tucker`` (the unfoldings along its two channel axes);
    every unfolding of ``tt``, ``spatial_svd`` and ``cp`` is our own extension. Where several unfoldings decide one
    rank, the largest counts. The answer does not depend on the scale of the weight.

    A matrix (L, M), L <= M, never has more than about L / (1 + L / M) signals: EVBMF takes the smallest singular
    values for noise, so a weight of full rank needs a recommendation ratio above 0 or another rule.

    Source: see ``hodec.ranks.evbmf``; recommendation ratio: NetsPresso documentation.
    """

    name = "vbmf"
    reads_weights = True

    recommendation_ratio: float = setting(
        0.0, "above 0 gives back that share of the ranks found to be noise, below 0 cuts as many more", low=-1, high=1
    )

    def choose_layer(self, layer: LayerContext, net: NetContext) -> Choice:
        """Ranks without the noise; no layer stays dense here, and a layer of pure noise has rank 1 and a note."""
        from hodec.ranks.evbmf import weight_signals

        signals, full = weight_signals(layer), layer.full_ranks
        notes = _noise_note(layer.name, signals)
        found = [min(max(1, rank), most) for rank, most in zip(signals, full, strict=True)]
        ranks = [self.recommended(rank, most) for rank, most in zip(found, full, strict=True)]
        if ranks != found:
            ratio = f"recommendation ratio {self.recommendation_ratio:g}"
            notes = (*notes, f"VBMF's ranks {found} became {ranks} by {ratio}")
        limited, more = self.limited(layer, ranks)
        return Choice(limited, (*notes, *more))

    def recommended(self, rank: int, full: int) -> int:
        """rank + trunc(ratio * (full - rank)), brought into 1..full, for VBMF's ``rank``, 1..full."""
        change = self.recommendation_ratio * (full - rank)
        return min(max(1, rank + math.trunc(round(change, 6))), full)  # 0.29 * 100 is 28.999999999999996


def _noise_note(name: str, signals: list[int]) -> tuple[str, ...]:
    empty = [position for position, rank in enumerate(signals) if rank == 0]
    if not empty:
        return ()
    log.warning("%s: VBMF finds only noise; are its weights trained?", name)
    return (f"VBMF finds only noise for rank {', '.join(str(p + 1) for p in empty)} of {len(signals)}: kept at 1",)
