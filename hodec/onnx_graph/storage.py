"""Weights kept in fewer bytes than they are computed in: a file that is smaller and exactly as fast.

A constant in float16, or in whole numbers of 8 bits with a scale for each index along one axis, is turned back to
float32 by nodes that read nothing but constants. onnxruntime computes these once, when it loads the file (constant
folding), so that what runs is the float32 graph with rounded weights.
"""

from collections.abc import Callable, Container, Mapping

import numpy as np
import onnx_ir as ir

from hodec.export.runtime import Array
from hodec.onnx_graph.cost import COUNTS, UNCOUNTED, is_stored, readers_of
from hodec.onnx_graph.graph import OnnxGraph, UniqueNames, constants_of, name_of
from hodec.onnx_graph.nodes import initializer
from hodec.onnx_graph.rewrite import add_initializers

# Elements from which a constant is stored in fewer bytes: 512 of so many are saved, and its own nodes take some 150.
LEAST = 256
# Largest norm of what rounding takes off a constant, as a share of the constant's: 16 bits take 2e-4, and more where
# numbers are too small for them; 8 bits take 0.9 % of a normal distribution, and more where some are far larger.
MOST_HALF, MOST_BYTE = 1e-3, 0.03
# Numbers that share a scale, at least: it takes four bytes, a quarter of a byte for each.
LEAST_SHARERS = 16
# What nothing is done to.
FLOAT32 = "float32"
# Operators beside the products whose constants are worth it: rows are looked up.
TABLES = {"Gather"}


def store(graph: OnnxGraph, kind: str) -> int:
    """Store the float32 constants that products and look-ups read in another way, in place; how many there were.

    Args:
        kind: a key of ``STORES``. A constant that it does not hold well enough gets the next larger one.
    """
    ways, count, names = STORES[kind], 0, UniqueNames.of_model(graph.model)
    constants = constants_of(graph)
    if not ways or (graph.lists_initializers and graph.model.ir_version >= 4):
        return 0  # an initializer that a caller may replace is not folded
    for value in sorted(constants, key=name_of):  # a set has no order, and files of the same names are wanted
        if _is_wanted(graph, value, constants):
            array = graph.array(value)
            nodes = next((made for way in ways if (made := way(array, name_of(value), names))), [])
            count += bool(nodes)
            _replace(graph, value, nodes)
    return count


def _is_wanted(graph: OnnxGraph, value: ir.Value, constants: Container[ir.Value]) -> bool:
    """Whether it is a large float32 constant, stored as it is, which ends up in products and look-ups alone."""
    readers = readers_of(value, constants)
    known = all(not one.domain and one.op_type in {*COUNTS, *UNCOUNTED, *TABLES} for one in readers)
    if not is_stored(value) or not readers or not known or graph.is_given_out(value):
        return False
    array = graph.array(value)
    return bool(array.dtype == np.float32 and array.size >= LEAST and np.isfinite(array).all())


def _replace(graph: OnnxGraph, value: ir.Value, nodes: list[ir.Node]) -> None:
    """Let all that read a constant read the last node, and put the nodes in front of the graph that holds it."""
    place, maker = value.graph, value.producer()
    if not nodes or not isinstance(place, ir.Graph):
        return
    new = [one for node in nodes for one in node.inputs if one and not one.producer()]
    add_initializers(graph, new, place)
    place.insert_before(place[0], nodes)
    value.replace_all_uses_with(nodes[-1].outputs[0])
    if maker is None:
        del place.initializers[name_of(value)]
        if value.is_graph_input():
            place.inputs.remove(value)
    else:
        place.remove(maker, safe=True)


# -- ways --------------------------------------------------------------------------------------------------------


def _half(array: Array, name: str, names: UniqueNames) -> list[ir.Node]:
    """Float16 and a Cast; nothing where it takes too much off."""
    with np.errstate(over="ignore"):
        short = array.astype(np.float16)
    if not _is_near(short.astype(np.float32), array, MOST_HALF):
        return []
    return [_node("Cast", [initializer(names.new(f"{name}.half"), short)], name, names, to=ir.DataType.FLOAT)]


def _byte(array: Array, name: str, names: UniqueNames) -> list[ir.Node]:
    """Whole numbers of -127 to 127 and a Cast, times a scale by the axis that loses least; nothing where that is much.

    Small kernels of their own (depthwise convolutions) stay: their scales would take half of what is saved.
    """
    channels = array.shape[:2]  # not the places of a kernel
    axes = [axis for axis, n in enumerate(channels) if 1 < n <= array.size // LEAST_SHARERS]
    found = [_rounded(array, axis) for axis in axes]
    best = min(found, key=lambda one: _lost(np.multiply(*one), array), default=None)
    if best is None or not _is_near(np.multiply(*best), array, MOST_BYTE):
        return []
    whole, scale = best
    floats = _node(
        "Cast", [initializer(names.new(f"{name}.byte"), whole.astype(np.int8))], name, names, to=ir.DataType.FLOAT
    )
    return [floats, _node("Mul", [floats.outputs[0], initializer(names.new(f"{name}.scale"), scale)], name, names)]


def _rounded(array: Array, axis: int) -> tuple[Array, Array]:
    """Whole numbers in float32, and the scale that they are multiplied by, one for each index of the axis."""
    others = tuple(k for k in range(array.ndim) if k != axis)
    scale = np.maximum(np.abs(array).max(others, keepdims=True) / np.float32(127), np.float32(1e-30))
    return np.rint(array / scale), scale.astype(np.float32)


def _is_near(found: Array, wanted: Array, share: float) -> bool:
    return _lost(found, wanted) <= share**2 * float(np.square(wanted, dtype=np.float64).sum())


def _lost(found: Array, wanted: Array) -> float:
    return float(np.square(np.subtract(found, wanted, dtype=np.float64)).sum())


def _node(kind: str, inputs: list[ir.Value], name: str, names: UniqueNames, **settings: ir.DataType) -> ir.Node:
    made = names.new(f"{name}.{kind.lower()}")
    return ir.node(kind, inputs, {key: int(one) for key, one in settings.items()}, outputs=[ir.val(made)], name=made)


Way = Callable[[Array, str, UniqueNames], list[ir.Node]]

STORES: Mapping[str, tuple[Way, ...]] = {FLOAT32: (), "float16": (_half,), "int8": (_byte, _half)}
"""How float32 weights may be stored -> what is tried for each, in this order."""
