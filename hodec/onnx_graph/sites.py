"""Which nodes of a graph can be decomposed, and why others cannot."""

import math
import shlex
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import onnx_ir as ir
import torch
from torch import Tensor

from hodec.conversion.eligibility import LayerSite
from hodec.errors import Use
from hodec.export.runtime import Array
from hodec.formats.base import Format
from hodec.formats.calls import CallSites
from hodec.formats.layer_types import LAYER_TYPES
from hodec.linalg.svd import largest_magnitude
from hodec.methods import Method
from hodec.onnx_graph.cost import FLOATS
from hodec.onnx_graph.graph import OnnxGraph, name_of
from hodec.onnx_graph.recipes import movers, no_recipe
from hodec.onnx_graph.sizes import Size

QUANTIZED = {
    "QLinearConv", "ConvInteger", "QLinearMatMul", "MatMulInteger", "QGemm", "DynamicQuantizeMatMul",
    "MatMulIntegerToFloat", "MatMulNBits",
}  # fmt: skip
# Operators with a weight -> what the names of their layer types begin with.
LAYERS = {"Conv": "conv", "ConvTranspose": "conv_transpose", "Gemm": "linear", "MatMul": "linear"}
# Operators that hold weights and stay as they are -> why, where there is more to say.
OTHERS = {
    "LSTM": "recurrent layers stay dense",
    "GRU": "recurrent layers stay dense",
    "RNN": "recurrent layers stay dense",
    "Gather": "a table that is looked up stays dense",
    "Einsum": "products by Einsum stay dense",
    "Attention": "",
    "DeformConv": "",
}
# Lists of a convolution's settings, and how many numbers each has for an axis.
UNSIZED = "the sizes of its input and output are not known: neither shape inference nor a run of the model tells them"
PER_AXIS = {"strides": 1, "dilations": 1, "pads": 2, "output_padding": 1, "output_shape": 1, "kernel_shape": 1}


@dataclass(frozen=True)
class WeightConsumer:
    """A node that multiplies by a constant weight.

    Attributes:
        name: of the node, made unique.
        weight: the constant.
        layer_type: name in LAYER_TYPES, or the empty string where its weight has a shape that no layer type has.
        input_index: which of the node's inputs the weight is.
        transposed: whether the stored weight of a linear map is (I, O).
    """

    node: ir.Node
    name: str
    weight: ir.Value
    layer_type: str
    input_index: int = 1
    transposed: bool = False

    @property
    def data(self) -> ir.Value:
        """What the node is applied to."""
        value = self.node.inputs[1 - self.input_index]
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
        """The constant as (O, I, ..)."""
        return stored.T if self.transposed else LAYER_TYPES[self.layer_type].to_oihw(stored)

    def from_oihw(self, weight: Tensor) -> Tensor:
        """(O, I, ..) as the node takes it."""
        return weight.T.contiguous() if self.transposed else LAYER_TYPES[self.layer_type].from_oihw(weight)


@dataclass(frozen=True)
class GraphSite:
    """A weight that can be decomposed and every node that multiplies by it."""

    consumers: tuple[WeightConsumer, ...]
    layer: LayerSite


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
        elif params.get(node) and (node.domain or node.op_type in OTHERS):
            refused[name] = OTHERS.get(node.op_type, "") or f"{node.op_type} nodes stay as they are"
    return consumers, refused


def _consumer(node: ir.Node, name: str, graph: OnnxGraph, sizes: Mapping[str, Size]) -> WeightConsumer | str:
    """The node as a weight consumer; or why it is none, empty for a product of two activations as in attention."""
    first, second = node.inputs[:2]
    if first is None or second is None:
        return ""
    index = 0 if node.op_type == "MatMul" and first in graph.constants and second not in graph.constants else 1
    weight = first if index == 0 else second
    if weight not in graph.constants:
        if LAYERS[node.op_type] != "linear" or any(_dequantized(one) for one in node.inputs):
            return graph.why_not_constant(weight)
        initializers = [one for one in node.inputs if one and one.is_initializer()]
        return graph.why_not_constant(initializers[0]) if initializers else ""
    rank, prefix = len(sizes.get(name_of(weight), ())), LAYERS[node.op_type]
    if prefix != "linear":
        layer_type = f"{prefix}{rank - 2}d"
        return WeightConsumer(node, name, weight, layer_type if layer_type in LAYER_TYPES else "")
    transposed = index == 1 if node.op_type == "MatMul" else not node.attributes.get_int("transB", 0)
    return WeightConsumer(node, name, weight, "linear" if rank == 2 else "", index, transposed)


def _dequantized(value: ir.Value | None) -> bool:
    producer = value.producer() if value else None
    return producer is not None and producer.op_type == "DequantizeLinear"


def groups_by_weight(consumers: Sequence[WeightConsumer]) -> list[tuple[WeightConsumer, ...]]:
    """The consumers of each weight together, in the order of the first ones."""
    groups: dict[ir.Value, tuple[WeightConsumer, ...]] = {}
    for one in consumers:
        groups[one.weight] = (*groups.get(one.weight, ()), one)
    return list(groups.values())


