"""Which weights of a graph can be decomposed, and why others cannot."""

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import onnx_ir as ir
import torch
from torch import Tensor

from hodec.conversion.eligibility import LayerSite
from hodec.export.runtime import Array
from hodec.formats.base import Format
from hodec.formats.calls import CallSites
from hodec.formats.roles import Role
from hodec.linalg.svd import largest_magnitude
from hodec.methods import Method
from hodec.onnx_graph.consumers import WeightConsumer
from hodec.onnx_graph.cost import FLOATS
from hodec.onnx_graph.graph import OnnxGraph, name_of
from hodec.onnx_graph.recipes import movers, no_recipe
from hodec.onnx_graph.sizes import Size

# Lists of a convolution's settings, and how many numbers each has for an axis.
PER_AXIS = {"strides": 1, "dilations": 1, "pads": 2, "output_padding": 1, "output_shape": 1, "kernel_shape": 1}
UNSIZED = "the sizes of its input and output are not known: neither shape inference nor a run of the model tells them"


@dataclass(frozen=True)
class GraphSite:
    """A weight that can be decomposed and every node that multiplies by it."""

    consumers: tuple[WeightConsumer, ...]
    layer: LayerSite


def refusal(group: Sequence[WeightConsumer], graph: OnnxGraph, method: Method, sizes: Mapping[str, Size]) -> str:
    """Why ``method`` cannot decompose the nodes that share a weight, or an empty string."""
    weight = group[0].weight
    outside = graph.is_given_out(weight)
    kinds = {(one.layer_type, one.transposed, one.groups) for one in group}
    if outside or len(weight.uses()) != len(group) or len(kinds) > 1:
        others = sorted(
            {use.node.op_type for use in weight.uses()} | ({"an output of the graph"} if outside else set())
        )
        return f"its weight {weight.name!r} is used in different ways ({', '.join(others)})"
    if group[0].directions and not _is_alone(weight):
        return "its weight is made from constants that other nodes read too: the file would hold both"
    for one in group:
        reason = _own_refusal(one, graph, method, sizes)
        if reason:
            return reason if one is group[0] else f"its weight is shared with {one.name}: {reason}"
    return ""


def _is_alone(weight: ir.Value) -> bool:
    """Whether nothing else reads the constants that a weight is made from."""
    node = weight.producer()
    inputs = [one for one in node.inputs if one] if node else []
    large = [one for one in inputs if one.const_value is None or one.const_value.size > 64]  # no shape, no list of axes
    return all(len(one.uses()) == 1 and _is_alone(one) for one in large)


def _own_refusal(one: WeightConsumer, graph: OnnxGraph, method: Method, sizes: Mapping[str, Size]) -> str:
    shape = graph.array(one.weight).shape if one.directions else sizes.get(name_of(one.weight), ())
    if one.place is not graph.graph and (one.data if one.directions else one.output).name not in sizes:
        return _not_run(one, graph)
    if not one.layer_type:
        return f"{one.node.op_type} with a weight of shape {list(shape)}: no layer type has such"
    if not all(shape):
        return f"its weight is empty, of shape {list(shape)}"
    if reason := _method_refusal(one, method, shape):
        return reason
    fmt = method.format(one.layer_type, one.groups)
    if reason := _settings_refusal(one, fmt, method.name, shape):
        return reason
    if one.data.name not in sizes or (one.output.name not in sizes and not one.directions):
        return UNSIZED
    if fmt.uses_modes and len(sizes[name_of(one.data)]) < len(shape) and one.lead:
        return f"method {method.name} would drop the axes that a weight of shape {list(shape)} adds"
    dtype = str(graph.array(one.weight).dtype)
    return "" if dtype in FLOATS else f"its weight is {dtype}; only {', '.join(FLOATS)} are decomposed"


def _method_refusal(one: WeightConsumer, method: Method, shape: Size) -> str:
    if one.layer_type not in method.layers:
        return f"method {method.name} has no layer for {one.layer_type}"
    if one.groups > 1 and shape[1] == 1:
        return f"depthwise convolution (group={one.groups}): no two channels share a kernel, so it has nothing to save"
    if not method.serves(one.layer_type, one.groups):
        return f"method {method.name} has no layer for a grouped {one.node.op_type} (group={one.groups})"
    if one.directions and method.format(one.layer_type).uses_modes:
        return f"method {method.name}: a recurrent node needs its weight whole, which one product of two factors gives"
    reason = no_recipe(method.format(one.layer_type, one.groups), one.layer_type)
    return f"method {method.name}: {reason}" if reason else ""


def _not_run(one: WeightConsumer, graph: OnnxGraph) -> str:
    """Why a node in a subgraph has not run on the example inputs."""
    around, place = list[ir.Node](), one.place
    while place in graph.owners:
        around.append(graph.owners[place])
        place = cast(ir.Graph, around[-1].graph)
    owner = next((node for node in around if node.op_type != "If"), around[0])
    name = f"{owner.op_type} {graph.node_names[owner]}"
    if owner.op_type not in ("If", "Loop"):
        return f"it stands in the body of {name}: those stay as they are"
    if owner.op_type == "Loop":
        return f"it stands in the body of {name}, which does not run on the example inputs: give others"
    return f"it stands in a branch of {name}, which the example inputs do not take: give others"


def _settings_refusal(one: WeightConsumer, fmt: Format, method: str, shape: Size) -> str:
    attributes = one.node.attributes
    if not one.dims:
        plain = (attributes.get_float("alpha", 1.0), attributes.get_float("beta", 1.0)) == (1.0, 1.0)
        return "" if plain or not fmt.uses_modes else f"method {method} has no place for a Gemm's alpha and beta"
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
    aliases = tuple(one.name for one in more)
    role = Role.PARAMETER if first.directions else Role.LAYER
    layer = LayerSite(first.layer_type, weight, call_sites, aliases, role, first.groups)
    return GraphSite(tuple(group), layer)


def _call(one: WeightConsumer, sizes: Mapping[str, Size], batch: int) -> CallSites:
    """One node: its convolution's sizes, or the positions that a linear map visits, for one image."""
    before, after = sizes[name_of(one.data)], sizes.get(name_of(one.output), ())
    if one.directions:
        steps = max(1, math.prod(before[:2]) * one.times // batch)
        return CallSites.once((steps,), (steps,))
    if one.dims:
        return CallSites(((max(1, before[0] * one.times // batch), before[2:], after[2:]),))
    width = sizes[name_of(one.weight)][-1 if one.transposed or one.whole_inputs else -2]
    positions = max(1, math.prod(after) * one.times // width // batch)
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
