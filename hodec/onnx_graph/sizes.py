"""Sizes of a graph's tensors for one example input, by shape inference; where that fails, by one run."""

import re
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import onnx
from onnx import NodeProto, TensorProto, ValueInfoProto, helper

from hodec.errors import ConfigError
from hodec.onnx_graph.constants import Constants
from hodec.onnx_graph.model_file import ModelFile, is_external, without_axes
from hodec.onnx_graph.session import Cannot, run_model

Size = tuple[int, ...]

# Constants up to this many numbers may be shapes, which inference has to read.
SMALL = 256
# What an axis of unknown size is taken to be: the batch, an axis of an image, another one.
BATCH, IMAGE, OTHER = 1, 224, 32
IMAGE_RANK = 4


def input_sizes(model: ModelFile, given: Mapping[str, Size]) -> dict[str, Size]:
    """A size for each input of the graph: its own, the given one, and a usual one for axes that are open.

    Raises:
        ConfigError: a given size that does not fit, for an input that is not there, or none for one without axes.
    """
    known = {tensor.name for tensor in model.graph.initializer}
    tensors = [value for value in model.graph.input if value.type.HasField("tensor_type")]
    inputs = {value.name: value for value in tensors if value.name not in known}
    for name in given:
        if name not in inputs:
            raise ConfigError(f"--shape {name}: the model has no such input; it has {', '.join(inputs) or 'none'}")
    bare = [value.name for value in without_axes(inputs.values()) if value.name not in given]
    if bare:
        raise ConfigError(
            f"{model.path}: input {', '.join(bare)} has no shape, not even a number of axes; give its size with "
            f"{' '.join(f'--shape {name}:1,3,224,224' for name in bare)}"
        )
    symbols: dict[str, int] = {}
    for name, size in given.items():
        symbols.update(_symbols(inputs[name], size))
    channels = _channels(model.graph)
    return {name: _size(value, given.get(name), symbols, channels.get(name)) for name, value in inputs.items()}


def _channels(graph: onnx.GraphProto) -> dict[str, int]:
    """Channels of what convolutions with a constant weight read."""
    weights = {tensor.name: tensor.dims for tensor in graph.initializer}
    found = {}
    for node in graph.node:
        if node.op_type == "Conv" and node.input[1] in weights:
            groups = next((one.i for one in node.attribute if one.name == "group"), 1)
            found[node.input[0]] = weights[node.input[1]][1] * groups
    return found


def _symbols(value: ValueInfoProto, size: Size) -> dict[str, int]:
    dims = value.type.tensor_type.shape.dim
    if value.type.tensor_type.HasField("shape") and len(dims) != len(size):
        raise ConfigError(f"--shape {value.name}: {size} has {len(size)} axes, the model's input has {len(dims)}")
    for dim, n in zip(dims, size):
        if dim.HasField("dim_value") and dim.dim_value != n:
            raise ConfigError(f"--shape {value.name}: {size} does not fit: the model fixes {dim.dim_value} for {n}")
    return {dim.dim_param: n for dim, n in zip(dims, size) if dim.dim_param}


def _size(value: ValueInfoProto, given: Size | None, symbols: Mapping[str, int], channels: int | None) -> Size:
    if given is not None:
        return given
    dims = value.type.tensor_type.shape.dim
    usual = IMAGE if len(dims) >= IMAGE_RANK else OTHER
    guess = (BATCH, channels or usual, *(usual for _ in dims[2:]))
    return tuple(
        dim.dim_value if dim.HasField("dim_value") else symbols.get(dim.dim_param, open_)
        for dim, open_ in zip(dims, guess)
    )


def parse_shapes(texts: Iterable[str]) -> dict[str, Size]:
    """``name:1,3,224,224`` -> {name: (1, 3, 224, 224)}.

    Raises:
        ConfigError: another form.
    """
    found = {}
    for text in texts:
        name, _, numbers = text.rpartition(":")
        if not name or not re.fullmatch(r"[1-9]\d*(,[1-9]\d*)*", numbers):
            raise ConfigError(f"--shape {text!r} is not of the form NAME:1,3,224,224")
        found[name] = tuple(int(n) for n in numbers.split(","))
    return found


