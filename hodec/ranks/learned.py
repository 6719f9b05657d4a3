"""Learned: ranks that ADMM finds while training: its Z-step weighs what a rank costs and what it holds.

Each Z-update takes, layer by layer, the ranks r that are least in alpha * C(r) + rho/2 * (what truncating
W + U to r loses of its squared norm). With a target for the whole net in place of alpha, that is a projection
of all layers together onto the nets within the target; alpha is then the price at which it is met.

Source: Idelbayev and Carreira-Perpinan, Low-Rank Compression of Neural Nets: Learning the Rank of Each Layer,
CVPR 2020: its C step.
"""

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from hodec.cost.count import Inputs
from hodec.errors import ConfigError, PlanError, near_matches
from hodec.linalg.svd import check_finite
from hodec.plan.layer import LayerPlan
from hodec.plan.plan import Plan
from hodec.ranks.base import Candidate, Choice
from hodec.ranks.budget import Budget, checked_targets
from hodec.ranks.rounding import Rounding
from hodec.ranks.selection.allotment import allot
from hodec.ranks.selection.options import COUNTED, Menu, Resource, candidate_of
from hodec.ranks.spectra import spectra

# alpha is the price of so many multiply-adds (or parameters), which keeps it near the size of a loss.
MILLION = 1e6
# Ranks that a path is sampled at: all of them, in all but the widest layers.
STEPS = 512
# The first plan of a target may stay below it: it is only where training starts from.
ANY_TOLERANCE = 0.99


def learned_ranks(
    layer: Candidate | LayerPlan,
    weight: Tensor,
    *,
    alpha: float,
    rho: float,
    metric: str = "macs",
    rounding: Rounding | None = None,
) -> tuple[int, ...]:
    """The ranks least in alpha * C + rho/2 * (squared norm lost), along the path of the layer's ranks.

    Args:
        layer: what is known of the layer; its own ranks do not matter.
        weight: W + U, in the layout that the dense layer stores, finite.
        alpha: loss that a million of ``metric`` are worth, >= 0.
        rho: ADMM's penalty, > 0.
        metric: cost C: ``macs`` (of one image) or ``params``.
        rounding: limits of the ranks.

    Returns:
        Ranks; full ones mean that the layer is worth leaving dense (C is then what the dense layer costs). A
        larger alpha never gives a larger rank.

    Raises:
        ConfigError: alpha, rho or metric out of range.
        TrainingError: NaN or Inf in the weight.
    """
    _check_at_least_0("alpha", alpha)
    if not (isinstance(rho, int | float) and 0 < rho < math.inf):
        raise ConfigError(f"rho={rho!r} is not a number above 0; without a pull nothing holds ranks up")
    candidate = _with_weight(layer, weight)
    resource = Resource(metric, math.inf, 0.0, *COUNTED[_checked_metric(metric)])
    menu = _menu(candidate, [resource], rho, rounding, nested=True)
    price = alpha / MILLION
    best = min(menu.items(), key=lambda item: (item.loss + price * item.costs[0], item.costs[0]))
    return best.ranks or candidate.most


class RankLearner:
    """Chooses the ranks of a plan anew at each Z-update.

    Args:
        alpha: loss that a million of ``metric`` are worth, >= 0; instead of targets.
        macs, params: share of the dense net's cost to keep, 0..1; instead of alpha.
        metric: cost that alpha prices: ``macs`` or ``params``.
        rounding: limits of all ranks.

    Attributes:
        prices: cost -> loss that a million of it were worth at the last update; for logs.

    Raises:
        ConfigError: neither or both of alpha and targets, or a number out of its range.
    """

    def __init__(
        self,
        alpha: float | None = None,
        macs: float | None = None,
        params: float | None = None,
        *,
        metric: str = "macs",
        rounding: Rounding | None = None,
    ) -> None:
        self.targets = checked_targets(macs=macs, params=params)
        if (alpha is None) == (not self.targets):
            raise ConfigError(
                f"learned: ranks.alpha={alpha} and targets {self.targets or 'none'} are given; give either "
                "ranks.alpha=0.1 or targets, e.g. ranks.macs=0.4, for which alpha is found"
            )
        if alpha is not None:
            _check_at_least_0("alpha", alpha)
        self.alpha, self.metric, self.rounding = alpha, _checked_metric(metric), rounding or Rounding()
        self.prices: dict[str, float] = {} if alpha is None else {metric: float(alpha)}

    def update(self, plan: Plan, weights: Mapping[str, Tensor], rho: Mapping[str, float]) -> Plan:
        """The plan with the ranks that the next Z should have; its layers stay the same.

        Args:
            plan: the plan so far.
            weights: W + U of the layers that train, in the layout that the dense layer stores.
            rho: penalty of each of them. Where one is 0, as before the first update, the plan stays as it is.

        Raises:
            PlanError: targets that cannot be met.
            TrainingError: NaN or Inf in a weight.
        """
        if any(rho[name] <= 0 for name in weights):
            return plan
        for name, weight in weights.items():
            check_finite(weight, f"layer {name}")
        choose = self._within_targets if self.targets else self._at_alpha
        ranks = choose(plan, weights, rho)
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
                "learned: no layer has ranks that save anything; give a larger ranks.alpha, a smaller "
                "ranks.macs or ranks.params, or train longer"
            )
        return frozen

    def _at_alpha(
        self, plan: Plan, weights: Mapping[str, Tensor], rho: Mapping[str, float]
    ) -> dict[str, tuple[int, ...]]:
        settings: dict[str, Any] = {"alpha": self.alpha, "metric": self.metric, "rounding": self.rounding}
        return {name: learned_ranks(plan[name], w, rho=rho[name], **settings) for name, w in weights.items()}

    def _within_targets(
        self, plan: Plan, weights: Mapping[str, Tensor], rho: Mapping[str, float]
    ) -> dict[str, tuple[int, ...]]:
        resources = [self._resource(key, share, plan, weights) for key, share in self.targets.items()]
        menus = {
            name: _menu(candidate_of(name, plan[name], w), resources, rho[name], self.rounding)
            for name, w in weights.items()
        }
        found = allot(menus, resources)
        if found is None:
            targets = ", ".join(f"ranks.{key}={share}" for key, share in self.targets.items())
            raise PlanError(
                f"learned: {targets} cannot be met by the layers that train; give larger targets, or train "
                "more of the planned layers"
            )
        self.prices = {key: price * MILLION for key, price in found.prices.items()}
        return {name: item.ranks or menus[name].candidate.most for name, item in found.items.items()}

    def _resource(self, key: str, share: float, plan: Plan, weights: Mapping[str, Tensor]) -> Resource:
        after, before = COUNTED[key]
        total = float(plan.macs_before if key == "macs" else plan.params_before)
        idle = sum(before(layer) - after(layer) for name, layer in plan.items() if name not in weights)
        fixed = total - idle - sum(before(plan[name]) for name in weights)
        return Resource(key, share * total, fixed, after, before)


