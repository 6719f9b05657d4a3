"""One replaced layer by itself: the new nodes against the old one with the dense weight that the factors stand for."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import onnx
from onnx import NodeProto, TensorProto, helper, numpy_helper
from torch import Tensor

from hodec.errors import ConvertError
from hodec.formats.layer_types import LAYER_TYPES
from hodec.onnx_graph.model_file import Array, ModelFile
from hodec.onnx_graph.nodes import Writer
from hodec.onnx_graph.session import Cannot, run_by_definition, run_model
from hodec.onnx_graph.sites import Use, attributes

# Largest difference of outputs over their largest number, by the type that the factors were rounded to.
TOLERANCE = {"float64": 1e-3, "float32": 1e-3, "float16": 2e-2, "bfloat16": 1e-1}
# Images and rows that a layer is tried on.
BATCH = 2


def check_layer(
    use: Use,
    writer: Writer,
    weights: Mapping[str, Array],
    dense: Tensor,
    *,
    model: ModelFile,
    outputs: int,
    size: Sequence[int],
) -> float:
    """Largest relative difference between the new nodes and the replaced node with the weight ``dense``.

    Both run in float32 on a small random input, with a random bias where the layer has one, on the settings of the
    real node: what stride, padding, dilation and order of weights come to is compared, not assumed.

    Args:
        weights: name -> numbers of the new initializers, as they stand in the file.
        dense: (O, I, ..), or its first rows: then only the first outputs are compared.
        outputs: O.
        size: spatial sizes that the layer really runs at.

    Raises:
        ConvertError: they differ, or the new nodes do not run.
    """
    kind = str(next(iter(weights.values())).dtype)
    feeds = _feeds(use, outputs, dense.shape[1:], size)
    old = NodeProto()
    old.CopyFrom(use.node)
    old.input[use.place] = "dense"
    before = {**feeds, "dense": use.from_oihw(dense.float()).numpy()}
    if use.bias:
        before[use.bias] = feeds[use.bias][: len(dense)]
    after = {**feeds, **{name: array.astype(np.float32, copy=False) for name, array in weights.items()}}
    reference = _small_model([old], before, use, model)
    new = _small_model(writer.nodes, after, use, model, writer.constants)
    try:
        wanted, given = _answers((reference, before), (new, after))
    except Cannot as error:
        raise ConvertError(f"{use.name}: the new nodes do not run ({error}); leave it dense with --exclude") from error
    difference = _difference(_leading(given, use, len(dense)), wanted)
    if not difference <= TOLERANCE[kind]:
        raise ConvertError(
            f"{use.name} ({use.node.op_type}): the new nodes differ from the layer they stand for by {difference:.2g}; "
            f"this is a fault of hodec: leave the layer dense with --exclude {use.name}"
        )
    return difference


def _answers(
    reference: tuple[onnx.ModelProto, Mapping[str, Any]], new: tuple[onnx.ModelProto, Mapping[str, Any]]
) -> tuple[Array, Array]:
    """Outputs of two models on their feeds, by onnxruntime if it knows the first one's version of the operator."""
    run: Callable[[onnx.ModelProto, Mapping[str, Any]], list[Any]] = run_model
    try:
        (wanted,) = run(*reference)
    except Cannot:
        run = run_by_definition
        (wanted,) = run(*reference)
    return wanted, run(*new)[0]


def _leading(output: Array, use: Use, count: int) -> Array:
    """The first ``count`` channels of a layer's output."""
    axis = 1 if LAYER_TYPES[use.layer_type].dims else -2 if use.place == 0 else -1
    return output.take(range(count), axis) if count < output.shape[axis] else output


def _difference(given: Array, wanted: Array) -> float:
    if given.shape != wanted.shape:
        return float("inf")
    if not wanted.size:
        return 0.0
    top = float(np.abs(wanted).max())
    return (
        float(np.abs(given.astype(np.float64) - wanted.astype(np.float64)).max()) / top
        if top
        else float(np.abs(given).max())
    )


def _feeds(use: Use, out: int, into: Sequence[int], real: Sequence[int]) -> dict[str, Any]:
    """Inputs of the layer's kind, small but larger than its kernel, and a bias if it has one."""
    generator = np.random.default_rng(0)
    inp, *kernel = into
    size: Sequence[int]
    if LAYER_TYPES[use.layer_type].dims:
        given = attributes(use.node)
        steps, gaps = (given.get(key) or [1] * len(kernel) for key in ("strides", "dilations"))
        extent = [gap * (k - 1) + 1 + 2 * step for k, step, gap in zip(kernel, steps, gaps, strict=True)]
        size = (BATCH, inp, *(real if given.get("output_shape") else extent))  # that holds for one size of input only
    elif use.place == 0 or attributes(use.node).get("transA", 0):
        size = (inp, BATCH)
    else:
        size = (BATCH, inp)
    feeds = {use.data: generator.standard_normal(size).astype(np.float32)}
    if use.bias:
        feeds[use.bias] = generator.standard_normal(out).astype(np.float32)
    return feeds


def _small_model(
    nodes: Sequence[NodeProto],
    feeds: Mapping[str, Any],
    use: Use,
    model: ModelFile,
    constants: Sequence[TensorProto] = (),
) -> onnx.ModelProto:
    """A model of these nodes. Weights are inputs too: as initializers they would be copied half a dozen times."""
    graph = helper.make_graph(
        nodes,
        "layer",
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, array.shape) for name, array in feeds.items()],
        [helper.make_tensor_value_info(use.node.output[0], TensorProto.FLOAT, None)],
        [_as_float(one) for one in constants],
    )
    opsets = [entry for entry in model.proto.opset_import if entry.domain in ("", "ai.onnx")]
    # onnxruntime refuses versions of the file format above its own; the layer does not depend on it
    return helper.make_model(graph, opset_imports=opsets, ir_version=min(10, max(4, model.proto.ir_version)))


def _as_float(tensor: TensorProto) -> TensorProto:
    if tensor.data_type == TensorProto.INT64:
        return tensor
    return numpy_helper.from_array(numpy_helper.to_array(tensor).astype(np.float32), tensor.name)
