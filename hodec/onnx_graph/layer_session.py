"""One layer as a small model of its own: with the nodes that onnxruntime fuses into it, between neighbours.

onnxruntime joins a convolution with the activation behind it, with a residual sum before that, with a batch
normalization; and it keeps activations in blocks of channels between convolutions. A node by itself is measured without
the first and with the cost of both changes of layout. So the small model holds what is fused, and convolutions from and
to one channel stand for the neighbours: they make and take the blocked layout. Their own times are left out.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import onnx
import onnx_ir as ir
import torch
from onnx import NodeProto, TensorProto, helper, numpy_helper
from torch import Tensor

from hodec.export.runtime import Array
from hodec.onnx_graph.consumers import WeightConsumer
from hodec.onnx_graph.graph import OnnxGraph, UniqueNames, name_of
from hodec.onnx_graph.nodes import Writer, as_stored, initializer
from hodec.onnx_graph.recipes import Recipe
from hodec.onnx_graph.sizes import Size

ACTIVATIONS = {"Relu", "LeakyRelu", "Sigmoid", "Tanh", "HardSigmoid", "Clip"}
# What is folded into a convolution or product where its other inputs are constant.
FOLDED = {"BatchNormalization", "Add", "Mul"}
# Begins the names of the neighbours' nodes and outputs, by which their times are known.
NEIGHBOUR = "hodec.neighbour"
INPUT = f"{NEIGHBOUR}.in"
# Types that onnxruntime's CPU kernels compute in; others are measured in float32.
COMPUTED = ("float32", "float64", "float16")

Kernels = Sequence[Tensor]


@dataclass(frozen=True)
class LayerSession:
    """The small model of one node, dense or with other nodes in its place.

    Attributes:
        consumer: the node.
        graph: where it stands.
        sizes: of the values there.
    """

    consumer: WeightConsumer
    graph: OnnxGraph
    sizes: Mapping[str, Size]

    @cached_property
    def tail(self) -> tuple[ir.Node, ...]:
        """The nodes behind it that are fused into it."""
        value, found, summed = self.consumer.output, list[ir.Node](), False
        while len(value.uses()) == 1 and not self.graph.is_given_out(value):
            (use,) = value.uses()
            node = use.node
            if node.graph is not self.consumer.place:
                break
            others = [one for one in node.inputs if one is not None and one is not value]
            constant = all(one in self.graph.constants for one in others)
            known = self.sizes.get(name_of(node.outputs[0]), self._size)
            if node.domain or len(node.outputs) != 1 or known != self._size:
                break
            if node.op_type in ACTIVATIONS and constant:
                return (*found, node)
            residual = node.op_type == "Add" and self._same_size(others) and not constant and not summed
            if not residual and not (node.op_type in FOLDED and constant):
                break
            found.append(node)
            summed, value = summed or residual, node.outputs[0]
        return tuple(found)

    @property
    def _size(self) -> Size:
        """The size of the layer's output, and of all that is fused into it."""
        return self.sizes[name_of(self.consumer.output)]

    def _same_size(self, others: Sequence[ir.Value]) -> bool:
        return len(others) == 1 and self.sizes.get(name_of(others[0])) == self._size

    @cached_property
    def dtype(self) -> np.dtype[np.generic]:
        """The type to measure in: that of the weight."""
        dtype = self.graph.array(self.consumer.weight).dtype
        return dtype if str(dtype) in COMPUTED else np.dtype(np.float32)

    @cached_property
    def key(self) -> str:
        """What its time depends on, in words."""
        one = self.consumer
        sizes = (self.sizes[name_of(value)] for value in (one.weight, one.data))
        weight, data = ("x".join(map(str, size)) for size in sizes)
        settings = [f"{key} {value.value}" for key, value in sorted(one.node.attributes.items())]
        kinds = [node.op_type for node in (one.node, *self.tail)]
        bias = ["bias"] if one.bias is not None else []
        place = [] if one.input_index else ["weight first"]
        return ", ".join([f"{'+'.join(kinds)} {weight} at {data} {self.dtype}", *settings, *bias, *place])

    def dense(self) -> tuple[bytes, dict[str, Array]]:
        """The model with the node itself, and what to feed it."""
        node, build = self._stand_in(), _Builder(self)
        build.add(name_of(node.weight), self.sizes[name_of(self.consumer.weight)])
        return build.model([ir.to_proto(node.node)], node)

    def factorized(self, recipe_of: Callable[[], Recipe]) -> tuple[bytes, dict[str, Array]]:
        """The model with the steps of a recipe in the node's place."""
        node, build, recipe = self._stand_in(), _Builder(self), recipe_of()
        arrays = [as_stored(node, step, self.dtype) for step in recipe.steps]
        weights = [initializer(f"hodec.weight.{k}", array) for k, array in enumerate(arrays)]
        writer = Writer(node, weights, UniqueNames(set()), self.graph.opset).write(recipe)
        for value in (*weights, *writer.constants):
            if value.const_value is not None:
                build.arrays[name_of(value)] = value.const_value.numpy()
        return build.model([ir.to_proto(one) for one in writer.nodes], node)

    def _stand_in(self) -> WeightConsumer:
        """The node with values of its own, so that the graph does not know of it."""
        one = self.consumer
        names = [INPUT, "hodec.weight"] if one.input_index else ["hodec.weight", INPUT]
        values = [ir.val(name) for name in (*names, *(["hodec.bias"] if one.bias is not None else []))]
        node = ir.Node(
            "",
            one.node.op_type,
            values,
            list(one.node.attributes.values()),
            outputs=[ir.val("hodec.out")],
            name="layer",
        )
        return replace(one, node=node, name="layer", weight=values[one.input_index])


