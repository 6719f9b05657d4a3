"""Ranks that keep a share of each unfolding's squared norm."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from hodec.options import setting
from hodec.ranks.rule import Choice, Limits, RankRule

if TYPE_CHECKING:
    from hodec.ranks.context import LayerContext, NetContext


@dataclass(frozen=True)
class Energy(RankRule, Limits):
    """The least ranks at which every unfolding keeps at least a share of the weight's squared norm.

    With n unfoldings the factorized weight may lose up to n (1 - keep) of the squared norm: what each loses adds up.
    Not so for CP, whose rank is seldom enough when it is enough for each unfolding alone. ``keep=1`` keeps the
    numerical rank. A layer that would cost more than dense stays dense, with ``allow_larger`` too.
    """

    name = "energy"
    reads_weights = True
    may_enlarge = False

    keep: float = setting(0.9, "share of each unfolding's squared norm to keep", above=0, high=1)

    def choose_layer(self, layer: LayerContext, net: NetContext) -> Choice:
        """Ranks that keep the share; no layer stays dense here."""
        from hodec.ranks.spectra import ranks_for_tail, unfolding_spectra

        # shares are sums of many numbers: a rank that misses by 1e-9 of what may be lost is enough
        lost = (1 - self.keep) * (1 + 1e-9)
        return Choice(*self.limited(layer, ranks_for_tail(unfolding_spectra(layer), lost, len(layer.full_ranks))))
