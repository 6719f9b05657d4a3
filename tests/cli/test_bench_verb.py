"""hodec bench at the shell."""

import json

import numpy as np
import pytest

from hodec.cli import main as cli
from hodec.onnx_graph.bench import bench_files
from hodec.onnx_graph.decompose import decompose_file
from hodec.ranks import Manual

from small_graphs import conv_net, node, numbers, relative, answer, save  # isort: skip


def call(capsys, *argv):
    code = cli.main([str(one) for one in argv])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


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
    x = np.random.default_rng(0).standard_normal((1, 8, 10, 12)).astype("float32")
    assert value["relative"] == pytest.approx(relative(answer(second, x=x)[0], answer(first, x=x)[0]), rel=1e-3)
    code, text, _ = call(capsys, "bench", first, second, "--seconds", "0.1")
    assert "times as fast (one thread" in text


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


@pytest.mark.parametrize(("argv", "reason"), [
    (["in.onnx", "missing.onnx"], "does not exist"),
    (["in.onnx", "in.onnx", "--seconds", "0"], "not a number above 0"),
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
