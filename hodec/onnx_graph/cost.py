"""Parameters and multiply-adds of a graph for one image, and which nodes cannot be counted."""

import math
from collections.abc import Callable, Container, Iterable, Mapping

import onnx_ir as ir

from hodec.onnx_graph.graph import FOLDABLE, OnnxGraph, constants_of, name_of, subgraphs_of
from hodec.onnx_graph.sizes import Size

FLOATS = ("float32", "float64", "float16", "bfloat16")


def parameters(graph: OnnxGraph) -> int:
    """Elements of the floating constants that a graph stores and its nodes read, in its present state."""
    return sum(held(graph).values())


def held(graph: OnnxGraph) -> dict[ir.Node | None, int]:
    """Node -> elements of the stored floating constants that it is the first to read; None: they are outputs only.

    One that other constants are made of counts once, for what reads these.
    """
    constants, found = constants_of(graph), dict[ir.Node | None, int]()
    floats = {value for value in constants if is_stored(value) and _is_float(graph, value)}
    floats |= {value for value in constants if not is_stored(value) and _is_made_float(graph, value)}
    order: dict[ir.Node | None, int] = {node: k for k, node in enumerate(graph.node_names)}
    for value in floats:
        readers, read = readers_of(value, constants), graph.is_given_out(value)
        if readers or read:
            reader = min(readers, key=lambda node: order.get(node, 0)) if readers else None
            found[reader] = found.get(reader, 0) + graph.array(value).size
    return dict(sorted(found.items(), key=lambda one: order.get(one[0], -1)))


def is_stored(value: ir.Value) -> bool:
    node = value.producer()
    return node is None or node.op_type == "Constant"


def _is_float(graph: OnnxGraph, value: ir.Value) -> bool:
    return str(graph.array(value).dtype) in FLOATS


def _is_made_float(graph: OnnxGraph, value: ir.Value) -> bool:
    """Whether a constant is made from others, none of which is floating, and is so itself: by Cast, or by its shape."""
    node = value.producer()
    made = node is not None and node.op_type in ("Cast", "ConstantOfShape")
    inputs = node.inputs if node else ()
    return made and _is_float(graph, value) and not any(_is_float(graph, one) for one in inputs if one)


def readers_of(value: ir.Value, constants: Container[ir.Value]) -> list[ir.Node]:
    """The nodes that read a constant, or one that is made of it, and make no constant of it."""
    found, rest = list[ir.Node](), [value]
    while rest:
        for use in rest.pop().uses():
            if use.node.outputs[0] in constants:
                rest.append(use.node.outputs[0])
            else:
                found.append(use.node)
    return found


def multiply_adds(nodes: Iterable[ir.Node], sizes: Mapping[str, Size]) -> tuple[int, list[ir.Node]]:
    """Multiply-adds of convolutions and matrix products, and the nodes that are left out.

    A product of constants, or of what is made of them alone, is none of them: runtimes multiply it out when they load
    the model.

    Left out are those whose sizes are not known, those with products in subgraphs, which may run any number of
    times, and operators that may hide products: attention, other sums of products, and all of other domains.

    Args:
        nodes: in the order that they run in.
        sizes: of the values, for one example input; the count is for that whole input.
    """
    total, uncounted, fixed = 0, [], set[ir.Value | None]({None})
    for node in nodes:
        inner = [one for graph in subgraphs_of(node) for one in graph.all_nodes()]
        if node.domain or node.op_type in UNCOUNTED or any(map(multiplies, inner)):
            uncounted.append(node)
        elif node.op_type in FOLDED and all(one in fixed or (one and one.is_initializer()) for one in node.inputs):
            fixed |= {*node.outputs}
        elif node.op_type in COUNTS:
            names = [name_of(value) for value in counted_values(node)]
            known = [sizes[name] for name in names if name in sizes]
            if len(known) == len(names):
                total += COUNTS[node.op_type][0](node, *known)
            else:
                uncounted.append(node)
    return total, uncounted


def counted_values(node: ir.Node) -> tuple[ir.Value | None, ...]:
    """Input, weight and output (of recurrent nodes: both weights) of a node that multiplies or looks up; or none."""
    if node.domain:
        return ()
    if node.op_type == "Gather" and node.inputs[0] and node.inputs[0].is_initializer():
        return node.inputs[1], node.inputs[0], node.outputs[0]
    if node.op_type == "Einsum" and len(node.inputs) == 2:
        return *node.inputs, node.outputs[0]
    if node.op_type not in COUNTS:
        return ()
    if node.op_type in GATES:  # any of its outputs may be left out
        return node.inputs[0], node.inputs[1], node.inputs[2]
    return node.inputs[0], node.inputs[COUNTS[node.op_type][1]], node.outputs[0]


def multiplies(node: ir.Node) -> bool:
    """Whether a node is known to multiply, or may do so unseen."""
    return bool(node.domain) or node.op_type in COUNTS or node.op_type in UNCOUNTED


def _conv(node: ir.Node, data: Size, weight: Size, output: Size) -> int:
    return math.prod(output) * math.prod(weight[1:])


def _matmul(node: ir.Node, data: Size, weight: Size, output: Size) -> int:
    return math.prod(output) * (data[-1] if data else 0)


def _gemm(node: ir.Node, data: Size, weight: Size, output: Size) -> int:
    return math.prod(output) * data[0 if node.attributes.get_int("transA", 0) else 1]


def _recurrent(node: ir.Node, data: Size, weight: Size, recurrence: Size) -> int:
    """Each step of each sequence multiplies by both weights."""
    return math.prod(data[:2]) * (math.prod(weight) + math.prod(recurrence))


# Operator -> its multiply-adds, and which of its inputs is the weight.
COUNTS: dict[str, tuple[Callable[[ir.Node, Size, Size, Size], int], int]] = {
    "Conv": (_conv, 1),
    "ConvInteger": (_conv, 1),
    "QLinearConv": (_conv, 3),
    "ConvTranspose": (lambda node, data, weight, output: math.prod(data) * math.prod(weight[1:]), 1),
    "MatMul": (_matmul, 1),
    "MatMulInteger": (_matmul, 1),
    "QLinearMatMul": (_matmul, 3),
    "Gemm": (_gemm, 1),
    "LSTM": (_recurrent, 1),
    "GRU": (_recurrent, 1),
    "RNN": (_recurrent, 1),
}
# Recurrent operators -> gates of each unit.
GATES = {"LSTM": 4, "GRU": 3, "RNN": 1}
# Operators whose outputs are as fixed as their inputs: those that weights are made by from what is stored.
FOLDED = {*COUNTS, *FOLDABLE, "Mul"}
# Standard operators that multiply in a way that is not counted here.
UNCOUNTED = {"Attention", "DeformConv", "Einsum"}
