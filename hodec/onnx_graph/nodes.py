"""Steps of a recipe as ONNX nodes in the place of one node."""

from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import onnx
import onnx_ir as ir
from onnx import NodeProto, TensorProto, helper, numpy_helper

from hodec.export.runtime import Array
from hodec.onnx_graph.consumers import WeightConsumer
from hodec.onnx_graph.cost import multiply_adds
from hodec.onnx_graph.graph import OnnxGraph, UniqueNames, name_of
from hodec.onnx_graph.recipes import Recipe, Step
from hodec.onnx_graph.sizes import Size

Attribute = int | float | str | Sequence[int]


@dataclass
class Writer:
    """Writes the nodes of one recipe; its weights are given, so that nodes can share them.

    Attributes:
        consumer: the node that is replaced.
        weights: the initializers of the recipe's weights, in order.
        nodes: what was written.
        constants: small initializers that the nodes need besides: shapes of reshapes.
    """

    consumer: WeightConsumer
    weights: Sequence[ir.Value]
    names: UniqueNames
    opset: int
    nodes: list[ir.Node] = field(default_factory=list)
    constants: list[ir.Value] = field(default_factory=list)

    @property
    def output(self) -> ir.Value:
        """What stands for the replaced node's output, and has its name."""
        return self.nodes[-1].outputs[0]

    def write(self, recipe: Recipe) -> "Writer":
        """The nodes of all steps; the last one gives the replaced node's output."""
        data, bias = self.consumer.data, self.consumer.bias
        for k, (step, weight) in enumerate(zip(recipe.steps, self.weights, strict=True)):
            last = k == len(recipe.steps) - 1
            if step.shape:
                if k == 0 and self.consumer.flag("transA"):
                    data = self.add("Transpose", [data], perm=[1, 0])
                data = self.add("Reshape", [data, self.shape(step.shape)])
            inputs = [data, weight, bias] if last and bias is not None and not recipe.shape else [data, weight]
            if k == 0 and self.consumer.node.op_type == "Gather":
                data = self.add("Gather", inputs[::-1])
                continue
            data = self._multiply(inputs, last=last) if step.kernel.ndim == 2 else self._convolve(step, inputs)
        if recipe.shape:
            data = self._restored(data, recipe.shape)
            if bias is not None:
                if dims := self.consumer.dims:
                    bias = self.add("Reshape", [bias, self.shape((-1, *(1 for _ in range(dims))))])
                self.add("Add", [data, bias])
        self.output.name = self.consumer.output.name
        return self

    def add(self, kind: str, inputs: Sequence[ir.Value], **settings: Attribute) -> ir.Value:
        """One node, named after the replaced one; returns its output."""
        name = self.names.new(f"{self.consumer.name}.{len(self.nodes)}")
        self.nodes.append(ir.node(kind, inputs, settings, outputs=[ir.val(name)], name=name))
        return self.output

    def shape(self, sizes: Sequence[int]) -> ir.Value:
        """A constant of whole numbers."""
        return self._constant("shape", np.array(sizes, np.int64))

    def _constant(self, what: str, array: Array) -> ir.Value:
        self.constants.append(initializer(self.names.new(f"{self.consumer.name}.{what}"), array))
        return self.constants[-1]

    def _convolve(self, step: Step, inputs: list[ir.Value]) -> ir.Value:
        transposed = self.consumer.node.op_type == "ConvTranspose" and step.axes
        return self.add("ConvTranspose" if transposed else "Conv", inputs, **self._settings(step))

    def _settings(self, step: Step) -> dict[str, Attribute]:
        """The replaced node's settings along the axes of this step, and none along the others."""
        one, dims = self.consumer, step.kernel.ndim - 2
        settings: dict[str, Attribute] = {"kernel_shape": list(step.kernel.shape[2:])}
        if (groups := step.kernel.shape[0] if step.depthwise else step.blocks) > 1 or step.depthwise:
            settings["group"] = groups
        if not step.axes:
            return settings
        for key, still in {"strides": 1, "dilations": 1, "output_padding": 0, "output_shape": 0}.items():
            if given := one.ints(key):
                settings[key] = [given[axis] if axis in step.axes else still for axis in range(dims)]
        if pads := one.ints("pads"):
            settings["pads"] = [n if k % dims in step.axes else 0 for k, n in enumerate(pads)]
        if (auto_pad := one.node.attributes.get_string("auto_pad", "NOTSET")) != "NOTSET":
            settings["auto_pad"] = auto_pad
        return settings

    def _multiply(self, inputs: list[ir.Value], *, last: bool) -> ir.Value:
        if self.consumer.node.op_type != "Gemm":
            return self.add("MatMul", inputs[::-1] if self.consumer.is_left else inputs)
        given, first = self.consumer.node.attributes, not self.nodes
        settings: dict[str, Attribute] = {
            "transB": given.get_int("transB", 0),
            "transA": given.get_int("transA", 0) if first else 0,
        }
        if last:
            settings |= {"alpha": given.get_float("alpha", 1.0), "beta": given.get_float("beta", 1.0)}
        if len(inputs) == 2 and self.opset < 11:  # from then on the third input may be left out
            weight = inputs[1].const_value
            inputs.append(self._constant("zero", np.zeros((), weight.dtype.numpy() if weight else np.float32)))
        return self.add("Gemm", inputs, **settings)

    def _restored(self, data: ir.Value, shape: tuple[int, ...]) -> ir.Value:
        """The layer's output: of a product of any number of axes, with the leading axes of the layer's input."""
        if self.consumer.node.op_type == "Gemm" or self.consumer.dims:
            return self.add("Reshape", [data, self.shape(shape)])
        full = self.add("Shape", [self.consumer.data])
        if self.opset < 10:  # from then on its ends are inputs
            lead = self.add("Slice", [full], starts=[0], ends=[-1])
        else:
            lead = self.add("Slice", [full, self.shape((0,)), self.shape((-1,))])
        return self.add("Reshape", [data, self.add("Concat", [lead, self.shape(shape[1:])], axis=0)])


