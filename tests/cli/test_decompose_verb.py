"""hodec decompose at the shell: options, exit codes, JSON."""

import json
import socket

import numpy as np
import onnx
import pytest

from small_graphs import answer, node, numbers, save  # isort: skip
from calls import call  # isort: skip


@pytest.mark.parametrize("how", [
    ["--method", "tucker", "--rule", "vbmf", "--recommendation-ratio", "0.5"],
    ["--method", "spatial_svd", "--rule", "energy", "--keep", "0.5"],
    ["--method", "svd", "--rule", "ratio", "--target", "0.5", "--metric", "params"],
    ["--method", "tucker", "--rule", "budget", "--macs", "0.6"],
    ["--methods", "tucker,spatial_svd,svd", "--macs", "0.6"],
    ["--method", "tt", "--ranks", "4", "--n-modes", "1"],
    ["--method", "tucker", "--ranks", "{first: 3, second: [4, 5]}"],
    ["--method", "tucker", "--ranks", "4", "--exclude", "first", "--round-to", "1"][:-2],
])  # fmt: skip
def test_a_model_file_in_a_smaller_one_out(capsys, tmp_path, source, how):
    out = tmp_path / "out.onnx"
    code, text, err = call(capsys, "decompose", source, "-o", out, *how)
    assert (code, err) == (0, "")
    assert f"written: {out}" in text
    assert out.stat().st_size < source.stat().st_size
    answer(out, x=np.zeros((2, 8, 10, 12), np.float32))


def test_json_is_a_map_of_changes(capsys, tmp_path, source):
    out = tmp_path / "out.onnx"
    code, text, _ = call(capsys, "decompose", source, "-o", out, "--method", "tucker", "--ranks", "4", "--json")
    value = json.loads(text)
    assert code == 0
    assert value["changes"]["first"]["nodes"] == ["first.0", "first.1", "first.2"]
    assert value["changes"]["second"]["ranks"] == [4, 4]
    assert value["params"][1] < value["params"][0]
    assert value["macs"][1] < value["macs"][0]
    assert value["bytes"] == [source.stat().st_size, out.stat().st_size]
    assert 0 < value["difference"] < 2


def test_the_plan_goes_out_and_comes_back(capsys, tmp_path, source):
    plan, out = tmp_path / "plan.json", tmp_path / "out.onnx"
    assert (
        call(capsys, "decompose", source, "-o", out, "--method", "tucker", "--ranks", "4", "--plan-out", plan)[0] == 0
    )
    code, text, _ = call(capsys, "show", plan)
    assert code == 0
    assert "first" in text
    value = json.loads(plan.read_text())
    value["layers"]["first"]["ranks"] = [2, 3]
    del value["layers"]["second"]
    plan.write_text(json.dumps(value))
    code, text, _ = call(capsys, "decompose", source, "-o", out, "--plan", plan, "--force", "--json")
    assert code == 0
    assert json.loads(text)["changes"]["first"]["ranks"] == [2, 3]
    assert "second" not in json.loads(text)["changes"]


def test_the_amct_preset(capsys, tmp_path):
    nodes = [node("Conv", "x w", name="wide"), node("Conv", "y v", "z", name="pointwise")]
    weights = {"w": numbers(64, 64, 3, 3), "v": numbers(64, 64, 1, 1)}
    source = save(tmp_path / "in.onnx", nodes, weights, inputs={"x": (1, 64, 9, 9)}, outputs=("z",))
    out = tmp_path / "out.onnx"
    code, text, _ = call(capsys, "decompose", source, "-o", out, "--preset", "amct", "--json")
    value = json.loads(text)
    assert code == 0
    assert value["changes"]["wide"]["ranks"] == [32]
    kernels = {one.name: list(one.dims) for one in onnx.load(str(out)).graph.initializer}
    assert kernels["w.0"] == [32, 64, 3, 1]
    assert kernels["w.1"] == [64, 32, 1, 3]
    assert list(value["skipped"]) == ["pointwise"]


