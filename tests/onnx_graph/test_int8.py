"""Files in 8 bits: what is rounded, what goes back to float, and the table of four files."""

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from hodec.errors import ConvertError
from hodec.export.runtime import open_session
from hodec.onnx_graph.decompose import decompose_file
from hodec.onnx_graph.graph import load_graph
from hodec.onnx_graph.int8 import Mixed, closeness, four_rows, quantize_file
from hodec.onnx_graph.quantizer import prepared, quantized
from hodec.ranks import Manual

from small_graphs import node, numbers, save  # isort: skip


def net(path, *, opset=17, wide=1.0):
    """Two convolutions with a shortcut, and a product whose weight spans ``wide`` orders of magnitude."""
    nodes = [
        node("Conv", "x w0 b0", "h0", name="stem", pads=[1, 1, 1, 1]),
        node("Relu", "h0", "r0", name="act0"),
        node("Conv", "r0 w1", "h1", name="body", pads=[1, 1, 1, 1]),
        node("Add", "r0 h1", "s1", name="sum"),
        node("GlobalAveragePool", "s1", "p", name="pool"),
        node("Flatten", "p", "f", name="flatten"),
        node("MatMul", "f w2", "y", name="head"),
    ]
    weights = {
        "w0": numbers(16, 3, 3, 3),
        "b0": numbers(16, seed=1),
        "w1": numbers(16, 16, 3, 3, seed=2),
        "w2": numbers(16, 10, seed=3) * np.geomspace(1, wide, 16, dtype=np.float32)[:, None],
    }
    return save(path, nodes, weights, inputs={"x": (1, 3, 12, 12)}, opset=opset)


def calls(count, *, seed=0):
    generator = np.random.default_rng(seed)
    return [{"x": generator.standard_normal((1, 3, 12, 12)).astype(np.float32)} for _ in range(count)]


def types(path):
    return {one.name: numpy_helper.to_array(one).dtype for one in onnx.load(path).graph.initializer}


@pytest.mark.parametrize("opset", [11, 17])
def test_a_file_in_8_bits_is_small_and_near(tmp_path, opset):
    source, out = net(tmp_path / "in.onnx", opset=opset), tmp_path / "out.onnx"
    done = quantize_file(source, out, calls(12))
    assert (done.reached, done.floats, done.layers) == (True, (), 3)
    assert 0.95 < done.score < 1 == done.float_score
    run = open_session(out)
    assert np.isfinite(run.run(None, calls(1)[0])[0]).all()
    kinds = types(out)
    assert all(str(kinds[f"w{k}_quantized"]) == "int8" for k in (0, 1, 2))
    onnx.checker.check_model(str(out))


def test_layers_that_lose_most_go_back_to_float(tmp_path):
    source, out = net(tmp_path / "in.onnx", wide=1e4), tmp_path / "out.onnx"
    data = calls(12)
    all_bits = quantize_file(source, out, data, least=-9.0)
    assert all_bits.floats == ()
    done = quantize_file(source, out, data, least=1 - (1 - all_bits.score) / 2, force=True)
    assert done.reached
    assert 0 < len(done.floats) < 3
    assert done.score > all_bits.score
    names = {node.name: node for node in onnx.load(out).graph.node}
    stored = types(out)
    weights = [names[name].input[1] for name in done.floats]
    assert all(str(stored[name]) == "float32" for name in weights)


def test_every_layer_in_float_is_the_file_itself(tmp_path):
    source = prepared(net(tmp_path / "in.onnx"))
    mixed = Mixed(source, quantized(source, calls(4)))
    assert mixed.layers == ["stem", "body", "head"]
    model = mixed.model(mixed.layers)
    assert not [one for one in model.graph.node if "Quantize" in one.op_type]
    for feeds in calls(2, seed=1):
        results = [open_session(one.SerializeToString()).run(None, feeds)[0] for one in (source, model)]
        np.testing.assert_allclose(results[1], results[0], rtol=1e-5, atol=1e-6)


