"""Ranks given by hand: one number, a list, or a mapping of layer globs."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from hodec.errors import ConfigError, Use, literal
from hodec.options import argument, setting
from hodec.ranks.rule import Choice, RankRule

if TYPE_CHECKING:
    from hodec.ranks.context import LayerContext, NetContext

log = logging.getLogger(__name__)

Ranks = int | Sequence[int]


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

    tt_ranks: Ranks | Mapping[str, Ranks] | None = argument()
    default: int = setting(8, "cap on every rank where no ranks are given by hand", low=1)

    def __post_init__(self) -> None:
        super().__post_init__()
        for where, value in bad_ranks(self.tt_ranks):
            raise ConfigError(
                f"{{key}}{literal(where)}: {literal(repr(value))} given; allowed: {{number}}, {{ranks}} or {{globs}}",
                key=Use("tt_ranks"),
                number=Use("tt_ranks", 16),
                ranks=Use("tt_ranks", "[4,16,16,4]"),
                globs=Use("tt_ranks", "{layer1.*:9}"),
            )

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


def bad_ranks(value: object) -> list[tuple[str, object]]:
    """(where, value) of each part that is no rank: ``where`` is ``[glob]`` for an entry of a mapping."""
    if isinstance(value, Mapping) and value:
        entries = [(f"[{glob}]", ranks) for glob, ranks in value.items()]
    else:
        entries = [("", value)] if value is not None else []
    return [(where, ranks) for where, ranks in entries if not _are_ranks(ranks)]


def _are_ranks(value: object) -> bool:
    numbers = value if isinstance(value, Sequence) and not isinstance(value, str) else [value]
    return len(numbers) > 0 and all(type(n) is int and n >= 1 for n in numbers)


def _choice(layer: LayerContext, ranks: Ranks | None) -> Choice:
    if ranks is None:
        return Choice(None, reason="no glob of tt_ranks matches it")
    if not isinstance(ranks, int):
        return Choice(layer.planned(tuple(ranks)).ranks)
    fitted = layer.fit([ranks] * len(layer.full_ranks))
    if all(rank == ranks for rank in fitted):
        return Choice(fitted)
    return Choice(fitted, notes=(f"rank {ranks} clipped to {list(fitted)}, the most its modes allow",))
