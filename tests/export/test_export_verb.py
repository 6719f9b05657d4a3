"""hodec export: from a run's folder to a file."""

import json

import pytest
import torch

import hodec
from hodec.cli import main as cli
from hodec.experiment.pipeline import run
from hodec.experiment.run_model import model_of_run
from hodec.fusion import search as fuse_module

from tiny_runs import tiny  # isort: skip


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "one"
    run(tiny(dense_epochs=1, retrain_epochs=0), folder)
    return folder


def call(capsys, *argv):
    code = cli.main(["export", *map(str, argv)])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_a_run_as_a_program(capsys, finished, tmp_path):
    path = tmp_path / "net.pt2"
    code, out, err = call(capsys, finished, "--to", "pt2", "--verify", "-o", path, "--json")
    assert (code, err) == (0, "")
    value = json.loads(out)
    assert value["path"] == str(path)
    assert value["error"] < 1e-4
    assert value["batches"] == [1, 3]
    made = model_of_run(finished)
    x = made.example(2)
    torch.testing.assert_close(torch.export.load(path).module()(x), made.model(x), rtol=1e-4, atol=1e-4)
    code, _, err = call(capsys, finished, "--to", "pt2", "-o", path)
    assert code == 2
    assert "exists; --force replaces it" in err


def test_a_run_as_onnx_fused(capsys, finished, monkeypatch):
    pytest.importorskip("onnxscript")
    monkeypatch.setattr(fuse_module, "LAYER_SECONDS", 0.0)
    monkeypatch.setattr(fuse_module, "NET_SECONDS", 0.0)
    code, out, err = call(capsys, finished, "--to", "onnx", "--fuse", "--verify")
    assert (code, err) == (0, "")
    assert "Fused for latency" in out
    assert (finished / "fused.onnx").exists()


def test_a_run_as_safetensors(capsys, finished, tmp_path):
    path = tmp_path / "net.safetensors"
    assert call(capsys, finished, "--to", "safetensors", "--verify", "-o", path)[0] == 0
    made = model_of_run(finished)
    again = hodec.load(path).eval()
    torch.testing.assert_close(dict(again.state_dict()), dict(made.model.state_dict()), rtol=0, atol=0)
    assert call(capsys, finished, "--to", "safetensors", "-o", path)[0] == 2
    assert call(capsys, finished, "--to", "safetensors", "-o", path, "--force")[0] == 0


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--to", "pt2", "-o", "net.onnx"], "with --to pt2 the file ends in .pt2"),
        (["--to", "pt2", "--precision", "int8"], "--precision int8 is for --to onnx"),
        (["--to", "safetensors", "--fuse"], "--fuse goes with --to onnx and --to pt2"),
        (["--to", "pt2", "--batch", "0"], "--batch 0 is below 1"),
    ],
)
def test_what_does_not_go_together_is_one_line(capsys, finished, argv, message):
    code, out, err = call(capsys, finished, *argv)
    assert (code, out) == (2, "")
    assert message in err
    assert err.count("\n") == 1


def test_no_run_is_one_line(capsys, tmp_path):
    code, _, err = call(capsys, tmp_path, "--to", "pt2")
    assert code == 2
    assert "has no compressed.safetensors" in err


def test_rebuilding_leaves_the_random_state(finished):
    state = torch.get_rng_state()
    model_of_run(finished)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_place_that_is_no_file_is_refused_before_any_work(capsys, finished, tmp_path):
    path = tmp_path / "net.pt2"
    path.mkdir()
    code, _, err = call(capsys, finished, "--to", "pt2", "-o", path, "--force")
    assert code == 2
    assert "net.pt2 is a folder and no file that could be replaced; name a file" in err


def test_a_place_that_cannot_be_written_is_one_line(capsys, finished, tmp_path):
    (tmp_path / "file").write_text("")
    code, _, err = call(capsys, finished, "--to", "safetensors", "-o", tmp_path / "file" / "net.safetensors")
    assert code == 2
    assert "net.safetensors could not be written: " in err
    assert err.count("\n") == 1
