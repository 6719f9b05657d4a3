"""Evaluating a net with some layers factorized, each net once."""

import copy
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import nn

from hodec.conversion.swap import convert
from hodec.cost.count import Cost, Inputs, as_inputs
from hodec.errors import PlanError
from hodec.layers.base import same_random_state
from hodec.plan.layer import LayerPlan
from hodec.plan.plan import Plan
from hodec.ranks.greedy.table import ScoreTable, net_of

Evaluate = Callable[[nn.Module], float]

# Every evaluation starts from this seed, so that all nets see the same draws, in whatever run they are evaluated.
SEED = 0


@dataclass(frozen=True)
class Scorer:
    """Evaluates a model with some layers factorized, unless the table knows the score.

    Attributes:
        cost: of the dense model.
    """

    model: nn.Module
    example_input: Inputs
    cost: Cost
    evaluate: Evaluate
    table: ScoreTable

    def knows(self, layers: Mapping[str, LayerPlan]) -> bool:
        """Whether the score of this net is in the table."""
        return self.table.get(net_of(layers)) is not None

    def score(self, layers: Mapping[str, LayerPlan]) -> float:
        """The score with these layers factorized; it is in the table afterwards.

        Raises:
            PlanError: ``evaluate`` returns no finite number.
        """
        net = net_of(layers)
        known = self.table.get(net)
        if known is not None:
            return known
        score = self._evaluated(layers)
        self.table.put(net, score)
        return score

    def plan(self, layers: Mapping[str, LayerPlan]) -> Plan:
        """The plan of such a net, for its costs and its conversion."""
        inputs = tuple((tuple(x.shape), str(x.dtype).removeprefix("torch.")) for x in as_inputs(self.example_input))
        return Plan(layers, {}, "greedy", self.cost.params, self.cost.macs, inputs)

    def _evaluated(self, layers: Mapping[str, LayerPlan]) -> float:
        net = convert(self.model, self.plan(layers)) if layers else copy.deepcopy(self.model)
        with same_random_state(self.model.parameters()):
            torch.manual_seed(SEED)
            given = self.evaluate(net.eval())
        what = " and ".join(f"{name} at ranks {list(layer.ranks)}" for name, layer in layers.items()) or "no layer"
        try:
            score = float(given) + 0.0  # no negative zero in tables and texts
        except (TypeError, ValueError) as error:
            raise PlanError(
                f"ranks=greedy: evaluate returns {given!r} with {what} factorized; it must return a number, "
                "higher is better"
            ) from error
        if not math.isfinite(score):
            raise PlanError(
                f"ranks=greedy: evaluate returns {score} with {what} factorized; it must return a finite number (for "
                "a net that breaks down, the worst score there is), or leave the layer out with ranks.ignore"
            )
        return score