def initializer(name: str, array: Array) -> ir.Value:
    """A value of the graph that holds an array."""
    tensor = ir.tensor(array, name=name)
    return ir.val(name, const_value=tensor)


def as_stored(consumer: WeightConsumer, step: Step, dtype: np.dtype[np.generic]) -> Array:
    """The weight of a step in the node's layout and the replaced weight's type."""
    in_first = consumer.node.op_type == "ConvTranspose" and step.axes and not step.depthwise
    turned = consumer.stores_turned if step.kernel.ndim == 2 else in_first
    weight = step.kernel.transpose(0, 1) if turned else step.kernel
    lead = consumer.lead if step.kernel.ndim == 2 else 0
    return np.ascontiguousarray(weight.contiguous().numpy()).astype(dtype)[(None,) * lead]


def layer_model(
    nodes: Sequence[ir.Node],
    inputs: Mapping[str, Size],
    graph: OnnxGraph,
    constants: Sequence[ir.Value] = (),
    whole: Container[str] = (),
) -> onnx.ModelProto:
    """A model in float32 of nodes that make one output, last. Weights are inputs too: as initializers they would be
    copied half a dozen times.

    Args:
        inputs: name of a value that the nodes read -> its size.
        whole: those of them that are whole numbers.
    """
    types = {name: TensorProto.INT64 if name in whole else TensorProto.FLOAT for name in inputs}
    protos: list[NodeProto] = [ir.to_proto(node) for node in nodes]
    made = helper.make_graph(
        protos,
        "layer",
        [helper.make_tensor_value_info(name, types[name], size) for name, size in inputs.items()],
        [helper.make_tensor_value_info(protos[-1].output[0], TensorProto.FLOAT, None)],
        [numpy_helper.from_array(_in_single(one), one.name) for one in constants],
    )
    # onnxruntime refuses versions of the file format above its own; the layer does not depend on it
    version = min(10, max(4, graph.model.ir_version))
    return helper.make_model(made, opset_imports=[helper.make_opsetid("", graph.opset)], ir_version=version)


def _in_single(value: ir.Value) -> Array:
    if value.const_value is None:
        raise ValueError(f"{value.name} is no constant")
    array = value.const_value.numpy()
    return array if array.dtype == np.int64 else array.astype(np.float32)


def count_layer(writer: Writer, graph: OnnxGraph, sizes: Mapping[str, Size]) -> int | None:
    """Multiply-adds of the new nodes by themselves, whatever inference can tell of the graph around them.

    None where it cannot tell the sizes within them either.

    Args:
        sizes: of the replaced node's input, weights and bias among others, for a whole example input.
    """
    reads = [
        name_of(value) for node in writer.nodes for value in node.inputs if value and value not in writer.constants
    ]
    inputs = {name: sizes[name] for name in reads if name in sizes}
    try:
        model = layer_model(writer.nodes, inputs, graph, writer.constants, writer.consumer.whole_inputs)
        layer = ir.from_proto(onnx.shape_inference.infer_shapes(model, data_prop=True)).graph
    except Exception:  # it raises whatever it meets
        return None
    values = ir.convenience.create_value_mapping(layer).items()
    known = {name: tuple(one.shape.numpy()) for name, one in values if one.shape is not None and one.shape.is_static()}
    count, uncounted = multiply_adds(writer.nodes, known)
    return None if uncounted else count
