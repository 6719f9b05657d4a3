"""Graphs as they come: shared weights, constants, types, versions, subgraphs, open sizes; and what is left alone."""

import json

import ml_dtypes
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from hodec.errors import PlanError
from hodec.onnx_graph.changes import METADATA
from hodec.onnx_graph.decompose import decompose_file
from hodec.plan.plan import Plan
from hodec.ranks import Budget, Energy, Manual, Ratio, Vbmf
from hodec.ranks.planning import PlanSettings

from small_graphs import FLOAT, answer, conv_net, kinds, node, numbers, reference, relative, save  # isort: skip

ANY = PlanSettings(allow_larger=True)


def decompose(source, rule=None, method="tucker", options=ANY, **more):
    out = source.with_name("out.onnx")
    return decompose_file(source, out, method=method, rule=rule or Manual(10**6), options=options, **more), out


def image(batch=3, channels=8, height=10, width=12):
    return np.random.default_rng(1).standard_normal((batch, channels, height, width)).astype("float32")


def same(source, out, tolerance=1e-4, by=answer, **feeds):
    for given, wanted in zip(by(out, **feeds), by(source, **feeds), strict=True):
        assert relative(given, wanted) < tolerance


@pytest.mark.parametrize("rule", [Vbmf(0.5), Energy(0.7), Ratio(0.6), Manual({"first": 4}), Budget(macs=0.6)])
def test_every_rule_that_needs_no_training(tmp_path, rule):
    source = conv_net(tmp_path / "in.onnx")
    outcome, out = decompose(source, rule, options=PlanSettings())
    assert outcome.plan.rule == rule.name
    assert outcome.after.macs < outcome.before.macs
    answer(out, x=image())
    if rule.name == "budget":
        assert outcome.after.macs <= 0.6 * outcome.before.macs
    if rule.name == "manual":
        assert list(outcome.changes) == ["first"]
        assert outcome.plan.skipped["second"] == "no glob of tt_ranks matches it"


def test_an_open_batch_stays_open_and_names_are_kept(tmp_path):
    source = conv_net(tmp_path / "in.onnx")
    _, out = decompose(source)
    model = onnx.load(str(out))
    assert [value.name for value in model.graph.input] == ["x"]
    assert model.graph.input[0].type.tensor_type.shape.dim[0].dim_param == "n"
    names = [one.name for one in model.graph.node]
    assert names[:4] == ["first.0", "first.1", "first.2", "relu"]
    assert {"w1.0", "w1.1", "w1.2", "b1"} <= {one.name for one in model.graph.initializer}
    assert not {"w1", "w2", "w3"} & {one.name for one in model.graph.initializer}
    for batch in (1, 5):
        same(source, out, x=image(batch))


def test_open_sizes_stay_open(tmp_path):
    nodes = [node("Conv", "x w", name="c", pads=[1, 1, 1, 1])]
    sizes = {"x": ("n", 8, "h", "w_")}
    source = save(tmp_path / "in.onnx", nodes, {"w": numbers(16, 8, 3, 3)}, inputs=sizes)
    outcome, out = decompose(
        source,
        method="tt",
        shapes={"x": (1, 8, 20, 30)},
        options=PlanSettings(n_modes=2, execution="chain", allow_larger=True),
    )
    assert outcome.before.macs == 16 * 8 * 9 * 600
    for height, width in ((9, 7), (16, 5)):
        same(source, out, x=image(2, 8, height, width))


def test_the_map_of_changes_is_in_the_file_and_grows(tmp_path):
    source = conv_net(tmp_path / "in.onnx")
    _, out = decompose(source, Manual({"first": 4}))
    notes = {one.key: one.value for one in onnx.load(str(out)).metadata_props}
    value = json.loads(notes[METADATA])
    assert value["layers"]["first"]["nodes"] == ["first.0", "first.1", "first.2"]
    assert value["layers"]["first"]["weights"] == ["w1.0", "w1.1", "w1.2"]
    assert value["layers"]["first"]["ranks"] == [4, 4]
    assert "second" in value["skipped"]
    decompose_file(out, tmp_path / "more.onnx", method="svd", rule=Manual({"second": 4}), options=ANY)
    notes = {one.key: one.value for one in onnx.load(str(tmp_path / "more.onnx")).metadata_props}
    assert list(json.loads(notes[METADATA])["layers"]) == ["first", "second"]


