"""The nodes of a graph that multiply by a constant weight or look it up, and how each takes it."""

import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import onnx_ir as ir
from torch import Tensor

from hodec.errors import Use
from hodec.formats.layer_types import LAYER_TYPES
from hodec.onnx_graph.cost import FLOATS, GATES
from hodec.onnx_graph.graph import OnnxGraph, name_of
from hodec.onnx_graph.sizes import Size

QUANTIZED = {
    "QLinearConv", "ConvInteger", "QLinearMatMul", "MatMulInteger", "QGemm", "DynamicQuantizeMatMul",
    "MatMulIntegerToFloat", "MatMulNBits",
}  # fmt: skip
# Operators with a weight -> what the names of their layer types begin with.
LAYERS = {
    "Conv": "conv", "ConvTranspose": "conv_transpose", "Gemm": "linear", "MatMul": "linear", "Einsum": "linear",
    "Gather": "embedding",
}  # fmt: skip
# An Einsum that is a product of its last axis with a matrix: the letters in front, of the axis, of the output.
PLAIN_EINSUM = re.compile(r"(?P<lead>\w*)(?P<i>\w),(?P<one>\w)(?P<two>\w)->(?P=lead)(?P<o>\w)")
# Standard operators that hold weights and stay as they are.
OTHERS = ("Attention", "DeformConv")
OTHER_EINSUM = "an Einsum that is no plain product of the last axis with a matrix stays as it is"


@dataclass(frozen=True)
class WeightConsumer:
    """A node that multiplies by a constant weight.

    Attributes:
        name: of the node, made unique.
        weight: the constant.
        layer_type: name in LAYER_TYPES, or the empty string where its weight has a shape that no layer type has.
        input_index: which of the node's inputs the weight is.
        transposed: whether the stored weight of a linear map is (I, O).
        lead: axes of size 1 in front of a linear map's two.
        directions: of a recurrent node, which needs its weight (directions, O, I) whole; 0 for all others.
        times: how often it runs, in a loop.
    """

    node: ir.Node
    name: str
    weight: ir.Value
    layer_type: str
    input_index: int = 1
    transposed: bool = False
    lead: int = 0
    directions: int = 0
    times: int = 1

    @property
    def data(self) -> ir.Value:
        """What the node is applied to."""
        value = self.node.inputs[0 if self.directions else 1 - self.input_index]
        if value is None:
            raise ValueError(f"{self.name} has no input")  # onnx.checker refuses such nodes
        return value

    @property
    def bias(self) -> ir.Value | None:
        """The bias, if there is one."""
        return self.node.inputs[2] if len(self.node.inputs) > 2 else None

    @property
    def output(self) -> ir.Value:
        """What the node makes."""
        return self.node.outputs[0]

    @property
    def groups(self) -> int:
        """Groups of a convolution."""
        return self.node.attributes.get_int("group", 1)

    @property
    def is_left(self) -> bool:
        """Whether it is a product with the weight in front."""
        return self.input_index == 0 and self.node.op_type == "MatMul"

    @property
    def stores_turned(self) -> bool:
        """Whether the new nodes take the matrices of linear maps as (I, O)."""
        return self.transposed or self.node.op_type in ("Gather", "Einsum")

    @property
    def whole_inputs(self) -> tuple[str, ...]:
        """The names of inputs that are whole numbers."""
        return (name_of(self.data),) if self.node.op_type == "Gather" else ()

    @property
    def data_lead(self) -> int:
        """Axes of the data in front of the last two, where the node takes no other number of axes."""
        if self.node.op_type != "Einsum":
            return 0
        return max(0, len(self.node.attributes.get_string("equation", "").split(",")[0].strip()) - 2)

    @property
    def place(self) -> ir.Graph:
        """The graph or subgraph in which it stands."""
        return cast(ir.Graph, self.node.graph)

    @property
    def exclusion(self) -> Use:
        """The setting that leaves it dense."""
        return Use("exclude", [self.name], f"--exclude {shlex.quote(self.name)}")

    @property
    def dims(self) -> int:
        """Spatial axes of the kernel, 0 for a linear map."""
        return LAYER_TYPES[self.layer_type].dims

    def ints(self, key: str) -> list[int]:
        """An attribute that lists whole numbers; empty where it is not given."""
        return list(self.node.attributes.get_ints(key, ()))

    def flag(self, key: str) -> bool:
        """An attribute that is 0 where it is not given."""
        return bool(self.node.attributes.get_int(key, 0))

    def to_oihw(self, stored: Tensor) -> Tensor:
        """The constant as (O, I, ..); the outputs of all directions one after another."""
        if self.directions:
            return stored.flatten(0, 1)
        stored = stored.reshape(stored.shape[self.lead :])
        return stored.T if self.transposed else LAYER_TYPES[self.layer_type].to_oihw(stored)

    def from_oihw(self, weight: Tensor) -> Tensor:
        """(O, I, ..) as the node takes it."""
        if self.directions:
            return cast(Tensor, weight.unflatten(0, (self.directions, -1)))
        turned = weight.T.contiguous() if self.transposed else LAYER_TYPES[self.layer_type].from_oihw(weight)
        return turned[(None,) * self.lead]


