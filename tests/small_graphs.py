"""Small ONNX graphs, and what they answer."""

from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

FLOAT = TensorProto.FLOAT


def numbers(*shape: int, seed: int = 0) -> np.ndarray:
    """Random numbers of about unit output variance."""
    generator = np.random.default_rng(seed)
    return (generator.standard_normal(shape) / max(1, np.prod(shape[1:])) ** 0.5).astype(np.float32)


def save(  # noqa: PLR0913
    path: Path,
    nodes: list[onnx.NodeProto],
    weights: dict[str, np.ndarray],
    *,
    inputs: dict[str, tuple] | None = None,
    outputs: tuple[str, ...] = ("y",),
    opset: int = 17,
    ir: int = 8,
    dtype: int = FLOAT,
    domains: tuple[str, ...] = (),
    extra_inputs: tuple[onnx.ValueInfoProto, ...] = (),
) -> Path:
    """A model of these nodes, written to ``path``."""
    inputs = inputs or {"x": ("n", 8, 10, 12)}
    graph = helper.make_graph(
        nodes,
        "small",
        [*(helper.make_tensor_value_info(name, dtype, size) for name, size in inputs.items()), *extra_inputs],
        [helper.make_tensor_value_info(name, dtype, None) for name in outputs],
        [numpy_helper.from_array(array, name) for name, array in weights.items()],
    )
    imports = [helper.make_opsetid("", opset), *(helper.make_opsetid(one, 1) for one in domains)]
    model = helper.make_model(graph, opset_imports=imports, ir_version=ir)
    inferred = onnx.shape_inference.infer_shapes(model).graph.output
    for mine, known in zip(model.graph.output, inferred, strict=True):
        mine.type.tensor_type.shape.CopyFrom(known.type.tensor_type.shape)  # the checker asks for a rank
    path.write_bytes(model.SerializeToString())
    return path


def node(op_type: str, inputs: str, outputs: str = "y", **attributes: object) -> onnx.NodeProto:
    """A node by words: ``node("Conv", "x w b", "y", name="c", pads=[1, 1, 1, 1])``."""
    return helper.make_node(op_type, inputs.split(), outputs.split(), **attributes)


def conv_net(path: Path, **options: object) -> Path:
    """Conv 3x3, ReLU, Conv 3x3 with stride 2, global pooling, Gemm; with names, bias and an open batch."""
    nodes = [
        node("Conv", "x w1 b1", "h1", name="first", pads=[1, 1, 1, 1]),
        node("Relu", "h1", "h2", name="relu"),
        node("Conv", "h2 w2", "h3", name="second", strides=[2, 2]),
        node("GlobalAveragePool", "h3", "h4", name="pool"),
        node("Flatten", "h4", "h5", name="flatten"),
        node("Gemm", "h5 w3 b3", "y", name="head", transB=1),
    ]
    weights = {
        "w1": numbers(16, 8, 3, 3),
        "b1": numbers(16, seed=1),
        "w2": numbers(16, 16, 3, 3, seed=2),
        "w3": numbers(10, 16, seed=3),
        "b3": numbers(10, seed=4),
    }
    return save(path, nodes, weights, **options)  # type: ignore[arg-type]


def answer(path: Path | onnx.ModelProto, **feeds: np.ndarray) -> list[np.ndarray]:
    """Outputs of a model; inputs of its own sizes where none are given."""
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    given = path.SerializeToString() if isinstance(path, onnx.ModelProto) else str(path)
    session = ort.InferenceSession(given, options, providers=["CPUExecutionProvider"])
    return session.run(None, feeds)


def reference(path: Path, **feeds: np.ndarray) -> list[np.ndarray]:
    """Outputs by ONNX's own definition of the operators: slow, and of any type."""
    return ReferenceEvaluator(str(path)).run(None, feeds)


def relative(given: np.ndarray, wanted: np.ndarray) -> float:
    """Largest difference over the largest number."""
    assert given.shape == wanted.shape
    wanted = wanted.astype(np.float64)
    return float(np.abs(given.astype(np.float64) - wanted).max() / max(np.abs(wanted).max(), 1e-30))


def kinds(path: Path) -> list[str]:
    """Types of the nodes of a model file, in order."""
    return [one.op_type for one in onnx.load(str(path)).graph.node]
