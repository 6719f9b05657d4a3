"""Budget: one target for the whole net; the ranks of all layers are chosen together, to lose least."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol

from hodec.cost.metric import METRICS, GivenTimes, LayerTimes, latency_metric
from hodec.errors import ConfigError, PlanError, Use
from hodec.options import BadParts, argument, bad_function, bad_names, setting
from hodec.ranks.greedy.stats import GreedyStats
from hodec.ranks.rule import Choice, Limits, RankRule, Targets

if TYPE_CHECKING:
    from torch import Tensor

    from hodec.plan.layer import LayerPlan
    from hodec.ranks.context import LayerContext, NetContext
    from hodec.ranks.selection.options import CostLimit, LayerOptions, MethodOptions, RankOption
    from hodec.ranks.selection.select import Selection

log = logging.getLogger(__name__)

# A loss below this is rounding: nothing is left to be gained. It is the square of a relative error of 3e-5, which is
# 265 roundings of float32.
ROUNDING = 1e-9


class Covariance(Protocol):
    """What a rule needs of an ``InputCovariance``."""

    def check(self, name: str, layer: LayerPlan) -> object:
        """Refuse a layer that it was not collected for."""
        ...

    def apply(self, weight: Tensor) -> Tensor:
        """A weight whose distances are those of the layer's outputs."""
        ...


def bad_weights(value: object) -> BadParts:
    """Yield what are no weights of layers."""
    if isinstance(value, Mapping):
        numbers = value.values()
        good = all(not isinstance(n, bool) and isinstance(n, int | float) and 0 <= n < math.inf for n in numbers)
    else:
        good = value == "norm" or isinstance(value, GreedyStats)
    if not good:
        yield "", value