def weight_consumers(
    graph: OnnxGraph, sizes: Mapping[str, Size], params: Mapping[ir.Node | None, int]
) -> tuple[list[WeightConsumer], dict[str, str]]:
    """The nodes that multiply by a constant, and others that hold weights, with the reason why they stay dense.

    Args:
        params: node -> its parameters.
    """
    consumers, refused = [], {}
    for node, name in graph.node_names.items():
        if node.op_type in QUANTIZED:
            refused[name] = f"it is quantized ({node.op_type}): decompose the float model, then quantize the result"
        elif node.op_type in LAYERS and not node.domain:
            found = _consumer(node, name, graph, sizes)
            if isinstance(found, WeightConsumer):
                consumers.append(found)
            elif found:
                refused[name] = found
        elif node.op_type in GATES and not node.domain:
            found_here = _recurrent_weights(node, name, graph, sizes)
            consumers += found_here
            if not found_here:
                refused[name] = "its weights are no constants of the types that are decomposed"
        elif params.get(node) and (node.domain or node.op_type in OTHERS):
            refused[name] = f"{node.op_type} nodes stay as they are"
    return consumers, refused


def _consumer(node: ir.Node, name: str, graph: OnnxGraph, sizes: Mapping[str, Size]) -> WeightConsumer | str:
    """The node as a weight consumer; or why it is none, empty for a product of two activations as in attention."""
    first, second = (*node.inputs, None)[:2]
    if first is None or second is None:
        return ""
    if node.op_type == "Gather":
        return _table(node, name, graph, sizes)
    if node.op_type == "Einsum":
        return _plain_einsum(node, name, graph, sizes)
    index = 0 if node.op_type == "MatMul" and first in graph.constants and second not in graph.constants else 1
    weight = first if index == 0 else second
    if weight not in graph.constants:
        if LAYERS[node.op_type] != "linear" or any(_dequantized(one) for one in node.inputs):
            return graph.why_not_constant(weight)
        initializers = [one for one in node.inputs if one and one.is_initializer()]
        return graph.why_not_constant(initializers[0]) if initializers else ""
    shape, prefix = sizes.get(name_of(weight), ()), LAYERS[node.op_type]
    rank = len(shape)
    if prefix != "linear":
        layer_type = f"{prefix}{rank - 2}d"
        return WeightConsumer(node, name, weight, layer_type if layer_type in LAYER_TYPES else "")
    transposed = index == 1 if node.op_type == "MatMul" else not node.attributes.get_int("transB", 0)
    plain = rank >= 2 and set(shape[:-2]) <= {1}
    return WeightConsumer(node, name, weight, "linear" if plain else "", index, transposed, max(0, rank - 2))


def _recurrent_weights(node: ir.Node, name: str, graph: OnnxGraph, sizes: Mapping[str, Size]) -> list[WeightConsumer]:
    """The weights of the inputs and of the state, as far as they are constants."""
    found = []
    for index, leaf in ((1, "W"), (2, "R")):
        weight = node.inputs[index]
        if weight in graph.constants and weight is not None and len(shape := graph.array(weight).shape) == 3:
            found.append(WeightConsumer(node, f"{name}.{leaf}", weight, "linear", index, directions=shape[0]))
    return found


def _table(node: ir.Node, name: str, graph: OnnxGraph, sizes: Mapping[str, Size]) -> WeightConsumer | str:
    """A table whose rows are looked up; empty for other uses of Gather."""
    table = node.inputs[0]
    if table is None or not table.is_initializer() or table not in graph.constants or not table.const_value:
        return ""
    if len(sizes.get(name_of(table), ())) != 2 or str(table.const_value.dtype.numpy()) not in FLOATS:
        return ""
    if node.attributes.get_int("axis", 0):
        return "it picks columns of its table"
    return WeightConsumer(node, name, table, "embedding", 0)


def _plain_einsum(node: ir.Node, name: str, graph: OnnxGraph, sizes: Mapping[str, Size]) -> WeightConsumer | str:
    """An Einsum that multiplies its data's last axis by a constant matrix; or why it is none."""
    weight = node.inputs[1]
    if len(node.inputs) != 2 or weight not in graph.constants or weight is None:
        return "" if not any(one in graph.constants for one in node.inputs) else OTHER_EINSUM
    found = PLAIN_EINSUM.fullmatch(node.attributes.get_string("equation", "").replace(" ", ""))
    if not found or found["i"] == found["o"] or {found["one"], found["two"]} != {found["i"], found["o"]}:
        return OTHER_EINSUM
    if found["o"] in found["lead"] or found["i"] in found["lead"] or len(sizes.get(name_of(weight), ())) != 2:
        return OTHER_EINSUM
    return WeightConsumer(node, name, weight, "linear", 1, transposed=found["one"] == found["i"])


def _dequantized(value: ir.Value | None) -> bool:
    producer = value.producer() if value else None
    return producer is not None and producer.op_type == "DequantizeLinear"


def groups_by_weight(consumers: Sequence[WeightConsumer]) -> list[tuple[WeightConsumer, ...]]:
    """The consumers of each weight together, in the order of the first ones."""
    groups: dict[ir.Value, tuple[WeightConsumer, ...]] = {}
    for one in consumers:
        groups[one.weight] = (*groups.get(one.weight, ()), one)
    return list(groups.values())
