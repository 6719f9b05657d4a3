"""What a layer can become: ranks of one method or several, with their cost and loss, and the same layer left dense."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
from numpy.typing import NDArray

from hodec.cost.metric import CostMetric
from hodec.ranks.context import LayerContext
from hodec.ranks.rule import Limits
from hodec.ranks.selection.knapsack import not_dominated
from hodec.ranks.spectra import Spectrum, TruncationLoss, cached_truncation_spectra, key_of, remembered


@dataclass(frozen=True)
class CostLimit:
    """A limit on one cost of the whole net.

    Attributes:
        limit: the most that the whole net may cost.
        fixed: what everything that no option changes costs.
    """

    metric: CostMetric
    limit: float
    fixed: float

    @property
    def available(self) -> float:
        """What is left for the layers that have options."""
        return self.limit - self.fixed


@dataclass(frozen=True)
class RankOption:
    """One option of a layer: ``ranks`` (None: dense) of ``method``, weighted ``loss``, ``costs`` one a limit."""

    ranks: tuple[int, ...] | None
    loss: float
    costs: tuple[float, ...]
    method: str = ""


class MeasuredLoss(TruncationLoss):
    """``TruncationLoss`` brought to scale by measuring, so that it compares with that of other methods.

    Where the singular values do not tell exactly what ranks lose, the weight is projected at a few ranks of the
    path, and the estimate in between is multiplied by what was found there.
    """

    def __init__(self, layer: LayerContext, spectra: Sequence[Spectrum], limits: Limits) -> None:
        super().__init__(spectra)
        self._scale: tuple[list[float], list[float]] = ([0.0], [1.0])
        if len(self.tails) > 1 or layer.format.iterative:
            self._scale = self._measure(layer, limits)

    def at(self, ranks: Sequence[int]) -> float:
        """The share lost at these ranks."""
        estimate = super().at(ranks)
        return min(1.0, estimate * float(np.interp(estimate, *self._scale)))

    def _measure(
        self, layer: LayerContext, limits: Limits, *, steps: int = 64, samples: int = 8, negligible: float = 1e-6
    ) -> tuple[list[float], list[float]]:
        """Estimates at ``samples`` ranks, rising, and what to multiply each with; ``negligible`` ones need no scale."""
        estimate_at = super().at
        fitted = dict.fromkeys(limits.limited(layer, ranks)[0] for ranks in self.path(steps))
        usable = [ranks for ranks in fitted if layer.planned(ranks).saves() and estimate_at(ranks) > negligible]
        places = np.unique(np.linspace(0, len(usable) - 1, samples).round().astype(int)) if usable else ()
        chosen = tuple(usable[k] for k in places)
        lost = remembered((*key_of(layer), chosen), partial(_lost, layer, chosen))
        seen = {estimate_at(ranks): share / estimate_at(ranks) for ranks, share in zip(chosen, lost, strict=True)}
        estimates = sorted(seen) or [0.0]
        return estimates, [seen.get(estimate, 1.0) for estimate in estimates]


def _lost(layer: LayerContext, chosen: Sequence[tuple[int, ...]]) -> list[float]:
    """The share of the weight's squared norm that its projection onto each of these ranks loses."""
    weight = layer.site.values().detach().float()
    norm = float(weight.square().sum())
    distances = (weight - layer.format.project(weight, ranks, layer.modes) for ranks in chosen)
    return [float(distance.square().sum()) / norm for distance in distances]