@pytest.mark.parametrize(("how", "reason"), [
    (["--rule", "greedy"], "--rule: greedy is not possible here"),
    (["--rule", "ratio", "--keep", "0.5"], "--keep does not go with --rule ratio"),
    (["--method", "tuckr"], "Did you mean: tucker"),
    (["--rule", "energy", "--keep", "2"], "--keep: '2' given"),
    (["--preset", "amct", "--method", "tucker"], "--preset amct stands for --method spatial_svd"),
    (["--plan", "plan.json", "--ranks", "4"], "--ranks and --plan: the plan says that already"),
    (["--plan", "missing.json"], "missing.json does not exist"),
    (["--plan-out", "nowhere/plan.json"], "folder nowhere does not exist"),
    (["--no-data", "--shape", "x=1,3"], "is not of the form NAME:1,3,224,224"),
    (["--method", "tucker", "--ranks", "4", "--include", "frist"], "Did you mean: first"),
    (["--method", "tucker", "--ranks", "{first: 400}", "--exclude", "first"], "matches no layer"),
    (["--method", "tucker", "--ranks", "[400, 400]"], "needs 1 rank, got 2: [400, 400]"),
])  # fmt: skip
def test_what_does_not_go_is_one_line_and_exit_code_2(capsys, tmp_path, source, how, reason):
    out = tmp_path / "out.onnx"
    code, text, err = call(capsys, "decompose", source, "-o", out, *how)
    assert (code, text) == (2, "")
    assert err.startswith("hodec decompose: ")
    assert reason in err
    assert err.count("\n") == 1
    assert not out.exists()


@pytest.mark.parametrize("name", ["missing.onnx", "text.onnx", "."])
def test_files_that_are_no_models(capsys, tmp_path, name):
    (tmp_path / "text.onnx").write_text("no model")
    code, out, err = call(capsys, "decompose", tmp_path / name, "-o", tmp_path / "out.onnx", "--ranks", "4")
    assert (code, out) == (2, "")
    assert err.count("\n") == 1


def test_nothing_to_decompose_is_exit_code_2(capsys, tmp_path):
    source = save(tmp_path / "in.onnx", [node("Relu", "x")], {})
    code, _, err = call(capsys, "decompose", source, "-o", tmp_path / "out.onnx", "--ranks", "4")
    assert code == 2
    assert "no layer is left to decompose" in err


@pytest.fixture
def no_file(tmp_path, monkeypatch):
    """Something that is neither file nor folder: a move would put a file in its place."""
    monkeypatch.chdir(tmp_path)  # names of sockets are short
    with socket.socket(socket.AF_UNIX) as one:
        one.bind("place")
        yield tmp_path / "place"


@pytest.mark.parametrize("flag", ["-o", "--plan-out"])
def test_what_is_no_file_is_not_replaced(capsys, tmp_path, source, no_file, flag):
    other = {"-o": "--plan-out", "--plan-out": "-o"}[flag]
    argv = (flag, no_file, other, tmp_path / "other", "--force", "--method", "tucker", "--ranks", "4")
    code, _, err = call(capsys, "decompose", source, *argv)
    assert code == 2
    assert "place is no file that could be replaced; name" in err
    assert no_file.is_socket()
    assert not (tmp_path / "other").exists()