def test_a_value_between_layers_in_float_is_not_rounded(tmp_path):
    source = prepared(net(tmp_path / "in.onnx"))
    mixed = Mixed(source, quantized(source, calls(4)))
    model = mixed.model(["stem", "body"])
    rounded = [one for one in model.graph.node if one.op_type == "QuantizeLinear"]
    near_head = {one.input[0] for one in model.graph.node if one.name == "head"}
    assert near_head
    makers = {name: one for one in model.graph.node for name in one.output}
    assert {makers[name].op_type for name in near_head} == {"DequantizeLinear"}
    assert all(makers[one.input[0]].name not in ("stem", "body", "sum") for one in rounded if one.input[0] in makers)


def test_a_score_of_ones_own_decides(tmp_path):
    source, out = net(tmp_path / "in.onnx"), tmp_path / "out.onnx"
    asked = []

    def score(run):
        asked.append(np.asarray(run(calls(1)[0])[0]).shape)
        return 0.5

    done = quantize_file(source, out, calls(8), score=score, least=0.5)
    assert (done.float_score, done.score, done.reached) == (0.5, 0.5, True)
    assert set(asked) == {(1, 10)}


@pytest.mark.parametrize(("count", "held", "message"), [
    (3, None, "3 calls to calibrate on and to judge by; at least 4"),
    (3, [], "at least one call to calibrate on and one to judge by"),
])  # fmt: skip
def test_too_little_data_is_refused(tmp_path, count, held, message):
    with pytest.raises(ConvertError, match=message):
        quantize_file(net(tmp_path / "in.onnx"), tmp_path / "out.onnx", calls(count), held_out=held)
    assert not (tmp_path / "out.onnx").exists()


def test_data_that_do_not_fit_are_refused(tmp_path):
    bad = [{"x": np.zeros((1, 5, 12, 12), np.float32)}] * 8
    with pytest.raises(ConvertError, match="does not run on these data"):
        quantize_file(net(tmp_path / "in.onnx"), tmp_path / "out.onnx", bad)
    assert not (tmp_path / "out.onnx").exists()


def test_the_table_has_four_rows(tmp_path):
    dense, small = net(tmp_path / "in.onnx"), tmp_path / "small.onnx"
    decompose_file(dense, small, method="svd", rule=Manual(8))
    data = calls(8)
    files = {"fp32 dense": dense, "int8 dense": tmp_path / "a.onnx", "decomposed": small, "both": tmp_path / "b.onnx"}
    quantize_file(dense, files["int8 dense"], data)
    quantize_file(small, files["both"], data)
    opened = open_session(dense)
    score = closeness(lambda feeds: opened.run(None, feeds), data[-2:])
    rows = four_rows(files, score, seconds=0.1)
    assert [row.what for row in rows] == list(files)
    assert rows[0].score == 1.0
    assert all(row.score < 1 for row in rows[1:])
    assert [row.bytes for row in rows] == [path.stat().st_size for path in files.values()]
    assert rows[0].bench is None
    assert "bytes, 1.00x" in str(rows[0])
    assert "x (" in str(rows[3])


def test_a_file_of_an_old_format_is_one_of_a_newer_one_in_8_bits(tmp_path):
    """Before version 4 of the format every initializer is an input too, also what the quantizer adds."""
    source, out = net(tmp_path / "in.onnx"), tmp_path / "out.onnx"
    model = onnx.load(source)
    model.ir_version = 3
    kinds = [(one.name, one.data_type, one.dims) for one in model.graph.initializer]
    model.graph.input.extend(onnx.helper.make_tensor_value_info(*one) for one in kinds)
    onnx.save(model, source)
    quantize_file(source, out, calls(8))
    assert load_graph(out).model.ir_version == 4
    assert [one.name for one in onnx.load(out).graph.input] == ["x"]
    assert np.isfinite(open_session(out).run(None, calls(1)[0])[0]).all()


# -- what onnxruntime's quantizer stumbles over ----------------------------------------------------------------------