def test_a_plan_can_be_edited_and_fed_back(tmp_path):
    source = conv_net(tmp_path / "in.onnx")
    outcome, out = decompose(source, Manual(6))
    outcome.plan.save(tmp_path / "plan.json")
    plan = Plan.load(tmp_path / "plan.json")
    assert plan == outcome.plan
    first = out.read_bytes()
    decompose_file(source, out, plan=plan, force=True)
    assert out.read_bytes() == first
    again = decompose_file(source, out, plan=plan.replace("first", ranks=(3, 3)).without("head"), force=True)
    assert again.changes["first"].layer.ranks == (3, 3)
    assert "head" not in again.changes


def test_a_plan_of_another_model_is_refused(tmp_path):
    source = conv_net(tmp_path / "in.onnx")
    plan = decompose(source, Manual(6))[0].plan
    other = save(tmp_path / "other.onnx", [node("Conv", "x w", name="frist")], {"w": numbers(16, 8, 3, 3)})
    with pytest.raises(PlanError, match="names node first, which this model lacks.*Did you mean: frist"):
        decompose_file(other, tmp_path / "o.onnx", plan=plan)
    other = save(tmp_path / "other.onnx", [node("Conv", "x w", name="first")], {"w": numbers(8, 8, 3, 3)})
    with pytest.raises(PlanError, match=r"first: the plan is for a conv2d weight \(16, 8, 3, 3\)"):
        decompose_file(other, tmp_path / "o.onnx", plan=plan)
    assert not (tmp_path / "o.onnx").exists()


def test_nodes_that_share_a_weight_share_its_factors(tmp_path):
    nodes = [
        node("Conv", "x w b", "h", name="a", pads=[1, 1, 1, 1]),
        node("Conv", "h w", "y", name="b", pads=[1, 1, 1, 1], strides=[2, 2]),
    ]
    source = save(tmp_path / "in.onnx", nodes, {"w": numbers(8, 8, 3, 3), "b": numbers(8)})
    outcome, out = decompose(source)
    assert list(outcome.plan) == ["a"]
    assert outcome.plan["a"].aliases == ("b",)
    assert set(outcome.changes) == {"a", "b"}
    assert [one.name for one in onnx.load(str(out)).graph.initializer] == ["b", "w.0", "w.1", "w.2"]
    assert outcome.plan["a"].call_sites.out_positions == 10 * 12 + 5 * 6
    assert outcome.after.macs == outcome.plan.macs_after
    same(source, out, x=image())


@pytest.mark.parametrize("other", ["Relu", "output"])
def test_a_weight_that_something_else_reads_is_left_alone(tmp_path, other):
    nodes = [node("Conv", "x w", name="a"), node("Conv", "x v", "z", name="b")]
    nodes += [node("Relu", "w", "r", name="relu")] if other == "Relu" else []
    outputs = ("y", "z", "r" if other == "Relu" else "w")
    weights = {"w": numbers(8, 8, 3, 3), "v": numbers(8, 8, 3, 3)}
    outcome, out = decompose(save(tmp_path / "in.onnx", nodes, weights, outputs=outputs))
    assert list(outcome.changes) == ["b"]
    assert "used in different ways" in outcome.plan.skipped["a"]
    same(tmp_path / "in.onnx", out, x=image())


def test_weights_from_constants_and_from_chains_of_them(tmp_path):
    weight = numbers(3, 3, 16, 8)
    nodes = [
        helper.make_node("Constant", [], ["raw"], value=numpy_helper.from_array(weight)),
        node("Transpose", "raw", "w", perm=[2, 3, 0, 1]),
        node("Identity", "w", "w2"),
        node("Conv", "x w2 b", "h", name="c"),
        node("ConstantOfShape", "size", "ones", value=helper.make_tensor("v", FLOAT, [1], [0.01])),
        node("Conv", "h ones", "y", name="d"),
    ]
    source = save(tmp_path / "in.onnx", nodes, {"b": numbers(16), "size": np.array([8, 16, 3, 3])})
    outcome, out = decompose(source)
    assert set(outcome.changes) == {"c", "d"}
    assert kinds(out) == ["Conv"] * 6  # the chains are gone
    assert outcome.before.params == 16 * 8 * 9 * 2 + 16
    same(source, out, x=image())