def test_a_plan_that_cannot_be_written_says_that_the_model_is(capsys, tmp_path, source, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("hodec.cli.decompose.write_json", full)
    out = tmp_path / "out.onnx"
    argv = ("-o", out, "--method", "tucker", "--ranks", "4", "--plan-out", tmp_path / "plan.json")
    code, _, err = call(capsys, "decompose", source, *argv)
    assert code == 2
    assert f"plan.json could not be written: there is no space left; the model {out} is written" in err


def test_rules_that_need_training_name_the_verb_that_has_them(capsys, tmp_path, source):
    code, _, err = call(capsys, "decompose", source, "-o", tmp_path / "out.onnx", "--rule", "greedy")
    assert code == 2
    assert "hodec train ranks=greedy does" in err


def test_milliseconds_that_the_dense_file_meets_are_refused(capsys, monkeypatch, tmp_path, source):
    monkeypatch.setenv("HODEC_CACHE", str(tmp_path / "cache"))
    code, _, err = call(capsys, "decompose", source, "-o", tmp_path / "out.onnx", "--latency-ms", "2000")
    assert code == 2
    assert "the dense net meets --latency-ms 2000 already" in err


def test_without_data_the_default_has_to_be_asked_for(capsys, tmp_path, source):
    out = tmp_path / "out.onnx"
    code, text, err = call(capsys, "decompose", source, "-o", out)
    assert (code, text) == (2, "")
    assert "--data DATA" in err
    assert "--no-data" in err
    assert not out.exists()
    code, text, _ = call(capsys, "decompose", source, "-o", out, "--no-data")
    assert code == 0
    assert "by the weights alone: layers lose" in text


@pytest.mark.usefixtures("quick_bench")
@pytest.mark.parametrize("how", [
    ["--method", "svd", "--macs", "0.5"],
    ["--methods", "spatial_svd,svd", "--macs", "0.5"],
    ["--method", "tucker", "--rule", "energy", "--keep", "0.6"],
    ["--method", "tucker", "--ranks", "6"],
])  # fmt: skip
def test_data_make_a_plan_of_any_rule_lose_less(capsys, tmp_path, source, data, how):
    out, plan, x = tmp_path / "out.onnx", tmp_path / "plan.json", np.load(data)["x"]
    errors = {}
    first = [*how, "--data", data, "--loss", "error", "--plan-out", plan]
    code, text, err = call(capsys, "decompose", source, "-o", out, *first)
    assert (code, err) == (0, "")
    assert text.startswith("keeps ")
    for which, more in {"fitted": [], "weights alone": ["--no-data"]}.items():
        if more:
            assert call(capsys, "decompose", source, "-o", out, "--plan", plan, "--force", *more)[0] == 0
        errors[which] = np.abs(answer(out, x=x)[0] - answer(source, x=x)[0]).mean()
    assert errors["fitted"] < errors["weights alone"]


@pytest.mark.usefixtures("quick_bench")
def test_a_plan_is_fitted_to_data(capsys, tmp_path, source, data):
    out, plan = tmp_path / "out.onnx", tmp_path / "plan.json"
    assert call(capsys, "decompose", source, "-o", out, "--ranks", "6", "--method", "svd", "--plan-out", plan)[0] == 0
    given = ["--plan", plan, "--data", data, "--force", "--loss", "error"]
    code, text, _ = call(capsys, "decompose", source, "-o", out, *given, "--json")
    assert code == 0
    assert json.loads(text)["changes"]["first"]["ranks"] == [6]


def test_more_than_the_allowed_drop_is_not_written(capsys, tmp_path, source, data):
    out = tmp_path / "out.onnx"
    how = ["--method", "svd", "--ranks", "1", "--data", data, "--loss", "error", "--max-drop", "0.001"]
    code, text, err = call(capsys, "decompose", source, "-o", out, *how)
    assert (code, text) == (3, "")
    assert "the decomposed file has" in err
    assert not out.exists()


@pytest.mark.parametrize(("how", "reason"), [
    (["--data", "x.npz", "--no-data"], "--no-data: given together with --data"),
    (["--ranks", "4", "--max-drop", "1%"], "--max-drop: what a model loses is measured on data"),
    (["--ranks", "4", "--labels", "y.npy"], "--labels: given without data, of which it speaks"),
    (["--no-data", "--channels", "bgr"], "--channels: given without data, of which it speaks"),
    (["--ranks", "4", "--data", "nowhere.npz"], "nowhere.npz does not exist"),
])  # fmt: skip
def test_data_options_that_do_not_go(capsys, tmp_path, source, how, reason):
    code, _, err = call(capsys, "decompose", source, "-o", tmp_path / "out.onnx", *how)
    assert code == 2
    assert reason in err
