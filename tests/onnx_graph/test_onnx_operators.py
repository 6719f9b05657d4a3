"""Operators beside plain convolutions and products: groups, tables, Einsum, leading axes, recurrent weights."""

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from hodec.errors import PlanError, Use
from hodec.onnx_graph.decompose import decompose_file, plan_file
from hodec.ranks import Budget, Manual
from hodec.ranks.planning import PlanSettings

from small_graphs import FLOAT, answer, conv_net, kinds, node, numbers, relative, save  # isort: skip

ANY = PlanSettings(allow_larger=True)


def decomposed(source, method="svd", rule=None, **more):
    """What came of it, and the outputs of both files on the same inputs."""
    out = source.with_name("out.onnx")
    options = more.pop("options", ANY)
    return decompose_file(source, out, method=method, rule=rule or Manual(10**6), options=options, **more), out


@pytest.mark.parametrize("method", ["svd", "weight_svd", "spatial_svd", "tucker", "tt", "cp", "cp3"])
def test_a_grouped_convolution_is_decomposed_group_by_group(tmp_path, method):
    rng = np.random.default_rng(0)
    per_group = np.stack([  # three groups of rank 2 in every sense: outer products of two terms
        np.einsum("ro,ri,rh,rw->oihw", *(rng.standard_normal((2, n)) for n in (8, 4, 3, 3))) for _ in range(3)
    ])  # fmt: skip
    weights = {"w": per_group.reshape(24, 4, 3, 3).astype(np.float32), "b": numbers(24)}
    nodes = [node("Conv", "x w b", "y", name="c", group=3, pads=[1, 0, 1, 0], strides=[2, 1])]
    source = save(tmp_path / "in.onnx", nodes, weights, inputs={"x": ("n", 12, 9, 10)})
    # CP of rank 2 meets such tensors only to its own tolerance
    rank, tolerance = (2, 5e-2) if method.startswith("cp") else (4, 1e-4)
    outcome, out = decomposed(source, method, Manual(rank))
    assert outcome.plan["c"].groups == 3
    x = rng.standard_normal((2, 12, 9, 10)).astype(np.float32)
    assert relative(answer(out, x=x)[0], answer(source, x=x)[0]) < tolerance
    assert outcome.after.macs == outcome.plan.macs_after
    attributes = [{one.name: one.i for one in made.attribute} for made in onnx.load(str(out)).graph.node]
    assert all(one["group"] % 3 == 0 for one in attributes)
    again, _ = decomposed(source, method, plan=outcome.plan, force=True)
    assert again.changes == outcome.changes


def test_a_table_becomes_a_narrow_one_and_a_product(tmp_path):
    table = (numbers(50, 4) @ numbers(4, 24, seed=1)).astype(np.float32)
    nodes = [node("Gather", "table ids", "h", name="words"), node("Relu", "h", "y")]
    ids = helper.make_tensor_value_info("ids", TensorProto.INT64, ("n", 7))
    unused = {"x": ("n", 1)}
    source = save(tmp_path / "in.onnx", nodes, {"table": table}, inputs=unused, extra_inputs=(ids,))
    outcome, out = decomposed(source, rule=Manual(4), options=PlanSettings())
    assert kinds(out) == ["Gather", "MatMul", "Relu"]
    feeds = {"x": np.zeros((3, 1), np.float32), "ids": np.random.default_rng(0).integers(50, size=(3, 7))}
    assert relative(answer(out, **feeds)[0], answer(source, **feeds)[0]) < 1e-5
    assert (outcome.before.params, outcome.after.params) == (50 * 24, 4 * (50 + 24))
    assert (outcome.before.macs, outcome.after.macs) == (0, 7 * 4 * 24)


def test_a_budget_of_multiply_adds_leaves_tables_alone(tmp_path):
    nodes = [node("Gather", "table ids", "h", name="words"), node("MatMul", "h w", "y", name="m")]
    ids = helper.make_tensor_value_info("ids", TensorProto.INT64, ("n", 7))
    weights = {"table": numbers(50, 24), "w": numbers(24, 24, seed=1)}
    source = save(tmp_path / "in.onnx", nodes, weights, inputs={"x": ("n", 1)}, extra_inputs=(ids,))
    outcome, _ = decomposed(source, rule=Budget(macs=0.5), options=PlanSettings())
    assert list(outcome.changes) == ["m"]


