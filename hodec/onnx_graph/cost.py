"""Parameters and multiply-adds of a graph for one image, and which nodes cannot be counted."""

import math
from collections.abc import Callable, Iterable, Mapping

import onnx_ir as ir

from hodec.onnx_graph.graph import OnnxGraph, constants_of, name_of, subgraphs_of
from hodec.onnx_graph.sizes import Size

FLOATS = ("float32", "float64", "float16", "bfloat16")


def parameters(graph: OnnxGraph) -> int:
    """Elements of the floating constants that nodes read, in the graph's present state.

    A constant that only other constants are made of is not counted beside them.
    """
    return sum(held(graph).values())


def held(graph: OnnxGraph) -> dict[ir.Node | None, int]:
    """Node -> elements of the floating constants that it is the first to read; None for those that are outputs only."""
    constants, found = constants_of(graph), dict[ir.Node | None, int]()
    for value in constants:
        readers = [use.node for use in value.uses() if use.node.outputs[0] not in constants]
        if readers or graph.is_given_out(value):
            array, reader = graph.array(value), readers[0] if readers else None
            if str(array.dtype) in FLOATS:
                found[reader] = found.get(reader, 0) + array.size
    return found


def multiply_adds(nodes: Iterable[ir.Node], sizes: Mapping[str, Size]) -> tuple[int, list[ir.Node]]:
    """Multiply-adds of convolutions and matrix products, and the nodes that are left out.

    Left out are those whose sizes are not known, those with products in subgraphs, which may run any number of
    times, and operators that may hide products: recurrent ones, attention, and all of other domains.

    Args:
        sizes: of the values, for one example input; the count is for that whole input.
    """
    total, uncounted = 0, []
    for node in nodes:
        inner = [one for graph in subgraphs_of(node) for one in graph.all_nodes()]
        if node.domain or node.op_type in UNCOUNTED or any(map(multiplies, inner)):
            uncounted.append(node)
        elif node.op_type in COUNTS:
            names = [name_of(value) for value in counted_values(node)]
            known = [sizes[name] for name in names if name in sizes]
            if len(known) == len(names):
                total += COUNTS[node.op_type][0](node, *known)
            else:
                uncounted.append(node)
    return total, uncounted


def counted_values(node: ir.Node) -> tuple[ir.Value | None, ...]:
    """Input, weight and output of a convolution or matrix product; none of another node."""
    if node.op_type not in COUNTS or node.domain:
        return ()
    return node.inputs[0], node.inputs[COUNTS[node.op_type][1]], node.outputs[0]


def multiplies(node: ir.Node) -> bool:
    """Whether a node is known to multiply, or may do so unseen."""
    return bool(node.domain) or node.op_type in COUNTS or node.op_type in UNCOUNTED


def _conv(node: ir.Node, data: Size, weight: Size, output: Size) -> int:
    return math.prod(output) * math.prod(weight[1:])


def _conv_transpose(node: ir.Node, data: Size, weight: Size, output: Size) -> int:
    return math.prod(data) * math.prod(weight[1:])


def _matmul(node: ir.Node, data: Size, weight: Size, output: Size) -> int:
    return math.prod(output) * (data[-1] if data else 0)


def _gemm(node: ir.Node, data: Size, weight: Size, output: Size) -> int:
    return math.prod(output) * data[0 if node.attributes.get_int("transA", 0) else 1]


# Operator -> its multiply-adds, and which of its inputs is the weight.
COUNTS: dict[str, tuple[Callable[[ir.Node, Size, Size, Size], int], int]] = {
    "Conv": (_conv, 1),
    "ConvInteger": (_conv, 1),
    "QLinearConv": (_conv, 3),
    "ConvTranspose": (_conv_transpose, 1),
    "MatMul": (_matmul, 1),
    "MatMulInteger": (_matmul, 1),
    "QLinearMatMul": (_matmul, 3),
    "Gemm": (_gemm, 1),
}
# Standard operators that multiply in a way that is not counted here.
UNCOUNTED = {"Attention", "DeformConv", "Einsum", "GRU", "LSTM", "RNN"}
