"""onnxruntime's quantizer: a model made ready for it, and its form in 8 bits."""

import itertools
import tempfile
from collections import Counter
from collections.abc import Container, Iterator, Sequence
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
from onnx import numpy_helper

from hodec.errors import ConvertError, first_line
from hodec.export.runtime import Calls, quiet
from hodec.onnx_graph.chance import Feeds

# Oldest version of the operators with one scale for each channel of a weight.
PER_CHANNEL = 13
# What is quantized: sums, pools and activations between them lose more than they win. PP-OCRv4 recognition is 1.5 times
# as fast as dense so, 1.4 times with all operators in 8 bits, at a relative error of 0.16 and 0.26.
OPERATORS = ["Conv", "MatMul", "Gemm"]


def prepared(source: Path) -> onnx.ModelProto:
    """The model as its quantizer wants it: batch normalizations folded, sizes known, every node named."""
    from onnxruntime.quantization.shape_inference import quant_pre_process

    model = onnx.load(str(source))
    versions = [entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx")]
    with tempfile.TemporaryDirectory(prefix="hodec-") as folder, quiet():
        given, path = (str(Path(folder) / name) for name in ("given.onnx", "prepared.onnx"))
        try:
            if max(versions) < PER_CHANNEL:
                model = onnx.version_converter.convert_version(model, PER_CHANNEL)
            onnx.save(model, given)
            quant_pre_process(given, path, skip_symbolic_shape=True)
            found: onnx.ModelProto = onnx.load(path)
        except Exception as error:  # whatever the quantizer's tools meet
            raise ConvertError(f"{source} cannot be prepared for quantization: {first_line(error)}") from error
    _renewed(found)
    _give_biases(found.graph)
    del found.metadata_props[:]
    found.metadata_props.extend(model.metadata_props)
    taken = {node.name for node in found.graph.node}
    for node in found.graph.node:
        if not node.name:
            node.name = _free("node", taken)
            taken.add(node.name)
    return found


def _free(beginning: str, taken: Container[str]) -> str:
    """A name that is not taken."""
    return next(name for k in itertools.count() if (name := f"{beginning} {k}") not in taken)


def _give_biases(graph: onnx.GraphProto) -> None:
    """Give each layer a bias of its own with one number for each output.

    The quantizer makes copies of a shared one by itself, whose names may be those of other values of the graph, and
    fails at one that is to be broadcast.
    """
    stored = {one.name: one for one in graph.initializer}
    read = Counter(name for node in graph.node for name in (*node.input, *inner_names(node)))
    read.update(one.name for one in graph.output)
    taken = {*read, *stored, *(name for node in graph.node for name in node.output)}
    for node in graph.node:
        if node.op_type not in ("Conv", "Gemm") or not {*node.input[1:]} <= {*stored} or len(node.input) < 3:
            continue
        bias, shape = node.input[2], stored[node.input[1]].dims
        values = numpy_helper.to_array(stored[bias])
        transposed = any(one.name == "transB" and one.i for one in node.attribute)
        wide = shape[0] if node.op_type == "Conv" or transposed else shape[1]
        is_row = values.size == 1 or values.shape[-1] == values.size == wide
        if not is_row or (values.shape == (wide,) and read[bias] == 1):
            continue
        node.input[2] = _free(f"{bias}.bias", taken)
        taken.add(node.input[2])
        own = np.ascontiguousarray(np.broadcast_to(values.reshape(-1), (wide,)))
        graph.initializer.append(numpy_helper.from_array(own, node.input[2]))
        read[bias] -= 1
        if not read[bias]:
            graph.initializer.remove(stored[bias])


def _renewed(model: onnx.ModelProto) -> None:
    """Bring a file format before version 4, where initializers are inputs too, to 4: the quantizer lists none."""
    if model.ir_version >= 4:
        return
    stored = {one.name for one in model.graph.initializer}
    inputs = [one for one in model.graph.input if one.name not in stored]
    del model.graph.input[:]
    model.graph.input.extend(inputs)
    model.ir_version = 4


def quantized(model: onnx.ModelProto, feeds: Sequence[Feeds]) -> onnx.ModelProto:
    """The prepared model with its convolutions and products in 8 bits, by the ranges of values that ``feeds`` show."""
    from onnxruntime import quantization

    copy = onnx.ModelProto.FromString(model.SerializeToString())  # the quantizer changes it
    with tempfile.TemporaryDirectory(prefix="hodec-") as folder, quiet("root"):
        path = str(Path(folder) / "int8.onnx")
        try:
            quantization.quantize_static(
                copy,
                path,
                Calls(feeds),
                op_types_to_quantize=OPERATORS,
                per_channel=True,
                # A processor without VNNI adds two products in 16 bits and cuts off what is above; with weights from
                # -64 to 64 nothing is. PP-OCR's line direction is off by 0.002 so, else by 0.003 with VNNI, 0.083
                # without.
                reduce_range=True,
                # x86 multiplies unsigned by signed bytes: nudenet is 1.8 times as fast as dense so, 0.7 times with
                # signed activations
                activation_type=quantization.QuantType.QUInt8,
            )
            found = ir.load(path)
            found.graph.sort()  # what rounds a value that a branch of an If reads stands behind that If else
        except Exception as error:  # its own kinds, and those of the runtime
            raise ConvertError(f"the model cannot be quantized on these data: {first_line(error)}") from error
    return ir.to_proto(found)


def inner_names(node: onnx.NodeProto) -> Iterator[str]:
    """The names that the graphs within a node read, and their outputs."""
    for attribute in node.attribute:
        for graph in (attribute.g, *attribute.graphs):
            for inner in graph.node:
                yield from inner.input
                yield from inner_names(inner)
            yield from (one.name for one in graph.output)
