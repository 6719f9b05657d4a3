"""What a model file is tried on: sizes and values of its inputs, and weights that are 0 in all but name."""

import ml_dtypes
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from hodec.errors import ConfigError, PlanError, Use
from hodec.onnx_graph.decompose import decompose_file
from hodec.onnx_graph.feeds import example_inputs, parse_values
from hodec.onnx_graph.flush import LEAST
from hodec.onnx_graph.graph import load_graph
from hodec.onnx_graph.sizes import input_sizes
from hodec.ranks import Manual
from hodec.ranks.planning import PlanSettings

from small_graphs import FLOAT, answer, conv_net, node, numbers, relative, save  # isort: skip

ANY = PlanSettings(allow_larger=True)


def rates(path, *, scalar=True):
    """A net with a branch for each of two sampling rates, given as a whole number."""
    branches = []
    for rate, stride in ((16000, 2), (8000, 1)):
        weight = numpy_helper.from_array(numbers(16, 8, 3, seed=rate), f"w{rate}")
        inside = [node("Conv", f"x w{rate}", f"y{rate}", name=f"conv{rate}", strides=[stride])]
        ends = [helper.make_tensor_value_info(f"y{rate}", FLOAT, None)]
        branches.append(helper.make_graph(inside, f"at{rate}", [], ends, [weight]))
    rate = helper.make_tensor_value_info("sr", TensorProto.INT64, [] if scalar else [1])
    nodes = [
        node("Equal", "sr high", "is_high"),
        helper.make_node("If", ["is_high"], ["h"], name="rate", then_branch=branches[0], else_branch=branches[1]),
        node("Conv", "h v", "y", name="last"),
    ]
    weights = {"high": np.array(16000), "v": numbers(8, 16, 3)}
    return save(path, nodes, weights, inputs={"x": ("n", 8, "samples")}, extra_inputs=(rate,))


def test_an_axis_of_minus_one_is_open(tmp_path):
    source = conv_net(tmp_path / "in.onnx", inputs={"x": (-1, 8, -1, -1)})
    assert input_sizes(load_graph(source), {}) == {"x": (1, 8, 224, 224)}
    outcome = decompose_file(source, tmp_path / "out.onnx", rule=Manual(4), shapes={"x": (1, 8, 10, 12)})
    assert outcome.difference is not None
    with pytest.raises(ConfigError, match="the model fixes 8 for 7"):
        input_sizes(load_graph(source), {"x": (1, 7, 10, 12)})


def test_values_of_inputs_decide_which_branch_is_decomposed(tmp_path):
    source, out = rates(tmp_path / "in.onnx"), tmp_path / "out.onnx"
    x = np.random.default_rng(0).standard_normal((2, 8, 40)).astype(np.float32)
    costs = {}
    for rate, other in ((16000, 8000), (8000, 16000)):
        outcome = decompose_file(
            source, out, method="svd", rule=Manual(10**6), options=ANY, values={"sr": rate}, force=True
        )
        assert list(outcome.changes) == ["last", f"conv{rate}"]
        assert outcome.plan.skipped == {
            f"conv{other}": "it stands in a branch of If rate, which the example inputs do not take: give others"
        }
        for sr in (rate, other):
            given, wanted = (answer(one, x=x, sr=np.array(sr))[0] for one in (out, source))
            assert relative(given, wanted) < 1e-4
        costs[rate] = outcome.before.macs
    assert costs == {16000: 15 * 16 * 8 * 3 + 13 * 8 * 16 * 3, 8000: 30 * 16 * 8 * 3 + 28 * 8 * 16 * 3}


def test_a_second_call_decomposes_the_other_branch(tmp_path):
    source, half, whole = (rates(tmp_path / "in.onnx"), tmp_path / "half.onnx", tmp_path / "whole.onnx")
    decompose_file(source, half, method="svd", rule=Manual(10**6), options=ANY, values={"sr": 16000})
    settings = PlanSettings(include="conv*", allow_larger=True)
    outcome = decompose_file(half, whole, method="svd", rule=Manual(10**6), options=settings, values={"sr": 8000})
    assert list(outcome.changes) == ["conv8000"]
    x = np.random.default_rng(0).standard_normal((2, 8, 40)).astype(np.float32)
    for sr in (16000, 8000):
        assert relative(*(answer(one, x=x, sr=np.array(sr))[0] for one in (whole, source))) < 1e-4


def test_multiply_adds_after_are_those_of_the_branch_that_runs(tmp_path):
    source, out = rates(tmp_path / "in.onnx"), tmp_path / "out.onnx"
    outcome = decompose_file(source, out, method="svd", rule=Manual(4), values={"sr": 16000})
    assert outcome.uncounted == ()
    assert outcome.after.macs == 15 * 4 * (8 * 3 + 16) + 13 * 4 * (16 * 3 + 8)


def test_an_array_gives_size_and_values(tmp_path):
    source = rates(tmp_path / "in.onnx")
    x = np.ones((2, 8, 9), np.float64)
    sizes, feeds = example_inputs(load_graph(source), {}, {"x": x, "sr": 8000.0})
    assert sizes == {"x": (2, 8, 9), "sr": ()}
    np.testing.assert_array_equal(feeds["x"], x.astype(np.float32))
    assert (feeds["sr"].dtype, feeds["sr"].item()) == (np.int64, 8000)
    np.save(tmp_path / "x.npy", x)
    values = parse_values([f"x={tmp_path / 'x.npy'}", "sr=8000"])
    assert values["sr"] == 8000
    np.testing.assert_array_equal(values["x"], x)


