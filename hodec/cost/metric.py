"""What layers and nets cost: the only table of cost metrics. Importing it does not load torch."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from torch import nn

    from hodec.cost.count import Cost
    from hodec.inputs import Inputs
    from hodec.plan.layer import LayerPlan

LayerCost = Callable[["LayerPlan"], float]


@dataclass(frozen=True)
class CostMetric:
    """One way to count what layers and nets cost.

    Attributes:
        name: ``macs`` (multiply-adds of one image), ``params`` or ``latency_ms`` (milliseconds).
        factorized, dense: planned layer -> what it costs, and what the dense layer in its place costs.
        whole: reads the cost of the whole dense net off its count; None where nets are not counted in this metric.
        rest: cost of all that is no planned layer, where ``whole`` is None.
    """

    name: str
    factorized: LayerCost
    dense: LayerCost
    whole: Callable[[Cost], float] | None = None
    rest: float = 0.0

    def ratio(self, layer: LayerPlan) -> float:
        """Share of its dense cost that a planned layer keeps."""
        return self.factorized(layer) / self.dense(layer)

    def whole_net(self, count: Cost, layers: Iterable[LayerPlan]) -> float:
        """Cost of the dense net; ``layers`` are all of its layers that may be factorized."""
        return self.rest + sum(map(self.dense, layers)) if self.whole is None else float(self.whole(count))

    def remainder(self, count: Cost, layers: Iterable[LayerPlan]) -> float:
        """Cost of the dense net without ``layers``."""
        return self.rest if self.whole is None else float(self.whole(count)) - sum(map(self.dense, layers))


METRICS = {
    "macs": CostMetric("macs", lambda layer: layer.macs_after, lambda layer: layer.macs_before, lambda net: net.macs),
    "params": CostMetric(
        "params", lambda layer: layer.params_after, lambda layer: layer.params_before, lambda net: net.params
    ),
}
"""The metrics that a plan counts by itself. ``latency_metric`` makes the one that is measured."""

COUNTED, LATENCY = tuple(METRICS), "latency_ms"


class LayerTimes(Protocol):
    """Milliseconds of layers: a ``LatencyTable`` measures them, a file's table too, ``GivenTimes`` is told."""

    def after(self, layer: LayerPlan) -> float:
        """Milliseconds of a planned layer."""
        ...

    def before(self, layer: LayerPlan) -> float:
        """Milliseconds of the dense layer in its place."""
        ...

    def rest_ms(self, model: nn.Module | None, example_input: Inputs, layers: Iterable[LayerPlan]) -> float:
        """Milliseconds of the dense net without these layers; ``model`` is None for a model file."""
        ...


@dataclass(frozen=True)
class GivenTimes:
    """Times of layers by functions of one's own: planned layer -> milliseconds, factorized and dense.

    Attributes:
        rest: milliseconds of everything else in the net.
    """

    after: LayerCost
    before: LayerCost
    rest: float = 0.0

    def rest_ms(self, model: nn.Module | None, example_input: Inputs, layers: Iterable[LayerPlan]) -> float:
        """The given ``rest``."""
        return self.rest


def latency_metric(
    times: LayerTimes | None, model: nn.Module | None, example_input: Inputs, layers: Iterable[LayerPlan]
) -> CostMetric:
    """The metric ``latency_ms`` for one net.

    Args:
        times: None measures on this machine, by a ``LatencyTable`` for one image.
        layers: all layers that may be factorized.
    """
    if times is None:
        from hodec.cost.latency import LatencyTable

        times = LatencyTable()
    return CostMetric(LATENCY, times.after, times.before, rest=times.rest_ms(model, example_input, layers))
