"""The shell's view: exit codes, one line per error, JSON for machines."""

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from hodec.cli import main as cli
from hodec.conversion.swap import convert
from hodec.experiment.pipeline import run
from hodec.experiment.report import render
from hodec.export.checkpoint import save
from hodec.ranks import Manual, make_plan

from tiny_runs import tiny  # isort: skip
from calls import call  # isort: skip


@pytest.fixture
def model_file(tmp_path):
    """A compressed model, with its plan inside, and the plan as a file of its own."""
    net = nn.Sequential(nn.Conv2d(8, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3))
    plan = make_plan(net, Manual(4), example_input=torch.zeros(1, 8, 9, 9))
    save(convert(net, plan), tmp_path / "small.safetensors", plan)
    plan.save(tmp_path / "plan.json")
    return tmp_path / "small.safetensors", plan


@pytest.mark.parametrize("which", ["small.safetensors", "small.json", "plan.json"])
def test_show_prints_the_plan(capsys, model_file, which):
    path, plan = model_file
    code, out, err = call(capsys, "show", path.parent / which)
    assert (code, err) == (0, "")
    assert "2 layers factorized" in out
    assert "16·8·3·3" in out
    code, out, err = call(capsys, "show", path.parent / which, "--json")
    assert (code, json.loads(out), err) == (0, plan.to_dict(), "")


@pytest.mark.parametrize("name", ["missing.json", "missing.safetensors", "text.json", "list.json", "."])
def test_show_of_something_else_is_one_line_and_exit_code_2(capsys, tmp_path, name):
    (tmp_path / "text.json").write_text("no json")
    (tmp_path / "list.json").write_text("[1, 2]")
    code, out, err = call(capsys, "show", tmp_path / name)
    assert (code, out) == (2, "")
    assert err.startswith("hodec show: ")
    assert err.count("\n") == 1
    assert "Traceback" not in err


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "one"
    run(tiny(dense_epochs=1, retrain_epochs=1), folder)
    return folder


def test_report_of_a_run(capsys, finished, monkeypatch):
    monkeypatch.setattr(render, "draw_all", lambda run: [render.draw(render.LEAD, run)])  # the others take seconds
    code, out, err = call(capsys, "report", finished)
    assert (code, err) == (0, "")
    assert out.strip() == str(finished / "report.html")
    assert (finished / "report.html").stat().st_size > 10_000


def test_report_of_a_sweep(capsys, finished):
    code, out, _ = call(capsys, "report", finished.parent, "--json")
    assert code == 0
    written = json.loads(out)["report"]
    assert written.startswith(str(finished.parent))
    assert written.endswith(".html")


def test_report_of_nothing_is_one_line_and_exit_code_2(capsys, tmp_path):
    for folder in (tmp_path / "missing", tmp_path):
        code, out, err = call(capsys, "report", folder)
        assert (code, out) == (2, "")
        assert err.startswith("hodec report: ")


@pytest.mark.parametrize(("argv", "who", "reason"), [
    ([], "hodec", "are required: VERB"),
    (["sho", "x"], "hodec", "invalid choice: 'sho'"),
    (["--json", "show", "x"], "hodec", "unrecognized arguments: --json"),
    (["show"], "hodec show", "are required: path"),
    (["show", "x", "y"], "hodec show", "unrecognized arguments: y"),
    (["show", "x", "--jsn"], "hodec show", "unrecognized arguments: --jsn. Did you mean: json?"),
    (["export", "run", "--to", "onx"], "hodec export", "--to: invalid choice: 'onx' (choose from 'onnx'"),
    (["bench", "a", "b", "--seconds", "ten"], "hodec bench", "--seconds: invalid float value: 'ten'"),
    (["decompose", "x"], "hodec decompose", "are required: -o/--output"),
])  # fmt: skip
def test_wrong_usage_is_one_line_and_exit_code_2(capsys, argv, who, reason):
    with pytest.raises(SystemExit) as stop:
        cli.main(argv)
    assert stop.value.code == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(f"{who}: ")
    assert err.endswith(f"; see {who} --help\n")
    assert reason in err
    assert err.count("\n") == 1


@pytest.fixture
def no_reader():
    """A stream into a pipe whose other end is closed."""
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "w") as stream:
        yield stream


@pytest.mark.parametrize("argv", [["show", "plan.json"], ["decompose", "--help"]])
def test_a_closed_pipe_ends_a_verb_quietly(model_file, no_reader, argv):
    command = [sys.executable, "-m", "hodec.cli", *argv]
    folder, path = model_file[0].parent, os.pathsep.join(sys.path)
    done = subprocess.run(
        command, cwd=folder, env={**os.environ, "PYTHONPATH": path}, stdout=no_reader, stderr=subprocess.PIPE,
        check=False,
    )  # fmt: skip
    assert done.stderr == b""
    # argparse swallows the error of a help text that is too long for one write, and ends with 0
    assert done.returncode in ((cli.NO_READER,) if argv[0] == "show" else (cli.NO_READER, 0))


