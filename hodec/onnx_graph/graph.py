"""ONNX files as graphs: read, checked, and which of their values are the same in every run."""

import logging
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import cast

import onnx
import onnx_ir as ir
from google.protobuf.message import DecodeError
from onnx import helper
from onnx.reference import ReferenceEvaluator

from hodec.errors import CheckpointError, first_line
from hodec.export.runtime import Array, quiet

# Oldest version of the operators: those before it differ in ways that the new nodes do not know.
OLDEST = 7
# Most elements that are made from a few (ConstantOfShape): a file that asks for more is broken, or hostile.
MAX_FOLDED_ELEMENTS = 2**30
# Operators that only move or make constants: a weight may come out of a chain of these.
FOLDABLE = {"Constant", "Identity", "Transpose", "ConstantOfShape", "Cast", "Reshape", "Squeeze", "Unsqueeze",
            "Slice", "Concat"}  # fmt: skip


@dataclass(frozen=True)
class OnnxGraph:
    """A model file. Tensors that it keeps in other files are mapped when they are read.

    Attributes:
        model: the model; rewriting changes it in place, and ``constants`` and ``node_names`` are of the state in which
            they are asked for first.
        path: where it was read.
        opset: version of the standard operators.
    """

    model: ir.Model
    path: Path
    opset: int

    @property
    def graph(self) -> ir.Graph:
        """The main graph."""
        return self.model.graph

    @property
    def inputs(self) -> dict[str, ir.Value]:
        """Name -> input of the graph, those that are tensors and have no value of their own."""
        tensors = [one for one in self.graph.inputs if isinstance(one.type, ir.TensorType)]
        return {name_of(value): value for value in tensors if not value.is_initializer()}

    @property
    def without_axes(self) -> list[ir.Value]:
        """Inputs and outputs that have no shape, not even a number of axes."""
        ends = (*self.inputs.values(), *self.graph.outputs)
        return [value for value in ends if value.shape is None and isinstance(value.type, ir.TensorType)]

    @cached_property
    def lists_initializers(self) -> bool:
        """Whether initializers are among the inputs too by habit: the file format asks for it before its version 4.

        Converters of that time list all of them in newer versions too; one that means a weight to be replaced lists it
        alone.
        """
        initializers = self.graph.initializers.values()
        everything = len(initializers) > 1 and all(one.is_graph_input() for one in initializers)
        return self.model.ir_version < 4 or everything

    @property
    def data_files(self) -> list[Path]:
        """Files beside the model that hold tensors."""
        return sorted({Path(one.path) for one in tensors_of(self.model) if isinstance(one, ir.ExternalTensor)})

    @property
    def bytes(self) -> int:
        """Size of the files, data files among them."""
        return sum(path.stat().st_size for path in (self.path, *self.data_files))

    @cached_property
    def node_names(self) -> dict[ir.Node, str]:
        """Node -> its name, after its output where it has none, made unique; those of subgraphs come last."""
        names, taken = {}, UniqueNames(set())
        for node in (*self.graph, *(node for graph in self.graph.subgraphs() for node in graph)):
            base = node.name or next((one.name for one in node.outputs if one.name), node.op_type)
            names[node] = taken.new(base)
        return names

    @cached_property
    def owners(self) -> dict[ir.Graph, ir.Node]:
        """Subgraph -> the node that it belongs to."""
        return {part: node for node in self.graph.all_nodes() for part in subgraphs_of(node)}

    @cached_property
    def constants(self) -> set[ir.Value]:
        """See ``constants_of``."""
        return constants_of(self)

    @cached_property
    def passed_through(self) -> set[str]:
        """Names of outputs of subgraphs: one that no node there makes is read from the graph around it."""
        return {name_of(value) for graph in self.graph.subgraphs() for value in graph.outputs}

    def is_given_out(self, value: ir.Value) -> bool:
        """Whether a value is an output of the graph or of a subgraph."""
        return value.is_graph_output() or value.name in self.passed_through

    def array(self, value: ir.Value) -> Array:
        """The elements of a constant.

        Raises:
            CheckpointError: they cannot be read or computed.
        """
        try:
            tensor = ir.convenience.get_const_tensor(value)
            array: Array | None = None if tensor is None else tensor.numpy()
        except Exception as error:  # asserts and errors of half a dozen kinds, by what is broken
            raise CheckpointError(
                f"tensor {value.name!r} of {self.path} cannot be read: {first_line(error)}"
            ) from error
        return self._folded(value) if array is None else array

    def _folded(self, value: ir.Value) -> Array:
        node = value.producer()
        if node is None:
            raise CheckpointError(f"{value.name!r} of {self.path} is no constant")
        feeds = {name_of(one): self.array(one) for one in node.inputs if one}
        size = [int(n) for n in next(iter(feeds.values())).flat] if node.op_type == "ConstantOfShape" else []
        if math.prod(size) > MAX_FOLDED_ELEMENTS:
            raise CheckpointError(f"node {node.name or value.name!r} makes a constant of too many elements")
        ends = [onnx.ValueInfoProto(name=name) for name in (*feeds, name_of(value))]
        alone = helper.make_graph([ir.to_proto(node)], "constant", ends[:-1], ends[-1:])
        try:  # as a model: a node by itself is taken to be of the newest version
            model = helper.make_model(alone, opset_imports=[helper.make_opsetid("", self.opset)])
            return cast(list[Array], ReferenceEvaluator(model).run(None, feeds))[0]
        except Exception as error:  # the evaluator raises whatever its operators raise
            raise CheckpointError(f"constant {value.name!r} cannot be computed: {first_line(error)}") from error

    def why_not_constant(self, value: ir.Value) -> str:
        """Why a value is not a constant, as the reason that a layer is left alone."""
        node = value.producer()
        if value.is_initializer():
            return f"its weight {value.name!r} is also an input of the graph, so a caller may replace it"
        if node is None:
            return f"its weight {value.name!r} is an input of the graph"
        if node.op_type == "DequantizeLinear":
            return (
                "its weight is quantized (DequantizeLinear): decompose the float model, or take quantization out first"
            )
        return f"its weight {value.name!r} is computed by {node.op_type}, so it is not a constant"


