"""What a layer can become: ranks with their cost and what they lose, and the same layer left dense."""

import hashlib
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hodec.conversion.eligibility import LayerSite
from hodec.formats.layer_types import LAYER_TYPES
from hodec.plan.layer import LayerPlan
from hodec.ranks.base import Candidate
from hodec.ranks.rounding import Rounding
from hodec.ranks.selection.knapsack import not_dominated
from hodec.ranks.spectra import Spectrum, spectra

# Ranks that a path is sampled at; finer ones are looked at near the solution.
STEPS = 64
# Ranks at which a layer is projected to bring estimated losses to scale; losses below need no scale.
SAMPLES, NEGLIGIBLE = 8, 1e-6
# Spectra remembered: a number a singular value, so thousands of layers take some ten megabytes.
REMEMBERED = 4096

_spectra: OrderedDict[tuple[object, ...], list[Spectrum]] = OrderedDict()


@dataclass(frozen=True)
class Resource:
    """A limited cost.

    Attributes:
        name: the setting that limits it: ``macs``, ``params``, ``latency_ms``.
        limit: the most that the whole net may cost.
        fixed: what everything that is no candidate costs.
        after, before: cost of a layer factorized, and dense.
    """

    name: str
    limit: float
    fixed: float
    after: Callable[[LayerPlan], float]
    before: Callable[[LayerPlan], float]

    @property
    def room(self) -> float:
        """What is left for the candidates."""
        return self.limit - self.fixed


# Costs that a plan knows by itself: factorized and dense.
COUNTED: dict[str, tuple[Callable[[LayerPlan], float], Callable[[LayerPlan], float]]] = {
    "macs": (lambda layer: layer.macs_after, lambda layer: layer.macs_before),
    "params": (lambda layer: layer.params_after, lambda layer: layer.params_before),
}


@dataclass(frozen=True)
class Item:
    """What a layer can become: ``ranks`` (None: dense) of ``method``, weighted ``loss``, ``costs`` one a resource."""

    ranks: tuple[int, ...] | None
    loss: float
    costs: tuple[float, ...]
    method: str = ""


def remembered_spectra(candidate: Candidate) -> list[Spectrum]:
    """``spectra``, remembered by the numbers in the weight, so that a sweep of targets computes them once."""
    weight = candidate.site.weight.detach().contiguous().cpu()
    digest = hashlib.sha256(weight.view(torch.uint8).numpy().data).digest()
    key = (digest, weight.dtype, weight.shape, candidate.method, candidate.site.layer_type, candidate.modes)
    if key not in _spectra:
        _spectra[key] = spectra(candidate)
        if len(_spectra) > REMEMBERED:
            _spectra.popitem(last=False)
    _spectra.move_to_end(key)
    return _spectra[key]


def candidate_of(name: str, layer: LayerPlan, weight: Tensor) -> Candidate:
    """The candidate that a planned layer was, with this weight, in the layout that the dense layer stores."""
    site = LayerSite(
        layer.layer_type, LAYER_TYPES[layer.layer_type].to_oihw(weight.detach()), layer.call_sites, layer.aliases
    )
    return Candidate(name, layer.method, site, layer.format, layer.modes, layer.execution)


class Losses:
    """Share of a weight's squared norm that ranks lose, from the singular values they cut off, 0..1.

    With one unfolding that is its tail, exactly. With several, each truncation is taken to keep its share of
    what the others kept: 1 - prod(1 - tail). That lies between the largest tail, which no truncation can
    undercut, and the sum of all tails, which bounds it. Choosing by the sum loses up to a fifth more in truth
    where much is cut: it passes 1 and then says little.
    """

    def __init__(self, found: Sequence[Spectrum]) -> None:
        self.tails: list[tuple[int, NDArray[np.float64]]] = [(s.position, s.tails.cpu().numpy()) for s in found]
        self.levels = np.unique(np.concatenate([tails[1:] for _, tails in self.tails]))

    def at(self, ranks: Sequence[int]) -> float:
        """The share lost at these ranks."""
        kept = 1.0
        for position, tails in self.tails:
            kept *= 1.0 - float(tails[min(ranks[position], len(tails) - 1)])
        return min(1.0, max(0.0, 1.0 - kept))

    def path(self, steps: int) -> list[list[int]]:
        """Ranks at which no unfolding loses more than a level, for ``steps`` levels; falling, not fitted."""
        positions = 1 + max(position for position, _ in self.tails)
        at = np.linspace(0, len(self.levels) - 1, min(steps, len(self.levels))).round().astype(int)
        picks = self.levels[at]
        ranks = np.ones((positions, len(picks)), dtype=int)
        for position, tails in self.tails:
            np.maximum(ranks[position], np.searchsorted(-tails, -picks, side="left"), out=ranks[position])
        return np.unique(ranks.T, axis=0)[::-1].tolist()  # type: ignore[no-any-return]


