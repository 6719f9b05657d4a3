"""Budget: one target for the whole net; the ranks of all layers are chosen together, to lose least."""

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from hodec.calibration.input_covariance import InputCovariance
from hodec.cost.count import Cost, Inputs, count_cost
from hodec.cost.latency import LatencyTable
from hodec.errors import ConfigError, PlanError
from hodec.plan.layer import LayerPlan
from hodec.ranks.base import Candidate, Choice
from hodec.ranks.greedy.stats import GreedyStats
from hodec.ranks.rounding import Rounding
from hodec.ranks.selection.allotment import Allotment, allot, closer, least
from hodec.ranks.selection.importance import Weights, checked_weights, importance
from hodec.ranks.selection.options import COUNTED, Item, LayerMenu, Menu, MixedMenu, Resource

log = logging.getLogger(__name__)

Latency = Callable[[LayerPlan], float]

# A target counts as met from this share of it on.
TOLERANCE = 0.005
# Below this a squared relative error is rounding: nothing is left to be gained by more ranks.
NO_LOSS = 1e-9


class Budget:
    """Least loss within one target for the whole net.

    The loss is the sum over layers of weight * squared relative error of the truncated weight, as the
    singular values tell it. Leaving a layer dense is among its options; ranks at which it would cost more
    than dense are not. With several targets all hold, and at least one is met closely.

    Args:
        macs, params: share of the dense net's multiply-adds and parameters to keep, 0..1.
        latency_ms: time of the whole net, milliseconds.
        weights: layer glob -> how much its squared relative error counts, >= 0 (1 where no glob matches; the
            last match counts); ``norm``: by its share of all candidates' squared norm; or ``Greedy.stats``: by the
            score that a layer's candidates lost there.
        covariances: of the layers' inputs, see ``hodec.collect_covariances``: errors are then those of a layer's
            outputs.
        latency_table: measured milliseconds of this device, for ``latency_ms``; or instead of it:
        latency: planned layer -> its milliseconds.
        dense_latency: planned layer -> milliseconds of the dense layer in its place.
        rest_ms: milliseconds of everything else in the net; a table measures them.
        methods: names in ``hodec.METHODS`` among which each layer takes the one that loses least, by losses that are
            measured at some ranks; None: the plan's method, by singular values alone.
        tolerance: how far below a target the net may stay, as a share of it, 0..1.
        round_to, min_rank, max_rank: limits of all ranks, see ``Rounding``.

    Raises:
        ConfigError: no target, a number out of its range, ``latency_ms`` without latency tables, or ``covariances`` or
            ``Greedy.stats`` together with several ``methods``.

    Source: Shoham and Gersho, Efficient Bit Allocation for an Arbitrary Set of Quantizers, IEEE Trans. ASSP
    36(9), 1988, whose bits are costs here.
    """

    name = "budget"
    reads_weights = True

    def __init__(  # noqa: PLR0913
        self,
        macs: float | None = None,
        params: float | None = None,
        latency_ms: float | None = None,
        *,
        weights: Weights = None,
        covariances: Mapping[str, InputCovariance] | None = None,
        latency: Latency | None = None,
        dense_latency: Latency | None = None,
        rest_ms: float = 0.0,
        latency_table: LatencyTable | None = None,
        methods: Sequence[str] | None = None,
        tolerance: float = TOLERANCE,
        round_to: int = 1,
        min_rank: int = 1,
        max_rank: int | None = None,
    ) -> None:
        self.targets = checked_targets(macs=macs, params=params)
        if latency_table is not None:
            latency, dense_latency = latency_table.after, latency_table.before
        if latency_ms is None and not self.targets:
            raise ConfigError("budget: no target is given; give ranks.macs=0.4, ranks.params=0.3 or ranks.latency_ms=5")
        if latency_ms is not None:
            check_number("latency_ms", latency_ms, 0, math.inf)
            if latency is None or dense_latency is None:
                raise ConfigError(
                    f"ranks.latency_ms={latency_ms} needs latency tables of this device (latency_table=LatencyTable(), "
                    "or latency and dense_latency, from a planned layer to milliseconds), and they are not given; "
                    "without them give ranks.macs=0.4"
                )
        check_number("tolerance", tolerance, 0, 1)
        self.weights, self.covariances = checked_weights(weights), dict(covariances or {})
        self.latency_ms, self.rest_ms = latency_ms, rest_ms
        self.latency, self.dense_latency, self.latency_table = latency, dense_latency, latency_table
        self.tolerance = tolerance
        self.methods = self._checked_methods(methods)
        self.rounding = Rounding(round_to, min_rank, max_rank)
        self.found: Allotment | None = None
        self._dense: Cost | None = None
        self._net: tuple[nn.Module, Inputs] | None = None

    def _checked_methods(self, methods: Sequence[str] | None) -> tuple[str, ...]:
        if isinstance(methods, str):
            raise ConfigError(f"ranks.methods={methods!r} is no list; give ranks.methods=[{methods}]")
        names = tuple(dict.fromkeys(methods or ()))
        for what, bound in (
            ("covariances", bool(self.covariances)),
            ("weights", isinstance(self.weights, GreedyStats)),
        ):
            if bound and len(names) > 1:
                raise ConfigError(
                    f"budget: {what} of one method's ranks are given, but methods names {len(names)}; allowed: one"
                )
        return names

    def bind(self, model: nn.Module, example_input: Inputs, method: str = "") -> None:
        """Count what the whole dense net costs; ``choose`` needs it."""
        self.bind_cost(count_cost(model, example_input))
        self._net = (model, example_input) if self.latency_table is not None else None

    def bind_cost(self, dense: Cost) -> None:
        """What the whole dense net costs, where it was counted already."""
        self._dense = dense

    def choose(self, candidates: Mapping[str, Candidate]) -> dict[str, Choice]:
        """Ranks of every layer, or why it stays dense.

        Raises:
            PlanError: a target that cannot be met, with the nearest that can, or that the dense net meets.
        """
        return self.choose_among({name: [candidate] for name, candidate in candidates.items()})

    def choose_among(self, options: Mapping[str, Sequence[Candidate]]) -> dict[str, Choice]:
        """Method and ranks of every layer, or why it stays dense.

        Raises:
            PlanError: as ``choose``.
        """
        # all of a layer's candidates have the same dense layer in common
        candidates = {name: several[0] for name, several in options.items()}
        resources = self._resources(candidates)
        self._refuse_idle(resources, candidates)
        weights = importance(self.weights, candidates)
        menus = {name: self._menu(several, resources, weights[name]) for name, several in options.items()}
        found = allot(menus, resources)
        if found is None:
            raise PlanError(self._unreachable(least(menus, resources), resources))
        found = self._met_closely(menus, found, resources)
        self.found = found
        log.info("budget: %s; weighted squared errors sum to %.4g", self._met(found, resources), found.loss)
        return {name: _choice(menus[name], item) for name, item in found.items.items()}

    def _menu(self, several: Sequence[Candidate], resources: list[Resource], weight: float) -> LayerMenu:
        menus = [
            Menu(
                self._by_outputs(candidate),
                resources,
                weight=weight,
                rounding=self.rounding,
                measured=bool(self.methods),
            )
            for candidate in several
        ]
        return menus[0] if len(menus) == 1 else MixedMenu(menus)

    def _resources(self, candidates: Mapping[str, Candidate]) -> list[Resource]:
        if self.targets and self._dense is None:
            raise PlanError(f"{self.name}: call bind(model, example_input, method) before choose, as make_plan does")
        resources = whole_net(self.targets, self._dense, candidates)
        if self.latency_ms is not None and self.latency and self.dense_latency:
            rest = self._rest_ms(candidates)
            resources.append(Resource("latency_ms", self.latency_ms, rest, self.latency, self.dense_latency))
        return resources

    def _rest_ms(self, candidates: Mapping[str, Candidate]) -> float:
        if self.latency_table is None:
            return self.rest_ms
        if self._net is None:
            raise PlanError(f"{self.name}: latency_ms needs the model itself: call bind(..) first, as make_plan does")
        return self.latency_table.rest_ms(*self._net, (c.planned(c.most) for c in candidates.values()))

    def _by_outputs(self, candidate: Candidate) -> Candidate:
        """The candidate with a weight whose distances are those of its outputs, where there is a covariance for it."""
        covariance = self.covariances.get(candidate.name)
        if covariance is None:
            return candidate
        covariance.check(candidate.name, candidate.planned(candidate.most))
        return replace(candidate, site=replace(candidate.site, weight=covariance.apply(candidate.site.weight)))

    # -- what a target allows ------------------------------------------------------------------------------

    def _met(self, found: Allotment, resources: list[Resource]) -> str:
        used = found.used(resources)
        each = (f"{r.name} {self._say(r, used[r.name])} of {self._say(r, r.limit)} allowed" for r in resources)
        return ", ".join(each)

    def _say(self, resource: Resource, cost: float, up: bool = False) -> str:
        """A cost in the unit of its setting; rounded up where it is to be given as a target."""
        share = cost / self._whole(resource)
        return f"{(math.ceil(share * 1e4) / 1e4 if up else share):.4g}"

    def _whole(self, resource: Resource) -> float:
        return resource.limit / self.targets[resource.name] if resource.name in self.targets else 1.0

    def _refuse_idle(self, resources: list[Resource], candidates: Mapping[str, Candidate]) -> None:
        """Shares of the dense net are below 1, so milliseconds are the only target that it can meet already."""
        dense = [candidate.planned(candidate.most) for candidate in candidates.values()]
        if [r.name for r in resources] != ["latency_ms"]:
            return
        (time,) = resources
        taken = time.fixed + sum(time.before(layer) for layer in dense)
        if taken <= time.limit:
            known = "measured here" if self.latency_table is not None else "by the given tables"
            raise PlanError(
                f"budget: the dense net meets ranks.latency_ms={time.limit:.4g} already: it takes {taken:.4g} ms "
                f"({known}), so there is nothing to factorize. Give a target below that, or none in milliseconds: "
                "ranks.macs=0.4"
            )

    def _unreachable(self, reachable: Mapping[str, float], resources: list[Resource]) -> str:
        lines = [
            f"ranks.{r.name}={self._say(r, r.limit)} (least reachable: "
            f"{self._say(r, reachable[r.name], up=True)}, of which {self._say(r, r.fixed)} "
            "in what is not factorized)"
            for r in resources
            if reachable[r.name] > r.limit
        ] or [f"ranks.{r.name}={self._say(r, r.limit)}" for r in resources]
        together = "" if len(lines) < len(resources) or len(resources) == 1 else " together"
        return (
            f"budget: {' and '.join(lines)} cannot be met{together}, even with every layer at the ranks that "
            "cost least. Give a larger target, include more layers, lower ranks.min_rank or ranks.round_to, "
            "or use a method that compresses further"
        )

    def _met_closely(self, menus: Mapping[str, LayerMenu], found: Allotment, resources: list[Resource]) -> Allotment:
        used = found.used(resources)
        shares = {r.name: used[r.name] / r.limit for r in resources}
        if max(shares.values()) >= 1 - self.tolerance or found.loss <= NO_LOSS:
            return found  # close to one target, or nothing is left to be gained by coming closer
        nearer = closer(menus, resources, found, 1 - self.tolerance)
        if nearer is not None:
            return nearer
        near = max(resources, key=lambda r: shares[r.name])
        key, cost = f"ranks.{near.name}", used[near.name]
        enough = math.ceil((1 - cost / near.limit) * 1e3) / 1e3
        raise PlanError(
            f"budget: {key}={self._say(near, near.limit)} cannot be met within {self.tolerance:.2%}: the "
            f"nearest found below it is {self._say(near, cost)}, as single ranks are too coarse. Give "
            f"{key}={self._say(near, cost, up=True)}, ranks.tolerance={enough}, or a smaller ranks.round_to"
        )