@dataclass
class _Builder:
    """Collects the arrays and nodes of one small model."""

    session: LayerSession

    def __post_init__(self) -> None:
        self.arrays: dict[str, Array] = {}
        self.inputs: dict[str, tuple[Size, bool]] = {}  # with whether they are whole numbers
        self.random = np.random.default_rng(0)

    def add(self, name: str, size: Size) -> None:
        """An initializer of random numbers that leave variances about as they are."""
        scale = max(1, int(np.prod(size[1:]))) ** -0.5
        self.arrays[name] = (scale * self.random.standard_normal(size)).astype(self.session.dtype)

    def model(self, nodes: Sequence[NodeProto], one: WeightConsumer) -> tuple[bytes, dict[str, Array]]:
        """The bytes of the model with these nodes as the layer, and its feeds."""
        session, output = self.session, "hodec.out"
        own = session.consumer
        before = [self._neighbour_before(INPUT, own.data)]
        if one.bias is not None and own.bias is not None:
            self.add("hodec.bias", session.sizes.get(name_of(own.bias), (1,)))
        tail = []
        for k, node in enumerate(session.tail):
            proto = ir.to_proto(node)
            made = own.output if k == 0 else session.tail[k - 1].outputs[0]
            for i, value in enumerate(node.inputs):
                if value is made:
                    proto.input[i] = output
                elif value is not None:
                    proto.input[i] = f"{NEIGHBOUR}.{k}.{i}"
                    self._other(proto.input[i], value, before)
            if node.op_type == "Add":  # onnxruntime joins a sum with the convolution that makes its first operand
                proto.input[:] = sorted(proto.input, key=lambda name: name != output)
            output = proto.output[0] = f"hodec.tail.{k}"
            tail.append(proto)
        end = self._neighbour_behind(output, session.sizes[name_of(own.output)])
        return self._finished([*(x for group in before for x in group), *nodes, *tail, *end])

    def _other(self, name: str, value: ir.Value, before: list[list[NodeProto]]) -> None:
        if value in self.session.graph.constants:
            self.arrays[name] = self.session.graph.array(value)
        else:
            before.append(self._neighbour_before(name, value))

    def _neighbour_before(self, name: str, value: ir.Value) -> list[NodeProto]:
        """What makes ``name`` in the place of ``value``: a convolution from one channel, or an input of the model."""
        size = self.session.sizes[name_of(value)]
        whole = name_of(value) in self.session.consumer.whole_inputs
        if len(size) != 4 or value.producer() is None or whole:
            self.inputs[name] = size, whole
            return []
        self.inputs[f"{name}.one"] = (size[0], 1, *size[2:]), False
        return [self._neighbour(f"{name}.one", name, (size[1], 1, 1, 1))]

    def _neighbour_behind(self, name: str, size: Size) -> list[NodeProto]:
        return [self._neighbour(name, f"{NEIGHBOUR}.end", (1, size[1], 1, 1))] if len(size) == 4 else []

    def _neighbour(self, given: str, made: str, weight: Size) -> NodeProto:
        self.add(f"{made}.weight", weight)
        return helper.make_node("Conv", [given, f"{made}.weight"], [made], name=f"{NEIGHBOUR} {made}")

    def _finished(self, nodes: Sequence[NodeProto]) -> tuple[bytes, dict[str, Array]]:
        kind = helper.np_dtype_to_tensor_dtype(self.session.dtype)
        graph = helper.make_graph(
            nodes, "layer",
            [
                helper.make_tensor_value_info(name, TensorProto.INT64 if whole else kind, size)
                for name, (size, whole) in self.inputs.items()
            ],
            [helper.make_tensor_value_info(nodes[-1].output[0], kind, None)],
            [numpy_helper.from_array(array, name) for name, array in self.arrays.items()],
        )  # fmt: skip
        opset = helper.make_opsetid("", self.session.graph.opset)
        version = min(10, max(4, self.session.graph.model.ir_version))
        model: onnx.ModelProto = helper.make_model(graph, opset_imports=[opset], ir_version=version)
        feeds = {name: self._feed(*kind_of) for name, kind_of in self.inputs.items()}
        return model.SerializeToString(), feeds

    def _feed(self, size: Size, whole: bool) -> Array:
        if whole:  # positions in a table
            return np.zeros(size, np.int64)
        return self.random.standard_normal(size).astype(self.session.dtype)


def random_kernels(shapes: Sequence[Size]) -> list[Tensor]:
    """Kernels of these shapes with numbers of the size of trained ones: subnormal numbers would take longer."""
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randn(shape, generator=generator) / max(1, shape[1:].numel()) ** 0.5 for shape in map(torch.Size, shapes)
    ]