@pytest.mark.parametrize(("equation", "shape", "axes"), [
    ("bsd,dh->bsh", (12, 20), 3), ("bsd,hd->bsh", (20, 12), 3), ("ij, jk -> ik", (12, 20), 2),
    ("abcd,de->abce", (12, 20), 4),
])  # fmt: skip
def test_an_einsum_that_is_a_plain_product(tmp_path, equation, shape, axes):
    size = (2, 3, 5, 12)[4 - axes :]
    nodes = [node("Einsum", "x w", "y", name="e", equation=equation)]
    source = save(tmp_path / "in.onnx", nodes, {"w": numbers(*shape)}, inputs={"x": size})
    outcome, out = decomposed(source)
    assert kinds(out) == ["MatMul", "MatMul"]
    x = np.random.default_rng(0).standard_normal(size).astype(np.float32)
    assert relative(answer(out, x=x)[0], answer(source, x=x)[0]) < 1e-4
    assert outcome.plan["e"].shape == (20, 12)


@pytest.mark.parametrize("equation", ["ij,ij->ij", "ij,jk->ki", "ij,kj->i"])
def test_other_einsums_stay_with_the_reason(tmp_path, equation):
    shape = {"ij,ij->ij": (12, 12), "ij,jk->ki": (12, 20), "ij,kj->i": (20, 12)}[equation]
    nodes = [node("Einsum", "x w", "h", name="e", equation=equation), node("MatMul", "x v", "z", name="m")]
    weights = {"w": numbers(*shape), "v": numbers(12, 20, seed=1)}
    source = save(tmp_path / "in.onnx", nodes, weights, inputs={"x": (12, 12)}, outputs=("h", "z"))
    outcome, _ = decomposed(source)
    assert outcome.plan.skipped["e"].startswith("an Einsum that is no plain product")
    assert outcome.plan.skipped_costs["e"][0] == np.prod(shape)


@pytest.mark.parametrize(("words", "shape", "size"), [
    ("x w", (1, 12, 20), (5, 12)), ("x w", (1, 1, 12, 20), (2, 5, 12)), ("w x", (1, 20, 12), (12, 5)),
    ("x w", (1, 12, 20), (2, 3, 5, 12)),
])  # fmt: skip
@pytest.mark.parametrize("method", ["svd", "tt"])
def test_products_with_leading_axes_of_one(tmp_path, words, shape, size, method):
    nodes = [node("MatMul", words, "h", name="m"), node("MatMul", "h v", "y", name="n")]
    weights = {"w": numbers(*shape), "v": numbers(20 if words == "x w" else 5, 6, seed=1)}
    source = save(tmp_path / "in.onnx", nodes, weights, inputs={"x": size})
    settings = PlanSettings(allow_larger=True, execution="chain" if method == "tt" else "auto")
    outcome, out = decomposed(source, method, options=settings)
    assert ("m" in outcome.changes) == (method == "svd" or len(size) >= len(shape))
    if "m" not in outcome.changes:
        assert "would drop the axes" in outcome.plan.skipped["m"]
    x = np.random.default_rng(0).standard_normal(size).astype(np.float32)
    assert relative(answer(out, x=x)[0], answer(source, x=x)[0]) < 1e-4


@pytest.mark.parametrize("opset", [7, 9, 10])
def test_a_tensor_train_of_a_product_in_old_versions_of_the_operators(tmp_path, opset):
    source = save(
        tmp_path / "in.onnx", [node("MatMul", "x w", "y", name="m")], {"w": numbers(16, 16)},
        inputs={"x": ("n", 5, 16)}, opset=opset,
    )  # fmt: skip
    outcome, out = decomposed(source, "tt", options=PlanSettings(allow_larger=True, execution="chain"))
    assert "m" in outcome.changes
    x = np.random.default_rng(0).standard_normal((2, 5, 16)).astype(np.float32)
    assert relative(answer(out, x=x)[0], answer(source, x=x)[0]) < 1e-4


RECURRENT = {"LSTM": 4, "GRU": 3, "RNN": 1}


