"""A quantized graph (QDQ: QuantizeLinear and DequantizeLinear around float operators) as a float one."""

from collections.abc import Container

import numpy as np
import onnx
import onnx_ir as ir

from hodec.errors import PlanError
from hodec.export.runtime import Array
from hodec.onnx_graph.graph import OnnxGraph, UniqueNames, constants_of, name_of
from hodec.onnx_graph.nodes import initializer


def dequantize(graph: OnnxGraph) -> int:
    """Take quantization out, in place.

    Constants get their float values. Activations are clipped to the range that they had, which may stand for a ReLU,
    but no longer rounded.

    Returns:
        How many constants became float.

    Raises:
        PlanError: the graph has no constant that DequantizeLinear reads, or one with scales by block.
    """
    constants, names, count = constants_of(graph), UniqueNames.of_model(graph.model), 0
    for node in [one for one in graph.graph.all_nodes() if one.op_type == "DequantizeLinear" and not one.domain]:
        if all(value is None or value in constants for value in node.inputs):
            _make_float(graph, node, names)
            count += 1
        elif _is_pair(node, constants):
            _clip(graph, node, names)
    for node in reversed(list(graph.graph.all_nodes())):
        unread = not any(one.uses() or graph.is_given_out(one) for one in node.outputs)
        if unread and node.op_type in ("DequantizeLinear", "QuantizeLinear") and isinstance(node.graph, ir.Graph):
            node.graph.remove(node, safe=True)
    if not count:
        raise PlanError(f"{graph.path} holds no constant that DequantizeLinear reads: it is not of the QDQ kind")
    return count


def _make_float(graph: OnnxGraph, node: ir.Node, names: UniqueNames) -> None:
    """Put an initializer in the place of what a node makes of a constant."""
    value = initializer(names.new(f"{name_of(node.inputs[0])}.float"), _values(graph, node))
    if isinstance(node.graph, ir.Graph):
        node.graph.register_initializer(value)
        value.type = value.shape = None  # its tensor has both
        node.outputs[0].replace_all_uses_with(value)


def _values(graph: OnnxGraph, node: ir.Node) -> Array:
    """(x - zero point) * scale of a constant, with one scale for all, or one for each index along an axis."""
    x, scale, *zero = (graph.array(one) for one in node.inputs if one)
    if scale.ndim > 1:
        raise PlanError(f"{graph.node_names[node]} has scales by block, which are not read")
    axis = node.attributes.get_int("axis", 1) % max(1, x.ndim)
    along = [-1 if k == axis else 1 for k in range(x.ndim)] if scale.size > 1 else []
    shift = zero[0].astype(np.float32).reshape(along) if zero else np.float32(0)
    values: Array = ((x.astype(np.float32) - shift) * scale.astype(np.float32).reshape(along)).astype(scale.dtype)
    return values


def _is_pair(node: ir.Node, constants: Container[ir.Value]) -> bool:
    """Whether a node undoes what the one before it does, with one scale and zero point for all."""
    before = node.inputs[0].producer() if node.inputs[0] else None
    if before is None or before.op_type != "QuantizeLinear" or before.inputs[1:] != node.inputs[1:]:
        return False
    settings = node.inputs[1:]
    return len(settings) == len(("scale", "zero point")) and all(one in constants for one in settings)


def _clip(graph: OnnxGraph, node: ir.Node, names: UniqueNames) -> None:
    """Put a Clip to the range of the numbers in the place of a pair."""
    scale, zero = (graph.array(one) for one in node.inputs[1:] if one)
    before = node.inputs[0].producer() if node.inputs[0] else None
    if scale.size != 1 or zero.dtype.kind not in "iu" or before is None or not isinstance(node.graph, ir.Graph):
        return
    limits = np.iinfo(zero.dtype)  # type: ignore[type-var]
    step, shift = float(scale.item()), int(zero.item())
    arrays = [np.array((n - shift) * step, scale.dtype) for n in (limits.min, limits.max)]
    name, inputs, settings = names.new(f"{graph.node_names[node]}.clip"), [before.inputs[0]], {}
    if len(onnx.defs.get_schema("Clip", graph.opset).inputs) > 1:  # before version 11 its bounds were attributes
        values = [initializer(names.new(f"{name}.{what}"), array) for what, array in zip(("min", "max"), arrays)]
        for value in values:
            node.graph.register_initializer(value)
            value.type = value.shape = None
        inputs += values
    else:
        settings = {what: float(array) for what, array in zip(("min", "max"), arrays)}
    new = ir.node("Clip", inputs, settings, outputs=[ir.val(names.new(name))], name=name)
    old = node.outputs
    ir.convenience.replace_nodes_and_values(node.graph, node, [node], [new], [old[0]], [new.outputs[0]])