def tensor_sizes(constants: Constants, inputs: Mapping[str, Size]) -> dict[str, Size]:
    """Sizes of all tensors that shape inference can tell."""
    sizes = {name: tuple(tensor.dims) for name, tensor in constants.initializers.items()}
    try:
        inferred = onnx.shape_inference.infer_shapes(_skeleton(constants, inputs), data_prop=True).graph
    except Exception:  # it raises whatever it meets in graphs that it does not understand
        return sizes
    for value in (*inferred.input, *inferred.value_info, *inferred.output):
        dims = value.type.tensor_type.shape.dim
        if value.type.tensor_type.HasField("shape") and all(dim.HasField("dim_value") for dim in dims):
            sizes[value.name] = tuple(dim.dim_value for dim in dims)
    return sizes


def _skeleton(constants: Constants, inputs: Mapping[str, Size]) -> onnx.ModelProto:
    """The graph without the numbers of its weights, which become inputs: inference copies what it is given."""
    proto, graph = constants.model.proto, constants.model.graph
    bare = onnx.ModelProto(ir_version=max(4, proto.ir_version), opset_import=proto.opset_import)
    bare.functions.extend(proto.functions)
    bare.graph.name = graph.name or "graph"
    for value in graph.input:
        if value.name in inputs:
            kind = value.type.tensor_type.elem_type
            bare.graph.input.append(helper.make_tensor_value_info(value.name, kind, inputs[value.name]))
        elif value.name not in constants.initializers:
            bare.graph.input.append(value)
    for tensor in graph.initializer:
        _declare(bare.graph, tensor, tensor.name)
    for node in graph.node:
        big = node.op_type == "Constant" and len(node.attribute) == 1 and _is_big(node.attribute[0].t)
        if big:
            _declare(bare.graph, node.attribute[0].t, node.output[0])
        else:
            bare.graph.node.append(node)
    for value in graph.output:
        bare.graph.output.append(ValueInfoProto(name=value.name))
    return bare


def _is_big(tensor: TensorProto) -> bool:
    return is_external(tensor) or int(np.prod(tensor.dims, dtype=np.int64)) > SMALL


def _declare(graph: onnx.GraphProto, tensor: TensorProto, name: str) -> None:
    if _is_big(tensor):
        graph.input.append(helper.make_tensor_value_info(name, tensor.data_type, tensor.dims))
    else:
        graph.initializer.append(tensor)
        graph.initializer[-1].name = name


def give_axes(model: ModelFile, sizes: Mapping[str, Size]) -> None:
    """Write the number of axes, each open, of inputs and outputs that lack it: onnx.checker asks for it.

    Raises:
        ConfigError: it is not known, as the model does not run on its inputs.
    """
    for value in without_axes((*model.graph.input, *model.graph.output)):
        if value.name not in sizes:
            one = model.graph.input[0].name
            given = f"--shape {one}:{','.join(map(str, sizes.get(one, ())))}"
            raise ConfigError(
                f"{model.path}: output {value.name} has no shape, and neither shape inference nor a run of the model "
                f"tells its number of axes; give sizes that the model runs on in place of {given}"
            )
        for _ in sizes[value.name] or ():
            value.type.tensor_type.shape.dim.add()
        value.type.tensor_type.shape.SetInParent()  # a single number has none


def measured_sizes(model: ModelFile, names: Iterable[str], feeds: Mapping[str, Any]) -> dict[str, Size]:
    """Sizes of these tensors in one run; none if the model does not run."""
    wanted = [name for name in dict.fromkeys(names) if name]
    probe = onnx.ModelProto()
    probe.CopyFrom(model.proto)
    del probe.graph.output[:]
    for k, name in enumerate(wanted):
        probe.graph.node.append(NodeProto(op_type="Shape", input=[name], output=[f"hodec size {k}"]))
        probe.graph.output.append(helper.make_tensor_value_info(f"hodec size {k}", TensorProto.INT64, None))
    try:
        found = run_model(probe, feeds, folder=model.folder)
    except (Cannot, ValueError):  # ValueError: too large to be given to it whole
        return {}
    return {name: tuple(int(n) for n in size) for name, size in zip(wanted, found)}