def recurrent_net(path, kind, directions, rank=None):
    """A recurrent node whose weights have this rank, and a product."""
    hidden, gates = 16, RECURRENT[kind]
    shapes = {"w": (directions, gates * hidden, 12), "r": (directions, gates * hidden, hidden)}
    weights = {}
    for name, (d, rows, columns) in shapes.items():
        k = rank or min(d * rows, columns)
        weights[name] = (numbers(d * rows, k) @ numbers(k, columns, seed=1)).reshape(d, rows, columns)
    words = "bidirectional" if directions == 2 else "forward"
    nodes = [
        node(kind, "x w r", "h", name="memory", hidden_size=hidden, direction=words),
        node("MatMul", "h v", "y", name="m"),
    ]
    return save(path, nodes, {**weights, "v": numbers(16, 16, seed=2)}, inputs={"x": (5, 1, 12)})


@pytest.mark.parametrize("directions", [1, 2])
@pytest.mark.parametrize("kind", RECURRENT)
def test_recurrent_weights_are_products_that_the_runtime_multiplies_out(tmp_path, kind, directions):
    source = recurrent_net(tmp_path / "in.onnx", kind, directions, rank=3)
    outcome, out = decomposed(source, rule=Manual(3), options=PlanSettings(include="memory.*"))
    assert kinds(out) == ["MatMul", "MatMul", kind, "MatMul"]
    x = np.random.default_rng(0).standard_normal((5, 1, 12)).astype(np.float32)
    assert relative(answer(out, x=x)[0], answer(source, x=x)[0]) < 1e-4
    rows = directions * RECURRENT[kind] * 16
    assert outcome.before.macs == outcome.after.macs == 5 * (rows * (12 + 16) + directions * 16 * 16), "of 5 steps"
    assert outcome.before.params - outcome.after.params == rows * (12 + 16) - 3 * (2 * rows + 12 + 16)
    again, _ = decomposed(source, plan=outcome.plan, force=True)
    assert again.changes == outcome.changes


def test_costs_say_of_which_part_of_a_call_they_are(tmp_path):
    """The first axis counts images; that of what a recurrent node reads counts steps, and the second one sequences."""
    save(tmp_path / "m.onnx", [node("MatMul", "x v", "y", name="m")], {"v": numbers(64, 64)}, inputs={"x": (16, 64)})
    outcome, _ = decomposed(tmp_path / "m.onnx", rule=Manual(8))
    assert outcome.costs()[1].startswith("multiply-adds of one of 16 along the first axis: 4,096 -> ")
    outcome, _ = decomposed(recurrent_net(tmp_path / "in.onnx", "LSTM", 1), rule=Manual(3), force=True)
    assert outcome.costs()[1].startswith("multiply-adds: ")


def test_a_recurrent_weight_is_no_tensor_train(tmp_path):
    outcome, _ = decomposed(
        recurrent_net(tmp_path / "in.onnx", "LSTM", 1), method="tucker", rule=Budget(macs=0.9, round_to=1)
    )
    assert list(outcome.changes) == ["m"]
    source = recurrent_net(tmp_path / "in.onnx", "LSTM", 1)
    outcome, _ = decomposed(source, method="tt", options=PlanSettings(allow_larger=True, execution="chain"), force=True)
    assert "needs its weight whole" in outcome.plan.skipped["memory.R"]


def looped(path, *, times, inner=None):
    """A net that puts its input through one convolution so many times, and a Mul beside it."""
    steps = [node("Identity", "on", "on_again"), node("Conv", "k q", "k_next", name="inside", pads=[1, 1])]
    if inner is not None:
        steps[1:] = [
            node("Conv", "k q", "k_half", name="inside", pads=[1, 1]),
            helper.make_node("Loop", ["inner", "", "k_half"], ["k_next"], name="deeper", body=inner),
        ]
    body = helper.make_graph(
        steps, "body",
        [helper.make_tensor_value_info("step", TensorProto.INT64, []),
         helper.make_tensor_value_info("on", TensorProto.BOOL, []), helper.make_tensor_value_info("k", FLOAT, None)],
        [helper.make_tensor_value_info("on_again", TensorProto.BOOL, []),
         helper.make_tensor_value_info("k_next", FLOAT, None)],
    )  # fmt: skip
    nodes = [
        node("Mul", "x w", "h", name="scale"),
        helper.make_node("Loop", ["times", "", "x"], ["y"], name="again", body=body),
    ]
    weights = {"w": numbers(8, 12), "q": numbers(8, 8, 3), "times": np.array(times), "inner": np.array(2)}
    return save(path, nodes, weights, inputs={"x": (1, 8, 12)}, outputs=("y", "h"))