def name_of(thing: ir.Value | ir.Node | None) -> str:
    """The name of a value or node; empty where there is none."""
    return (thing.name or "") if thing is not None else ""


def subgraphs_of(node: ir.Node) -> Iterator[ir.Graph]:
    """The graphs among a node's attributes."""
    for attribute in node.attributes.values():
        if attribute.type == ir.AttributeType.GRAPH:
            yield attribute.as_graph()
        elif attribute.type == ir.AttributeType.GRAPHS:
            yield from attribute.as_graphs()


class UniqueNames:
    """Names in use; a new one that is taken gets ``#2``, ``#3``, .. behind it."""

    def __init__(self, taken: set[str]) -> None:
        self.taken = taken

    @classmethod
    def of_model(cls, model: ir.Model) -> "UniqueNames":
        """Names of all nodes and values, in subgraphs too."""
        taken: set[str] = set()
        for graph in model.graphs():
            values = [*graph.inputs, *graph.outputs, *graph.initializers.values()]
            for node in graph:
                taken.add(name_of(node))
                values += [one for one in (*node.inputs, *node.outputs) if one]
            taken |= {name_of(value) for value in values}
        return cls(taken)

    def new(self, wanted: str) -> str:
        """``wanted``, or the first free name made from it."""
        name, k = wanted, 1
        while name in self.taken:
            k += 1
            name = f"{wanted}#{k}"
        self.taken.add(name)
        return name


