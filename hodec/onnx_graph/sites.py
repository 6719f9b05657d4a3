"""Which nodes of a graph can be decomposed, and why others cannot."""

import math
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from onnx import NodeProto, helper
from torch import Tensor

from hodec.conversion.eligibility import LayerSite
from hodec.formats.base import Format
from hodec.formats.calls import CallSites
from hodec.formats.layer_types import LAYER_TYPES
from hodec.linalg.svd import largest_magnitude
from hodec.methods import Method
from hodec.onnx_graph.constants import FLOATS, Constants
from hodec.onnx_graph.model_file import DEFAULT_DOMAINS, Array
from hodec.onnx_graph.recipes import movers, no_recipe
from hodec.onnx_graph.sizes import Size

QUANTIZED = {
    "QLinearConv", "ConvInteger", "QLinearMatMul", "MatMulInteger", "QGemm", "DynamicQuantizeMatMul",
    "MatMulIntegerToFloat", "MatMulNBits",
}  # fmt: skip


# Settings of convolutions and how many numbers they have for an axis.
COUNTS = {"strides": 1, "dilations": 1, "pads": 2, "output_padding": 1, "output_shape": 1, "kernel_shape": 1}
# Bytes of a float32 number.
SINGLE = 4


@dataclass(frozen=True)
class Use:
    """A node that multiplies by a constant weight.

    Attributes:
        name: of the node, made unique.
        weight: name of the constant.
        kind: name in KINDS, or the empty string where its weight has a shape that no kind has.
        place: which of the node's inputs the weight is.
        turned: whether the stored weight of a linear map is (I, O).
    """

    node: NodeProto
    name: str
    weight: str
    layer_type: str
    place: int = 1
    turned: bool = False

    @property
    def data(self) -> str:
        """Name of the tensor it is applied to."""
        return self.node.input[1 - self.place]

    @property
    def bias(self) -> str:
        """Name of the bias, or an empty string."""
        return self.node.input[2] if len(self.node.input) > 2 else ""

    def to_oihw(self, stored: Tensor) -> Tensor:
        """The constant as (O, I, ..)."""
        return stored.T if self.turned else LAYER_TYPES[self.layer_type].to_oihw(stored)

    def from_oihw(self, weight: Tensor) -> Tensor:
        """(O, I, ..) as the node takes it."""
        return weight.T.contiguous() if self.turned else LAYER_TYPES[self.layer_type].from_oihw(weight)


@dataclass(frozen=True)
class GraphSite:
    """A weight that can be decomposed and every node that multiplies by it."""

    uses: tuple[Use, ...]
    layer: LayerSite


def attributes(node: NodeProto) -> dict[str, Any]:
    """Attributes of a node by name, texts as str."""
    values = {one.name: helper.get_attribute_value(one) for one in node.attribute}
    return {name: value.decode() if isinstance(value, bytes) else value for name, value in values.items()}


def weight_uses(constants: Constants, sizes: Mapping[str, Size]) -> tuple[list[Use], dict[str, str]]:
    """The nodes that multiply by a constant, and others that look like them, with the reason why they are not."""
    uses, refused = [], {}
    for node, name in NodeNames(constants).items():
        if node.op_type in QUANTIZED:
            refused[name] = f"it is quantized ({node.op_type}): decompose the float model, then quantize the result"
        elif node.op_type in READERS and node.domain in DEFAULT_DOMAINS:
            found = READERS[node.op_type](node, name, constants, sizes)
            if isinstance(found, Use):
                uses.append(found)
            elif found:
                refused[name] = found
    return uses, refused


class NodeNames:
    """Nodes of a graph and their unique names, in order."""

    def __init__(self, constants: Constants) -> None:
        taken: set[str] = set()
        self.nodes = list(constants.model.graph.node)
        self.names: list[str] = []
        for node in self.nodes:
            base = node.name or next((output for output in node.output if output), node.op_type)
            name, k = base, 1
            while name in taken:
                k += 1
                name = f"{base}#{k}"
            taken.add(name)
            self.names.append(name)

    def items(self) -> list[tuple[NodeProto, str]]:
        return list(zip(self.nodes, self.names, strict=True))


def _conv(node: NodeProto, name: str, constants: Constants, sizes: Mapping[str, Size]) -> "Use | str":
    weight = node.input[1]
    if not constants.is_constant(weight):
        return constants.why_not(weight)
    prefix = "conv_transpose" if node.op_type == "ConvTranspose" else "conv"
    layer_type = f"{prefix}{len(sizes.get(weight, ())) - 2}d"
    return Use(node, name, weight, layer_type if layer_type in LAYER_TYPES else "")


def _gemm(node: NodeProto, name: str, constants: Constants, sizes: Mapping[str, Size]) -> "Use | str":
    turned = not attributes(node).get("transB", 0)
    return _product(node, name, constants, place=1, turned=turned, sizes=sizes)


def _matmul(node: NodeProto, name: str, constants: Constants, sizes: Mapping[str, Size]) -> "Use | str":
    place = 0 if constants.is_constant(node.input[0]) and not constants.is_constant(node.input[1]) else 1
    return _product(node, name, constants, place=place, turned=place == 1, sizes=sizes)


def _product(
    node: NodeProto, name: str, constants: Constants, *, place: int, turned: bool, sizes: Mapping[str, Size]
) -> "Use | str":
    weight = node.input[place]
    if not constants.is_constant(weight):
        quantized = any(
            one in constants.producers and constants.producers[one].op_type == "DequantizeLinear" for one in node.input
        )
        weights = [one for one in node.input if one in constants.initializers]
        # a product of two activations, as in attention, is no layer
        named = weight if quantized else next(iter(weights), "")
        return constants.why_not(named) if named else ""
    layer_type = "linear" if len(sizes.get(weight, ())) == 2 else ""
    return Use(node, name, weight, layer_type, place, turned)