def test_convolutions_in_loops_are_decomposed_and_counted_turn_by_turn(tmp_path):
    source = looped(tmp_path / "in.onnx", times=5)
    outcome, out = decomposed(source, rule=Manual(4), options=PlanSettings())
    assert list(outcome.changes) == ["inside"]
    assert outcome.before.macs == 5 * 12 * 8 * 8 * 3
    assert outcome.after.macs == outcome.plan.macs_after == 5 * 12 * (4 * 8 * 3 + 8 * 4)
    assert outcome.uncounted == ()
    exact, _ = decomposed(source, force=True)
    assert exact.difference < 1e-4
    body = onnx.load(str(out)).graph.node[-1].attribute[0].g
    assert [one.op_type for one in body.node] == ["Identity", "Conv", "Conv"]


def test_loops_in_loops(tmp_path):
    deeper = helper.make_graph(
        [node("Identity", "on2", "on2_again"), node("Conv", "m q2", "m_next", name="deep", pads=[1, 1])], "deeper",
        [helper.make_tensor_value_info("step2", TensorProto.INT64, []),
         helper.make_tensor_value_info("on2", TensorProto.BOOL, []), helper.make_tensor_value_info("m", FLOAT, None)],
        [helper.make_tensor_value_info("on2_again", TensorProto.BOOL, []),
         helper.make_tensor_value_info("m_next", FLOAT, None)],
        [numpy_helper.from_array(numbers(8, 8, 3, seed=4), "q2")],
    )  # fmt: skip
    source = looped(tmp_path / "in.onnx", times=3, inner=deeper)
    outcome, _ = decomposed(source)
    assert set(outcome.changes) == {"inside", "deep"}
    assert outcome.before.macs == (3 + 3 * 2) * 12 * 8 * 8 * 3
    assert outcome.after.macs == outcome.plan.macs_after
    assert outcome.difference < 1e-4


def test_what_a_file_holds_is_named_where_nothing_can_be_decomposed(tmp_path):
    source = looped(tmp_path / "in.onnx", times=3)
    model = onnx.load(str(source))
    (inside,) = (one for one in model.graph.node[1].attribute[0].g.node if one.name == "inside")
    inside.input[1] = "k"
    onnx.save(model, str(source))
    with pytest.raises(PlanError) as error:
        decomposed(source, options=PlanSettings(), method="svd")
    assert "the model holds Mul scale, 100.0% of the parameters" in str(error.value)


def quantized_net(path, kind):
    """The small net after onnxruntime's static quantization."""
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, quantize_static

    class Reader(CalibrationDataReader):
        def __init__(self):
            generator = np.random.default_rng(0)
            self.left = [{"x": generator.standard_normal((1, 8, 10, 12)).astype(np.float32)} for _ in range(8)]

        def get_next(self):
            return self.left.pop() if self.left else None

    source = conv_net(path.with_name("float.onnx"), inputs={"x": (1, 8, 10, 12)})
    quantize_static(str(source), str(path), Reader(), quant_format=getattr(QuantFormat, kind), per_channel=True)
    return source


@pytest.mark.filterwarnings("ignore")
def test_a_quantized_file_is_decomposed_as_the_float_one(tmp_path):
    exact, source = quantized_net(tmp_path / "in.onnx", "QDQ"), tmp_path / "in.onnx"
    with pytest.raises(PlanError, match="DequantizeLinear.*take quantization out first"):
        decomposed(source)
    outcome, out = decomposed(source, rule=Manual(10**6), dequantized=True)
    assert set(outcome.changes) == {"first", "second", "head"}
    assert any("float now" in remark for remark in outcome.remarks)
    assert not {"QuantizeLinear", "DequantizeLinear"} & set(kinds(out))
    x = np.random.default_rng(3).standard_normal((1, 8, 10, 12)).astype(np.float32)
    (dense,) = answer(exact, x=x)
    assert relative(answer(out, x=x)[0], dense) < 0.03  # the rounding of the weights stays
    assert relative(answer(source, x=x)[0], dense) < 0.4  # 0.2 or less where the CPU sums int8 products exactly


