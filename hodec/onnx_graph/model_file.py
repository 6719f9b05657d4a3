"""ONNX files as they come: read, checked, their tensors fetched one at a time."""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from google.protobuf.message import DecodeError
from numpy.typing import NDArray
from onnx import TensorProto, ValueInfoProto, external_data_helper, helper, numpy_helper

from hodec.errors import CheckpointError

Array = NDArray[np.generic]

# Older operators differ in ways that the new nodes do not know.
OLDEST = 7
# Until this version of the file format, every initializer must be among the graph's inputs too.
LISTED_UNTIL = 3
# Bytes of the numbers that large tensors are made of; as many bytes are a large tensor.
WIDTHS: dict[int, int] = {TensorProto.FLOAT: 4, TensorProto.DOUBLE: 8, TensorProto.FLOAT16: 2, TensorProto.BFLOAT16: 2}
LARGE_BYTES = 2**20
DEFAULT_DOMAINS = ("", "ai.onnx")


@dataclass(frozen=True)
class ModelFile:
    """A model as it stands in its file; tensors kept outside of it are still outside.

    Attributes:
        proto: the model; rewriting changes it in place.
        path: where it was read.
        opset: version of the standard operators.
    """

    proto: onnx.ModelProto
    path: Path
    opset: int

    @property
    def graph(self) -> onnx.GraphProto:
        return self.proto.graph

    @property
    def folder(self) -> Path:
        """Where tensors outside of the file are looked for."""
        return self.path.parent

    @property
    def data_files(self) -> list[Path]:
        """Files beside the model that hold tensors."""
        return sorted({self.folder / location_of(tensor) for tensor in every_tensor(self.proto) if is_external(tensor)})

    @property
    def listed(self) -> bool:
        """Whether initializers must be listed among the graph's inputs."""
        return self.proto.ir_version <= LISTED_UNTIL

    def array(self, tensor: TensorProto) -> Array:
        """The numbers of an initializer; those outside of the file are mapped, not read.

        Raises:
            CheckpointError: too few numbers in the file for its shape.
        """
        try:
            if not is_external(tensor):
                return numpy_helper.to_array(tensor)
            return self._mapped(tensor)
        except (ValueError, TypeError, KeyError, OSError, onnx.checker.ValidationError) as error:
            raise CheckpointError(f"tensor {tensor.name!r} of {self.path} cannot be read: {error}") from error

    def content(self, tensor: TensorProto) -> Array:
        """The bytes of a tensor as they are kept, (n,) of uint8; those outside of the file are mapped, not read.

        Raises:
            CheckpointError: they cannot be read.
        """
        try:
            if is_external(tensor):
                info = {entry.key: entry.value for entry in tensor.external_data}
                path, offset = self.folder / info["location"], int(info.get("offset", 0))
                length = int(info.get("length", path.stat().st_size - offset))
                return np.memmap(path, np.uint8, mode="r", offset=offset, shape=(length,))
            raw = tensor.raw_data or numpy_helper.from_array(numpy_helper.to_array(tensor)).raw_data
            return np.frombuffer(raw, np.uint8)
        except (ValueError, TypeError, KeyError, OSError) as error:
            raise CheckpointError(f"tensor {tensor.name!r} of {self.path} cannot be read: {error}") from error

    def _mapped(self, tensor: TensorProto) -> Array:
        info = {entry.key: entry.value for entry in tensor.external_data}
        kind, shape = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type), tuple(tensor.dims)
        if not int(np.prod(shape)):
            return np.zeros(shape, kind)
        path, offset = self.folder / info["location"], int(info.get("offset", 0))
        if path.stat().st_size < offset + int(np.prod(shape)) * np.dtype(kind).itemsize:
            raise ValueError(f"{path.name} ends before it does; is it truncated?")
        return np.memmap(path, kind, mode="c", offset=offset, shape=shape)


def every_tensor(model: onnx.ModelProto) -> Iterator[TensorProto]:
    """Initializers and tensors in attributes, in subgraphs and functions too."""
    yield from _tensors_of(model.graph)
    for function in model.functions:
        for node in function.node:
            yield from _tensors_in(node)


def _tensors_of(graph: onnx.GraphProto) -> Iterator[TensorProto]:
    yield from graph.initializer
    for node in graph.node:
        yield from _tensors_in(node)


def _tensors_in(node: onnx.NodeProto) -> Iterator[TensorProto]:
    for attribute in node.attribute:
        if attribute.HasField("t"):
            yield attribute.t
        yield from attribute.tensors
        if attribute.HasField("g"):
            yield from _tensors_of(attribute.g)
        for graph in attribute.graphs:
            yield from _tensors_of(graph)


def is_external(tensor: TensorProto) -> bool:
    """Whether its numbers stand in a file of their own."""
    return external_data_helper.uses_external_data(tensor)


def location_of(tensor: TensorProto) -> str:
    """Name of the file that holds an external tensor."""
    return next((entry.value for entry in tensor.external_data if entry.key == "location"), "")


