"""Random ONNX graphs through decompose and compress, and graphs that are broken in their parts."""

import random
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from hypothesis import strategies as st
from onnx import AttributeProto, TensorProto, helper

import hodec
from hodec.errors import HodecError, NothingPays
from hodec.methods import METHODS
from hodec.onnx_graph.decompose import decompose_file
from hodec.ranks import Budget, Energy, Manual, Ratio
from hodec.ranks.planning import PlanSettings

from small_graphs import answer, node, numbers, relative, save  # isort: skip

# One in so many graphs is compressed by data, which takes a second.
COMPRESSED = 40

ODD_NUMBERS = [0, -1, 1, 2, 3, 2**31 - 1, 2**31, 2**40, 2**62]
TYPES = [TensorProto.FLOAT16, TensorProto.DOUBLE, TensorProto.INT64, TensorProto.STRING, TensorProto.BFLOAT16, 0, 99]


class Builder:
    """A chain of nodes that grows by random ones."""

    def __init__(self, draw: random.Random) -> None:
        self.draw, self.now, self.count = draw, "x", 0
        self.nodes: list[onnx.NodeProto] = []
        self.weights: dict[str, np.ndarray] = {}

    def add(self, kind: str, inputs: str = "", **attributes: Any) -> None:
        """A node that reads the end of the chain, and what ``inputs`` names."""
        self.count += 1
        out = f"h{self.count}"
        name = self.draw.choice([f"{kind} {self.count}", f"net/{kind}.{self.count}", ""])
        self.nodes.append(node(kind, f"{self.now} {inputs}", out, **({"name": name} if name else {}), **attributes))
        self.now = out

    def weight(self, *shape: int) -> str:
        """The name of a new weight, now and then behind an Identity."""
        self.count += 1
        name = f"w{self.count}"
        self.weights[name] = numbers(*shape, seed=self.draw.randrange(2**31))
        if self.draw.random() < 0.1:
            self.nodes.append(node("Identity", name, f"{name}i"))
            return f"{name}i"
        return name

    def conv(self, channels: int, dims: int) -> int:
        """A convolution, and perhaps a norm and a rectifier; returns its channels."""
        draw, kernel = self.draw, [self.draw.choice([1, 1, 2, 3]) for _ in range(dims)]
        out, transposed = draw.choice([channels, draw.randint(1, 12), 16]), draw.random() < 0.2
        groups = 1 if transposed else draw.choice([g for g in (1, 1, 1, 2, channels) if channels % g == out % g == 0])
        settings: dict[str, Any] = {"strides": [draw.choice([1, 1, 1, 2]) for _ in kernel], "group": groups}
        if draw.random() < 0.3:
            settings["auto_pad"] = draw.choice(["SAME_UPPER", "SAME_LOWER", "VALID"])
        else:
            settings["pads"] = [draw.randint(0, n - 1) for n in (*kernel, *kernel)]
            settings["dilations"] = [draw.choice([1, 1, 2]) for _ in kernel]
        before = self.now
        words = self.weight(*((channels, out, *kernel) if transposed else (out, channels // groups, *kernel)))
        words += f" {self.weight(out)}" if draw.random() < 0.5 else ""
        self.add("ConvTranspose" if transposed else "Conv", words, **settings)
        if draw.random() < 0.3:
            ones = [self.weight(out) for _ in range(4)]
            for name in ones:
                self.weights[name.removesuffix("i")] = np.abs(self.weights[name.removesuffix("i")]) + 0.5
            self.add("BatchNormalization", " ".join(ones))
        if draw.random() < 0.6:
            self.add(draw.choice(["Relu", "Sigmoid", "Tanh", "HardSwish"]))
        if out == channels and draw.random() < 0.2 and "strides" in settings and set(settings["strides"]) == {1}:
            self.add("Add", before)
        return out

    def dense(self, width: int) -> int:
        """A product with a matrix; returns its width."""
        draw, out = self.draw, self.draw.choice([width, self.draw.randint(1, 16)])
        if draw.random() < 0.5:
            self.add("MatMul", self.weight(width, out))
            if draw.random() < 0.5:
                self.add("Add", self.weight(out))
        else:
            turned = draw.randrange(2)
            bias = f" {self.weight(out)}" if draw.random() < 0.5 else ""
            self.add("Gemm", self.weight(*((out, width) if turned else (width, out))) + bias, transB=turned)
        return out


def random_graph(path: Path, draw: random.Random) -> tuple[Path, tuple[int, ...]]:
    """A file with a graph of random layers, and the size of its input."""
    build = Builder(draw)
    if draw.random() < 0.7:
        dims, channels = draw.choice([1, 2, 2, 2, 3]), draw.randint(1, 9)
        first: tuple[Any, ...] = (draw.choice(["n", 2]), channels, *(draw.randint(8, 12) for _ in range(dims)))
        for _ in range(draw.randint(1, 4)):
            channels = build.conv(channels, dims)
        build.add("GlobalAveragePool")
        build.add("Flatten")
        width = channels
    else:
        width = draw.randint(1, 16)
        first = (draw.choice(["n", 2]), width)
    for _ in range(draw.randint(1, 3)):
        width = build.dense(width)
        if draw.random() < 0.5:
            build.add(draw.choice(["Relu", "Softmax", "Erf"]))
    build.add("Identity")
    build.nodes[-1].output[0] = "y"
    save(path, build.nodes, build.weights, inputs={"x": first}, opset=draw.choice([14, 17, 20]))
    return path, (2, *first[1:])


def check_graphs(data: st.DataObject, folder: Path) -> str:
    """A graph that runs: exact at full rank, smaller and finite at others."""
    draw = random.Random(data.draw(st.integers(0, 2**32)))
    source, size = random_graph(folder / "in.onnx", draw)
    x = np.random.default_rng(0).standard_normal(size).astype("float32")
    try:
        (wanted,) = answer(source, x=x)
    except Exception:  # kernels larger than what earlier layers leave
        return "onnxruntime does not run it"
    out, method = folder / "out.onnx", draw.choice([name for name in METHODS if name != "tt_classical"])
    out.unlink(missing_ok=True)
    if draw.randrange(COMPRESSED) == 0:
        return compressed(draw, source, out, x)
    full = draw.random() < 0.5
    rule = (
        Manual(10**6)
        if full
        else draw.choice([Manual(draw.randint(1, 5)), Ratio(0.5), Energy(0.6), Budget(params=0.7)])
    )
    options = PlanSettings(allow_larger=full or draw.random() < 0.3, n_modes=draw.choice([1, 2, 3]))
    try:
        outcome = decompose_file(source, out, method=method, rule=rule, options=options)
    except HodecError as error:
        assert not out.exists()
        if "no layer is left" in str(error):
            return "no layer is left"
        raise
    (given,) = answer(out, x=x)
    assert np.isfinite(given).all()
    assert given.shape == wanted.shape
    if full:
        assert relative(given, wanted) < 1e-3, "full rank is not the dense graph"
    elif not options.allow_larger:
        assert outcome.after.params <= outcome.before.params
    return "right, of full rank" if full else "right"


def compressed(draw: random.Random, source: Path, out: Path, x: np.ndarray) -> str:
    """The graph compressed by data: the file answers, or nothing is written."""
    samples = np.concatenate([x] * 6) + np.random.default_rng(1).standard_normal((len(x) * 6, *x.shape[1:])).astype(
        "f4"
    )
    try:
        hodec.compress_file(
            source, out, data={"x": samples}, target=draw.choice(["macs", "size"]), max_drop="20%", threads=1
        )
    except NothingPays:
        assert not out.exists()
        return "nothing pays"
    assert np.isfinite(answer(out, x=x)[0]).all()
    return "right, compressed"


def _break_tensor(draw: random.Random, tensor: TensorProto) -> None:
    act = draw.randrange(6)
    if act == 0 and tensor.dims:
        tensor.dims[draw.randrange(len(tensor.dims))] = draw.choice(ODD_NUMBERS)
    elif act == 1:
        tensor.data_type = draw.choice(TYPES)
    elif act == 2:
        tensor.raw_data = tensor.raw_data[: draw.choice([0, 1, 4, len(tensor.raw_data) // 2])]
    elif act == 3:
        tensor.dims.extend([draw.choice([1, 1, 2**40])] * draw.choice([1, 1, 70]))
    elif act == 4:
        value = np.array(draw.choice([np.nan, np.inf, 3e38]), np.float32).tobytes()
        tensor.raw_data = value + tensor.raw_data[len(value) :]
    else:
        tensor.name = draw.choice(["", "x", "w2", "ü", "a\nb"])


def _break_node(draw: random.Random, graph: onnx.GraphProto) -> None:
    one, act = draw.choice(graph.node), draw.randrange(9)
    if act == 0 and one.input:
        one.input[draw.randrange(len(one.input))] = draw.choice(["", "nope", "y", "x", one.output[0]])
    elif act == 1:
        one.op_type = draw.choice(["Conv", "MatMul", "Gemm", "ConvTranspose", "If", "Nope", "", "LSTM", "Reshape"])
    elif act == 2:
        one.domain = draw.choice(["com.microsoft", "nope"])
    elif act == 3 and one.attribute:
        attribute = draw.choice(one.attribute)
        attribute.ints[:] = [draw.choice(ODD_NUMBERS) for _ in range(draw.choice([0, 1, 2, 4, 6]))]
    elif act == 4:
        name = draw.choice(["group", "pads", "strides", "kernel_shape", "transA", "x"])
        value = draw.choice([0, -1, 2, 7, [1], [2, 2], [0, 0, 0, 0], 1.5, "SAME_UPPER"])
        one.attribute.append(helper.make_attribute(name, value))
    elif act == 5 and one.attribute:
        draw.choice(one.attribute).type = draw.choice(
            [AttributeProto.FLOAT, AttributeProto.STRING, AttributeProto.GRAPH]
        )
    elif act == 6:
        graph.node.append(one)
    elif act == 7:
        one.name = draw.choice(graph.node).name
    else:
        graph.node.remove(one)


def broken(draw: random.Random, model: onnx.ModelProto) -> onnx.ModelProto:
    """A model with one to three of its parts altered."""
    graph = model.graph
    for _ in range(draw.choice([1, 1, 2, 3])):
        act = draw.randrange(10)
        if act < 4 and graph.initializer:
            _break_tensor(draw, draw.choice(graph.initializer))
        elif act < 8 and graph.node:
            _break_node(draw, graph)
        elif act == 8:
            graph.input[0].type.tensor_type.shape.dim[0].dim_value = draw.choice(ODD_NUMBERS)
            last = graph.input[0].type.tensor_type.shape.dim[-1]
            last.dim_value = draw.choice([*ODD_NUMBERS, 7])
        else:
            model.opset_import[0].version = draw.choice([0, 1, 7, 9, 99, 2**40])
            model.ir_version = draw.choice([0, 3, 8, 99])
    return model


def check_broken(data: st.DataObject, folder: Path) -> str:
    """A graph with broken parts: refused, or as good as it was where onnxruntime runs it."""
    draw = random.Random(data.draw(st.integers(0, 2**32)))
    source, size = random_graph(folder / "in.onnx", draw)
    source.write_bytes(broken(draw, onnx.load(str(source))).SerializeToString())
    out = folder / "out.onnx"
    out.unlink(missing_ok=True)
    rule = draw.choice([Manual(10**6), Manual(3)])
    try:
        decompose_file(
            source, out, method=draw.choice(["tucker", "tt", "svd"]), rule=rule, options=PlanSettings(allow_larger=True)
        )
    except HodecError as error:
        assert not out.exists()
        return f"{type(error).__name__}: no layer is left" if "no layer is left" in str(error) else refused(error)
    x = np.zeros(size, np.float32)
    try:
        (wanted,) = answer(source, x=x)
    except Exception:
        return "decomposed, and the dense graph takes other inputs"
    (given,) = answer(out, x=x)
    assert given.shape == wanted.shape
    if rule.tt_ranks == 10**6 and np.isfinite(wanted).all():
        assert relative(given, wanted) < 1e-3
    return "right"


def refused(error: HodecError) -> str:
    """Raises: an error of hodec's own, which the caller judges."""
    raise error