@dataclass(frozen=True)
class Budget(Targets, RankRule, Limits):
    """Least loss within one target for the whole net.

    The loss is the sum over layers of weight * squared relative error of the truncated weight, as the
    singular values tell it. Leaving a layer dense is among its options; ranks at which it would cost more
    than dense are not. With several targets all hold, and at least one is met closely, or as closely as ranks can:
    where that is further away than ``tolerance``, a note says so. Without any target the net keeps half of its
    multiply-adds (``macs=0.5``).

    Args:
        methods: each layer takes the one that loses least, by losses that are measured at some ranks; None: the
            plan's method, by singular values alone.
        weights: layer glob -> how much its squared relative error counts, >= 0 (1 where no glob matches; the
            last match counts); ``norm``: by its share of all layers' squared norm; or the ``GreedyStats`` of a
            search: by the score that a layer lost there.
        covariances: of the layers' inputs, see ``hodec.collect_covariances``: errors are then those of a layer's
            outputs. With several ``methods``, layer -> method -> covariance.
        latency_table: milliseconds of layers, for ``latency_ms``; None: they are measured on this machine.
        report: called with the ``Selection`` (options, loss, bound, multipliers) of each choice.

    Raises:
        ConfigError: a setting out of range, or ``covariances`` or ``GreedyStats`` together with several ``methods``.

    Source: Shoham and Gersho, Efficient Bit Allocation for an Arbitrary Set of Quantizers, IEEE Trans. ASSP
    36(9), 1988, whose bits are costs here.
    """

    name = "budget"
    reads_weights = True
    instead_of_targets = "latency_ms"

    latency_ms: float | None = setting(
        None, "milliseconds that the whole net may take for one image on this machine", above=0
    )
    methods: list[str] | None = setting(
        None,
        "methods of which each layer takes the one that loses least; by default the method of all layers",
        words="a list of methods",
        example="[tt,spatial_svd]",
        check=bad_names,
    )
    tolerance: float = setting(
        0.005, "how far below a target the net may stay, as a share of the target", above=0, below=1
    )
    weights: Mapping[str, float] | str | GreedyStats | None = argument(
        words="norm, {layer glob: a number at least 0}, or the GreedyStats of a search", check=bad_weights
    )
    covariances: Mapping[str, Covariance | Mapping[str, Covariance]] | None = argument()
    latency_table: LayerTimes | None = argument()
    report: Callable[..., object] | None = argument(words="a function of a Selection", check=bad_function)

    def __post_init__(self) -> None:
        super().__post_init__()
        count = len(self.methods_for(""))
        of_one = any(not isinstance(given, Mapping) for given in (self.covariances or {}).values())
        for name, given in (("covariances", of_one), ("weights", isinstance(self.weights, GreedyStats))):
            if given and count > 1:
                raise ConfigError(
                    f"budget: {name} of one method's ranks are given, but methods names {count}; allowed: one"
                )

    def methods_for(self, method: str) -> tuple[str, ...]:
        """``methods``, each once, else ``method``."""
        return tuple(dict.fromkeys(self.methods or (method,)))

    def choose(self, layers: Mapping[str, LayerContext], net: NetContext) -> dict[str, Choice]:
        """Ranks (and method) of every layer, or why it stays dense.

        Raises:
            PlanError: a target that cannot be met, with the least that can, or that the dense net meets.
        """
        from hodec.ranks.selection.importance import importance
        from hodec.ranks.selection.options import LayerOptions
        from hodec.ranks.selection.select import select

        limits = cost_limits(self.targets, layers, net)
        if self.latency_ms is not None:
            limits.append(self._latency_limit(self.latency_ms, layers, net))
        weights = importance(self.weights, layers)
        options = {
            name: LayerOptions([self._options(one, limits, weights[name]) for one in (layer, *layer.others)])
            for name, layer in layers.items()
        }
        selection = select(options, limits)
        if selection is None:
            raise self._unreachable(options, limits)
        selection = self._met_closely(options, selection, limits)
        used = selection.used(limits)
        log.info(
            "budget: %s; weighted squared errors sum to %.4g",
            ", ".join(
                f"{one.metric.name} {self._share(one, used[one.metric.name])} of {self._share(one, one.limit)} allowed"
                for one in limits
            ),
            selection.loss,
        )
        if self.report is not None:
            self.report(selection)
        notes = self._coarse(selection, limits)
        return {name: _choice(options[name], selection.options[name], notes) for name in layers}

    def _options(self, layer: LayerContext, limits: list[CostLimit], weight: float) -> MethodOptions:
        """Options of a layer under one method; by what its outputs lose, where its inputs' covariance is given."""
        from hodec.ranks.selection.options import MethodOptions

        covariance = (self.covariances or {}).get(layer.name)
        if isinstance(covariance, Mapping):
            covariance = covariance.get(layer.method)
        if covariance is not None:
            covariance.check(layer.name, layer.dense)
            layer = replace(layer, site=layer.site.changed(covariance.apply))
        return MethodOptions(layer, limits, weight=weight, limits=self, measured=bool(self.methods))

    # -- what a target allows ------------------------------------------------------------------------------

    def _latency_limit(self, limit: float, layers: Mapping[str, LayerContext], net: NetContext) -> CostLimit:
        """The limit in milliseconds; as the only target, the dense net must not meet it already.

        The other targets are shares of the dense net below 1, so that it meets none of them.
        """
        from hodec.ranks.selection.options import CostLimit

        times = self.latency_table or net.times
        if times is None:
            net.runnable("{latency} is measured by running the net", latency=Use("ranks.latency_ms", limit))
        dense = [layer.dense for layer in layers.values()]
        metric = latency_metric(times, net.model, net.example_input, dense)
        taken = metric.whole_net(net.cost, dense)
        if taken <= limit and not self.targets:
            known = "by the given tables" if isinstance(self.latency_table, GivenTimes) else "measured here"
            raise PlanError(
                f"budget: the dense net meets {{target}} already: it takes {taken:.4g} ms ({known}), so there is "
                "nothing to factorize. Give a target below that, or none in milliseconds: {macs}",
                target=Use("ranks.latency_ms", f"{limit:.4g}"),
                macs=Use("ranks.macs", 0.4),
            )
        return CostLimit(metric, limit, metric.remainder(net.cost, dense))

    def _share(self, limit: CostLimit, cost: float, *, up: bool = False) -> str:
        """A cost in the unit of its setting; rounded up where it is to be given as a target."""
        name = limit.metric.name
        share = cost / (limit.limit / self.targets[name] if name in self.targets else 1.0)
        return f"{(math.ceil(share * 1e4) / 1e4 if up else share):.4g}"

    def _unreachable(self, options: Mapping[str, LayerOptions], limits: list[CostLimit]) -> PlanError:
        from hodec.ranks.selection.select import least_costs

        reachable = least_costs(options, limits)
        missed = [one for one in limits if reachable[one.metric.name] > one.limit]
        lines, uses = [], {}
        for one in missed or limits:
            name = one.metric.name
            uses[name] = Use(f"ranks.{name}", self._share(one, one.limit))
            least = f"least reachable: {self._share(one, reachable[name], up=True)}"
            fixed = f"of which {self._share(one, one.fixed)} in what is not factorized"
            lines.append(f"{{{name}}} ({least}, {fixed})" if missed else f"{{{name}}}")
        together = "" if len(lines) < len(limits) or len(limits) == 1 else " together"
        return PlanError(
            f"budget: {' and '.join(lines)} cannot be met{together}, even with every layer at the ranks that "
            "cost least. Give a larger target, include more layers, lower {min_rank} or {round_to}, "
            "or use a method that compresses further",
            **uses,
            min_rank=Use("ranks.min_rank"),
            round_to=Use("ranks.round_to"),
        )

    def _met_closely(
        self, options: Mapping[str, LayerOptions], selection: Selection, limits: list[CostLimit]
    ) -> Selection:
        """The selection, changed where it stays too far below all targets and can come nearer."""
        from hodec.ranks.selection.select import use_up

        used = selection.used(limits)
        shares = {one.metric.name: used[one.metric.name] / one.limit for one in limits}
        if max(shares.values()) >= 1 - self.tolerance or selection.loss <= ROUNDING:
            return selection  # close to one target, or nothing is left to be gained by coming closer
        nearer = use_up(options, limits, selection, 1 - self.tolerance)
        return selection if nearer is None else nearer

    def _coarse(self, selection: Selection, limits: list[CostLimit]) -> tuple[str, ...]:
        """A note where the net stays further below all targets than ``tolerance``, as single ranks are too coarse."""
        used = selection.used(limits)
        near = max(limits, key=lambda one: used[one.metric.name] / one.limit)
        name, cost = near.metric.name, used[near.metric.name]
        if cost >= (1 - self.tolerance) * near.limit or selection.loss <= ROUNDING:
            return ()
        asked = f"{name}={self._share(near, near.limit)}"
        note = f"budget: {asked} is met by {self._share(near, cost)}, the nearest found below it: ranks are coarse"
        log.warning("%s", note)
        return (note,)


def cost_limits(targets: Mapping[str, float], layers: Mapping[str, LayerContext], net: NetContext) -> list[CostLimit]:
    """Limits of the whole net's cost, from targets that are shares of the dense net's."""
    from hodec.ranks.selection.options import CostLimit

    dense = [layer.dense for layer in layers.values()]
    metrics = [(METRICS[name], share) for name, share in targets.items()]
    return [
        CostLimit(one, share * one.whole_net(net.cost, ()), one.remainder(net.cost, dense)) for one, share in metrics
    ]


def _choice(options: LayerOptions, option: RankOption, notes: tuple[str, ...]) -> Choice:
    if option.ranks is not None:
        return Choice(option.ranks, notes, method=option.method)
    if options.largest() is None:
        return Choice(None, reason="no ranks within its limits save anything")
    return Choice(None, reason="the budget is met with less loss when other layers are factorized instead")