def constants_of(graph: OnnxGraph) -> set[ir.Value]:
    """Values of the graph and its subgraphs that are the same in every run, in its present state.

    Initializers that are inputs too are not among them: a caller may replace them.
    """
    found = set[ir.Value]()
    for part in graph.model.graphs():  # outer ones come first, and a constant stands before what reads it
        initializers = part.initializers.values()
        found |= {one for one in initializers if graph.lists_initializers or not one.is_graph_input()}
        for node in part:
            foldable = node.op_type in FOLDABLE and not node.domain and len(node.outputs) == 1
            if foldable and all(one is None or one in found for one in node.inputs):
                found.add(node.outputs[0])
    return found


def tensors_of(model: ir.Model) -> Iterator[ir.TensorProtocol]:
    """Initializers and tensors in attributes, in subgraphs and functions too."""
    functions = model.functions.values()
    for graph in (*model.graphs(), *(g for one in functions for g in (one.graph, *one.subgraphs()))):
        yield from (one.const_value for one in graph.initializers.values() if one.const_value is not None)
        for node in graph:
            for attribute in node.attributes.values():
                if attribute.type == ir.AttributeType.TENSOR and not attribute.is_ref():
                    yield attribute.as_tensor()
                elif attribute.type == ir.AttributeType.TENSORS and not attribute.is_ref():
                    yield from attribute.as_tensors()


def load_graph(path: str | Path) -> OnnxGraph:
    """Read and check a model file; tensors outside of it are not read yet.

    Raises:
        CheckpointError: missing, truncated, not an ONNX model, of a version that is too old or too new, without the
            files it keeps its tensors in, or with parts that could not be written again.
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
    opset = _opset(proto, path)
    if any(isinstance(word, bytes) for word in _words(proto.graph)):
        raise CheckpointError(f"{path} is not a valid ONNX model: a name in it is no text")
    if proto.training_info or proto.graph.sparse_initializer:
        raise CheckpointError(f"{path} holds sparse initializers or training steps, which would be lost")
    _check_places(proto, path)
    try:
        with quiet("onnx_ir", logging.CRITICAL):
            graph = OnnxGraph(ir.from_proto(proto), path, opset)
        _check_data_files(graph)
        _check(proto, path, external=bool(graph.data_files))
    except CheckpointError:
        raise
    except Exception as error:  # of onnx_ir and of onnx.checker, by what is broken
        raise CheckpointError(
            f"{path} is not a valid ONNX model, or not one that can be written again: {first_line(error)}"
        ) from error
    for value in (one for part in graph.model.graphs() for one in part.initializers.values()):
        if not value.is_graph_input() and not value.is_graph_output():
            value.type = value.shape = None  # its tensor has both, and the file need not say it twice
    _name_once(graph.model)
    return graph


def _name_once(model: ir.Model) -> None:
    """Give values of subgraphs that have the name of another value one of their own: sizes are known by name."""
    names = UniqueNames.of_model(model)
    seen = {name_of(value) for value in _made(model.graph)}
    for graph in model.graph.subgraphs():
        for value in _made(graph):
            if value.name and value.name in seen:
                value.name = names.new(value.name)
            seen.add(name_of(value))


def _made(graph: ir.Graph) -> list[ir.Value]:
    """Inputs, initializers and what the nodes of a graph make, without those of its subgraphs."""
    return [*graph.inputs, *graph.initializers.values(), *(one for node in graph for one in node.outputs)]


def _opset(proto: onnx.ModelProto, path: Path) -> int:
    if not proto.ir_version or not proto.opset_import:
        raise CheckpointError(f"{path} is not an ONNX model, or it is truncated: it names no version of its operators")
    if not proto.graph.node:
        raise CheckpointError(f"{path} holds an empty graph: there is nothing to decompose")
    versions: list[int] = [entry.version for entry in proto.opset_import if entry.domain in ("", "ai.onnx")]
    newest = onnx.defs.onnx_opset_version()
    if not versions:
        raise CheckpointError(f"{path} uses none of the standard ONNX operators")
    if not OLDEST <= max(versions) <= newest:
        raise CheckpointError(
            f"{path} is written for version {max(versions)} of the ONNX operators; versions {OLDEST} to {newest} can "
            f"be read: {'upgrade the package onnx' if max(versions) > newest else 'use onnx.version_converter'}"
        )
    return max(versions)


def _words(graph: onnx.GraphProto) -> Iterator[object]:
    """Names and types of the graph's nodes and tensors; protobuf gives bytes for those that are not UTF-8."""
    for node in graph.node:
        yield from (node.name, node.op_type, node.domain, *node.input, *node.output)
        yield from (attribute.name for attribute in node.attribute)
    yield from (value.name for value in (*graph.input, *graph.output, *graph.initializer))