class Learned:
    """Ranks found by ADMM itself; the plan that this rule makes is only where training starts.

    With ``alpha`` every layer starts at the largest ranks that save something, with targets at the ranks that
    lose least within them. ``learner()`` then changes them at each Z-update.

    Args:
        alpha: loss that a million of ``metric`` are worth, >= 0; instead of targets.
        macs, params: share of the dense net's cost to keep, 0..1; instead of alpha.
        metric: cost that alpha prices: ``macs`` or ``params``.
        round_to, min_rank, max_rank: limits of all ranks, see ``Rounding``.

    Raises:
        ConfigError: neither or both of alpha and targets, or a number out of its range.
    """

    name = "learned"
    reads_weights = True

    def __init__(  # noqa: PLR0913
        self,
        alpha: float | None = None,
        macs: float | None = None,
        params: float | None = None,
        *,
        metric: str = "macs",
        round_to: int = 1,
        min_rank: int = 1,
        max_rank: int | None = None,
    ) -> None:
        limits: dict[str, Any] = {"round_to": round_to, "min_rank": min_rank, "max_rank": max_rank}
        self.rounding = Rounding(**limits)
        self._settings = {"alpha": alpha, "macs": macs, "params": params}
        self.metric = metric
        self.learner()  # refuses what cannot be
        self._first = (
            None
            if alpha is not None
            else Budget(macs=macs, params=params, weights="norm", tolerance=ANY_TOLERANCE, **limits)
        )

    def learner(self) -> RankLearner:
        """What changes the ranks while training."""
        return RankLearner(**self._settings, metric=self.metric, rounding=self.rounding)

    def bind(self, model: nn.Module, example_input: Inputs, method: str = "") -> None:
        """Count what the whole dense net costs; ``choose`` needs it where targets are given."""
        if self._first is not None:
            self._first.bind(model, example_input, method)

    def choose(self, candidates: Mapping[str, Candidate]) -> dict[str, Choice]:
        """Where training starts; see the class.

        Raises:
            PlanError: targets that cannot be met, with the nearest that can.
        """
        first = self._first.choose(candidates) if self._first is not None else {}
        return {name: self._start(candidate, first.get(name)) for name, candidate in candidates.items()}

    def _start(self, candidate: Candidate, first: Choice | None) -> Choice:
        if first is not None and first.ranks is not None:
            return replace(first, notes=("ranks to start from; training changes them",))
        resource = Resource(self.metric, math.inf, 0.0, *COUNTED[self.metric])
        largest = Menu(candidate, [resource], rounding=self.rounding, nested=True).largest()
        if largest is None:
            return Choice(None, reason="no ranks within its limits save anything")
        return Choice(largest.ranks, notes=("the largest ranks that save something; training changes them",))


def _menu(
    candidate: Candidate,
    resources: list[Resource],
    rho: float,
    rounding: Rounding | None,
    *,
    nested: bool = False,
) -> Menu:
    weight = candidate.site.weight
    lost = rho / 2 * float(weight.double().square().sum())
    found = spectra(candidate)
    return Menu(candidate, resources, weight=lost, rounding=rounding, steps=STEPS, found=found, nested=nested)


def _with_weight(layer: Candidate | LayerPlan, weight: Tensor) -> Candidate:
    if isinstance(layer, LayerPlan):
        return candidate_of("the layer", layer, weight)
    return candidate_of(layer.name, layer.planned(layer.most), weight)


def _checked_metric(metric: str) -> str:
    if metric not in COUNTED:
        hint = near_matches(metric, tuple(COUNTED))
        raise ConfigError(f"ranks.metric={metric!r} is not one of {', '.join(COUNTED)}.{hint}")
    return metric


def _check_at_least_0(key: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < math.inf:
        raise ConfigError(f"ranks.{key}={value!r} is not a number of at least 0, e.g. ranks.{key}=0.1")
