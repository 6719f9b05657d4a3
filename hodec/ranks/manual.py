"""Ranks given by hand: one number, a list, or a mapping of layer globs."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from hodec.errors import PlanError, Use, literal
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
        tt_ranks: one number is a cap on every rank of every layer, a list has one cap for each of a layer's ranks.
            Both are clipped to what the layer allows, and the plan notes it. A mapping gives each layer glob a number
            or a list; the last glob that matches counts, and layers that none matches stay dense. None stands for
            ``default``.
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
            PlanError: a list for a layer of another number of ranks, or a glob that matches no layer.
        """
        from hodec.conversion.eligibility import match_names

        ranks = self.default if self.tt_ranks is None else self.tt_ranks
        by_glob = ranks if isinstance(ranks, Mapping) else {"*": ranks}
        by_layer = {
            name: value for glob, value in by_glob.items() for name in match_names(str(glob), list(layers), "tt_ranks")
        }
        self._check_counts(layers, by_layer)
        choices = {name: _choice(layer, by_layer.get(name)) for name, layer in layers.items()}
        clipped = [name for name, choice in choices.items() if choice.notes]
        if clipped:
            log.info("ranks clipped in %d layers (%s, ..); the plan notes each", len(clipped), clipped[0])
        return choices

    def _check_counts(self, layers: Mapping[str, LayerContext], by_layer: Mapping[str, Ranks], most: int = 6) -> None:
        """Refuse a list for a layer of another number of ranks.

        Args:
            most: layers whose ranks the message gives one by one.

        Raises:
            PlanError: with an override that gives these layers one number, and one number for all where they are many.
        """
        given = {name: ranks for name, ranks in by_layer.items() if not isinstance(ranks, int)}
        others = {name: len(layers[name].full_ranks) for name in given}
        others = {name: count for name, count in others.items() if count != len(given[name])}
        if not others:
            return
        name, few = next(iter(others)), len(others) <= most and len(others) < len(layers)
        by_glob = self.tt_ranks if isinstance(self.tt_ranks, Mapping) else {"*": given[name]}
        fitting = {**by_glob, **dict.fromkeys(others, self.default)}
        entries = ",".join(f"{glob}:{str(list(r) if not isinstance(r, int) else r)}" for glob, r in fitting.items())
        more = f", and so in {len(others) - 1} more" if len(others) > 1 else ""
        raise PlanError(
            f"{literal(name)} ({layers[name].site.layer_type}, method {layers[name].method}) needs {others[name]} "
            f"rank{'s' * (others[name] != 1)}, got {len(given[name])}: {list(given[name])}{more}. Allowed: {{ranks}}",
            ranks=Use("tt_ranks", f"{{{entries.replace(' ', '')}}}" if few else self.default),
        )


def _choice(layer: LayerContext, ranks: Ranks | None) -> Choice:
    if ranks is None:
        return Choice(None, reason="no glob of tt_ranks matches it")
    caps = [ranks] * len(layer.full_ranks) if isinstance(ranks, int) else list(ranks)
    fitted = layer.fit(caps)
    if fitted == tuple(caps):
        return Choice(fitted)
    given = f"rank {ranks}" if isinstance(ranks, int) else f"ranks {caps}"
    return Choice(fitted, notes=(f"{given} clipped to {list(fitted)}, the most its modes allow",))
