"""Ranks of all layers chosen together: the least lost within limits that hold for the whole net."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from hodec.ranks.knapsack import Solution, solve
from hodec.ranks.menu import Item, Menu, Resource

log = logging.getLogger(__name__)

# Rounds of solving and looking at finer ranks near the solution; they end early when nothing is gained.
ROUNDS = 4
GAIN = 1e-3


@dataclass(frozen=True)
class Allotment:
    """One item a layer.

    Attributes:
        items: layer name -> what it becomes.
        prices: resource -> loss that one unit of it is worth at the solution.
        bound: no choice among the options seen loses less.
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
        return {r.name: r.fixed + sum(item.costs[k] for item in self.items.values()) for k, r in enumerate(resources)}


def allot(menus: Mapping[str, Menu], resources: Sequence[Resource]) -> Allotment | None:
    """The items that lose least within the resources' limits; None if none keep them.

    The menus are refined near the solution; then single ranks are raised one by one while they fit.
    """
    found, loss = None, np.inf
    for _ in range(ROUNDS):
        offers = {name: menu.items() for name, menu in menus.items()}
        found = _solve(offers, resources)
        if found is None:
            return None
        if not found.loss < loss * (1 - GAIN):
            break
        loss = found.loss
        prices = np.array([found.prices[r.name] for r in resources])
        for menu in menus.values():
            menu.refine(prices)
    return None if found is None else _fill(menus, resources, found)


def _solve(offers: Mapping[str, list[Item]], resources: Sequence[Resource]) -> Allotment | None:
    losses = [np.array([item.loss for item in items]) for items in offers.values()]
    costs = [np.array([item.costs for item in items], dtype=np.float64) for items in offers.values()]
    solution: Solution | None = solve(losses, costs, [r.room for r in resources])
    if solution is None:
        return None
    picked = {name: items[pick] for (name, items), pick in zip(offers.items(), solution.picks, strict=True)}
    prices = {r.name: float(price) for r, price in zip(resources, solution.prices, strict=True)}
    return Allotment(picked, prices, solution.bound)


def _fill(menus: Mapping[str, Menu], resources: Sequence[Resource], found: Allotment) -> Allotment:
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
                near = menus[name].around(item.ranks, 1) if item.ranks else []
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


def least(menus: Mapping[str, Menu], resources: Sequence[Resource]) -> dict[str, float]:
    """The least that the whole net can cost in each resource, each taken alone."""
    return {
        r.name: r.fixed + sum(min(item.costs[k] for item in menu.items()) for menu in menus.values())
        for k, r in enumerate(resources)
    }
