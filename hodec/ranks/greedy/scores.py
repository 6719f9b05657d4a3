"""Evaluating a net with some layers factorized, each net once."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from hodec.conversion.swap import convert
from hodec.errors import ConfigError, PlanError, Use, literal
from hodec.inputs import as_input, form_of
from hodec.layers.base import same_random_state
from hodec.layers.plain import copied
from hodec.plan.layer import LayerPlan
from hodec.plan.plan import Plan
from hodec.ranks.context import NetContext
from hodec.ranks.greedy.table import ScoreTable, identity, net_of

Evaluate = Callable[[nn.Module], object]


@dataclass(frozen=True)
class NetScorer:
    """Evaluates a net with some layers factorized, unless the table knows the score.

    Every evaluation starts from the same seed, so that all nets see the same draws, in whatever run.

    Attributes:
        rule: the rule's name, for messages.
        evaluate: gives one number for a net, higher is better; it is given copies in evaluation mode.
    """

    rule: str
    net: NetContext
    evaluate: Evaluate
    table: ScoreTable

    @classmethod
    def of(
        cls, rule: str, net: NetContext, evaluate: Evaluate | None, *, table: str | Path | None = None, key: str = ""
    ) -> "NetScorer":
        """The scorer of a net, with its scores in the file ``table`` if there is one.

        Args:
            key: what identifies the evaluation beside the function's name.

        Raises:
            ConfigError: no ``evaluate``, or a table that cannot be written.
            CheckpointError: a damaged table.
        """
        model, example_input = net.runnable(f"{rule} evaluates the net")
        if evaluate is None:
            raise ConfigError(
                f"{rule}: {{evaluate}} is missing; give a function model -> score, higher is better",
                evaluate=Use("ranks.evaluate"),
            )
        about = identity(model, example_input, evaluate, key)
        return cls(rule, net, evaluate, ScoreTable(None if table is None else Path(table), about))

    def knows(self, layers: Mapping[str, LayerPlan]) -> bool:
        """Whether the score of this net is in the table."""
        return self.table.get(net_of(layers)) is not None

    def score(self, layers: Mapping[str, LayerPlan], *, finite: bool = True) -> float:
        """The score with these layers factorized; it is in the table afterwards.

        Raises:
            PlanError: ``evaluate`` returns no number, or one that is not finite where that is asked for.
        """
        net = net_of(layers)
        known = self.table.get(net)
        if known is not None:
            return known
        score = self._evaluated(layers, finite)
        self.table.put(net, score)
        return score

    def plan(self, layers: Mapping[str, LayerPlan]) -> Plan:
        """The plan of such a net, for its costs and its conversion."""
        given, cost = as_input(self.net.example_input, self.net.model), self.net.cost
        return Plan(layers, {}, self.rule, cost.params, cost.macs, given.sizes, form_of(given))

    def _evaluated(self, layers: Mapping[str, LayerPlan], finite: bool) -> float:
        model, _ = self.net.runnable(f"{self.rule} evaluates the net")
        net = convert(model, self.plan(layers)) if layers else copied(model)
        with same_random_state(model.parameters()):
            torch.manual_seed(0)
            given = self.evaluate(net.eval())
        what = " and ".join(f"{name} at ranks {list(layer.ranks)}" for name, layer in layers.items()) or "no layer"
        said = f"{self.rule}: evaluate returns {given!r} with {what} factorized; it must return"
        try:
            # + 0.0: no negative zero in tables and texts
            score = float(given.detach() if isinstance(given, Tensor) else given) + 0.0  # type: ignore[arg-type]
        except (TypeError, ValueError) as error:
            raise PlanError(f"{said} a number, higher is better") from error
        if finite and not math.isfinite(score):
            raise PlanError(
                f"{literal(said)} a finite number (for a net that breaks down, the worst score there is), or leave the "
                "layer out with {exclude}",
                exclude=Use("exclude"),
            )
        return score
