"""What planning and rewriting need to know of a graph; it is looked at once."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import onnx_ir as ir
from numpy.typing import ArrayLike
from onnx_ir.passes.common import InlinePass

from hodec.cost.count import Cost
from hodec.export.runtime import Array
from hodec.onnx_graph.consumers import WeightConsumer, groups_by_weight, weight_consumers
from hodec.onnx_graph.cost import COUNTS, GATES, counted_values, held, multiply_adds
from hodec.onnx_graph.feeds import example_inputs
from hodec.onnx_graph.graph import OnnxGraph, name_of
from hodec.onnx_graph.probe import Probe, Ran, probed
from hodec.onnx_graph.sizes import Size, inferred_sizes, open_axes


@dataclass(frozen=True)
class GraphFacts:
    """The facts of a graph.

    Attributes:
        inputs: sizes of the example input.
        feeds: the example input.
        ran: which branches the example input takes, and how often loops turn.
        reason: why the model does not run on it; empty where it does, or need not be tried.
        sizes: sizes of the values for that.
        axes: input or output without a shape -> its number of axes.
        groups: the nodes that multiply by a constant, those that share one together.
        refused: nodes that look like them -> why they are not.
        params: node -> elements of the constants that it reads, see ``held``.
        total_macs: multiply-adds of the whole example.
        uncounted: names of nodes whose multiply-adds are not known.
        batch: images in the example.
        axis: of an input, along which they stand.
    """

    graph: OnnxGraph
    inputs: Mapping[str, Size]
    feeds: Mapping[str, Array]
    ran: Ran
    reason: str
    sizes: Mapping[str, Size]
    axes: Mapping[str, int]
    groups: Sequence[tuple[WeightConsumer, ...]]
    refused: Mapping[str, str]
    params: Mapping[ir.Node | None, int]
    total_macs: int
    uncounted: tuple[str, ...]
    batch: int
    axis: int

    @property
    def of_one(self) -> str:
        """Of which part of the example a cost is, in words; empty where it is of all of it."""
        return f" of one of {self.batch} along the {('first', 'second')[self.axis]} axis" if self.batch > 1 else ""

    @property
    def cost(self) -> Cost:
        """Parameters and multiply-adds of one image, without the nodes in ``uncounted``."""
        return Cost(sum(self.params.values()), self.total_macs // self.batch)


def inline_functions(graph: OnnxGraph) -> None:
    """Put the nodes of functions that multiply in the places of their calls, in place: a call shares no weight."""
    functions = graph.model.functions.values()
    if any(node.op_type in COUNTS and not node.domain for one in functions for node in one.all_nodes()):
        InlinePass()(graph.model)


def _batch(graph: OnnxGraph, inputs: Mapping[str, Size]) -> tuple[int, int]:
    """Samples in the example and their axis: the second of an input that a recurrent node reads step by step."""
    recurrent = [node for node in graph.graph if node.op_type in GATES and not node.attributes.get_int("layout", 0)]
    steps = {name_of(value) for node in recurrent if (value := node.inputs[0])}
    sizes = [(size, int(name in steps)) for name, size in inputs.items()]
    # a file may say that it takes 0
    return next(((size[axis], axis) for size, axis in sizes if len(size) > axis and size[axis]), (1, 0))


def graph_facts(
    graph: OnnxGraph, shapes: Mapping[str, Size], values: Mapping[str, ArrayLike] | None = None
) -> GraphFacts:
    """The facts of a graph for inputs of these sizes (its own where none are given); the graph computes what it did.

    Args:
        values: numbers or arrays for inputs, see ``example_inputs``.

    Raises:
        ConfigError: sizes or values that do not fit its inputs, or are needed and not given.
    """
    inline_functions(graph)
    inputs, feeds = example_inputs(graph, shapes, values or {})
    sizes = inferred_sizes(graph, inputs)
    wanted = [name_of(value) for node in graph.graph for value in counted_values(node) if value]
    missing = [name for name in (*wanted, *map(name_of, graph.without_axes)) if name not in sizes]
    probe = probed(graph, feeds, known=sizes) if missing or any(graph.graph.subgraphs()) else Probe()
    sizes |= probe.sizes
    params = held(graph)
    consumers, refused = weight_consumers(graph, sizes, params)
    consumers = [replace(one, times=probe.ran.times(graph, one.place)) for one in consumers]
    macs, uncounted = multiply_adds(probe.ran.nodes(graph.graph), sizes)
    batch, axis = _batch(graph, inputs)
    return GraphFacts(
        graph, inputs, feeds, probe.ran, probe.reason, sizes,
        axes=open_axes(graph, sizes, inputs),
        groups=groups_by_weight(consumers),
        refused=refused,
        params=params,
        total_macs=macs,
        uncounted=tuple(graph.node_names[node] for node in uncounted),
        batch=batch, axis=axis,
    )  # fmt: skip
