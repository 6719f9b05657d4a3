"""Every kind of layer, every method, every setting: the new nodes compute what the layer did."""

import itertools

import numpy as np
import onnx
import pytest

from hodec.errors import ConvertError
from hodec.methods import METHODS
from hodec.onnx_graph.decompose import decompose_file
from hodec.ranks import Manual, Ratio
from hodec.ranks.planning import PlanSettings

from small_graphs import answer, conv_net, node, numbers, relative, save  # isort: skip

FULL = Manual(10**6)
ANY = PlanSettings(allow_larger=True)
# kind -> operator, weight, size of the input
LAYER_TYPES = {
    "conv1d": ("Conv", (12, 8, 3), ("n", 8, 17)),
    "conv2d": ("Conv", (12, 8, 3, 5), ("n", 8, 13, 14)),
    "conv3d": ("Conv", (12, 8, 3, 1, 3), ("n", 8, 7, 6, 8)),
    "conv_transpose1d": ("ConvTranspose", (8, 12, 3), ("n", 8, 9)),
    "conv_transpose2d": ("ConvTranspose", (8, 12, 3, 4), ("n", 8, 6, 7)),
    "conv_transpose3d": ("ConvTranspose", (8, 12, 3, 2, 1), ("n", 8, 4, 5, 3)),
}
# tt_classical's layer is no chain of convolutions
METHODS_HERE = [name for name in METHODS if name != "tt_classical"]


def full_rank(source, out, method, **options):
    """Decompose at full rank, whatever that costs."""
    return decompose_file(source, out, method=method, rule=FULL, options=PlanSettings(allow_larger=True, **options))


def compare(source, out, x, tolerance=1e-4):
    (wanted,), (given,) = answer(source, x=x), answer(out, x=x)
    assert relative(given, wanted) < tolerance


def sized(size, batch=3):
    return (
        np.random.default_rng(7).standard_normal([batch if isinstance(n, str) else n for n in size]).astype("float32")
    )


@pytest.mark.parametrize(("kind", "method"), [
    (kind, method) for kind, method in itertools.product(LAYER_TYPES, METHODS_HERE) if kind in METHODS[method].layers
])  # fmt: skip
def test_convolutions_at_full_rank(tmp_path, kind, method):
    operator, shape, size = LAYER_TYPES[kind]
    dims = len(shape) - 2
    settings = {"strides": [2, 1, 2][:dims], "dilations": [1, 2, 1][:dims], "pads": [1, 0, 1, 0, 2, 1][: 2 * dims]}
    if operator == "ConvTranspose":
        settings["output_padding"] = [1, 0, 1][:dims]
    out_channels = shape[1] if operator == "ConvTranspose" else shape[0]
    nodes = [node(operator, "x w b", name="layer", **settings)]
    source = save(tmp_path / "in.onnx", nodes, {"w": numbers(*shape), "b": numbers(out_channels)}, inputs={"x": size})
    outcome = full_rank(source, tmp_path / "out.onnx", method)
    assert list(outcome.changes) == ["layer"]
    compare(source, tmp_path / "out.onnx", sized(size))
    names = [one.name for one in onnx.load(str(tmp_path / "out.onnx")).graph.node]
    assert names == [f"layer.{k}" for k in range(len(names))]


@pytest.mark.parametrize("method", ["tucker", "spatial_svd", "cp", "svd"])
@pytest.mark.parametrize("auto_pad", ["SAME_UPPER", "SAME_LOWER", "VALID"])
@pytest.mark.parametrize("operator", ["Conv", "ConvTranspose"])
def test_auto_pad(tmp_path, method, auto_pad, operator):
    nodes = [node(operator, "x w", name="layer", auto_pad=auto_pad, strides=[2, 3])]
    shape = (12, 8, 3, 4) if operator == "Conv" else (8, 12, 3, 4)
    size = ("n", 8, 11, 13)
    source = save(tmp_path / "in.onnx", nodes, {"w": numbers(*shape)}, inputs={"x": size})
    full_rank(source, tmp_path / "out.onnx", method)
    compare(source, tmp_path / "out.onnx", sized(size))