@pytest.mark.parametrize("ir", [3, 4])
def test_initializers_that_are_inputs_too(tmp_path, ir):
    """Old files must list them, and they are constants; newer ones say that a caller may replace them."""
    listed = (helper.make_tensor_value_info("w", FLOAT, (16, 8, 3, 3)),)
    nodes = [node("Conv", "x w", "h", name="c"), node("Conv", "h v", "y", name="d")]
    weights = {"w": numbers(16, 8, 3, 3), "v": numbers(8, 16, 3, 3)}
    if ir == 3:
        listed += (helper.make_tensor_value_info("v", FLOAT, (8, 16, 3, 3)),)
    source = save(tmp_path / "in.onnx", nodes, weights, opset=8, ir=ir, extra_inputs=listed)
    outcome, out = decompose(source)
    if ir == 3:
        assert set(outcome.changes) == {"c", "d"}
        assert [one.name for one in onnx.load(str(out)).graph.input] == [
            "x",
            *(f"{w}.{k}" for w in "wv" for k in range(3)),
        ]
    else:
        assert list(outcome.changes) == ["d"]
        assert "also an input of the graph, so a caller may replace it" in outcome.plan.skipped["c"]
    same(source, out, x=image())


def test_weights_that_are_all_listed_as_inputs_are_fixed_and_it_is_said(tmp_path):
    sizes = {"w": (16, 8, 3, 3), "v": (8, 16, 3, 3)}
    listed = tuple(helper.make_tensor_value_info(name, FLOAT, size) for name, size in sizes.items())
    nodes = [node("Conv", "x w", "h", name="c"), node("Conv", "h v", "y", name="d")]
    weights = {name: numbers(*size) for name, size in sizes.items()}
    outcome, out = decompose(save(tmp_path / "in.onnx", nodes, weights, extra_inputs=listed))
    assert set(outcome.changes) == {"c", "d"}
    assert any("listed as inputs" in remark for remark in outcome.remarks)
    same(tmp_path / "in.onnx", out, x=image())


@pytest.mark.parametrize("opset", [7, 9, 11, 13, 15, 18, 20, 22, 24])
@pytest.mark.parametrize("method", ["tucker", "tt"])
def test_versions_of_the_operators(tmp_path, opset, method):
    source = conv_net(tmp_path / "in.onnx", opset=opset, ir=7 if opset < 20 else 10)
    outcome, out = decompose(source, Manual(6), method=method)
    assert outcome.remarks == ()
    assert onnx.load(str(out)).opset_import[0].version == opset
    answer(out, x=image())


def test_the_newest_version_is_read_whatever_onnxruntime_knows(tmp_path):
    newest = onnx.defs.onnx_opset_version()
    outcome, out = decompose(conv_net(tmp_path / "in.onnx", opset=newest, ir=10), Manual(6))
    assert outcome.changes
    assert out.exists()
    assert outcome.difference is not None or "onnxruntime does not run the given model" in outcome.remarks[0]
    assert 0.01 < outcome.changes["first"].error < 1


@pytest.mark.parametrize(("kind", "tolerance"), [("float16", 5e-3), ("float64", 1e-12), ("bfloat16", 5e-2)])
def test_other_floating_types_stay_what_they_are(tmp_path, kind, tolerance):
    dtype = np.dtype(ml_dtypes.bfloat16) if kind == "bfloat16" else np.dtype(kind)
    number = helper.np_dtype_to_tensor_dtype(dtype)
    nodes = [node("Conv", "x w b", "h", name="c"), node("Flatten", "h", "f"), node("Gemm", "f v", "y", name="g")]
    weights = {"w": numbers(16, 8, 3, 3), "b": numbers(16), "v": numbers(16 * 80, 10)}
    weights = {name: array.astype(dtype) for name, array in weights.items()}
    source = save(tmp_path / "in.onnx", nodes, weights, dtype=number, inputs={"x": (1, 8, 10, 12)}, opset=22, ir=10)
    outcome, out = decompose(source, Manual(10**6))
    assert set(outcome.changes) == {"c", "g"}
    assert {one.data_type for one in onnx.load(str(out)).graph.initializer} == {number}
    same(source, out, tolerance, reference, x=image(1).astype(dtype))