def runs_in_8_bits(path, out, data, layers):
    done = quantize_file(path, out, data, least=-9.0)
    assert (done.floats, done.layers) == ((), layers)
    assert done.score > 0.9
    onnx.checker.check_model(str(out))
    assert np.isfinite(open_session(out).run(None, data[0])[0]).all()


@pytest.mark.parametrize("shape", [(10,), (1, 10), (1,), (1, 1)])
@pytest.mark.parametrize("transposed", [0, 1])
def test_a_bias_that_is_broadcast(tmp_path, shape, transposed):
    weight = numbers(16, 10) if not transposed else numbers(10, 16)
    nodes = [node("Gemm", "x w b", "y", name="head", transB=transposed)]
    path = save(tmp_path / "in.onnx", nodes, {"w": weight, "b": numbers(*shape, seed=1)}, inputs={"x": (4, 16)})
    generator = np.random.default_rng(0)
    data = [{"x": generator.standard_normal((4, 16)).astype(np.float32)} for _ in range(8)]
    runs_in_8_bits(path, tmp_path / "out.onnx", data, 1)


def test_sums_of_large_products_are_those_of_the_definition(tmp_path):
    """Without VNNI a processor adds two products of bytes in 16 bits: with weights of 8 bits those would be cut off."""
    path = save(tmp_path / "in.onnx", [node("Gemm", "x w", "y", transB=1)], {"w": weight()}, inputs={"x": (4, 16)})
    data = [{"x": np.full((4, 16), value, np.float32)} for value in (0.0, 0.5, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0)]
    done = quantize_file(path, tmp_path / "out.onnx", data)
    assert (done.floats, done.score) == ((), pytest.approx(1.0, abs=0.01))
    stored = [numpy_helper.to_array(one) for one in onnx.load(done.path).graph.initializer]
    assert max(np.abs(one.astype(int)).max() for one in stored if one.dtype == np.int8 and one.ndim == 2) == 64


def weight():
    """(8, 16), all near its largest number."""
    return np.linspace(0.9, 1.0, 128, dtype=np.float32).reshape(8, 16)


def test_a_shared_bias_beside_a_value_of_the_name_that_its_copy_would_have(tmp_path):
    nodes = [
        node("Conv", "x w0 b", "b1", name="first", pads=[1, 1, 1, 1]),
        node("Conv", "b1 w1 b", "h", name="second", pads=[1, 1, 1, 1]),
        node("Add", "b1 h", "y", name="sum"),
    ]
    weights = {"w0": numbers(8, 3, 3, 3), "w1": numbers(8, 8, 3, 3, seed=1), "b": numbers(8, seed=2)}
    path = save(tmp_path / "in.onnx", nodes, weights, inputs={"x": (1, 3, 12, 12)})
    runs_in_8_bits(path, tmp_path / "out.onnx", calls(8), 2)
    biases = [one.input[2] for one in prepared(path).graph.node if one.op_type == "Conv"]
    assert len({*biases} - {"b1"}) == 2


def test_a_value_that_a_branch_reads_is_rounded_before_it(tmp_path):
    def branch(name, op):
        made = [node(op, "h", f"{name}_y", name=name)]
        return onnx.helper.make_graph(made, name, [], [onnx.helper.make_tensor_value_info(f"{name}_y", 1, None)])

    pick = onnx.helper.make_node(
        "If", ["c"], ["p"], "pick", then_branch=branch("yes", "Relu"), else_branch=branch("no", "Neg")
    )
    nodes = [
        node("Conv", "x w0", "h", name="first", pads=[1, 1, 1, 1]),
        node("Greater", "a zero", "c", name="is_positive"),
        pick,
        node("Conv", "p w1", "y", name="second", pads=[1, 1, 1, 1]),
    ]
    weights = {"w0": numbers(8, 3, 3, 3), "w1": numbers(8, 8, 3, 3, seed=1), "zero": np.zeros((), np.float32)}
    path = save(tmp_path / "in.onnx", nodes, weights, inputs={"x": (1, 3, 12, 12), "a": ()})
    data = [each | {"a": np.array(1, np.float32)} for each in calls(8)]
    runs_in_8_bits(path, tmp_path / "out.onnx", data, 2)