def _check_places(proto: onnx.ModelProto, path: Path) -> None:
    """Refuse tensors in other files whose place there is no whole number from 0."""
    for tensor in proto.graph.initializer:
        for entry in tensor.external_data:
            if entry.key in ("offset", "length") and not entry.value.isdecimal():
                raise CheckpointError(
                    f"tensor {tensor.name!r} of {path} is in another file at {entry.key} {entry.value!r}; allowed: a "
                    "whole number from 0. The model is damaged: export it again"
                )


def _check_data_files(graph: OnnxGraph) -> None:
    """Refuse data files that are missing, too short or not in the model's folder; nothing is read from them."""
    folder = graph.path.parent
    for tensor in tensors_of(graph.model):
        if not isinstance(tensor, ir.ExternalTensor):
            continue
        tensor.base_dir = folder
        data = Path(tensor.path)
        if not data.resolve().is_relative_to(folder.resolve()):
            raise CheckpointError(f"{graph.path} keeps tensors in {data}, which is outside of its folder: refused")
        if not data.is_file():
            raise CheckpointError(f"{graph.path} keeps tensors in {data.name}, which is missing beside it")
        end = (tensor.offset or 0) + tensor.nbytes
        if data.stat().st_size < end or tensor.length not in (None, tensor.nbytes):
            raise CheckpointError(
                f"tensor {tensor.name!r} of {graph.path} cannot be read: {data.name} ends before it does, or its shape "
                "is another; is it truncated?"
            )


def _check(proto: onnx.ModelProto, path: Path, *, external: bool) -> None:
    """Ask onnx.checker. ``proto`` is changed: its numbers are taken out, which the checker would copy and parse again.

    The checker refuses inputs and outputs without a number of axes: the standard asks for it, runtimes do not.
    """
    ends = [
        one.type.tensor_type for one in (*proto.graph.input, *proto.graph.output) if one.type.HasField("tensor_type")
    ]
    bare = [one for one in ends if not one.HasField("shape")]
    if external:  # a model in memory would be looked for in the working folder; what is written is checked anyway
        if not bare:
            onnx.checker.check_model(str(path))
        return
    for one in bare:
        one.shape.SetInParent()
    listed, tensors = {value.name for value in proto.graph.input}, proto.graph.initializer
    if short := [tensor.name for tensor in tensors if _numbers(tensor) and not _is_whole(tensor)]:
        raise CheckpointError(
            f"{path} is not a valid ONNX model: {short[0]} has more or fewer bytes than its shape says"
        )
    for k in reversed([k for k, tensor in enumerate(tensors) if _is_whole(tensor)]):
        if tensors[k].name not in listed:
            proto.graph.input.append(
                helper.make_tensor_value_info(tensors[k].name, tensors[k].data_type, tensors[k].dims)
            )
        del tensors[k]
    onnx.checker.check_model(proto)


def _numbers(tensor: onnx.TensorProto) -> bool:
    """Whether it holds plain bytes, for a shape that has any."""
    return bool(tensor.raw_data) and all(n > 0 for n in tensor.dims)


def _is_whole(tensor: onnx.TensorProto) -> bool:
    """Whether the checker would find nothing in it: plain bytes, as many as its shape asks for."""
    if not _numbers(tensor):
        return False
    return ir.serde.TensorProtoTensor(tensor).nbytes == len(tensor.raw_data)