def test_branches_are_decomposed_where_they_stand(tmp_path):
    branch = helper.make_graph(
        [node("Conv", "h inner", "t", name="inside")], "then", [],
        [helper.make_tensor_value_info("t", FLOAT, None)], [numpy_helper.from_array(numbers(8, 16, 1, 1), "inner")],
    )  # fmt: skip
    other = helper.make_graph(
        [node("Conv", "h w2", "e", name="else")], "else", [], [helper.make_tensor_value_info("e", FLOAT, None)]
    )
    nodes = [
        node("Conv", "x w1", "h", name="c"),
        node("Conv", "h w2", "z", name="d"),
        helper.make_node("If", ["yes"], ["y"], then_branch=branch, else_branch=other),
    ]
    weights = {"w1": numbers(16, 8, 3, 3), "w2": numbers(8, 16, 1, 1), "yes": np.array(True)}
    source = save(tmp_path / "in.onnx", nodes, weights, outputs=("y", "z"))
    outcome, out = decompose(source)
    assert list(outcome.changes) == ["c", "inside"]
    assert "shared with else: it stands in a branch of If" in outcome.plan.skipped["d"]
    branches = {one.name: one.g for one in onnx.load(str(out)).graph.node[-1].attribute}
    then, other = branches["then_branch"], branches["else_branch"]
    assert [one.name for one in then.initializer] == ["inner.0", "inner.1", "inner.2"]
    assert [one.name for one in then.node] == ["inside.0", "inside.1", "inside.2"]
    assert [one.name for one in other.node] == ["else"]
    same(source, out, x=image())
    macs = {name: layer.macs_before for name, layer in outcome.plan.items()}
    assert outcome.before.macs == macs["c"] + macs["inside"] + 8 * 10 * 8 * 16


def test_a_model_that_onnxruntime_cannot_run_is_checked_layer_by_layer(tmp_path):
    nodes = [
        node("Conv", "x w", "h", name="c"),
        node("Twist", "h", "t", name="twist", domain="some.where"),
        node("Conv", "t v", "y", name="d"),
    ]
    weights = {"w": numbers(16, 8, 3, 3), "v": numbers(8, 16, 3, 3)}
    source = tmp_path / "in.onnx"
    graph = helper.make_graph(
        nodes, "g", [helper.make_tensor_value_info("x", FLOAT, ("n", 8, 10, 12))],
        [helper.make_tensor_value_info("y", FLOAT, ("n", 8, 6, 8))],
        [numpy_helper.from_array(array, name) for name, array in weights.items()],
    )  # fmt: skip
    imports = [helper.make_opsetid("", 17), helper.make_opsetid("some.where", 1)]
    source.write_bytes(helper.make_model(graph, opset_imports=imports, ir_version=8).SerializeToString())
    outcome, out = decompose(source)
    assert list(outcome.changes) == ["c"]
    assert "sizes of its input and output are not known" in outcome.plan.skipped["d"]
    assert outcome.difference is None
    assert "only the replaced layers were checked" in outcome.remarks[0]
    assert kinds(out) == ["Conv"] * 3 + ["Twist", "Conv"]


def test_sizes_that_inference_cannot_tell_are_measured(tmp_path):
    nodes = [
        node("Conv", "x w", "h", name="c"),
        node("ReduceMax", "x", "m", keepdims=0),
        node("Cast", "m", "i", to=TensorProto.INT64),  # depends on the numbers in x
        node("Clip", "i low low", "one"),
        node("Unsqueeze", "one zero", "times"),
        node("Concat", "times three", "reps", axis=0),
        node("Tile", "h reps", "big"),
        node("Conv", "big v", "y", name="d"),
    ]
    weights = {
        "w": numbers(16, 8, 3, 3), "v": numbers(8, 16, 3, 3), "low": np.array(2), "zero": np.array([0]),
        "three": np.array([1, 1, 2]),
    }  # fmt: skip
    source = save(tmp_path / "in.onnx", nodes, weights, inputs={"x": (1, 8, 10, 12)})
    outcome, out = decompose(source)
    assert outcome.plan["d"].call_sites.calls == ((2, (8, 20), (6, 18)),)
    same(source, out, x=image(1))
    # what stands for d is counted too, though inference cannot tell its sizes within the file
    outcome, _ = decompose(source, Manual(4), force=True)
    assert outcome.after.macs == outcome.plan.macs_after
    assert outcome.uncounted == ()


