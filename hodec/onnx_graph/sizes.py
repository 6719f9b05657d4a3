"""Sizes of a graph's tensors for one example input, by shape inference; where that fails, by one run."""

import re
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import onnx
from onnx import NodeProto, TensorProto, ValueInfoProto, helper

from hodec.errors import ConfigError
from hodec.onnx_graph.constants import Constants
from hodec.onnx_graph.model_file import ModelFile, is_external
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
        ConfigError: a given size that does not fit, or for an input that is not there.
    """
    known = {tensor.name for tensor in model.graph.initializer}
    tensors = [value for value in model.graph.input if value.type.HasField("tensor_type")]
    inputs = {value.name: value for value in tensors if value.name not in known}
    for name in given:
        if name not in inputs:
            raise ConfigError(f"--shape {name}: the model has no such input; it has {', '.join(inputs) or 'none'}")
    symbols: dict[str, int] = {}
    for name, size in given.items():
        symbols.update(_symbols(inputs[name], size))
    return {name: _size(value, given.get(name), symbols) for name, value in inputs.items()}


def _symbols(value: ValueInfoProto, size: Size) -> dict[str, int]:
    dims = value.type.tensor_type.shape.dim
    if value.type.tensor_type.HasField("shape") and len(dims) != len(size):
        raise ConfigError(f"--shape {value.name}: {size} has {len(size)} axes, the model's input has {len(dims)}")
    for dim, n in zip(dims, size):
        if dim.HasField("dim_value") and dim.dim_value != n:
            raise ConfigError(f"--shape {value.name}: {size} does not fit: the model fixes {dim.dim_value} for {n}")
    return {dim.dim_param: n for dim, n in zip(dims, size) if dim.dim_param}


def _size(value: ValueInfoProto, given: Size | None, symbols: Mapping[str, int]) -> Size:
    if given is not None:
        return given
    dims = value.type.tensor_type.shape.dim
    usual = IMAGE if len(dims) >= IMAGE_RANK else OTHER
    guess = (BATCH, *(usual for _ in dims[1:]))
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