def test_a_closed_pipe_of_errors_ends_a_verb_quietly(monkeypatch, no_reader, tmp_path):
    monkeypatch.setattr("sys.stderr", no_reader)
    assert cli.main(["show", str(tmp_path / "missing.json")]) == cli.NO_READER


def test_every_verb_writes_through_one_place():
    """So that what holds of show above holds of all: no verb prints by itself."""
    for verb in cli.VERBS:
        assert "print(" not in Path(cli.verb_module(verb).__file__).read_text()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
def test_a_full_disk_is_one_line(capsys, monkeypatch, model_file):
    with Path("/dev/full").open("w") as full:
        monkeypatch.setattr("sys.stdout", full)
        code = cli.main(["show", str(model_file[0])])
    assert code == 2
    assert capsys.readouterr().err == "hodec: the output could not be written: No space left on device\n"


def test_help_and_flags_need_neither_torch_nor_hydra():
    code = (
        "import sys; from hodec.cli.main import parser, main; parser().parse_args(['plan', '--model', 'x']); "
        "code = main(['plan', '--model', 'resnet20', '--rule', 'vbmf', '--macs', '0.3']); "
        "print(code, {'torch', 'hydra', 'omegaconf', 'yaml', 'pytorch_lightning'} & sys.modules.keys())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout == "2 set()\n", done.stderr


def test_train_hands_its_arguments_to_the_experiment(monkeypatch):
    seen = []
    monkeypatch.setattr("hodec.experiment.main.main", lambda: seen.append(sys.argv))
    monkeypatch.setattr("sys.argv", ["hodec"])
    assert cli.main(["train", "-m", "seed=1,2", "--cfg", "job"]) == 0
    assert seen[0][1:] == ["-m", "seed=1,2", "--cfg", "job"]
    assert seen[0][0].endswith("hodec/experiment/__main__.py")


def test_train_without_the_packages_of_the_experiment_says_how_to_get_them(capsys, monkeypatch):
    monkeypatch.delitem(sys.modules, "hodec.experiment.main", raising=False)
    monkeypatch.setitem(sys.modules, "hydra", None)
    code, out, err = call(capsys, "train", "seed=1")
    assert (code, out) == (2, "")
    assert err == "hodec train: hydra is missing; pip install 'hodec[experiment]'\n"


@pytest.mark.parametrize(("argv", "module", "package", "extra"), [
    (["report", "run"], "hodec.experiment.report.render", "jinja2", "experiment"),
    (["decompose", "a.onnx", "-o", "b.onnx", "--no-data"], "hodec.onnx_graph.decompose", "onnx", "onnx"),
])  # fmt: skip
def test_every_verb_says_which_extra_is_missing(capsys, monkeypatch, argv, module, package, extra):
    monkeypatch.delitem(sys.modules, module, raising=False)
    monkeypatch.setitem(sys.modules, package, None)
    told = f"hodec {argv[0]}: {package} is missing; pip install 'hodec[{extra}]'\n"
    assert call(capsys, *argv) == (2, "", told)


def test_a_missing_module_of_no_extra_is_raised(monkeypatch):
    monkeypatch.delitem(sys.modules, "hodec.experiment.report.render", raising=False)
    monkeypatch.setitem(sys.modules, "hodec.experiment.report.collect", None)
    with pytest.raises(ModuleNotFoundError):
        cli.main(["report", "run"])


def test_help_names_every_verb(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["--help"])
    assert stop.value.code == 0
    out = capsys.readouterr().out
    for verb in cli.VERBS:
        assert f"    {verb}" in [line[: 4 + len(verb)] for line in out.splitlines()]  # its help may be below it
        assert cli.verb_module(verb).HELP.split()[0] in out


def test_python_runs_the_package_as_the_command_runs(capsys, monkeypatch, model_file):
    monkeypatch.setattr("sys.argv", ["hodec", "show", str(model_file[0]), "--json"])
    with pytest.raises(SystemExit) as stop:
        runpy.run_module("hodec", run_name="__main__")
    assert stop.value.code == 0
    assert capsys.readouterr().out == call(capsys, "show", model_file[0], "--json")[1]


def test_show_of_a_folder_says_which_file(capsys, tmp_path):
    code, _, err = call(capsys, "show", tmp_path)
    assert code == 2
    assert "is a folder; give a file in it: plan.json, or compressed.safetensors of a run" in err