@pytest.mark.parametrize("method", ["tucker", "svd"])
def test_output_shape_stays_on_the_one_convolution_that_moves(tmp_path, method):
    nodes = [node("ConvTranspose", "x w b", name="layer", output_shape=[12, 13], strides=[2, 2])]
    weights = {"w": numbers(8, 12, 3, 3), "b": numbers(12)}
    source = save(tmp_path / "in.onnx", nodes, weights, inputs={"x": (1, 8, 6, 6)})
    full_rank(source, tmp_path / "out.onnx", method)
    compare(source, tmp_path / "out.onnx", sized((1, 8, 6, 6)))


@pytest.mark.parametrize("n_modes", [1, 2, 3])
@pytest.mark.parametrize("kind", ["conv1d", "conv2d", "conv3d", "conv_transpose2d"])
def test_a_tensor_train_as_a_chain_of_convolutions(tmp_path, kind, n_modes):
    operator, shape, size = LAYER_TYPES[kind]
    out_channels = shape[1] if operator == "ConvTranspose" else shape[0]
    nodes = [node(operator, "x w b", name="layer")]
    source = save(tmp_path / "in.onnx", nodes, {"w": numbers(*shape), "b": numbers(out_channels)}, inputs={"x": size})
    outcome = full_rank(source, tmp_path / "out.onnx", "tt", n_modes=n_modes, execution="chain")
    assert outcome.changes["layer"].layer.resolved_execution == "chain"
    kinds = {one.op_type for one in onnx.load(str(tmp_path / "out.onnx")).graph.node}
    assert kinds <= {"Conv", "ConvTranspose", "Reshape", "Add"}
    compare(source, tmp_path / "out.onnx", sized(size))


def linear_cases():
    """Words: operator, shape of the constant, attributes, size of the input."""
    for trans_a, trans_b, bias in itertools.product((0, 1), (0, 1), ("", "b", "scalar")):
        shape = (12, 8) if trans_b else (8, 12)
        size = (8, "n") if trans_a else ("n", 8)
        settings = {"transA": trans_a, "transB": trans_b, "alpha": 0.5, "beta": 2.0}
        yield f"x w {bias}", "Gemm", shape, settings, size
    yield "x w", "MatMul", (8, 12), {}, ("n", 8)
    yield "x w", "MatMul", (8, 12), {}, ("n", 5, 8)
    yield "x w", "MatMul", (8, 12), {}, ("n", 2, 5, 8)
    yield "w x", "MatMul", (12, 8), {}, ("n", 8, 5)


@pytest.mark.parametrize(("words", "operator", "shape", "settings", "size"), list(linear_cases()))
@pytest.mark.parametrize("opset", [9, 17])
def test_linear_maps_at_full_rank(tmp_path, words, operator, shape, settings, size, opset):
    weights = {"w": numbers(*shape)}
    if opset < 11 and operator == "Gemm" and len(words.split()) < 3:
        words = "x w scalar"
    weights |= {name: array for name, array in {"b": numbers(12), "scalar": np.float32(0.7)}.items() if name in words}
    nodes = [node(operator, words, name="layer", **settings)]
    source = save(tmp_path / "in.onnx", nodes, weights, inputs={"x": size}, opset=opset)
    full_rank(source, tmp_path / "out.onnx", "svd")
    compare(source, tmp_path / "out.onnx", sized(size))