READERS: dict[str, Callable[[NodeProto, str, Constants, Mapping[str, Size]], "Use | str"]] = {
    "Conv": _conv,
    "ConvTranspose": _conv,
    "Gemm": _gemm,
    "MatMul": _matmul,
}


def eligible_sites(
    constants: Constants, sizes: Mapping[str, Size], method: Method, *, batch: int
) -> tuple[dict[str, GraphSite], dict[str, str]]:
    """The weights that ``method`` can decompose in this graph, and each other layer with the reason why not.

    Args:
        sizes: of the tensors, for one example input.
        batch: images in that example.

    Returns:
        Sites by the name of their first node, and refused nodes with reasons.
    """
    uses, refused = weight_uses(constants, sizes)
    groups: dict[str, list[Use]] = {}
    for use in uses:
        groups.setdefault(use.weight, []).append(use)
    found = {}
    for weight, together in groups.items():
        reason = _refusal(weight, together, constants, method, sizes=sizes)
        site = None if reason else _site(together, constants.array(weight), sizes, batch)
        if site is None or not math.isfinite(largest_magnitude(site.weight)):
            refused |= {use.name: reason or "its weight holds NaN or Inf" for use in together}
        else:
            found[together[0].name] = GraphSite(tuple(together), site)
    return found, refused


def _refusal(weight: str, uses: list[Use], constants: Constants, method: Method, *, sizes: Mapping[str, Size]) -> str:
    """Why the nodes that share a weight cannot be decomposed, or an empty string."""
    readers = constants.readers[weight]
    if len(readers) != len(uses) or len({(use.layer_type, use.turned) for use in uses}) > 1:
        others = sorted({node.op_type if node else "the graph's output or a subgraph" for node in readers})
        return f"its weight {weight!r} is used in different ways ({', '.join(others)})"
    for use in uses:
        reason = _own_refusal(use, constants, method, sizes)
        if reason:
            return reason if use is uses[0] or len(uses) == 1 else f"its weight is shared with {use.name}: {reason}"
    return ""


def _own_refusal(use: Use, constants: Constants, method: Method, sizes: Mapping[str, Size]) -> str:
    node, shape = use.node, sizes.get(use.weight, ())
    if not use.layer_type:
        return f"{node.op_type} with a weight of shape {list(shape)}: no kind of layer has such"
    if use.layer_type not in method.layers:
        return f"method {method.name} has no layer for {use.layer_type}"
    fmt = method.format(use.layer_type)
    if reason := no_recipe(fmt):
        return f"method {method.name}: {reason}"
    if not all(shape):
        return f"its weight is empty, of shape {list(shape)}"
    if reason := _settings_refusal(use, fmt, method.name, shape):
        return reason
    if use.data not in sizes or node.output[0] not in sizes:
        return _unsized(constants)
    dtype = constants.type_of(use.weight)
    return "" if dtype in FLOATS else f"its weight is {dtype}; only {', '.join(FLOATS)} are decomposed"


def _settings_refusal(use: Use, fmt: Format, method: str, shape: Size) -> str:
    given, dims = attributes(use.node), LAYER_TYPES[use.layer_type].dims
    if not dims:
        plain = (given.get("alpha", 1.0), given.get("beta", 1.0)) == (1.0, 1.0)
        return "" if plain or not fmt.uses_modes else f"method {method} has no place for a Gemm's alpha and beta"
    if given.get("group", 1) != 1:
        return f"grouped convolution (group={given['group']})"
    for key, count in COUNTS.items():
        if len(given.get(key) or [0] * count * dims) != count * dims:
            return f"its {key} are not {count * dims} numbers: the node is broken"
    if given.get("output_shape") and movers(fmt, shape, use.layer_type) > 1:
        return "its output_shape cannot be shared out among several convolutions; give pads instead"
    return ""


def _unsized(constants: Constants) -> str:
    names = [value.name for value in constants.model.graph.input if value.name not in constants.initializers]
    return (
        "the sizes of its input and output are not known: neither shape inference nor a run of the model tells them; "
        f"give sizes that the model runs on with {' '.join(f'--shape {name}:1,3,224,224' for name in names)}"
    )


def _site(uses: list[Use], stored: Array, sizes: Mapping[str, Size], batch: int) -> LayerSite:
    call_sites = _call(uses[0], sizes, batch)
    for use in uses[1:]:
        call_sites = call_sites.also(_call(use, sizes, batch))
    weight = uses[0].to_oihw(as_tensor(stored))
    return LayerSite(uses[0].layer_type, weight, call_sites, tuple(use.name for use in uses[1:]))


def _call(use: Use, sizes: Mapping[str, Size], batch: int) -> CallSites:
    """One node: its convolution's sizes, or the positions that a linear map visits, for one image."""
    before, after = sizes[use.data], sizes[use.node.output[0]]
    dims = LAYER_TYPES[use.layer_type].dims
    if dims:
        return CallSites(((max(1, before[0] // batch), before[2:], after[2:]),))
    width = sizes[use.weight][1 if use.turned else 0]
    numbers = 1
    for n in after:
        numbers *= n
    positions = max(1, numbers // width // batch)
    return CallSites.once((positions,), (positions,))


def as_tensor(array: Array) -> Tensor:
    """Numbers in the type to decompose them in: float32, which holds all of the shorter types, or float64.

    Not a copy where the type is that already: it is only to be read.
    """
    if array.dtype.itemsize < SINGLE:
        return torch.from_numpy(array.astype("float32"))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given NumPy array is not writable")
        return torch.from_numpy(array)