class MeasuredLosses(Losses):
    """``Losses`` brought to scale by measuring, so that they compare with those of other methods.

    Where the singular values do not tell exactly what ranks lose, the weight is projected at a few ranks of the
    path, and the estimate in between is multiplied by what was found there.
    """

    def __init__(self, candidate: Candidate, found: Sequence[Spectrum], rounding: Rounding) -> None:
        super().__init__(found)
        self._scale: tuple[list[float], list[float]] = ([0.0], [1.0])
        if len(self.tails) > 1 or candidate.format.iterative:
            self._scale = self._measure(candidate, rounding)

    def at(self, ranks: Sequence[int]) -> float:
        """The share lost at these ranks."""
        estimate = super().at(ranks)
        return min(1.0, estimate * float(np.interp(estimate, *self._scale)))

    def _measure(self, candidate: Candidate, rounding: Rounding) -> tuple[list[float], list[float]]:
        """Estimates, rising, and what to multiply each with."""
        weight = candidate.site.weight.detach().float()
        whole, estimate_at = float(weight.square().sum()), super().at
        fitted = dict.fromkeys(rounding.apply(candidate, tuple(ranks))[0] for ranks in self.path(STEPS))
        offered = [ranks for ranks in fitted if candidate.planned(ranks).saves() and estimate_at(ranks) > NEGLIGIBLE]
        seen: dict[float, float] = {}
        for k in np.unique(np.linspace(0, len(offered) - 1, SAMPLES).round().astype(int)) if offered else ():
            lost = weight - candidate.format.project(weight, offered[k], candidate.modes)
            estimate = estimate_at(offered[k])
            seen[estimate] = float(lost.square().sum()) / whole / estimate
        estimates = sorted(seen) or [0.0]
        return estimates, [seen.get(estimate, 1.0) for estimate in estimates]


