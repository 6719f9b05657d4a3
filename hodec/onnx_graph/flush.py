"""Weights that are 0 in all but name: many CPUs take a hundred times as long for a subnormal number."""

import numpy as np
import onnx_ir as ir

from hodec.export.runtime import Array
from hodec.onnx_graph.cost import COUNTS, UNCOUNTED
from hodec.onnx_graph.graph import OnnxGraph, constants_of

# Float32 and bfloat16 are subnormal below 1.2e-38, and so are products of a weight below this with an input below
# 1.2e-8. It adds less than 1e-22 of its input, where the rounding of a sum near 1 is 6e-8. Float16 has no room for such
# numbers, and what is subnormal there (below 6e-5) are weights like others.
LEAST, TYPES = 1e-30, ("float32", "bfloat16")

# Elements looked at together: a mapped file is not copied whole.
CHUNK = 2**24


def flush(graph: OnnxGraph) -> int:
    """Set weights of less than ``LEAST`` to 0, in place, in factors and in what stays dense; how many there were.

    Weights are the constants that convolutions, products and recurrent nodes read: such a number elsewhere may be what
    keeps a divisor from 0.
    """
    constants, found = constants_of(graph), dict[ir.Value, None]()
    for node in graph.graph.all_nodes():
        if not node.domain and (node.op_type in COUNTS or node.op_type in UNCOUNTED):
            found |= dict.fromkeys(value for value in node.inputs if value in constants)
    return sum(_flush(graph, value) for value in found)


def _flush(graph: OnnxGraph, value: ir.Value) -> int:
    node = value.producer()
    if node is not None and (node.op_type != "Constant" or "value" not in node.attributes):
        return 0  # it is made from another constant, which may have other uses
    array = graph.array(value)
    count = _tiny(array)
    if count:
        tensor = ir.tensor(np.where(np.abs(array) < LEAST, np.zeros((), array.dtype), array), name=value.name)
        if node is None:
            value.const_value = tensor
        else:
            node.attributes["value"] = ir.AttrTensor("value", tensor)
            value.const_value = None
    return count


def _tiny(array: Array) -> int:
    """How many elements are below ``LEAST`` and not 0."""
    if str(array.dtype) not in TYPES:
        return 0
    flat = array.reshape(-1)
    parts = (np.abs(flat[k : k + CHUNK]) for k in range(0, flat.size, CHUNK))
    return sum(int(np.count_nonzero((part < LEAST) & (part > 0))) for part in parts)
