"""Learned: ranks that ADMM finds while training: its Z-step weighs what a rank costs and what it holds.

Each Z-update takes, layer by layer, the ranks r that are least in alpha * C(r) + rho/2 * (what truncating
W + U to r loses of its squared norm). With a target for the whole net in place of alpha, that is a projection
of all layers together onto the nets within the target; alpha is then the Lagrange multiplier at which it is met.

Source: Idelbayev and Carreira-Perpinan, Low-Rank Compression of Neural Nets: Learning the Rank of Each Layer,
CVPR 2020: its C step.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from hodec.cost.metric import COUNTED, METRICS
from hodec.errors import ConfigError, PlanError, Use
from hodec.options import setting
from hodec.ranks.budget import Budget
from hodec.ranks.rule import Choice, Limits, RankRule, Targets

if TYPE_CHECKING:
    from torch import Tensor

    from hodec.plan.layer import LayerPlan
    from hodec.plan.plan import Plan
    from hodec.ranks.context import LayerContext, NetContext
    from hodec.ranks.selection.options import CostLimit, LayerOptions, RankOption

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Learned(Targets, RankRule, Limits):
    """Ranks found by ADMM itself; the plan that this rule makes is only where training starts.

    With ``alpha`` every layer starts at the largest ranks that save something, with targets at the ranks that
    lose least within them. Given to ``AdmmCallback`` as ``learner``, the rule chooses the ranks anew at each
    Z-update. Without alpha and targets the net keeps half of its multiply-adds (``macs=0.5``).

    Raises:
        ConfigError: both alpha and targets, or a setting out of range.
    """

    name = "learned"
    reads_weights = True
    runs_net = "finds its ranks while ADMM trains the net"
    instead_of_targets = "alpha"

    alpha: float | None = setting(
        None, "loss that a million of `metric` are worth; by default it is found for the targets", low=0
    )
    metric: str = setting("macs", "cost that alpha prices", choices=COUNTED)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.alpha is not None and (self.macs is not None or self.params is not None):
            raise ConfigError(
                "learned: both {alpha} and targets are given; allowed: alpha, or targets such as {macs}, for which "
                "alpha is found",
                alpha=Use("ranks.alpha", self.alpha),
                macs=Use("ranks.macs", 0.4),
            )

    # -- where training starts -----------------------------------------------------------------------------

    def choose(self, layers: Mapping[str, LayerContext], net: NetContext) -> dict[str, Choice]:
        """Where training starts; the class describes it.

        Raises:
            PlanError: targets that cannot be met, with the nearest that can.
        """
        first: dict[str, Choice] = {}
        if self.targets:  # the first plan may stay far below them
            first = Budget(
                self.targets.get("macs"),
                self.targets.get("params"),
                weights="norm",
                tolerance=0.99,
                round_to=self.round_to,
                min_rank=self.min_rank,
                max_rank=self.max_rank,
            ).choose(layers, net)
        return {name: self._start(layer, first.get(name)) for name, layer in layers.items()}

    def _start(self, layer: LayerContext, first: Choice | None) -> Choice:
        if first is not None and first.ranks is not None:
            return replace(first, notes=("ranks to start from; training changes them",))
        from hodec.ranks.selection.options import LayerOptions, MethodOptions

        options = MethodOptions(layer, [_priced(self.metric)], limits=self, nested=True)
        largest = LayerOptions([options]).largest()
        if largest is None:
            return Choice(None, reason="no ranks within its limits save anything")
        return Choice(largest.ranks, notes=("the largest ranks that save something; training changes them",))

    # -- while ADMM trains ---------------------------------------------------------------------------------

    def update(self, plan: Plan, weights: Mapping[str, Tensor], rho: Mapping[str, float]) -> Plan:
        """The plan with the ranks that the next Z should have; its layers stay the same.

        Args:
            plan: the plan so far.
            weights: W + U of the layers that train, in the layout that the dense layer stores.
            rho: penalty of each of them. Where one is 0, as before the first update, the plan stays as it is.

        Returns:
            The changed plan; full ranks mean that the layer is worth leaving dense. A larger alpha never gives a
            larger rank.

        Raises:
            PlanError: targets that cannot be met.
            TrainingError: NaN or Inf in a weight.
        """
        from hodec.linalg.svd import check_finite

        if any(rho[name] <= 0 for name in weights):
            return plan
        for name, weight in weights.items():
            check_finite(weight, f"layer {name}")
        limits = [_limit_while_training(name, share, plan, weights) for name, share in self.targets.items()]
        layers = {name: _context(name, plan[name], weight) for name, weight in weights.items()}
        options = {name: self._options(layer, limits, rho[name]) for name, layer in layers.items()}
        best = self._within(options, limits) if limits else {n: self._at_alpha(each) for n, each in options.items()}
        ranks = {name: option.ranks or layers[name].full_ranks for name, option in best.items()}
        changed = {name: replace(plan[name], ranks=r).check(name) for name, r in ranks.items()}
        return replace(plan, layers={**plan.layers, **changed})

    def freeze(self, plan: Plan) -> Plan:
        """The plan to convert by: layers whose ranks save nothing are left dense, with the reason.

        Raises:
            PlanError: no layer is left.
        """
        frozen = plan
        for name, layer in plan.items():
            if not layer.saves():
                frozen = frozen.without(name, f"learned ranks {list(layer.ranks)} would save nothing")
        if not frozen:
            raise PlanError(
                "learned: no layer has ranks that save anything; give a larger {alpha}, a smaller {macs} or {params}, "
                "or train longer",
                alpha=Use("ranks.alpha"),
                macs=Use("ranks.macs"),
                params=Use("ranks.params"),
            )
        return frozen

    def _options(self, layer: LayerContext, limits: list[CostLimit], rho: float) -> LayerOptions:
        """Options at nearly all ranks, whose loss is rho/2 times the squared norm that they lose."""
        from hodec.ranks.selection.options import LayerOptions, MethodOptions
        from hodec.ranks.spectra import truncation_spectra

        weight = rho / 2 * float(layer.site.values().double().square().sum())
        spectra = truncation_spectra(layer)
        costs = limits or [_priced(self.metric)]  # along one path, a larger alpha never gives a larger rank
        nested = not limits
        options = MethodOptions(layer, costs, weight=weight, limits=self, steps=512, spectra=spectra, nested=nested)
        return LayerOptions([options])

    def _at_alpha(self, options: LayerOptions) -> RankOption:
        """The option that is least in loss + alpha * cost; dense where that is the least."""
        multiplier = (self.alpha or 0.0) / 1e6  # a million costs alpha, which is then near the size of a loss
        return min(options.options(), key=lambda one: (one.loss + multiplier * one.costs[0], one.costs[0]))

    def _within(self, options: Mapping[str, LayerOptions], limits: list[CostLimit]) -> Mapping[str, RankOption]:
        """The options that lose least within the targets."""
        from hodec.ranks.selection.select import select

        selection = select(options, limits)
        if selection is None:
            uses = {name: Use(f"ranks.{name}", share) for name, share in self.targets.items()}
            raise PlanError(
                f"learned: {', '.join(f'{{{name}}}' for name in uses)} cannot be met by the layers that train; give "
                "larger targets, or train more of the planned layers",
                **uses,
            )
        log.debug("learned: a million is worth %s", {k: m * 1e6 for k, m in selection.multipliers.items()})
        return selection.options


def _context(name: str, layer: LayerPlan, weight: Tensor) -> LayerContext:
    """The context of a planned layer with this weight, which is in the layout that the dense layer stores."""
    from hodec.conversion.eligibility import LayerSite
    from hodec.formats.layer_types import LAYER_TYPES
    from hodec.ranks.context import LayerContext

    oihw = LAYER_TYPES[layer.layer_type].to_oihw(weight.detach())
    site = LayerSite(
        layer.layer_type, oihw, layer.call_sites, layer.aliases, layer.role, groups=layer.groups, ties=layer.ties
    )
    return LayerContext(name, layer.method, site, layer.format, layer.modes, layer.execution)


def _priced(metric: str) -> CostLimit:
    """A cost that is priced, not limited."""
    from hodec.ranks.selection.options import CostLimit

    return CostLimit(METRICS[metric], math.inf, 0.0)


def _limit_while_training(name: str, share: float, plan: Plan, weights: Mapping[str, Tensor]) -> CostLimit:
    """The limit on the layers that train: what the other planned layers save is saved already."""
    from hodec.cost.count import Cost
    from hodec.ranks.selection.options import CostLimit

    metric = METRICS[name]
    total = metric.whole_net(Cost(plan.params_before, plan.macs_before), ())
    idle = sum(metric.dense(layer) - metric.factorized(layer) for key, layer in plan.items() if key not in weights)
    fixed = total - idle - sum(metric.dense(plan[key]) for key in weights)
    return CostLimit(metric, share * total, fixed)
