"""Ranks given by hand: one number, a list, or a mapping of layer globs."""

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from hodec.conversion.eligibility import match_names
from hodec.errors import HodecError, PlanError
from hodec.ranks.base import Candidate, Choice

log = logging.getLogger(__name__)


class Manual:
    """Ranks by hand.

    Args:
        tt_ranks: one number is a cap: every rank of every layer is at most this, clipped to what the layer
            allows, and the clipping is noted in the plan. A list is a demand: each layer must take exactly
            these. A mapping gives each layer glob a number or a list; the last glob that matches counts, and
            layers that none matches stay dense.
    """

    name = "manual"
    reads_weights = False

    def __init__(self, tt_ranks: int | Sequence[int] | Mapping[str, Any]) -> None:
        self.tt_ranks = tt_ranks
        if isinstance(tt_ranks, Mapping) and not tt_ranks:
            raise PlanError("tt_ranks: {} names no layer; give at least one glob, e.g. 'tt_ranks={layer1.*:9}'")
        for value in tt_ranks.values() if isinstance(tt_ranks, Mapping) else [tt_ranks]:
            _check_value(value)

    def choose(self, candidates: Mapping[str, Candidate]) -> dict[str, Choice]:
        """One choice a layer; see the class for the rules."""
        given = self._by_layer(list(candidates))
        choices = {name: self._one(candidate, given.get(name)) for name, candidate in candidates.items()}
        clipped = [name for name, choice in choices.items() if choice.notes]
        if clipped:
            log.warning("ranks clipped in %d layers (%s, ..); the plan notes each", len(clipped), clipped[0])
        return choices

    def _by_layer(self, names: list[str]) -> dict[str, Any]:
        if not isinstance(self.tt_ranks, Mapping):
            return dict.fromkeys(names, self.tt_ranks)
        return {
            name: value
            for pattern, value in self.tt_ranks.items()
            for name in match_names(str(pattern), names, "tt_ranks")
        }

    def _one(self, candidate: Candidate, given: Any) -> Choice:
        if given is None:
            return Choice(None, reason="no glob of tt_ranks matches it")
        if not isinstance(given, int):
            ranks = tuple(given)
            _check_demand(candidate, ranks)
            return Choice(ranks)
        most = candidate.most
        ranks = candidate.format.fit_ranks(candidate.site.shape, candidate.modes, [given] * len(most))
        if all(r == given for r in ranks):
            return Choice(ranks)
        return Choice(ranks, notes=(f"rank {given} clipped to {list(ranks)}, the most its modes allow",))


def _check_demand(candidate: Candidate, ranks: tuple[int, ...]) -> None:
    try:
        candidate.planned(ranks)
    except HodecError as error:
        raise PlanError(str(error)) from error


def _check_value(value: Any) -> None:
    if isinstance(value, int) and not isinstance(value, bool):
        numbers: Sequence[Any] = [value]
    elif isinstance(value, Sequence) and not isinstance(value, str) and len(value):
        numbers = value
    else:
        raise PlanError(
            f"tt_ranks: {value!r} is neither a whole number nor a list of them; give tt_ranks=16, "
            "'tt_ranks=[4,16,16,4]' or 'tt_ranks={layer1.*:9}'"
        )
    for number in numbers:
        if isinstance(number, bool) or not isinstance(number, int) or number < 1:
            raise PlanError(f"tt_ranks: rank {number!r} must be a whole number of at least 1, e.g. tt_ranks=16")
