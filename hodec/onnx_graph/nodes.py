"""Steps of a recipe as ONNX nodes in the place of one node."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from onnx import NodeProto, TensorProto, helper

from hodec.formats.layer_types import LAYER_TYPES
from hodec.onnx_graph.recipes import Convolve, Flatten, Multiply, Recipe, Reshape, Restore, Step
from hodec.onnx_graph.sites import Use, attributes

# Gemm's third input may be left out from this version of the operators on.
GEMM_WITHOUT_BIAS = 11
TRANSPOSE_PREFIX = "conv_transpose"
# Settings of a convolution with one number an axis, and what they are where it does not move.
PER_AXIS: dict[str, int] = {"strides": 1, "dilations": 1, "output_padding": 0, "output_shape": 0}


@dataclass
class Names:
    """Names in use; new ones are made unique."""

    taken: set[str]

    def new(self, wanted: str) -> str:
        name, k = wanted, 1
        while name in self.taken:
            k += 1
            name = f"{wanted}#{k}"
        self.taken.add(name)
        return name


@dataclass
class Writer:
    """Writes the nodes of one recipe; the names of its weights are given, so that nodes can share them.

    Attributes:
        use: the node that is replaced.
        weights: names of the initializers of the recipe's weights, in order.
        dtype: their type, as TensorProto counts them.
        nodes: what was written.
        constants: small initializers that the nodes need besides: shapes of reshapes.
    """

    use: Use
    weights: Sequence[str]
    dtype: int
    names: Names
    opset: int
    nodes: list[NodeProto] = field(default_factory=list)
    constants: list[TensorProto] = field(default_factory=list)

    def write(self, recipe: Recipe) -> "Writer":
        """The nodes of all steps; the last one gives the replaced node's output."""
        weights, now, bias = iter(self.weights), self.use.data, self.use.bias
        for k, step in enumerate(recipe.steps):
            last = k == len(recipe.steps) - 1
            inside = bias if last and recipe.bias_inside else ""
            weight = next(weights) if isinstance(step, Convolve | Multiply) else ""
            now = self._step(step, now, weight, bias=inside, final=last and (recipe.bias_inside or not bias))
        if bias and not recipe.bias_inside:
            self._add_bias(now, bias)
        return self

    def _step(self, step: Step, data: str, weight: str, *, bias: str, final: bool) -> str:
        if isinstance(step, Convolve):
            return self._convolve(step, [data, weight, *([bias] if bias else [])], final)
        if isinstance(step, Multiply):
            return self._multiply(data, weight, bias=bias, final=final)
        if isinstance(step, Reshape):
            return self.add("Reshape", [data, self.shape(step.to)], final=final)
        if isinstance(step, Flatten):
            return self._flatten(step, data)
        return self._restore(step, data, final)

    def add(self, kind: str, inputs: Sequence[str], *, final: bool = False, **settings: Any) -> str:
        """One node, named after the replaced one; returns the name of its output."""
        name = self.names.new(f"{self.use.name}.{len(self.nodes)}")
        output = self.use.node.output[0] if final else name
        self.nodes.append(helper.make_node(kind, list(inputs), [output], name=name, **settings))
        return output

    def shape(self, numbers: Sequence[int]) -> str:
        """A constant of whole numbers."""
        return self._constant("shape", TensorProto.INT64, [len(numbers)], numbers)

    def _constant(self, what: str, dtype: int, size: Sequence[int], numbers: Sequence[float]) -> str:
        name = self.names.new(f"{self.use.name}.{what}")
        self.constants.append(helper.make_tensor(name, dtype, list(size), list(numbers)))
        return name

    def _convolve(self, step: Convolve, inputs: list[str], final: bool) -> str:
        transposed = self.use.layer_type.startswith(TRANSPOSE_PREFIX) and bool(step.axes)
        kind = "ConvTranspose" if transposed else "Conv"
        return self.add(kind, inputs, final=final, **self._settings(step))

    def _settings(self, step: Convolve) -> dict[str, Any]:
        """The replaced node's settings along the axes of this step, and none along the others."""
        dims = step.kernel.ndim - 2
        settings: dict[str, Any] = {"kernel_shape": list(step.kernel.shape[2:])}
        if step.depthwise:
            settings["group"] = step.kernel.shape[0]
        if not step.axes:
            return settings
        given = attributes(self.use.node)
        for key, still in PER_AXIS.items():
            if given.get(key):
                settings[key] = [int(given[key][a]) if a in step.axes else still for a in range(dims)]
        if given.get("pads"):
            settings["pads"] = [int(n) if k % dims in step.axes else 0 for k, n in enumerate(given["pads"])]
        if given.get("auto_pad", "NOTSET") != "NOTSET":
            settings["auto_pad"] = given["auto_pad"]
        return settings

    def _multiply(self, data: str, weight: str, *, bias: str, final: bool) -> str:
        if self.use.node.op_type == "MatMul":
            return self.add("MatMul", [weight, data] if self.use.place == 0 else [data, weight], final=final)
        given, first = attributes(self.use.node), not self.nodes
        settings = {"transB": int(given.get("transB", 0)), "transA": int(given.get("transA", 0)) if first else 0}
        if final:
            settings |= {"alpha": given.get("alpha", 1.0), "beta": given.get("beta", 1.0)}
        if not bias and self.opset < GEMM_WITHOUT_BIAS:
            bias = self._constant("zero", self.dtype, [], [0.0])
        return self.add("Gemm", [data, weight, *([bias] if bias else [])], final=final, **settings)

    def _flatten(self, step: Flatten, data: str) -> str:
        if attributes(self.use.node).get("transA", 0):
            data = self.add("Transpose", [data], perm=[1, 0])
        return self.add("Reshape", [data, self.shape((-1, *step.to))])

    def _restore(self, step: Restore, data: str, final: bool) -> str:
        if self.use.node.op_type == "Gemm":
            return self.add("Reshape", [data, self.shape((-1, step.width))], final=final)
        whole = self.add("Shape", [self.use.data])
        lead = self.add("Slice", [whole, self.shape((0,)), self.shape((-1,))])
        to = self.add("Concat", [lead, self.shape((step.width,))], axis=0)
        return self.add("Reshape", [data, to], final=final)

    def _add_bias(self, data: str, bias: str) -> None:
        dims = LAYER_TYPES[self.use.layer_type].dims
        if dims:
            bias = self.add("Reshape", [bias, self.shape((-1, *(1 for _ in range(dims))))])
        self.add("Add", [data, bias], final=True)


def as_stored(use: Use, step: Step, dtype: np.dtype[Any]) -> Any:
    """The weight of a step in the node's layout and the replaced weight's type."""
    if isinstance(step, Multiply):
        weight = step.matrix.mT if use.turned else step.matrix
    elif isinstance(step, Convolve):
        swapped = use.layer_type.startswith(TRANSPOSE_PREFIX) and step.axes and not step.depthwise
        weight = step.kernel.transpose(0, 1) if swapped else step.kernel
    else:
        raise TypeError(f"{type(step).__name__} has no weight")
    return np.ascontiguousarray(weight.contiguous().numpy()).astype(dtype)
