"""Ranks of equal approximation residual in every layer, one level for all, chosen by evaluating the converted net."""

import copy
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from hodec.conversion.swap import convert
from hodec.cost.count import Inputs, count_cost
from hodec.errors import ConfigError, PlanError
from hodec.plan.plan import Plan
from hodec.ranks.base import Candidate, Choice
from hodec.ranks.rounding import Rounding, check_metric
from hodec.ranks.spectra import Option, path, relative_error, spectra

log = logging.getLogger(__name__)

Evaluate = Callable[[nn.Module], float]


@dataclass(frozen=True)
class Trial:
    """One index, tried on the whole net.

    Attributes:
        index: 1..indices; the residual aimed at is index / indices.
        accuracy: what ``evaluate`` said of the converted net.
        kept: share of the dense net's cost that is left.
        objective: (baseline - accuracy) + weight * kept; the least wins.
    """

    index: int
    accuracy: float
    kept: float
    objective: float


class Tar:
    """Tensor approximation residual: every layer is cut to about the same relative residual, i / n for one i.

    Each layer's options are the ranks that save something; the one whose relative residual (from the singular values
    cut off: exact for one unfolding, a bound for several) is nearest to i / n stands for index i. The whole net is
    converted and evaluated at each i, and the i that minimises

        (baseline accuracy - accuracy) + weight * kept cost share

    decides for all layers: lost accuracy and kept cost both count against it. Ties go to the cheaper net.

    Args:
        evaluate: model -> accuracy, larger is better; it is given copies in evaluation mode.
        indices: n, 2..50: how often the net is evaluated, apart from the dense net once.
        metric: the cost that counts, ``macs`` or ``params``.
        weight: what keeping the whole cost is worth in units of accuracy, above 0: 1 with an accuracy of 0..1 trades
            one point of accuracy for one point of cost; use 100 if ``evaluate`` returns per cent.
        round_to, min_rank, max_rank: see ``Rounding``.

    Attributes:
        trials: what was tried in the last choice, by index.

    Raises:
        ConfigError: a setting out of range.

    Source: AIMET documentation, tensor approximation residual (its second scheme, removed in 2024). There the
        objective rewarded less compression; here its sign is right.
    """

    name = "tar"
    reads_weights = True

    def __init__(  # noqa: PLR0913
        self,
        evaluate: Evaluate,
        indices: int = 20,
        *,
        metric: str = "macs",
        weight: float = 1.0,
        round_to: int = 1,
        min_rank: int = 1,
        max_rank: int | None = None,
    ) -> None:
        _check_settings(evaluate, indices, weight)
        self.evaluate, self.indices, self.weight = evaluate, indices, float(weight)
        self.metric = check_metric(metric)
        self.rounding = Rounding(round_to, min_rank, max_rank)
        self.trials: tuple[Trial, ...] = ()
        self._bound: tuple[nn.Module, Inputs] | None = None

    def bind(self, model: nn.Module, example_input: Inputs, method: str) -> None:
        """Remember the net that the next choice is for; it is not changed. Needed once before each ``choose``."""
        self._bound = model, example_input

    def choose(self, candidates: Mapping[str, Candidate]) -> dict[str, Choice]:
        """The ranks of the winning index; layers in which no rank saves anything stay dense.

        Raises:
            PlanError: not bound to a model, or ``evaluate`` gave no finite accuracy.
        """
        if self._bound is None:
            raise PlanError("ranks=tar has no model to evaluate: plan with hodec.make_plan, or call bind(..) first")
        (model, example_input), self._bound = self._bound, None
        levels = {name: self._levels(candidate) for name, candidate in candidates.items()}
        usable = {name: found for name, found in levels.items() if found}
        index = self._search(model, example_input, usable).index if usable else 0
        return {name: self._choice(found, index) if found else _dense() for name, found in levels.items()}

    def _levels(self, candidate: Candidate) -> list[Option]:
        """The option of each index 1..n, or none where no rank saves anything."""
        found, options = spectra(candidate), []
        for option in path(candidate):
            ranks, notes = self.rounding.apply(candidate, option.layer.ranks)
            layer = candidate.planned(ranks, notes)
            if layer.saves():
                options.append(Option(layer, relative_error(found, ranks)))
        targets = [index / self.indices for index in range(1, self.indices + 1)] if options else []
        return [min(options, key=lambda o: (abs(o.error - target), o.error)) for target in targets]

    def _search(self, model: nn.Module, example_input: Inputs, levels: Mapping[str, Sequence[Option]]) -> Trial:
        dense = count_cost(model, example_input)
        baseline = self._accuracy(copy.deepcopy(model))
        if not math.isfinite(baseline):
            raise PlanError(f"ranks=tar: evaluate gives {baseline} for the dense model; it must be a finite accuracy")
        trials: dict[tuple[tuple[int, ...], ...], Trial] = {}
        for index in range(1, self.indices + 1):
            layers = {name: found[index - 1].layer for name, found in levels.items()}
            key = tuple(layer.ranks for layer in layers.values())
            if key in trials:  # neighbours may come to the same ranks
                continue
            plan = Plan(layers, {}, self.name, dense.params, dense.macs)
            trials[key] = self._try(index, plan, model, baseline)
        self.trials = tuple(trials.values())
        finite = [trial for trial in self.trials if math.isfinite(trial.objective)]
        if not finite:
            raise PlanError("ranks=tar: evaluate gave no finite accuracy for any converted model")
        return min(finite, key=lambda trial: (trial.objective, trial.kept))

    def _try(self, index: int, plan: Plan, model: nn.Module, baseline: float) -> Trial:
        kept = 1 - plan.reduction[self.metric]
        accuracy = self._accuracy(convert(model, plan))
        trial = Trial(index, accuracy, kept, baseline - accuracy + self.weight * kept)
        log.info("residual %d/%d: accuracy %.4f, %s kept %.3f", index, self.indices, accuracy, self.metric, kept)
        return trial

    def _accuracy(self, model: nn.Module) -> float:
        given = self.evaluate(model.eval())
        try:
            return float(given.detach() if isinstance(given, Tensor) else given)
        except (TypeError, ValueError) as error:
            raise PlanError(f"ranks=tar: evaluate returns {given!r}, which is not a number (the accuracy)") from error

    def _choice(self, found: Sequence[Option], index: int) -> Choice:
        option = found[index - 1]
        note = f"residual {option.error:.3f}, index {index} of {self.indices} for all layers"
        return Choice(option.layer.ranks, (*option.layer.notes, note))


def _dense() -> Choice:
    return Choice(None, reason="no rank makes it cheaper")


def _check_settings(evaluate: object, indices: object, weight: object) -> None:
    if not callable(evaluate):
        raise ConfigError(f"ranks.evaluate={evaluate!r} is not a function model -> accuracy (larger is better)")
    if isinstance(indices, bool) or not isinstance(indices, int) or not 2 <= indices <= 50:
        raise ConfigError(f"ranks.indices={indices!r} is not a whole number from 2 to 50; the default is 20")
    if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 < weight < math.inf:
        raise ConfigError(f"ranks.weight={weight!r} is not a number above 0; the default is 1")
