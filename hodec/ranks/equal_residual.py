"""Ranks of equal approximation residual in every layer, one level for all, chosen by evaluating the converted net."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from hodec.cost.metric import COUNTED
from hodec.errors import PlanError
from hodec.options import argument, bad_function, setting
from hodec.ranks.rule import Choice, Limits, RankRule

if TYPE_CHECKING:
    from hodec.plan.layer import LayerPlan
    from hodec.ranks.context import LayerContext, NetContext

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ResidualLevel:
    """One index, tried on the whole net.

    Attributes:
        index: 1..indices; the residual aimed at is index / indices.
        accuracy: what ``evaluate`` said of the converted net.
        ratio: share of the dense net's cost that is left.
        objective: (baseline - accuracy) + weight * ratio; the least wins.
    """

    index: int
    accuracy: float
    ratio: float
    objective: float


@dataclass(frozen=True)
class EqualResidual(RankRule, Limits):
    """Every layer is cut to about the same relative residual, i / n for one i (tensor approximation residual).

    Each layer's options are the ranks that save something; the one whose relative residual (from the singular values
    cut off: exact for one unfolding, a bound for several) is nearest to i / n stands for index i. The whole net is
    converted and evaluated at each i, and the i that minimises

        (baseline accuracy - accuracy) + weight * share of the cost that is left

    decides for all layers: lost accuracy and remaining cost both count against it. Ties go to the cheaper net. The
    dense net is evaluated once. With an accuracy in per cent, ``weight=100`` trades one point of accuracy for one
    point of cost, as 1 does with an accuracy of 0..1.

    Args:
        evaluate: model -> accuracy, larger is better; it is given copies in evaluation mode.
        report: called with a tuple of the ``ResidualLevel`` that were tried, by index.

    Raises:
        ConfigError: a setting out of range.

    Source: AIMET documentation, tensor approximation residual (its second scheme, removed in 2024). There the
        objective rewarded less compression; here its sign is right.
    """

    name = "equal_residual"
    reads_weights = True
    runs_net = "evaluates the net on a validation split"

    evaluate: Callable[..., object] | None = argument(words="a function model -> accuracy", check=bad_function)
    indices: int = setting(20, "n: how many levels of the residual are tried", low=2, high=50)
    metric: str = setting("macs", "cost that counts", choices=COUNTED)
    weight: float = setting(1.0, "what the whole cost is worth, in units of accuracy", above=0)
    report: Callable[..., object] | None = argument(words="a function of ResidualLevels", check=bad_function)

    def choose(self, layers: Mapping[str, LayerContext], net: NetContext) -> dict[str, Choice]:
        """The ranks of the winning index; layers in which no rank saves anything stay dense.

        Raises:
            PlanError: ``evaluate`` gave no finite accuracy.
            ConfigError: there is no ``evaluate``.
        """
        options = {name: self._by_index(layer) for name, layer in layers.items()}
        usable = {name: each for name, each in options.items() if each}
        index = self._search(net, usable).index if usable else 0
        return {name: self._choice(each, index) for name, each in options.items()}

    def _by_index(self, layer: LayerContext) -> list[tuple[float, LayerPlan]]:
        """(relative residual, layer plan) of each index 1..n; empty where no rank saves anything."""
        from hodec.ranks.spectra import TruncationLoss, relative_error, truncation_spectra

        spectra = truncation_spectra(layer)
        fitted = dict.fromkeys(layer.fit(ranks) for ranks in TruncationLoss(spectra).path(128))
        planned = [(layer.planned(ranks), relative_error(spectra, ranks)) for ranks in fitted]
        planned.sort(key=lambda one: (one[0].macs_after, one[0].params_after, one[1]))
        options = []
        for each, _ in planned:
            limited = layer.planned(*self.limited(layer, each.ranks))
            if limited.saves():
                options.append((relative_error(spectra, limited.ranks), limited))
        targets = [index / self.indices for index in range(1, self.indices + 1)] if options else []
        return [min(options, key=lambda one: (abs(one[0] - target), one[0])) for target in targets]

    def _search(self, net: NetContext, options: Mapping[str, Sequence[tuple[float, LayerPlan]]]) -> ResidualLevel:
        from hodec.ranks.greedy.scores import NetScorer

        scorer = NetScorer.of(self.name, net, self.evaluate)
        baseline = scorer.score({})
        levels: dict[tuple[tuple[int, ...], ...], ResidualLevel] = {}
        for index in range(1, self.indices + 1):
            layers = {name: each[index - 1][1] for name, each in options.items()}
            key = tuple(layer.ranks for layer in layers.values())
            if key in levels:  # neighbours may come to the same ranks
                continue
            ratio = 1 - scorer.plan(layers).reduction[self.metric]
            accuracy = scorer.score(layers, finite=False)
            levels[key] = ResidualLevel(index, accuracy, ratio, baseline - accuracy + self.weight * ratio)
            log.info("residual %d/%d: accuracy %.4f, %s kept %.3f", index, self.indices, accuracy, self.metric, ratio)
        if self.report is not None:
            self.report(tuple(levels.values()))
        finite = [level for level in levels.values() if math.isfinite(level.objective)]
        if not finite:
            raise PlanError(f"{self.name}: evaluate gave no finite accuracy for any converted model")
        return min(finite, key=lambda level: (level.objective, level.ratio))

    def _choice(self, options: Sequence[tuple[float, LayerPlan]], index: int) -> Choice:
        if not options:
            return Choice(None, reason="no rank makes it cheaper")
        residual, layer = options[index - 1]
        note = f"residual {residual:.3f}, index {index} of {self.indices} for all layers"
        return Choice(layer.ranks, (*layer.notes, note))
