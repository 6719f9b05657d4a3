"""hodec init: a project folder that trains, in this process; in an environment of its own: tests/test_wheel.py."""

import ast
import sys

import pytest
from calls import call

from hodec import methods
from hodec.experiment import pipeline
from hodec.experiment.config import trust
from hodec.experiment.config.groups import CONF
from hodec.experiment.config.overrides import check_overrides, plain
from hodec.experiment.config.schema import config_of

SHORT = (
    "dense_epochs=1", "retrain_epochs=1", "bn_batches=1", "model.width=4", "data.batch_size=256", "report=false",
    "trainer.accelerator=cpu", "trainer.threads=1",
)  # fmt: skip


@pytest.fixture
def project(tmp_path, monkeypatch, capsys):
    """A written project, the working folder, trusted."""
    monkeypatch.chdir(tmp_path)
    code, out, err = call(capsys, "init", "mine")
    assert (code, err) == (0, "")
    assert out.startswith("written to mine: README.md, conf/experiment/own.yaml, mine/__init__.py, ")
    monkeypatch.chdir(tmp_path / "mine")
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setenv(trust.VARIABLE, "mine")
    yield tmp_path / "mine"
    if "balanced" in methods.METHODS:
        methods.METHODS.remove("balanced")
    for name in [name for name in sys.modules if name.split(".")[0] == "mine"]:
        del sys.modules[name]


def test_a_project_trains(project):
    from hydra import compose, initialize_config_dir

    argv = ["--config-dir", "conf", "experiment=own", *SHORT]
    with initialize_config_dir(str(CONF), version_base="1.3"):
        search = f"hydra.searchpath=['file://{project / 'conf'}']"
        config = config_of(plain(compose("config", overrides=[search, *argv[2:]])))
    metrics = pipeline.run(config, project / "out")
    assert metrics["compressed"]["params"] < metrics["dense"]["params"]
    assert metrics["data"]["images"] == {"train": 1079, "validation": 359, "test": 359}
    plan = (project / "out" / "plan.json").read_text()
    assert '"balanced"' in plan


def test_a_project_is_named_throughout_and_small(project):
    files = [path for path in project.rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    assert len(files) == 9
    for path in files:
        assert "my_project" not in path.read_text()
    for name in ("net", "data", "rule", "method"):
        tree = ast.parse((project / "mine" / f"{name}.py").read_text())
        lines = {node.lineno for node in ast.walk(tree) if isinstance(node, ast.stmt)}
        assert len(lines) <= 24, "statements"
    assert (project.stat().st_mode & 0o777) == 0o755


def test_a_readme_names_commands_that_are_accepted(project):
    import shlex

    text = (project / "README.md").read_text()
    lines = [line for line in text.splitlines() if line.startswith("hodec train --trust mine --config-dir")]
    assert len(lines) == 3
    assert lines[1].startswith(lines[0])
    for line in lines[2:]:  # the sweep, which has all that the others have
        check_overrides(trust.take_flag(shlex.split(line)[2:]), CONF)


@pytest.mark.parametrize(
    ("argv", "text"),
    [
        (["My-Project"], "NAME: 'My-Project' given; allowed: a name of a Python package"),
        (["class"], "NAME: 'class' given; allowed: a name of a Python package"),
        (["torch"], "NAME: 'torch' given; there is a package of that name already"),
        (["mine", "-o", "full"], "full: there already; allowed: a new folder, -o FOLDER"),
    ],
)
def test_mistakes_write_nothing(tmp_path, monkeypatch, capsys, argv, text):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").touch()
    code, out, err = call(capsys, "init", *argv)
    assert (code, out) == (2, "")
    assert err.startswith(f"hodec init: {text}")
    assert [str(path.relative_to(tmp_path)) for path in sorted(tmp_path.rglob("*"))] == ["full", "full/mine.txt"]