class MethodOptions:
    """The options of one layer under one method that were looked at; each saves something and costs nowhere more.

    Args:
        costs: the limited costs.
        weight: how much a squared relative error of 1 counts, >= 0.
        limits: limits of its ranks.
        steps: ranks that its path is sampled at; finer ones are looked at near the solution.
        spectra: its truncation spectra, where they are not worth remembering.
        nested: one path only, on which no rank falls where another rises.
        measured: bring losses to scale by projecting, which takes longer; for comparing methods.
    """

    def __init__(
        self,
        layer: LayerContext,
        costs: Sequence[CostLimit],
        *,
        weight: float = 1.0,
        limits: Limits | None = None,
        steps: int = 64,
        spectra: Sequence[Spectrum] | None = None,
        nested: bool = False,
        measured: bool = False,
    ) -> None:
        self.layer, self.costs, self.weight, self.limits = layer, costs, weight, limits or Limits()
        spectra = cached_truncation_spectra(layer) if spectra is None else spectra
        self.loss = MeasuredLoss(layer, spectra, self.limits) if measured else TruncationLoss(spectra)
        self._by_ranks: dict[tuple[int, ...], RankOption | None] = {}
        self._by_request: dict[tuple[int, ...], RankOption | None] = {}
        # Ranks between modes of one side cost no multiply-adds where factors are merged before use: a path on
        # which only the two greatest ranks fall is looked at too.
        full = layer.full_ranks
        inner = sorted(range(len(full)), key=lambda k: full[k])[-2:]
        for ranks in self.loss.path(steps):
            self.look_at(ranks)
            if not nested:
                self.look_at([r if k in inner else full[k] for k, r in enumerate(ranks)])

    def look_at(self, ranks: Sequence[int]) -> RankOption | None:
        """The option at these ranks, limited and fitted; None where they would cost more than dense."""
        request = tuple(ranks)
        if request not in self._by_request:
            fitted, _ = self.limits.limited(self.layer, request)
            if fitted not in self._by_ranks:
                self._by_ranks[fitted] = self._option(fitted)
            self._by_request[request] = self._by_ranks[fitted]
        return self._by_request[request]

    def _option(self, ranks: tuple[int, ...]) -> RankOption | None:
        planned = replace(self.layer.dense, ranks=ranks)
        planned = replace(planned, execution=planned.resolved_execution)  # chosen once, not again for every cost
        if not planned.saves():
            return None
        costs = tuple(cost.metric.factorized(planned) for cost in self.costs)
        return RankOption(ranks, self.weight * self.loss.at(ranks), costs, planned.method)

    def options(self) -> list[RankOption]:
        """All that were looked at and save something."""
        return [option for option in self._by_ranks.values() if option]

    def refine(self, multipliers: NDArray[np.float64]) -> None:
        """Look at ranks near the best at these multipliers: single ranks more or less, by ever smaller steps."""

        def value(option: RankOption) -> float:
            return option.loss + float(multipliers @ option.costs)

        best = min(self.options(), key=value, default=None)
        if best is None or best.ranks is None:
            return
        step = max(1, max(best.ranks) // 8)
        while step:
            better = min(self.around(best, step), key=value, default=best)
            if value(better) < value(best):
                best = better
            else:
                step //= 2

    def around(self, option: RankOption, step: int) -> Iterator[RankOption]:
        """Options with one rank changed by ``step`` (times the multiple that ranks are rounded to)."""
        ranks, size = option.ranks or (), step * self.limits.multiple(self.layer)
        changes = [(k, max(1, r + d)) for k, r in enumerate(ranks) for d in (size, -size)]
        found = [self.look_at((*ranks[:k], r, *ranks[k + 1 :])) for k, r in changes]
        return (one for one in found if one)


class LayerOptions:
    """The options of one layer, under one method or several: all that save something, and dense."""

    def __init__(self, methods: Sequence[MethodOptions]) -> None:
        self.methods = {one.layer.method: one for one in methods}
        first = methods[0]  # all have the same dense layer
        self.dense = RankOption(None, 0.0, tuple(cost.metric.dense(first.layer.dense) for cost in first.costs))

    def options(self) -> list[RankOption]:
        """Dense and all others, without those that another beats in loss and every cost."""
        options = [self.dense, *(option for method in self.methods.values() for option in method.options())]
        losses = np.array([option.loss for option in options])
        return [options[i] for i in not_dominated(losses, np.array([option.costs for option in options]))]

    def largest(self) -> RankOption | None:
        """The ranks that lose least among those that save something; None if there are none."""
        options = [option for method in self.methods.values() for option in method.options()]
        return min(options, key=lambda option: option.loss, default=None)

    def refine(self, multipliers: NDArray[np.float64]) -> None:
        """Look at ranks near each method's best at these multipliers."""
        for method in self.methods.values():
            method.refine(multipliers)

    def near(self, option: RankOption) -> list[RankOption]:
        """Options of the same method with one rank one step away from ``option``; none where that is dense."""
        return list(self.methods[option.method].around(option, 1)) if option.ranks else []
