"""What of a graph is constant, and who reads it."""

import math
from collections import defaultdict
from collections.abc import Iterator
from typing import cast

import numpy as np
import onnx
from onnx import NodeProto, helper
from onnx.reference import ReferenceEvaluator

from hodec.errors import CheckpointError
from hodec.onnx_graph.model_file import DEFAULT_DOMAINS, Array, ModelFile, first_line

# Operators that only move or make constants: a weight may come out of a chain of these.
FOLDABLE = {"Constant", "Identity", "Transpose", "ConstantOfShape", "Cast", "Reshape", "Squeeze", "Unsqueeze"}
FLOATS = ("float32", "float64", "float16", "bfloat16")
# More numbers than this are not made from a few (ConstantOfShape): the file is broken, or hostile.
MOST_NUMBERS = 2**30


class Constants:
    """Constants of a model's graph, by the name of the tensor.

    Attributes:
        initializers: name -> its tensor.
        producers: name of a tensor -> the node of the graph that makes it.
        readers: name of a tensor -> the nodes that read it; None stands for the graph's output or a subgraph.
    """

    def __init__(self, model: ModelFile) -> None:
        graph = model.graph
        self.model = model
        self.initializers = {tensor.name: tensor for tensor in graph.initializer}
        self.producers = {name: node for node in graph.node for name in node.output if name}
        self.readers: dict[str, list[NodeProto | None]] = defaultdict(list)
        listed = set() if model.listed else {value.name for value in graph.input}
        self.overridable = listed & self.initializers.keys()
        for node in graph.node:
            for name in node.input:
                self.readers[name].append(node)
            for name in inner_names(node):
                self.readers[name].append(None)
        for value in graph.output:
            self.readers[value.name].append(None)
        self._known: dict[str, bool] = {}

    def is_constant(self, name: str) -> bool:
        """Whether a tensor is the same in every run."""
        if name not in self._known:
            self._known[name] = False  # a cycle, in a broken graph, is not constant
            self._known[name] = self._look(name)
        return self._known[name]

    def _look(self, name: str) -> bool:
        if name in self.initializers:
            return name not in self.overridable
        node = self.producers.get(name)
        if node is None or node.op_type not in FOLDABLE or node.domain not in DEFAULT_DOMAINS:
            return False
        return len(node.output) == 1 and all(self.is_constant(one) for one in node.input if one)

    def array(self, name: str) -> Array:
        """The numbers of a constant.

        Raises:
            CheckpointError: they cannot be read or computed.
        """
        if name in self.initializers:
            return self.model.array(self.initializers[name])
        node = self.producers[name]
        feeds = {one: self.array(one) for one in node.input if one}
        if node.op_type == "ConstantOfShape" and math.prod(int(n) for n in feeds[node.input[0]].flat) > MOST_NUMBERS:
            raise CheckpointError(f"node {node.name or name!r} makes a constant of too many numbers")
        if node.op_type == "Constant" and node.attribute[0].name == "value":
            return self.model.array(node.attribute[0].t)
        version = helper.make_opsetid("", self.model.opset)
        values = [onnx.ValueInfoProto(name=one) for one in feeds]
        alone = helper.make_graph([node], "constant", values, [onnx.ValueInfoProto(name=name)])
        try:  # as a model: a node by itself is taken to be of the newest version
            evaluator = ReferenceEvaluator(helper.make_model(alone, opset_imports=[version]))
            (made,) = cast(list[Array], evaluator.run(None, feeds))
        except Exception as error:  # the evaluator raises whatever its operators raise
            raise CheckpointError(f"constant {name!r} cannot be computed: {first_line(error)}") from error
        return made

    def type_of(self, name: str) -> str:
        """Type of the numbers of a constant: ``float32``, ``bfloat16``, .."""
        tensor = self.initializers.get(name)
        return str(np.dtype(helper.tensor_dtype_to_np_dtype(tensor.data_type)) if tensor else self.array(name).dtype)

    def why_not(self, name: str) -> str:
        """Why a tensor is not a constant."""
        if name in self.overridable:
            return f"its weight {name!r} is also an input of the graph, so a caller may replace it"
        node = self.producers.get(name)
        if node is None:
            return f"its weight {name!r} is an input of the graph"
        if node.op_type == "DequantizeLinear":
            return "its weight is quantized (DequantizeLinear): decompose the float model, then quantize the result"
        return f"its weight {name!r} is computed by {node.op_type}, so it is not a constant"


def inner_names(node: NodeProto) -> Iterator[str]:
    """Names that the subgraphs of a node read or give, its own tensors among them."""
    for attribute in node.attribute:
        for graph in (attribute.g, *attribute.graphs):
            for inner in graph.node:
                yield from inner.input
                yield from inner_names(inner)
            yield from (value.name for value in graph.output)


def every_name(graph: onnx.GraphProto) -> set[str]:
    """All names in use: of tensors, of nodes and in subgraphs."""
    names = {value.name for value in (*graph.input, *graph.output, *graph.initializer, *graph.value_info)}
    for node in graph.node:
        names |= {node.name, *node.input, *node.output}
        for attribute in node.attribute:
            for inner in (attribute.g, *attribute.graphs):
                names |= every_name(inner)
    return names