@pytest.mark.parametrize(("values", "reason"), [
    ({"nothing": 1}, "--input nothing=1: the model has no such input; it has x, sr"),
    ({"sr": 0.5}, "--input sr=0.5: the model takes int64 there"),
    ({"x": np.ones((1, 8))}, "--shape x:1,8 has 2 axes, the model's input has 3"),
])  # fmt: skip
def test_values_that_do_not_fit(tmp_path, values, reason):
    with pytest.raises(ConfigError) as error:
        example_inputs(load_graph(rates(tmp_path / "in.onnx")), {}, values)
    assert error.value.told(Use.in_flags) == reason


@pytest.mark.parametrize(("kind", "value"), [
    (TensorProto.INT32, 3_000_000_000), (TensorProto.INT8, 300), (TensorProto.UINT8, -1),
    (TensorProto.INT64, float("nan")), (TensorProto.INT64, 2**63),
])  # fmt: skip
def test_values_that_the_type_of_the_input_does_not_hold_are_refused(tmp_path, kind, value):
    number = helper.make_tensor_value_info("n", kind, ())
    source = save(tmp_path / "in.onnx", [node("MatMul", "x w")], {"w": numbers(8, 8)}, inputs={"x": (1, 8)},
                  extra_inputs=(number,))  # fmt: skip
    with pytest.raises(ConfigError) as error:
        example_inputs(load_graph(source), {}, {"n": value})
    assert f"--input n={value}: the model takes " in error.value.told(Use.in_flags)
    assert example_inputs(load_graph(source), {}, {"n": 44.0, "x": 1e-3})[1]["n"] == 44


@pytest.mark.parametrize("text", ["sr", "=3", "sr=", "sr=fast", "x=missing.npy"])
def test_values_of_another_form(text):
    with pytest.raises(ConfigError, match="--input "):
        parse_values([text])


def test_hints_are_of_each_input_s_own_kind(tmp_path):
    source = tmp_path / "in.onnx"
    nodes = [helper.make_node("Odd", ["x", "sr"], ["h"], domain="own"), node("Conv", "h w", name="first")]
    rate = helper.make_tensor_value_info("sr", TensorProto.INT64, [])
    save(source, nodes, {"w": numbers(16, 8, 3)}, inputs={"x": (1, "n")}, extra_inputs=(rate,), domains=("own",))
    with pytest.raises(PlanError, match=r"not run it on x float32 \(1, 32\), sr int64 = 1: ") as error:
        decompose_file(source, tmp_path / "out.onnx", rule=Manual(4))
    assert error.value.told(Use.in_flags).endswith("Give other inputs with --shape x:1,32 --input sr=1")


@pytest.mark.parametrize("kind", ["float32", "bfloat16"])
def test_weights_that_are_zero_in_all_but_name_become_zero(tmp_path, kind):
    dtype, number = {"float32": (np.float32, FLOAT), "bfloat16": (ml_dtypes.bfloat16, TensorProto.BFLOAT16)}[kind]
    tiny = numbers(16, 16, 3, 3).astype(dtype)
    tiny[3], tiny[4, 0] = 1e-39, -1e-31
    dense, bare = tiny.copy(), np.full((1, 16, 1, 1), 1e-39, dtype)
    nodes = [
        node("Conv", "x w", "h", name="first"),
        node("Conv", "h v", "k", name="second"),
        node("Add", "k bare", "y"),
    ]
    weights = {"w": tiny, "v": dense, "bare": bare}
    source = save(tmp_path / "in.onnx", nodes, weights, inputs={"x": (1, 16, 8, 8)}, dtype=number)
    settings = PlanSettings(include="first", allow_larger=True)
    outcome = decompose_file(source, tmp_path / "out.onnx", method="svd", rule=Manual(4), options=settings)
    written = {one.name: numpy_helper.to_array(one) for one in onnx.load(str(tmp_path / "out.onnx")).graph.initializer}
    for name in ("w.0", "w.1", "v"):
        sizes = np.abs(written[name].astype(np.float64))
        assert not ((sizes > 0) & (sizes < LEAST)).any()
    np.testing.assert_array_equal(written["v"][5:], dense[5:])
    assert (written["bare"] == bare).all()  # it may keep a divisor from 0
    assert any("weights below 1e-30 were set to 0" in remark for remark in outcome.remarks)
    count = int(next(one for one in outcome.remarks if "set to 0" in one).split()[0])
    assert count >= 16 * 9 + 9


def test_small_numbers_of_float16_are_weights_like_others(tmp_path):
    weight = (numbers(16, 8, 3, 3) * 1e-6).astype(np.float16)
    nodes = [node("Conv", "x w", "h", name="first"), node("Conv", "h v", name="second")]
    weights = {"w": weight, "v": numbers(8, 16, 3, 3).astype(np.float16)}
    source = save(tmp_path / "in.onnx", nodes, weights, dtype=TensorProto.FLOAT16)
    settings = PlanSettings(include="second")
    outcome = decompose_file(source, tmp_path / "out.onnx", method="svd", rule=Manual(4), options=settings)
    assert not any("set to 0" in remark for remark in outcome.remarks)
    kept = next(one for one in onnx.load(str(tmp_path / "out.onnx")).graph.initializer if one.name == "w")
    np.testing.assert_array_equal(numpy_helper.to_array(kept), weight)