def refusal(group: Sequence[WeightConsumer], graph: OnnxGraph, method: Method, sizes: Mapping[str, Size]) -> str:
    """Why ``method`` cannot decompose the nodes that share a weight, or an empty string."""
    weight = group[0].weight
    outside = graph.is_given_out(weight)
    if outside or len(weight.uses()) != len(group) or len({(one.layer_type, one.transposed) for one in group}) > 1:
        others = sorted(
            {use.node.op_type for use in weight.uses()} | ({"an output of the graph"} if outside else set())
        )
        return f"its weight {weight.name!r} is used in different ways ({', '.join(others)})"
    for one in group:
        reason = _own_refusal(one, graph, method, sizes)
        if reason:
            return reason if one is group[0] else f"its weight is shared with {one.name}: {reason}"
    return ""


def _own_refusal(one: WeightConsumer, graph: OnnxGraph, method: Method, sizes: Mapping[str, Size]) -> str:
    shape = sizes.get(name_of(one.weight), ())
    if one.place is not graph.graph and one.output.name not in sizes:
        return _not_run(one, graph)
    if not one.layer_type:
        return f"{one.node.op_type} with a weight of shape {list(shape)}: no layer type has such"
    if one.layer_type not in method.layers:
        return f"method {method.name} has no layer for {one.layer_type}"
    fmt = method.format(one.layer_type)
    if reason := no_recipe(fmt):
        return f"method {method.name}: {reason}"
    if not all(shape):
        return f"its weight is empty, of shape {list(shape)}"
    if reason := _settings_refusal(one, fmt, method.name, shape):
        return reason
    if one.data.name not in sizes or one.output.name not in sizes:
        return UNSIZED
    dtype = str(graph.array(one.weight).dtype)
    return "" if dtype in FLOATS else f"its weight is {dtype}; only {', '.join(FLOATS)} are decomposed"


def _not_run(one: WeightConsumer, graph: OnnxGraph) -> str:
    """Why a node in a subgraph has not run on the example inputs."""
    owner = graph.owners[one.place]
    name = f"{owner.op_type} {graph.node_names[owner]}"
    if owner.op_type != "If":
        return f"it stands in the body of {name}: those stay as they are"
    return f"it stands in a branch of {name}, which the example inputs do not take: give others"


def _settings_refusal(one: WeightConsumer, fmt: Format, method: str, shape: Size) -> str:
    attributes = one.node.attributes
    if not one.dims:
        plain = (attributes.get_float("alpha", 1.0), attributes.get_float("beta", 1.0)) == (1.0, 1.0)
        return "" if plain or not fmt.uses_modes else f"method {method} has no place for a Gemm's alpha and beta"
    if attributes.get_int("group", 1) != 1:
        return f"grouped convolution (group={attributes.get_int('group')})"
    for key, count in PER_AXIS.items():
        if len(one.ints(key)) not in (0, count * one.dims):
            return f"its {key} are not {count * one.dims} numbers: the node is broken"
    if one.ints("output_shape") and movers(fmt, shape, one.layer_type) > 1:
        return "its output_shape cannot be shared out among several convolutions; give pads instead"
    return ""


def site_of(
    group: Sequence[WeightConsumer], graph: OnnxGraph, sizes: Mapping[str, Size], *, batch: int
) -> GraphSite | None:
    """The site of the nodes that share a weight, none of which is refused; None where the weight holds NaN or Inf.

    Args:
        batch: images in the example input that ``sizes`` are for.
    """
    first, *more = group
    call_sites = _call(first, sizes, batch)
    for one in more:
        call_sites = call_sites.also(_call(one, sizes, batch))
    weight = first.to_oihw(as_tensor(graph.array(first.weight)))
    if not math.isfinite(largest_magnitude(weight)):
        return None
    return GraphSite(tuple(group), LayerSite(first.layer_type, weight, call_sites, tuple(one.name for one in more)))


def _call(one: WeightConsumer, sizes: Mapping[str, Size], batch: int) -> CallSites:
    """One node: its convolution's sizes, or the positions that a linear map visits, for one image."""
    before, after = sizes[name_of(one.data)], sizes[name_of(one.output)]
    if one.dims:
        return CallSites(((max(1, before[0] // batch), before[2:], after[2:]),))
    width = sizes[name_of(one.weight)][1 if one.transposed else 0]
    positions = max(1, math.prod(after) // width // batch)
    return CallSites.once((positions,), (positions,))


def as_tensor(array: Array) -> Tensor:
    """The array in the type to decompose it in: float32, which holds all of the shorter types, or float64.

    Not a copy where the type is that already: it is only to be read.
    """
    if array.dtype.itemsize < torch.float32.itemsize:
        return torch.from_numpy(array.astype("float32"))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given NumPy array is not writable")
        return torch.from_numpy(array)