class Menu:
    """The options of one layer seen so far; every one saves something and costs nowhere more than dense.

    Args:
        candidate: the layer.
        resources: the limited costs.
        weight: how much a squared relative error of 1 counts, >= 0.
        rounding: limits of its ranks.
        steps: ranks that its path is sampled at.
        found: its spectra, where they are known or not worth remembering.
        nested: offer one path only, on which no rank falls where another rises.
        measured: bring losses to scale by projecting, which takes longer; for comparing methods.
    """

    def __init__(
        self,
        candidate: Candidate,
        resources: Sequence[Resource],
        *,
        weight: float = 1.0,
        rounding: Rounding | None = None,
        steps: int = STEPS,
        found: Sequence[Spectrum] | None = None,
        nested: bool = False,
        measured: bool = False,
    ) -> None:
        self.candidate, self.resources, self.weight = candidate, resources, weight
        self.rounding = rounding or Rounding()
        spectra_of = remembered_spectra(candidate) if found is None else found
        self.losses = MeasuredLosses(candidate, spectra_of, self.rounding) if measured else Losses(spectra_of)
        self._template = candidate.planned(candidate.most)
        self._seen: dict[tuple[int, ...], Item | None] = {}
        self._asked: dict[tuple[int, ...], Item | None] = {}
        self.dense = Item(None, 0.0, tuple(r.before(self._template) for r in resources))
        self._look(steps, nested)

    def _look(self, steps: int, nested: bool) -> None:
        most = self._template.ranks
        # Ranks between modes of one side cost no multiply-adds where factors are merged before use: a path on
        # which only the two greatest ranks fall is looked at too.
        inner = sorted(range(len(most)), key=lambda k: most[k])[-2:]
        for ranks in self.losses.path(steps):
            self.see(ranks)
            if not nested:
                self.see([r if k in inner else most[k] for k, r in enumerate(ranks)])

    def see(self, ranks: Sequence[int]) -> Item | None:
        """The option at these ranks, rounded and fitted; None where they would cost more than dense."""
        asked = tuple(ranks)
        if asked not in self._asked:
            fit, _ = self.rounding.apply(self.candidate, asked)
            if fit not in self._seen:
                self._seen[fit] = self._price(fit)
            self._asked[asked] = self._seen[fit]
        return self._asked[asked]

    def _price(self, ranks: tuple[int, ...]) -> Item | None:
        layer = replace(self._template, ranks=ranks)
        layer = replace(layer, execution=layer.resolved_execution)  # chosen once, not again for every cost
        if not layer.saves():
            return None
        costs = tuple(resource.after(layer) for resource in self.resources)
        return Item(ranks, self.weight * self.losses.at(ranks), costs, layer.method)

    def items(self) -> list[Item]:
        """Dense and all ranks seen, without those that another beats in loss and every cost."""
        return best_of([self.dense, *(item for item in self._seen.values() if item)])

    def largest(self) -> Item | None:
        """The ranks that lose least among those that save something; None if there are none."""
        return min((item for item in self._seen.values() if item), key=lambda item: item.loss, default=None)

    def refine(self, prices: NDArray[np.float64]) -> None:
        """Look at ranks near the best at these prices: single ranks more or less, by ever smaller steps."""

        def value(item: Item | None) -> float:
            return item.loss + float(prices @ item.costs) if item else np.inf

        best = min((item for item in self._seen.values() if item), key=value, default=None)
        if best is None or best.ranks is None:
            return
        step = max(1, max(best.ranks) // 8)
        while step:
            near = [item for item in self.around(best.ranks, step) if item]
            better = min(near, key=value, default=best)
            if value(better) < value(best) and better.ranks:
                best = better
            else:
                step //= 2

    def near(self, item: Item) -> list[Item | None]:
        """Options with one rank one step away from ``item``; none where that is dense."""
        return self.around(item.ranks, 1) if item.ranks else []

    def around(self, ranks: Sequence[int], step: int) -> list[Item | None]:
        """Options with one rank changed by ``step`` (times the multiple that ranks are rounded to)."""
        size = step * self.rounding.round_to
        changes = [(k, max(1, r + d)) for k, r in enumerate(ranks) for d in (size, -size)]
        return [self.see((*ranks[:k], r, *ranks[k + 1 :])) for k, r in changes]


class MixedMenu:
    """The options of one layer under several methods, as one menu."""

    def __init__(self, menus: Sequence[Menu]) -> None:
        self.menus = {menu.candidate.method: menu for menu in menus}
        self.dense = menus[0].dense

    def items(self) -> list[Item]:
        """Dense and what each method offers, without what another beats in loss and every cost."""
        return best_of([self.dense, *(item for menu in self.menus.values() for item in menu.items() if item.ranks)])

    def largest(self) -> Item | None:
        """The ranks that lose least among those that save something; None if there are none."""
        found = [item for menu in self.menus.values() if (item := menu.largest())]
        return min(found, key=lambda item: item.loss, default=None)

    def refine(self, prices: NDArray[np.float64]) -> None:
        """Look at ranks near each method's best at these prices."""
        for menu in self.menus.values():
            menu.refine(prices)

    def near(self, item: Item) -> list[Item | None]:
        """Options of the same method with one rank one step away from ``item``; none where that is dense."""
        return self.menus[item.method].near(item) if item.ranks else []


# What a layer can become, under one method or several.
LayerMenu = Menu | MixedMenu


def best_of(items: Sequence[Item]) -> list[Item]:
    """The items that no other beats in loss and every cost."""
    losses = np.array([item.loss for item in items])
    return [items[i] for i in not_dominated(losses, np.array([item.costs for item in items]))]
