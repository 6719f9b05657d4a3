"""Parameters and multiply-adds of a graph for one image."""

import math
from collections.abc import Callable, Mapping

from onnx import NodeProto

from hodec.cost.count import Cost
from hodec.onnx_graph.constants import FLOATS, Constants
from hodec.onnx_graph.sites import attributes
from hodec.onnx_graph.sizes import Size


def graph_cost(constants: Constants, sizes: Mapping[str, Size], *, batch: int) -> Cost:
    """Numbers in the floating constants that nodes read, and MACs of convolutions and matrix products.

    Nodes whose sizes are not known, nodes in subgraphs and fused operators of other domains count nothing.

    Args:
        sizes: of the tensors, for one example input of ``batch`` images.
    """
    params = sum(math.prod(sizes.get(name, (0,))) for name in constants.readers if _is_parameter(name, constants))
    macs = sum(_macs(node, sizes) for node in constants.model.graph.node)
    return Cost(params, macs // batch)


def _is_parameter(name: str, constants: Constants) -> bool:
    if not name or not constants.is_constant(name):
        return False
    readers = constants.readers[name]
    if all(node is not None and constants.is_constant(node.output[0]) for node in readers):
        return False  # only another constant is made of it
    return constants.type_of(name) in FLOATS


def _macs(node: NodeProto, sizes: Mapping[str, Size]) -> int:
    count = COUNTS.get(node.op_type)
    if count is None or any(name not in sizes for name in (*node.input[:2], node.output[0])):
        return 0
    return count(node, sizes)


def _conv(node: NodeProto, sizes: Mapping[str, Size]) -> int:
    return math.prod(sizes[node.output[0]]) * math.prod(sizes[node.input[1]][1:])


def _conv_transpose(node: NodeProto, sizes: Mapping[str, Size]) -> int:
    return math.prod(sizes[node.input[0]]) * math.prod(sizes[node.input[1]][1:])


def _matmul(node: NodeProto, sizes: Mapping[str, Size]) -> int:
    given = sizes[node.input[0]]
    return math.prod(sizes[node.output[0]]) * (given[-1] if given else 0)


def _gemm(node: NodeProto, sizes: Mapping[str, Size]) -> int:
    inner = sizes[node.input[0]][0 if attributes(node).get("transA", 0) else 1]
    return math.prod(sizes[node.output[0]]) * inner


COUNTS: dict[str, Callable[[NodeProto, Mapping[str, Size]], int]] = {
    "Conv": _conv,
    "ConvInteger": _conv,
    "ConvTranspose": _conv_transpose,
    "MatMul": _matmul,
    "MatMulInteger": _matmul,
    "Gemm": _gemm,
}