@pytest.mark.parametrize(("words", "operator", "shape", "settings", "size"), [
    ("x w b", "Gemm", (64, 48), {"transB": 1}, ("n", 48)),
    ("x w b", "Gemm", (48, 64), {"transA": 1}, (48, "n")),
    ("x w", "MatMul", (48, 64), {}, ("n", "s", 48)),
    ("x w", "MatMul", (48, 64), {}, ("n", 48)),
])  # fmt: skip
def test_a_tensor_train_of_a_linear_map(tmp_path, words, operator, shape, settings, size):
    weights = {"w": np.ones(shape, np.float32) + 1e-3 * numbers(*shape)}
    if "b" in words:
        weights["b"] = numbers(64)
    source = save(tmp_path / "in.onnx", [node(operator, words, name="layer", **settings)], weights, inputs={"x": size})
    outcome = decompose_file(source, tmp_path / "out.onnx", method="tt", rule=Manual(2), options=ANY)
    assert outcome.changes["layer"].layer.resolved_execution == "chain"
    assert outcome.after.params < outcome.before.params / 10
    compare(source, tmp_path / "out.onnx", sized(size), 0.02)  # the weight is nearly of these ranks


def test_a_merged_tensor_train_of_a_linear_map_is_refused_with_the_reason(tmp_path):
    source = save(
        tmp_path / "in.onnx", [node("MatMul", "x w", name="layer")], {"w": numbers(8, 12)}, inputs={"x": (1, 8)}
    )
    with pytest.raises(Exception, match="layer: a merged tensor train of a linear layer is its dense weight"):
        full_rank(source, tmp_path / "out.onnx", "tt")
    assert not (tmp_path / "out.onnx").exists()


@pytest.mark.parametrize("method", METHODS_HERE)
def test_half_the_cost(tmp_path, method):
    nodes = [node("Conv", "x w b", name="layer", pads=[1, 1, 1, 1])]
    weights = {"w": numbers(32, 32, 3, 3), "b": numbers(32)}
    source = save(tmp_path / "in.onnx", nodes, weights, inputs={"x": (1, 32, 12, 12)})
    outcome = decompose_file(source, tmp_path / "out.onnx", method=method, rule=Ratio(0.5, round_to=1))
    assert outcome.after.macs <= outcome.before.macs / 2
    assert outcome.after.params < outcome.before.params
    assert (tmp_path / "out.onnx").stat().st_size < source.stat().st_size
    error = outcome.changes["layer"].error
    assert 0.01 < error < 1
    (wanted,), (given,) = (
        answer(source, x=sized((1, 32, 12, 12))),
        answer(tmp_path / "out.onnx", x=sized((1, 32, 12, 12))),
    )
    assert 0.2 * error < np.linalg.norm(given - wanted) / np.linalg.norm(wanted) < 2 * error


def test_the_planned_cost_is_the_counted_one(tmp_path):
    """Of formats whose factors are not merged with each other."""
    nodes = [
        node("Conv", "x w1", "h", name="a", strides=[2, 1]),
        node("ConvTranspose", "h w2", "y", name="b", strides=[1, 3]),
    ]
    weights = {"w1": numbers(16, 8, 3, 3), "w2": numbers(16, 12, 3, 3)}
    source = save(tmp_path / "in.onnx", nodes, weights, inputs={"x": (2, 8, 10, 12)})
    for method in ("tucker", "svd", "weight_svd", "spatial_svd", "cp"):
        outcome = decompose_file(source, tmp_path / "out.onnx", method=method, rule=Manual(3), options=ANY, force=True)
        plan = outcome.plan
        assert (outcome.before.params, outcome.before.macs) == (plan.params_before, plan.macs_before)
        assert (outcome.after.params, outcome.after.macs) == (plan.params_after, plan.macs_after)


def test_nodes_that_compute_something_else_are_found(tmp_path, monkeypatch):
    """The check of single layers can fail."""
    from hodec.onnx_graph.nodes import Writer

    rightly = Writer.add

    def wrongly(self, kind, inputs, **settings):
        settings.pop("pads", None) or settings.pop("strides", None)
        return rightly(self, kind, inputs, **settings)

    monkeypatch.setattr(Writer, "add", wrongly)
    for name in ("first", "second"):
        with pytest.raises(
            ConvertError, match=f"{name}.*this is a fault of hodec: leave the layer dense with exclude="
        ):
            decompose_file(conv_net(tmp_path / "in.onnx"), tmp_path / "out.onnx", rule=Manual({name: 6}), options=ANY)
    assert not (tmp_path / "out.onnx").exists()