def test_nodes_whose_multiply_adds_are_not_known_are_named(tmp_path):
    branch = helper.make_graph(
        [node("Conv", "t v", "e", name="inside")], "then", [], [helper.make_tensor_value_info("e", FLOAT, None)]
    )
    nodes = [
        node("Conv", "x w", "h", name="c"),
        node("Twist", "h", "t", name="twist", domain="some.where"),
        node("Conv", "t v", "y", name="d"),
        helper.make_node("If", ["yes"], ["z"], name="if", then_branch=branch, else_branch=branch),
    ]
    weights = {"w": numbers(16, 8, 3, 3), "v": numbers(8, 16, 3, 3), "yes": np.array(True)}
    source = save(tmp_path / "in.onnx", nodes, weights, domains=("some.where",))
    for value in (model := onnx.load(str(source))).graph.output:
        value.type.tensor_type.shape.SetInParent()
    source.write_bytes(model.SerializeToString())
    outcome, _ = decompose(source, Manual(4))
    assert outcome.uncounted == ("twist", "d", "if")
    assert (outcome.before.macs, outcome.after.macs) == (outcome.plan["c"].macs_before, outcome.plan["c"].macs_after)


REFUSED = {
    "depthwise": (
        node("Conv", "x w", name="c", group=8),
        {"w": numbers(8, 1, 3, 3)},
        "depthwise convolution (group=8)",
    ),
    "grouped": (
        node("ConvTranspose", "x w", name="c", group=2),
        {"w": numbers(8, 4, 3, 3)},
        "method tucker has no layer for a grouped ConvTranspose (group=2)",
    ),
    "computed": (
        node("Conv", "x r", name="c"),
        {"w": numbers(8, 8, 3, 3)},
        "computed by Relu, so it is not a constant",
    ),
    "nan": (node("Conv", "x w", name="c"), {"w": np.full((8, 8, 3, 3), np.nan, np.float32)}, "holds NaN or Inf"),
    "stack": (node("MatMul", "x w", name="c"), {"w": numbers(8, 12, 5)}, "no layer type has such"),
    "quantized": (node("Conv", "x q", name="c"), {"w": numbers(8, 8, 3, 3)}, "quantized (DequantizeLinear)"),
}


@pytest.mark.parametrize("which", REFUSED)
def test_what_cannot_be_decomposed_is_left_with_the_reason(tmp_path, which):
    layer, weights, reason = REFUSED[which]
    before = {"computed": [node("Relu", "w", "r")], "quantized": [
        node("QuantizeLinear", "w s", "i"), node("DequantizeLinear", "i s", "q")]}.get(which, [])  # fmt: skip
    weights = {**weights, "v": numbers(16, 8, 3, 3), **({"s": np.float32(0.1)} if which == "quantized" else {})}
    nodes = [*before, layer, node("Conv", "x v", "z", name="good")]
    source = save(tmp_path / "in.onnx", nodes, weights, outputs=("y", "z"))
    outcome, out = decompose(source)
    assert list(outcome.changes) == ["good"]
    assert reason in outcome.plan.skipped["c"]
    if which != "nan":
        same(source, out, x=image())


def test_quantized_operators_are_refused_with_the_reason(tmp_path):
    nodes = [node("ConvInteger", "x w", name="q")]
    weights = {"w": np.ones((8, 8, 3, 3), np.uint8)}
    graph = helper.make_graph(
        nodes, "g", [helper.make_tensor_value_info("x", TensorProto.UINT8, (1, 8, 10, 12))],
        [helper.make_tensor_value_info("y", TensorProto.INT32, (1, 8, 8, 10))],
        [numpy_helper.from_array(array, name) for name, array in weights.items()],
    )  # fmt: skip
    source = tmp_path / "in.onnx"
    imports = [helper.make_opsetid("", 17)]
    source.write_bytes(helper.make_model(graph, opset_imports=imports, ir_version=8).SerializeToString())
    with pytest.raises(
        PlanError, match=r"no layer is left.*ConvInteger q, 0.0% of the parameters: it is quantized \(ConvInteger\)"
    ):
        decompose(source)


def test_names_that_are_taken_or_missing(tmp_path):
    nodes = [
        node("Conv", "x w", "h"),
        node("Conv", "h w.0", "h.0", name="h"),
        node("Conv", "h.0 v", "y", name="h"),
    ]
    weights = {"w": numbers(16, 8, 3, 3), "w.0": numbers(8, 16, 3, 3), "v": numbers(8, 8, 3, 3)}
    source = save(tmp_path / "in.onnx", nodes, weights)
    outcome, out = decompose(source)
    assert list(outcome.plan) == ["h", "h#2", "h#3"]
    graph = onnx.load(str(out)).graph
    assert len({one.name for one in graph.initializer}) == len({one.name for one in graph.node}) == 9
    same(source, out, 1e-4, reference, x=image())  # onnxruntime refuses nodes of the same name
