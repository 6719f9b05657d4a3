"""hodec bench at the shell."""

import json

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from hodec.onnx_graph.bench import Bench, bench_files, interval
from hodec.onnx_graph.decompose import decompose_file
from hodec.ranks import Manual

from small_graphs import conv_net, node, numbers, relative, answer, save  # isort: skip
from calls import call  # isort: skip


def test_two_models_side_by_side(capsys, tmp_path):
    first, second = conv_net(tmp_path / "in.onnx"), tmp_path / "out.onnx"
    decompose_file(first, second, method="tucker", rule=Manual(4))
    code, text, err = call(capsys, "bench", first, second, "--seconds", "0.2", "--json")
    value = json.loads(text)
    assert (code, err) == (0, "")
    assert value["first_bytes"] > value["second_bytes"] == second.stat().st_size
    assert value["turns"] >= 10
    assert 0 < value["first_ms"] < 1000
    assert value["noise"] >= 0
    assert 0 < value["low"] <= value["speedup"] <= value["high"]
    assert value["threads"] == 1
    x = np.random.default_rng(0).standard_normal((1, 8, 10, 12)).astype("float32")
    assert value["relative"] == pytest.approx(relative(answer(second, x=x)[0], answer(first, x=x)[0]), rel=1e-3)
    code, text, _ = call(capsys, "bench", first, second, "--seconds", "0.1")
    assert "times as fast (one thread" in text
    assert "95 % interval" in text


def test_an_interval_of_steady_turns_is_narrow_and_holds_the_median():
    generator = np.random.default_rng(1)
    ratios, own = (list(1.2 * np.exp(0.1 * generator.standard_normal(400))) for _ in range(2))
    own = [one / np.median(own) for one in own]
    low, high = interval(ratios, own)
    assert low < np.median(ratios) < high
    assert 0.01 < high - low < 0.06  # the median's standard error is 1.253 * 0.1 * 1.2 / 20 = 0.0075


def test_a_machine_that_drifts_and_one_that_prefers_a_place_make_the_interval_wider():
    generator = np.random.default_rng(1)
    steady = np.exp(0.05 * generator.standard_normal(400))
    drift = np.exp(np.repeat(0.2 * generator.standard_normal(8), 50))
    apart = [np.subtract(*interval(ratios, [1.0])[::-1]) for ratios in (list(steady), list(steady * drift))]
    assert apart[1] > 3 * apart[0]
    low, high = interval(list(steady), [1.0])
    wider_low, wider_high = interval(list(steady), [1.1])
    assert (wider_low, wider_high) == pytest.approx((low / 1.1, high * 1.1))


def test_a_ratio_whose_interval_holds_one_is_no_gain():
    made = {"first_ms": 2.0, "second_ms": 1.9, "noise": 0.0, "turns": 10, "difference": 0.0, "relative": 0.0}
    sizes = {"first_bytes": 10, "second_bytes": 9}
    unsure = Bench(speedup=1.05, low=0.98, high=1.1, threads=1, **made, **sizes)
    assert not unsure.is_told
    assert "no difference can be told: 1.05 times as fast (one thread" in str(unsure)
    sure = Bench(speedup=1.05, low=1.01, high=1.1, threads=2, **made, **sizes)
    assert sure.is_told
    assert "ms, 1.05 times as fast (2 threads, 10 turns, 95 % interval 1.01 to 1.10" in str(sure)


def test_two_threads_are_measured_on_the_clock(capsys, tmp_path):
    source = conv_net(tmp_path / "in.onnx")
    code, text, _ = call(capsys, "bench", source, source, "--seconds", "0.1", "--threads", "2")
    assert code == 0
    assert "(2 threads, " in text


def test_a_model_four_times_as_large_takes_longer(tmp_path):
    def net(name, channels):
        nodes = [node("Conv", "x w1", "h", name="a"), node("Conv", "h w2", "y", name="b")]
        weights = {"w1": numbers(channels, 8, 5, 5), "w2": numbers(8, channels, 5, 5)}
        return save(tmp_path / name, nodes, weights, inputs={"x": (1, 8, 40, 40)})

    found = bench_files(net("large", 128), net("small", 16), seconds=0.3)
    assert found.speedup > 2
    assert found.difference > 0
    same = bench_files(tmp_path / "small", tmp_path / "small", seconds=0.3)
    assert same.difference == 0
    assert 0.5 < same.speedup < 2


@pytest.mark.parametrize(("kinds", "words", "difference"), [
    (("ArgMax", "ArgMin"), "outputs differ by at most ", 1), (("ArgMax", "ArgMax"), "outputs differ by at most 0 ", 0),
    (("IsNaN", "IsInf"), "outputs differ by at most 0 ", 0),
    (("SequenceConstruct", "SequenceConstruct"), "outputs that are no arrays of numbers (1) are not compared", None),
])  # fmt: skip
def test_outputs_that_are_no_floating_numbers(tmp_path, kinds, words, difference):
    files = [tmp_path / f"{k}.onnx" for k in range(2)]
    for path, kind in zip(files, kinds, strict=True):
        save(path, [node(kind, "x")], {}, inputs={"x": (3, 7)})
        model = onnx.load(path)
        tensor = model.graph.output[0].type.tensor_type
        tensor.elem_type = {"A": TensorProto.INT64, "I": TensorProto.BOOL, "S": TensorProto.FLOAT}[kind[0]]
        if kind == "SequenceConstruct":
            model.graph.output[0].type.CopyFrom(helper.make_sequence_type_proto(helper.make_tensor_type_proto(1, None)))
        onnx.save(model, path)
    found = bench_files(*files, seconds=0.1)
    assert words in str(found)
    assert found.difference is None if difference is None else found.difference >= difference


@pytest.mark.parametrize(("argv", "reason"), [
    (["in.onnx", "missing.onnx"], "does not exist"),
    (["in.onnx", "in.onnx", "--seconds", "0"], "not a number above 0"),
    (["in.onnx", "in.onnx", "--threads", "0"], "--threads 0 is not a whole number above 0"),
    (["in.onnx", "other.onnx"], "take different inputs"),
])  # fmt: skip
def test_what_cannot_be_compared(capsys, tmp_path, monkeypatch, argv, reason):
    monkeypatch.chdir(tmp_path)
    conv_net(tmp_path / "in.onnx")
    save(tmp_path / "other.onnx", [node("Relu", "z")], {}, inputs={"z": (1, 4)})
    code, out, err = call(capsys, "bench", *argv)
    assert (code, out) == (2, "")
    assert reason in err
    assert err.count("\n") == 1
