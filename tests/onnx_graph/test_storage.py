"""Weights stored in fewer bytes: what a runtime computes, what stays as it is, and what is fallen back on."""

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper

from hodec.onnx_graph.cost import parameters
from hodec.onnx_graph.decompose import decompose_file
from hodec.onnx_graph.facts import graph_facts
from hodec.onnx_graph.graph import load_graph
from hodec.onnx_graph.storage import STORES, store
from hodec.onnx_graph.writing import written
from hodec.ranks import Manual

from small_graphs import answer, conv_net, kinds, node, numbers, relative, save  # isort: skip


def stored(source, out, kind):
    """How many constants were stored so; the file is at ``out``."""
    graph = load_graph(source)
    count = store(graph, kind)
    with written(graph, out):
        pass
    onnx.checker.check_model(str(out))
    return count


def types(path):
    return {one.name: one.data_type for one in onnx.load(path).graph.initializer}


@pytest.mark.parametrize(("kind", "most", "size"), [("float32", 0, 1.0), ("float16", 1e-3, 0.6), ("int8", 3e-2, 0.4)])
def test_a_file_with_short_weights_answers_almost_the_same(tmp_path, kind, most, size):
    source, out = conv_net(tmp_path / "in.onnx"), tmp_path / "out.onnx"
    count = stored(source, out, kind)
    assert count == (0 if kind == "float32" else 2)  # the head has 160 numbers, too few to win anything
    x = numbers(4, 8, 10, 12, seed=5)
    assert relative(answer(out, x=x)[0], answer(source, x=x)[0]) <= most
    assert out.stat().st_size <= size * source.stat().st_size
    assert parameters(load_graph(out)) - parameters(load_graph(source)) == (32 if kind == "int8" else 0)  # scales


def test_the_runtime_computes_the_weights_once_when_it_loads_the_file(tmp_path):
    source, out = conv_net(tmp_path / "in.onnx"), tmp_path / "out.onnx"
    stored(source, out, "int8")
    assert kinds(out).count("Cast") == kinds(out).count("Mul") == 2
    options = ort.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "run.onnx")
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_BASIC
    ort.InferenceSession(str(out), options, providers=["CPUExecutionProvider"])
    assert not {"Cast", "Mul"} & {*kinds(tmp_path / "run.onnx")}


def test_numbers_that_the_short_types_cannot_hold_stay(tmp_path):
    weights = {"v": numbers(32, 32), "w": numbers(32, 32, seed=1)}
    weights["v"][0, 0] = 1e6  # beyond float16, and every scale is spoilt by it
    nodes = [node("MatMul", "x v", "h"), node("MatMul", "h w")]
    source = save(tmp_path / "in.onnx", nodes, weights, inputs={"x": ("n", 32)})
    for kind in ("float16", "int8"):
        assert stored(source, tmp_path / f"{kind}.onnx", kind) == (1 if kind == "float16" else 2)
        assert types(tmp_path / "float16.onnx")["v"] == TensorProto.FLOAT
    found, wanted = (answer(tmp_path / name, x=np.eye(32, dtype=np.float32))[0] for name in ("int8.onnx", "in.onnx"))
    assert relative(found, wanted) < 2e-2


def test_constants_of_other_uses_stay(tmp_path):
    """What is also added, given out, or may be replaced by a caller."""
    nodes = [node("MatMul", "x w", "h"), node("Add", "h w", "y"), node("MatMul", "x v", "z")]
    weights = {"w": numbers(32, 32), "v": numbers(32, 32, seed=1)}
    given = (helper.make_tensor_value_info("v", TensorProto.FLOAT, [32, 32]),)
    source = save(tmp_path / "in.onnx", nodes, weights, inputs={"x": (32, 32)}, outputs=("y", "z"), extra_inputs=given)
    assert stored(source, tmp_path / "out.onnx", "float16") == 0


