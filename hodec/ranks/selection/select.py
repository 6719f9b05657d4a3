"""Ranks of all layers selected together: the least lost within limits that hold for the whole net."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from hodec.ranks.selection.knapsack import Numbers, solve, within_slack
from hodec.ranks.selection.options import CostLimit, LayerOptions, RankOption


@dataclass(frozen=True)
class Selection:
    """One option a layer.

    Attributes:
        options: layer name -> what it becomes.
        multipliers: name of a limited metric -> loss that one unit of it is worth at the solution.
        bound: no choice among the options compared last loses less (finer ranks may).
    """

    options: dict[str, RankOption]
    multipliers: dict[str, float]
    bound: float

    @property
    def loss(self) -> float:
        """Sum over layers of weight times squared relative error."""
        return sum(option.loss for option in self.options.values())

    def used(self, limits: Sequence[CostLimit]) -> dict[str, float]:
        """Cost of the whole net in each limited metric."""
        sums = [sum(option.costs[k] for option in self.options.values()) for k in range(len(limits))]
        return {one.metric.name: one.fixed + mine for one, mine in zip(limits, sums, strict=True)}


def select(
    layers: Mapping[str, LayerOptions], limits: Sequence[CostLimit], *, rounds: int = 4, gain: float = 1e-3
) -> Selection | None:
    """The options that lose least within the limits; None if none keep them.

    In rounds, the options are refined near the solution; then single ranks are raised one by one while they fit.

    Args:
        rounds: the most rounds.
        gain: they end when one lowers the loss by less than this share.
    """
    loss = np.inf
    for _ in range(rounds):
        selection = _solve(layers, limits, pairs=False)
        if selection is None:
            return None
        multipliers = np.array([selection.multipliers[one.metric.name] for one in limits])
        for layer in layers.values():
            layer.refine(multipliers)
        if not selection.loss < loss * (1 - gain):
            break
        loss = selection.loss
    selection = _solve(layers, limits, pairs=True)
    return None if selection is None else _raise_ranks(layers, limits, selection)


def _solve(layers: Mapping[str, LayerOptions], limits: Sequence[CostLimit], *, pairs: bool) -> Selection | None:
    options = {name: layer.options() for name, layer in layers.items()}
    solution = solve(*_tables(options), [one.available for one in limits], pairs=pairs)
    if solution is None:
        return None
    picked = {name: each[pick] for (name, each), pick in zip(options.items(), solution.picks, strict=True)}
    multipliers = {one.metric.name: float(m) for one, m in zip(limits, solution.multipliers, strict=True)}
    return Selection(picked, multipliers, solution.bound)


def _raise_ranks(layers: Mapping[str, LayerOptions], limits: Sequence[CostLimit], selection: Selection) -> Selection:
    """Raise single ranks while that fits, the one that gains most per share of what is left first."""
    options = dict(selection.options)
    available = np.array([one.available for one in limits])
    scale = np.maximum(available, 1e-30)
    raised: dict[str, list[RankOption]] = {}
    while True:
        left = available - np.sum([option.costs for option in options.values()], axis=0)
        best, most = "", 0.0
        chosen: RankOption | None = None
        for name, option in options.items():
            if name not in raised:
                raised[name] = [one for one in layers[name].near(option) if one.loss < option.loss]
            for one in raised[name]:
                more = np.subtract(one.costs, option.costs)
                gain = (option.loss - one.loss) / max(float((more / scale).max()), 1e-12)
                if gain > most and bool((more <= left).all()):
                    best, most, chosen = name, gain, one
        if chosen is None:
            return replace(selection, options=options)
        options[best] = chosen
        del raised[best]


def use_up(
    layers: Mapping[str, LayerOptions], limits: Sequence[CostLimit], selection: Selection, share: float
) -> Selection | None:
    """The least loss at which one limit is used up to ``share``, by changing two layers of ``selection``; or None."""
    options = {name: list(dict.fromkeys([*layer.options(), selection.options[name]])) for name, layer in layers.items()}
    floors = [share * one.limit - one.fixed for one in limits]
    now = [each.index(selection.options[name]) for name, each in options.items()]
    picks = within_slack(*_tables(options), [one.available for one in limits], floors, picks=now)
    if picks is None:
        return None
    return replace(selection, options={name: options[name][pick] for name, pick in zip(options, picks, strict=True)})


def _tables(options: Mapping[str, list[RankOption]]) -> tuple[list[Numbers], list[Numbers]]:
    """Losses (options,) and costs (options, limits) of each layer."""
    losses = [np.array([option.loss for option in each]) for each in options.values()]
    return losses, [np.array([option.costs for option in each], dtype=np.float64) for each in options.values()]


def least_costs(layers: Mapping[str, LayerOptions], limits: Sequence[CostLimit]) -> dict[str, float]:
    """The least that the whole net can cost in each limited metric, each taken alone."""
    return {
        one.metric.name: one.fixed + sum(min(o.costs[k] for o in layer.options()) for layer in layers.values())
        for k, one in enumerate(limits)
    }
