"""Ranks of all layers chosen together: the least lost within limits that hold for the whole net."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from hodec.ranks.selection.knapsack import Numbers, Solution, into_band, solve
from hodec.ranks.selection.options import Item, LayerMenu, Resource

# Rounds of solving and looking at finer ranks near the solution; they end early when nothing is gained.
ROUNDS = 4
GAIN = 1e-3


@dataclass(frozen=True)
class Allotment:
    """One item a layer.

    Attributes:
        items: layer name -> what it becomes.
        prices: resource -> loss that one unit of it is worth at the solution.
        bound: no choice among the options compared last loses less (finer ranks may).
    """

    items: dict[str, Item]
    prices: dict[str, float]
    bound: float

    @property
    def loss(self) -> float:
        """Sum over layers of weight times squared relative error."""
        return sum(item.loss for item in self.items.values())

    def used(self, resources: Sequence[Resource]) -> dict[str, float]:
        """Cost of the whole net in each resource."""
        sums = [sum(item.costs[k] for item in self.items.values()) for k in range(len(resources))]
        return {r.name: r.fixed + mine for r, mine in zip(resources, sums, strict=True)}


def allot(menus: Mapping[str, LayerMenu], resources: Sequence[Resource]) -> Allotment | None:
    """The items that lose least within the resources' limits; None if none keep them.

    The menus are refined near the solution; then single ranks are raised one by one while they fit.
    """
    loss = np.inf
    for _ in range(ROUNDS):
        found = _solve(menus, resources, pairs=False)
        if found is None:
            return None
        prices = np.array([found.prices[r.name] for r in resources])
        for menu in menus.values():
            menu.refine(prices)
        if not found.loss < loss * (1 - GAIN):
            break
        loss = found.loss
    found = _solve(menus, resources, pairs=True)
    return None if found is None else _fill(menus, resources, found)


def _solve(menus: Mapping[str, LayerMenu], resources: Sequence[Resource], *, pairs: bool) -> Allotment | None:
    offers = {name: menu.items() for name, menu in menus.items()}
    losses, costs = _tables(offers)
    solution: Solution | None = solve(losses, costs, [r.room for r in resources], pairs=pairs)
    if solution is None:
        return None
    picked = {name: items[pick] for (name, items), pick in zip(offers.items(), solution.picks, strict=True)}
    prices = {r.name: float(price) for r, price in zip(resources, solution.prices, strict=True)}
    return Allotment(picked, prices, solution.bound)


def _fill(menus: Mapping[str, LayerMenu], resources: Sequence[Resource], found: Allotment) -> Allotment:
    """Raise single ranks while that fits, the one that gains most per share of what is left first."""
    items = dict(found.items)
    rooms = np.array([r.room for r in resources])
    scale = np.maximum(rooms, 1e-30)
    raised: dict[str, list[Item]] = {}
    while True:
        left = rooms - np.sum([item.costs for item in items.values()], axis=0)
        best, most = "", 0.0
        chosen: Item | None = None
        for name, item in items.items():
            if name not in raised:
                near = menus[name].near(item)
                raised[name] = [one for one in near if one and one.loss < item.loss]
            for one in raised[name]:
                more = np.subtract(one.costs, item.costs)
                gain = (item.loss - one.loss) / max(float((more / scale).max()), 1e-12)
                if gain > most and bool((more <= left).all()):
                    best, most, chosen = name, gain, one
        if chosen is None:
            return Allotment(items, found.prices, found.bound)
        items[best] = chosen
        del raised[best]


def closer(
    menus: Mapping[str, LayerMenu], resources: Sequence[Resource], found: Allotment, share: float
) -> Allotment | None:
    """The least loss at which one limit is used up to ``share``, by changing two layers of ``found``; or None."""
    offers = {name: list(dict.fromkeys([*menu.items(), found.items[name]])) for name, menu in menus.items()}
    losses, costs = _tables(offers)
    floors = [share * r.limit - r.fixed for r in resources]
    now = [items.index(found.items[name]) for name, items in offers.items()]
    picks = into_band(losses, costs, [r.room for r in resources], floors, picks=now)
    if picks is None:
        return None
    return replace(found, items={name: offers[name][pick] for name, pick in zip(offers, picks, strict=True)})


def _tables(offers: Mapping[str, list[Item]]) -> tuple[list[Numbers], list[Numbers]]:
    losses = [np.array([item.loss for item in items]) for items in offers.values()]
    costs = [np.array([item.costs for item in items], dtype=np.float64) for items in offers.values()]
    return losses, costs


def least(menus: Mapping[str, LayerMenu], resources: Sequence[Resource]) -> dict[str, float]:
    """The least that the whole net can cost in each resource, each taken alone."""
    return {
        r.name: r.fixed + sum(min(item.costs[k] for item in menu.items()) for menu in menus.values())
        for k, r in enumerate(resources)
    }