def load_model(path: str | Path) -> ModelFile:
    """Read and check a model file; tensors outside of it are not read yet.

    Raises:
        CheckpointError: missing, truncated, not an ONNX model, of a version that is too old or too new, or without
            the files it keeps its tensors in.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"model file {path} {'is a folder' if path.is_dir() else 'does not exist'}")
    try:
        proto = onnx.load(str(path), format="protobuf", load_external_data=False)
    except OSError as error:
        raise CheckpointError(f"model file {path} cannot be read: {error.strerror}") from error
    except DecodeError as error:
        raise CheckpointError(f"{path} is not an ONNX model, or it is truncated") from error
    model = ModelFile(proto, path, _opset(proto, path))
    if any(isinstance(word, bytes) for word in _words(proto.graph)):
        raise CheckpointError(f"{path} is not a valid ONNX model: a name in it is no text")
    _check_data_files(model)
    try:
        _check(model)
    except (onnx.checker.ValidationError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"{path} is not a valid ONNX model: {first_line(error)}") from error
    return model


def without_axes(values: Iterable[ValueInfoProto]) -> list[ValueInfoProto]:
    """Those tensors among a graph's inputs or outputs that have no shape, not even a number of axes."""
    tensors = [value for value in values if value.type.HasField("tensor_type")]
    return [value for value in tensors if not value.type.tensor_type.HasField("shape")]


def _check(model: ModelFile) -> None:
    """Ask onnx.checker, which refuses tensors without a number of axes: the standard asks for it, runtimes do not."""
    bare = without_axes((*model.graph.input, *model.graph.output))
    if not bare and not model.data_files:
        onnx.checker.check_model(_without_numbers(model))
    elif not bare:
        onnx.checker.check_model(str(model.path))
    elif not model.data_files:  # which it would look for beside the working folder; the result is checked anyway
        for value in bare:
            value.type.tensor_type.shape.SetInParent()
        try:
            onnx.checker.check_model(model.proto)
        finally:
            for value in bare:
                value.type.tensor_type.ClearField("shape")


def _without_numbers(model: ModelFile) -> onnx.ModelProto:
    """The model with its large initializers as inputs: the checker would read and parse the whole file again."""
    light = onnx.ModelProto()
    for field, value in model.proto.ListFields():
        if field.name != "graph":
            _set(light, field.name, value)
    listed = {value.name for value in model.graph.input}
    for field, value in model.graph.ListFields():
        if field.name != "initializer":
            _set(light.graph, field.name, value)
    for tensor in model.graph.initializer:
        if not _is_large_and_whole(tensor):
            light.graph.initializer.append(tensor)
        elif tensor.name not in listed:
            light.graph.input.append(helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims))
            listed.add(tensor.name)
    return light


def _set(message: Any, name: str, value: Any) -> None:
    if isinstance(value, str | bytes | int | float):
        setattr(message, name, value)
    elif hasattr(value, "extend"):
        getattr(message, name).extend(value)
    else:
        getattr(message, name).CopyFrom(value)


def _is_large_and_whole(tensor: TensorProto) -> bool:
    """Whether the checker would find nothing in it: numbers in plain bytes, as many as its shape asks for."""
    size = math.prod(tensor.dims) * WIDTHS.get(tensor.data_type, 0)
    return size >= LARGE_BYTES and all(n > 0 for n in tensor.dims) and len(tensor.raw_data) == size


def _opset(proto: onnx.ModelProto, path: Path) -> int:
    if not proto.ir_version or not proto.opset_import:
        raise CheckpointError(f"{path} is not an ONNX model, or it is truncated: it names no version of its operators")
    if not proto.graph.node:
        raise CheckpointError(f"{path} holds an empty graph: there is nothing to decompose")
    found = [entry.version for entry in proto.opset_import if entry.domain in DEFAULT_DOMAINS]
    newest = onnx.defs.onnx_opset_version()
    if not found:
        raise CheckpointError(f"{path} uses none of the standard ONNX operators")
    if not OLDEST <= max(found) <= newest:
        raise CheckpointError(
            f"{path} is written for version {max(found)} of the ONNX operators; versions {OLDEST} to {newest} can be "
            f"read: {'upgrade the onnx package' if max(found) > newest else 'convert it with onnx.version_converter'}"
        )
    return max(found)


def _words(graph: onnx.GraphProto) -> Iterator[object]:
    """Names and types of the graph's nodes and tensors; protobuf gives bytes for those that are not UTF-8."""
    for node in graph.node:
        yield from (node.name, node.op_type, node.domain, *node.input, *node.output)
        yield from (attribute.name for attribute in node.attribute)
    yield from (value.name for value in (*graph.input, *graph.output, *graph.initializer))


def _check_data_files(model: ModelFile) -> None:
    folder = model.folder.resolve()
    for data in model.data_files:
        if not data.resolve().is_relative_to(folder):
            raise CheckpointError(f"{model.path} keeps tensors in {data}, which is outside of its folder: refused")
        if not data.is_file():
            raise CheckpointError(f"{model.path} keeps tensors in {data.name}, which is missing beside it")


def first_line(error: BaseException) -> str:
    """The first line that says something: libraries append traces and dumps."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0][:300] if lines else type(error).__name__
