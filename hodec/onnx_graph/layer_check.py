"""One replaced layer by itself: the new nodes against the old one with the dense weight that the factors stand for."""

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import onnx
from torch import Tensor

from hodec.errors import ConvertError, literal
from hodec.export.runtime import Array, Cannot
from hodec.onnx_graph.consumers import WeightConsumer
from hodec.onnx_graph.graph import OnnxGraph, name_of
from hodec.onnx_graph.nodes import Writer, layer_model
from hodec.onnx_graph.session import relative_difference, run_by_definition, run_model

# Largest difference of outputs over their largest number, by the type that the factors were rounded to: some ten times
# what rounding does in the nets of tests/onnx_graph.
TOLERANCE = {"float64": 1e-3, "float32": 1e-3, "float16": 2e-2, "bfloat16": 1e-1}


def check_layer(writer: Writer, dense: Tensor, *, graph: OnnxGraph, outputs: int, size: Sequence[int]) -> float:
    """Largest relative difference between the new nodes and the replaced node with the weight ``dense``.

    Both run in float32 on a small random input, with a random bias where the layer has one, on the settings of the
    real node: what stride, padding, dilation and order of weights come to is compared, not assumed.

    Args:
        dense: (O, I, ..), or its first rows: then only the first outputs are compared.
        outputs: O.
        size: spatial sizes that the layer really runs at.

    Raises:
        ConvertError: they differ, or the new nodes do not run.
    """
    one = writer.consumer
    feeds = _feeds(one, outputs, dense.shape[1:], size)
    bias = {} if one.bias is None else {name_of(one.bias): feeds[name_of(one.bias)][: len(dense)]}
    before = {**feeds, **bias, name_of(one.weight): one.from_oihw(dense.float()).numpy()}
    weights = {name_of(value): value.const_value for value in writer.weights}
    arrays = {name: tensor.numpy() for name, tensor in weights.items() if tensor is not None}
    after = {**feeds, **{name: array.astype(np.float32, copy=False) for name, array in arrays.items()}}
    try:
        reference = layer_model([one.node], _sizes(before), graph, whole=one.whole_inputs)
        new = layer_model(writer.nodes, _sizes(after), graph, writer.constants, one.whole_inputs)
        wanted, result = _answers((reference, before), (new, after))
    except Cannot as error:
        raise ConvertError(
            literal(f"{one.name}: the new nodes do not run ({error}); leave it dense with ") + "{exclude}",
            exclude=one.exclusion,
        ) from error
    difference = relative_difference(_leading(result, one, len(dense)), wanted)
    if not difference <= TOLERANCE[str(next(iter(arrays.values())).dtype)]:
        raise ConvertError(
            literal(
                f"{one.name} ({one.node.op_type}): the new nodes differ from the layer they stand for by "
                f"{difference:.2g}; this is a fault of hodec: leave the layer dense with "
            )
            + "{exclude}",
            exclude=one.exclusion,
        )
    return difference


def _sizes(feeds: Mapping[str, Array]) -> dict[str, tuple[int, ...]]:
    return {name: array.shape for name, array in feeds.items()}


Problem = tuple[onnx.ModelProto, Mapping[str, Array]]


def _answers(reference: Problem, new: Problem) -> tuple[object, object]:
    """Outputs of two models on their feeds, by onnxruntime if it knows the first one's version of the operator."""
    run: Callable[[onnx.ModelProto, Mapping[str, Array]], list[object]] = run_model
    try:
        (wanted,) = run(*reference)
    except Cannot:
        run = run_by_definition
        (wanted,) = run(*reference)
    return wanted, run(*new)[0]


def _leading(output: object, one: WeightConsumer, count: int) -> object:
    """The first ``count`` channels of a layer's output."""
    axis = 1 if one.dims else -2 if one.is_left else -1
    if not isinstance(output, np.ndarray) or count >= output.shape[axis]:
        return output
    return output.take(range(count), axis)


def _feeds(one: WeightConsumer, outputs: int, into: Sequence[int], real: Sequence[int]) -> dict[str, Array]:
    """Two inputs of the layer's kind, small but larger than its kernel, and a bias if it has one."""
    generator, batch = np.random.default_rng(0), 2
    inp, *kernel = into
    if one.whole_inputs:
        return {name_of(one.data): generator.integers(inp, size=8)}
    inp *= one.groups
    size: Sequence[int] = (batch, inp)
    if one.dims:
        steps, gaps = (one.ints(key) or [1] * len(kernel) for key in ("strides", "dilations"))
        extent = [gap * (k - 1) + 1 + 2 * step for k, step, gap in zip(kernel, steps, gaps, strict=True)]
        size = (batch, inp, *(real if one.ints("output_shape") else extent))  # that holds for one size of input only
    elif one.is_left or one.flag("transA"):
        size = (inp, batch)
    size = (*(1 for _ in range(max(one.lead, one.data_lead))), *size)
    feeds: dict[str, Array] = {name_of(one.data): generator.standard_normal(size).astype(np.float32)}
    if one.bias is not None:
        feeds[name_of(one.bias)] = generator.standard_normal(outputs).astype(np.float32)
    return feeds