def test_weights_in_constant_nodes_and_of_branches(tmp_path):
    """A weight that a branch holds, one that it reads from outside, and one in a node."""
    outside, inside, held = (numbers(32, 32, seed=k) for k in range(3))

    def branch(name, weight, *more):
        ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None)]
        return helper.make_graph([node("MatMul", f"h {weight}", name)], name, [], ends, list(more))

    nodes = [
        helper.make_node("Constant", [], ["k"], value=numpy_helper.from_array(held)),
        node("MatMul", "x k", "h"),
        node(
            "If",
            "c",
            "y",
            then_branch=branch("a", "w"),
            else_branch=branch("b", "v", numpy_helper.from_array(inside, "v")),
        ),
    ]
    source = save(
        tmp_path / "in.onnx", nodes, {"w": outside}, inputs={"x": (4, 32)},
        extra_inputs=(helper.make_tensor_value_info("c", TensorProto.BOOL, []),),
    )  # fmt: skip
    out = tmp_path / "out.onnx"
    assert stored(source, out, "float16") == 3
    x = numbers(4, 32, seed=7)
    for taken in (True, False):
        found, wanted = (answer(path, x=x, c=np.array(taken))[0] for path in (out, source))
        assert 0 < relative(found, wanted) < 1e-3


def test_a_depthwise_kernel_is_no_byte(tmp_path):
    """A scale for each channel of nine numbers would take half of what is saved."""
    nodes = [node("Conv", "x w", "y", group=64, pads=[1, 1, 1, 1])]
    source = save(tmp_path / "in.onnx", nodes, {"w": numbers(64, 1, 3, 3)}, inputs={"x": ("n", 64, 5, 5)})
    assert stored(source, tmp_path / "out.onnx", "int8") == 1
    assert TensorProto.FLOAT16 in types(tmp_path / "out.onnx").values()


def test_old_files_that_list_their_weights_as_inputs(tmp_path):
    listed = [helper.make_tensor_value_info("w", TensorProto.FLOAT, [32, 32])]
    source = save(
        tmp_path / "in.onnx", [node("MatMul", "x w")], {"w": numbers(32, 32)}, inputs={"x": ("n", 32)},
        opset=9, ir=3, extra_inputs=tuple(listed),
    )  # fmt: skip
    out = tmp_path / "out.onnx"
    assert stored(source, out, "int8") == 1
    x = numbers(4, 32, seed=7)
    assert relative(answer(out, x=x)[0], answer(source, x=x)[0]) < 2e-2


def test_weights_in_sixteen_bits_are_weights_still(tmp_path):
    """Such a file can be decomposed again, and its cost is counted as before."""
    source, out = conv_net(tmp_path / "in.onnx"), tmp_path / "out.onnx"
    stored(source, out, "float16")
    results = [
        decompose_file(path, tmp_path / f"small {k}.onnx", method="svd", rule=Manual(4))
        for k, path in enumerate((source, out))
    ]
    assert results[0].changes.keys() == results[1].changes.keys() == {"first", "second", "head"}
    assert results[0].before == results[1].before
    x = numbers(4, 8, 10, 12, seed=5)
    assert relative(*(answer(tmp_path / f"small {k}.onnx", x=x)[0] for k in range(2))) < 1e-2


def test_ways_go_from_long_to_short():
    assert [*STORES] == ["float32", "float16", "int8"]


@pytest.mark.parametrize("kind", ["float32", "float16", "int8"])
def test_products_of_stored_weights_are_no_multiply_adds(tmp_path, kind):
    """A recurrent weight is the product of its factors, which runtimes multiply out when they load the file."""
    nodes = [node("RNN", "x w r", "h", name="one", hidden_size=64), node("MatMul", "h v", "y", name="two")]
    weights = {"w": numbers(1, 64, 64), "r": numbers(1, 64, 64, seed=1), "v": numbers(64, 64, seed=2)}
    source = save(tmp_path / "in.onnx", nodes, weights, inputs={"x": (5, 1, 64)})
    decompose_file(source, tmp_path / "small.onnx", method="svd", rule=Manual(4))
    stored(tmp_path / "small.onnx", tmp_path / "out.onnx", kind)
    found, wanted = (graph_facts(load_graph(tmp_path / name), {}).cost.macs for name in ("out.onnx", "small.onnx"))
    assert found == wanted == 5 * (2 * 64 * 64 + 2 * 4 * 64)  # of five steps, of both weights and of two factors