@pytest.mark.filterwarnings("ignore")
def test_a_file_that_is_not_of_the_qdq_kind_cannot_be_dequantized(tmp_path):
    exact = quantized_net(tmp_path / "in.onnx", "QOperator")
    with pytest.raises(PlanError, match="not of the QDQ kind"):
        decomposed(exact, dequantized=True)


def test_a_budget_of_milliseconds_is_not_that_of_a_file_whose_quantization_is_taken_out(tmp_path):
    source, rule = conv_net(tmp_path / "in.onnx"), Budget(latency_ms=1.0)
    for refused in (lambda: decomposed(source, rule=rule, dequantized=True),
                    lambda: plan_file(source, rule, method="svd", dequantized=True)):  # fmt: skip
        with pytest.raises(PlanError, match="timed as its file is, quantized") as error:
            refused()
        assert error.value.told(Use.in_flags).startswith("--latency-ms 1.0: ")


def test_a_function_that_multiplies_is_written_out_where_it_is_called(tmp_path):
    body = [node("Conv", "a b", "c", name="inside", pads=[1, 1, 1, 1]), node("Relu", "c", "d")]
    block = helper.make_function("own", "block", ["a", "b"], ["d"], body, [helper.make_opsetid("", 17)])
    nodes = [
        helper.make_node("block", ["x", "w"], ["h"], domain="own"),
        helper.make_node("block", ["h", "v"], ["y"], domain="own"),
    ]
    weights = {"w": numbers(16, 8, 3, 3), "v": numbers(8, 16, 3, 3)}
    source = save(tmp_path / "in.onnx", nodes, weights, inputs={"x": (1, 8, 10, 12)}, domains=("own",))
    model = onnx.load(str(source))
    model.functions.append(block)
    model.graph.output[0].CopyFrom(helper.make_tensor_value_info("y", FLOAT, (1, 8, 10, 12)))
    onnx.save(model, str(source))
    outcome, out = decomposed(source)
    assert len(outcome.changes) == 2
    x = np.random.default_rng(0).standard_normal((1, 8, 10, 12)).astype(np.float32)
    assert relative(answer(out, x=x)[0], answer(source, x=x)[0]) < 1e-4


def test_layers_in_a_scan_stay_with_the_reason(tmp_path):
    body = helper.make_graph(
        [node("MatMul", "one w", "out", name="inside")], "body",
        [helper.make_tensor_value_info("one", FLOAT, (4, 12))], [helper.make_tensor_value_info("out", FLOAT, None)],
    )  # fmt: skip
    nodes = [
        helper.make_node("Scan", ["x"], ["y"], name="walk", body=body, num_scan_inputs=1),
        node("MatMul", "y v", "z", name="m"),
    ]
    weights = {"w": numbers(12, 20), "v": numbers(20, 20, seed=1)}
    source = save(tmp_path / "in.onnx", nodes, weights, inputs={"x": (5, 4, 12)}, outputs=("z",))
    outcome, _ = decomposed(source)
    assert outcome.plan.skipped == {"inside": "it stands in the body of Scan walk: those stay as they are"}
    assert outcome.uncounted == ("walk",)


def test_a_loop_that_does_not_turn(tmp_path):
    with pytest.raises(PlanError, match="body of Loop again, which does not run on the example inputs"):
        decomposed(looped(tmp_path / "in.onnx", times=0))


@pytest.mark.parametrize("method", ["tt_classical"])
def test_a_method_without_plain_nodes_is_refused_with_the_reason(tmp_path, method):
    with pytest.raises(
        PlanError,
        match="Conv first and 1 more, 95.3% of the parameters: method tt_classical: its layer is no chain",
    ):
        decomposed(conv_net(tmp_path / "in.onnx"), method=method)


def test_a_model_without_layers_says_so(tmp_path):
    source = save(tmp_path / "in.onnx", [node("Relu", "x")], {})
    with pytest.raises(PlanError, match="no layer is left to decompose; the model holds no parameters"):
        decomposed(source)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.onnx"]


def test_output_shape_shared_out_is_refused_with_the_reason(tmp_path):
    nodes = [node("ConvTranspose", "x w", name="c", output_shape=[21, 25], strides=[2, 2])]
    source = save(tmp_path / "in.onnx", nodes, {"w": numbers(8, 8, 3, 3)}, inputs={"x": (1, 8, 10, 12)})
    with pytest.raises(PlanError, match="output_shape cannot be shared out"):
        decomposed(source, method="spatial_svd")
