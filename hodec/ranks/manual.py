"""Ranks given by hand: one number, a list, or a mapping of layer globs."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from hodec.options import BadParts, argument, setting
from hodec.ranks.rule import Choice, RankRule

if TYPE_CHECKING:
    from hodec.ranks.context import LayerContext, NetContext

log = logging.getLogger(__name__)

Ranks = int | Sequence[int]


def bad_ranks(value: object) -> BadParts:
    """Yield each part that is no rank or list of ranks: ``([glob], value)`` of an entry of a mapping."""
    entries = {f"[{glob}]": ranks for glob, ranks in value.items()} if isinstance(value, Mapping) else {}
    for where, ranks in (entries or {"": value}).items():
        numbers = ranks if isinstance(ranks, Sequence) and not isinstance(ranks, str) else [ranks]
        if not numbers or not all(type(n) is int and n >= 1 for n in numbers):
            yield where, ranks


@dataclass(frozen=True)
class Manual(RankRule):
    """Ranks by hand.

    Args:
        tt_ranks: one number is a cap: every rank of every layer is at most this, clipped to what the layer
            allows, and the clipping is noted in the plan. A list is a demand: each layer must take exactly
            these. A mapping gives each layer glob a number or a list; the last glob that matches counts, and
            layers that none matches stay dense. None stands for ``default``.
        default: the cap where ``tt_ranks`` is None.

    Raises:
        ConfigError: something else than whole numbers of at least 1.
    """

    name = "manual"

    tt_ranks: Ranks | Mapping[str, Ranks] | None = argument(
        words="16, a list [4,16,16,4], or {layer glob: one of both}, with whole numbers from 1", check=bad_ranks
    )
    default: int = setting(8, "cap on every rank where no ranks are given by hand", low=1)

    def choose(self, layers: Mapping[str, LayerContext], net: NetContext) -> dict[str, Choice]:
        """One choice a layer; the class describes them.

        Raises:
            PlanError: a list that a layer cannot take, or a glob that matches no layer.
        """
        from hodec.conversion.eligibility import match_names

        ranks = self.default if self.tt_ranks is None else self.tt_ranks
        by_glob = ranks if isinstance(ranks, Mapping) else {"*": ranks}
        by_layer = {
            name: value for glob, value in by_glob.items() for name in match_names(str(glob), list(layers), "tt_ranks")
        }
        choices = {name: _choice(layer, by_layer.get(name)) for name, layer in layers.items()}
        clipped = [name for name, choice in choices.items() if choice.notes]
        if clipped:
            log.warning("ranks clipped in %d layers (%s, ..); the plan notes each", len(clipped), clipped[0])
        return choices


def _choice(layer: LayerContext, ranks: Ranks | None) -> Choice:
    if ranks is None:
        return Choice(None, reason="no glob of tt_ranks matches it")
    if not isinstance(ranks, int):
        return Choice(layer.planned(tuple(ranks)).ranks)
    fitted = layer.fit([ranks] * len(layer.full_ranks))
    if all(rank == ranks for rank in fitted):
        return Choice(fitted)
    return Choice(fitted, notes=(f"rank {ranks} clipped to {list(fitted)}, the most its modes allow",))
