"""hodec plan of a model file: a preview that writes nothing but the plan."""

import json

import onnx
import pytest

from hodec.plan.plan import Plan

from small_graphs import conv_net, node, numbers, save  # isort: skip
from calls import call  # isort: skip


def named(path, name):
    """The small net with another name for its first node."""
    model = onnx.load(str(conv_net(path)))
    model.graph.node[0].name = name
    onnx.save(model, str(path))
    return path


def test_a_preview_is_what_decompose_then_does(capsys, tmp_path):
    source, plan, out = conv_net(tmp_path / "in.onnx"), tmp_path / "plan.json", tmp_path / "out.onnx"
    how = ("--method", "tucker", "--macs", "0.6", "--shape", "x:1,8,10,12")
    code, text, err = call(capsys, "plan", source, *how)
    assert (code, err) == (0, "")
    assert "Plan by rule budget" in text
    assert [one.name for one in tmp_path.iterdir()] == ["in.onnx"]
    code, text, _ = call(capsys, "plan", source, *how, "-o", plan)
    assert code == 0
    assert text.endswith(f"  hodec decompose {source} -o small.onnx --plan {plan}\n")
    assert call(capsys, "decompose", source, "-o", out, "--plan", plan)[0] == 0
    again = json.loads(call(capsys, "decompose", source, "-o", out, *how, "--force", "--json")[1])
    assert {name: one["ranks"] for name, one in again["changes"].items()} == {
        name: list(one.ranks) for name, one in Plan.load(plan).items()
    }
    assert again["macs"][1] == Plan.load(plan).macs_after


def test_the_costs_of_what_stays_dense_are_in_the_plan(capsys, tmp_path):
    nodes = [node("Conv", "x w", "h", name="c"), node("Conv", "h v", "k", name="d", group=8), node("Mul", "k s", "y")]
    weights = {"w": numbers(8, 8, 3, 3), "v": numbers(8, 1, 3, 3), "s": numbers(1, 8, 1, 1)}
    source = save(tmp_path / "in.onnx", nodes, weights, inputs={"x": (1, 8, 10, 12)})
    plan = json.loads(call(capsys, "plan", source, "--method", "svd", "--ranks", "4", "--json")[1])
    assert plan["skipped_costs"] == {"d": [72, 6 * 8 * 72]}
    assert plan["other"] == {"Mul": 8}


def test_long_names_are_cut_in_the_text_and_whole_in_json(capsys, tmp_path):
    name = "/".join(["StatefulPartitionedCall/model/block"] * 10) + "/conv_a"
    source, out = named(tmp_path / "in.onnx", name), tmp_path / "out.onnx"
    how = ("--method", "tucker", "--ranks", "4")
    for argv in (["plan", source, *how], ["decompose", source, "-o", out, *how], ["show", out]):
        code, text, _ = call(capsys, *argv)
        assert code == 0
        assert name not in text
        assert text.count("StatefulPartition") == 1
        assert argv[0] == "plan" or "/conv_a" in text  # a table folds it
    assert name in json.loads(call(capsys, "plan", source, *how, "--json")[1])["layers"]
    assert name in json.loads(call(capsys, "show", out, "--json")[1])["layers"]


def test_names_that_differ_in_the_middle_only_are_told_apart(capsys, tmp_path):
    source = named(tmp_path / "in.onnx", "a" * 100 + "1" + "b" * 100)
    model = onnx.load(str(source))
    model.graph.node[2].name = "a" * 100 + "2" + "b" * 100
    onnx.save(model, str(source))
    code, text, _ = call(capsys, "plan", source, "--method", "tucker", "--ranks", "4")
    assert code == 0
    assert "2 layers" in text or "3 layers" in text


@pytest.mark.parametrize(("more", "reason"), [
    (["--model", "resnet20"], "in.onnx and --model resnet20 are given; allowed: one of MODEL.onnx and --model NAME"),
    (["--weights", "w.pt"], "--weights goes with --model NAME only"),
    (["--image-size", "9"], "--image-size goes with --model NAME only"),
    (["--input", "x=y"], "--input 'x=y': 'y' is neither a number nor the name of an .npy file"),
    (["--shape", "x"], "--shape 'x' is not of the form"),
])  # fmt: skip
def test_options_that_do_not_go_with_a_file(capsys, tmp_path, more, reason):
    code, _, err = call(capsys, "plan", conv_net(tmp_path / "in.onnx"), *more)
    assert code == 2
    assert reason in err


@pytest.mark.parametrize("flag", [["--shape", "x:1,3"], ["--input", "x=1"], ["--allow-larger"]])
def test_options_that_do_not_go_with_a_network(capsys, flag):
    code, _, err = call(capsys, "plan", "--model", "resnet20", *flag)
    assert (code, err) == (2, f"hodec plan: {flag[0]} goes with MODEL.onnx only\n")


def test_a_value_at_the_shell(capsys, tmp_path):
    source = conv_net(tmp_path / "in.onnx", inputs={"x": (1, 8, 10, 12)})
    code, text, _ = call(capsys, "decompose", source, "-o", tmp_path / "out.onnx", "--ranks", "4", "--input", "x=0.5")
    assert code == 0
    assert "differ by" in text
    code, _, err = call(
        capsys, "decompose", source, "-o", tmp_path / "out.onnx", "--no-data", "--input", "y=1", "--force"
    )
    assert (code, err) == (2, "hodec decompose: --input y=1: the model has no such input; it has x\n")