def _choice(menu: LayerMenu, item: Item) -> Choice:
    if item.ranks is not None:
        return Choice(item.ranks, method=item.method)
    if menu.largest() is None:
        return Choice(None, reason="no ranks within its limits save anything")
    return Choice(None, reason="the budget is met with less loss when other layers are factorized instead")


def whole_net(targets: Mapping[str, float], dense: Cost | None, candidates: Mapping[str, Candidate]) -> list[Resource]:
    """The resources of targets that are shares of the dense net's cost; ``dense`` is what that costs."""
    resources = []
    for key, share in targets.items():
        after, before = COUNTED[key]
        total = float(getattr(dense, key))
        mine = sum(before(candidate.planned(candidate.most)) for candidate in candidates.values())
        resources.append(Resource(key, share * total, total - mine, after, before))
    return resources


def checked_targets(**targets: float | None) -> dict[str, float]:
    """The targets that are given, each a share between 0 and 1.

    Raises:
        ConfigError: another number, or none.
    """
    given = {key: value for key, value in targets.items() if value is not None}
    for key, value in given.items():
        check_number(key, value, 0, 1)
    return {key: float(value) for key, value in given.items()}


def check_number(key: str, value: Any, low: float, high: float) -> None:
    """Refuse what is no number strictly between ``low`` and ``high``.

    Raises:
        ConfigError: naming the key and what is allowed.
    """
    if isinstance(value, bool) or not isinstance(value, int | float) or not low < value < high:
        allowed = f"a number between {low:g} and {high:g}" if math.isfinite(high) else f"a number above {low:g}"
        example = f"{low + min(1.0, high - low) * 0.4:g}"
        raise ConfigError(f"ranks.{key}={value!r} is not {allowed}, e.g. ranks.{key}={example}")
