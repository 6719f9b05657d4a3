"""What fitted layers add to their outputs, put into the graph: into a bias where there is one, else as one."""

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from hodec.export.runtime import Array
from hodec.onnx_graph.consumers import WeightConsumer
from hodec.onnx_graph.facts import GraphFacts
from hodec.onnx_graph.graph import OnnxGraph, UniqueNames, name_of
from hodec.onnx_graph.nodes import initializer
from hodec.onnx_graph.rewrite import add_initializers, remove_unread
from hodec.onnx_graph.sites import GraphSite
from hodec.onnx_graph.sizes import Size

Numbers = NDArray[np.float64]


def shifted(facts: GraphFacts, sites: Mapping[str, GraphSite], shifts: Mapping[str, Numbers]) -> GraphFacts:
    """The facts after each layer's outputs are shifted, in place; of the layers as they stand, before rewriting.

    Args:
        shifts: layer -> (O,), what is added to each of its outputs.
    """
    names, sizes = UniqueNames.of_model(facts.graph.model), dict[str, Size]()
    for name, shift in shifts.items():
        if not np.any(shift):
            continue
        for one in sites[name].consumers:
            sizes |= _shift(one, shift, facts, names)
    return replace(facts, sizes={**facts.sizes, **sizes})


def _shift(one: WeightConsumer, shift: Numbers, facts: GraphFacts, names: UniqueNames) -> dict[str, Size]:
    """Shift one node's outputs; returns the sizes of the values that are new."""
    graph, kind = facts.graph, facts.graph.array(one.weight).dtype
    if one.dims:
        return _replaced(one.node, 2, _own(one.bias, graph, len(shift)) + shift, (graph, names), kind)
    if one.node.op_type == "Gemm":
        own, beta = _own(one.bias, graph, len(shift)), one.node.attributes.get_float("beta", 1.0)
        if own.ndim == 1 and beta:
            return _replaced(one.node, 2, own + shift / beta, (graph, names), kind)
    add, at = _following_add(one, graph, len(shift))
    if add is not None:
        bias = graph.array(add.inputs[at])  # type: ignore[arg-type]
        return _replaced(add, at, bias.astype(np.float64) + shift.reshape(bias.shape), (graph, names), bias.dtype)
    return _added(one, shift, facts, names)


def _own(bias: ir.Value | None, graph: OnnxGraph, outputs: int) -> Numbers:
    """A node's bias, (O,) unless it differs from row to row."""
    if bias is None:
        return np.zeros(outputs)
    array = graph.array(bias).astype(np.float64)
    if array.size in (1, outputs) and array.shape[-1:] in ((), (1,), (outputs,)):
        return np.broadcast_to(array.reshape(-1), (outputs,))
    return array


def _replaced(
    node: ir.Node, at: int, array: Array, home: tuple[OnnxGraph, UniqueNames], kind: np.dtype[np.generic]
) -> dict[str, Size]:
    """Let a node read a new constant; an old one that nothing else reads is removed."""
    graph, names = home
    old = node.inputs[at] if at < len(node.inputs) else None
    value = initializer(names.new(f"{name_of(old) or node.name or node.op_type}.fitted"), array.astype(kind))
    node.resize_inputs(max(len(node.inputs), at + 1))
    node.replace_input_with(at, value)
    add_initializers(graph, [value], graph.graph)
    if old is not None:
        remove_unread(graph, old)
    return {name_of(value): array.shape}


def _following_add(one: WeightConsumer, graph: OnnxGraph, outputs: int) -> tuple[ir.Node | None, int]:
    """The Add of a constant with a number for each output that alone reads a product, and which input that is."""
    uses = list(one.output.uses())
    if len(uses) != 1 or graph.is_given_out(one.output) or uses[0].node.op_type != "Add" or one.input_index == 0:
        return None, 0
    at = 1 - uses[0].idx
    bias = uses[0].node.inputs[at]
    if bias is None or bias not in graph.constants or not bias.is_initializer():
        return None, 0
    shape = graph.array(bias).shape
    return (uses[0].node, at) if shape[-1:] == (outputs,) and graph.array(bias).size == outputs else (None, 0)


def _added(one: WeightConsumer, shift: Array, facts: GraphFacts, names: UniqueNames) -> dict[str, Size]:
    """An Add behind a node; the sum takes the name of the node's output."""
    graph, raw, kind = facts.graph, one.output, facts.graph.array(one.weight).dtype
    size = facts.sizes[name_of(raw)]
    shaped = shift.reshape(-1, 1) if one.input_index == 0 else shift
    value = initializer(names.new(f"{one.name}.shift"), shaped.astype(kind))
    total = ir.Value(name=raw.name, type=raw.type, shape=raw.shape)
    add = ir.node("Add", [raw, value], outputs=[total], name=names.new(f"{one.name}.shifted"))
    for use in list(raw.uses()):
        if use.node is not add:
            use.node.replace_input_with(use.idx, total)
    for k, end in enumerate(graph.graph.outputs):
        if end is raw:
            graph.graph.outputs[k] = total
    raw.name = names.new(f"{raw.name}.product")
    graph.graph.insert_after(one.node, add)
    add_initializers(graph, [value], graph.graph)
    return {name_of(raw): size, name_of(value): shaped.shape}
