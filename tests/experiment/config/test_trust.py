"""A settings file of somebody else's runs no code, unless the user says so."""

import pytest
from train_script import Forked, wait

from hodec.errors import ConfigError
from hodec.experiment.config import trust
from hodec.experiment.config.groups import CONF
from hodec.experiment.config.overrides import check_overrides

TRAPS = {
    "callback": "hydra: {callbacks: {x: {_target_: os.mkdir, path: TRACE}}}",
    "launcher": "hydra: {launcher: {_target_: os.mkdir}}",
    "sweeper": "hydra: {sweeper: {_target_: os.mkdir}}",
    "nested target": "defaults: [override /hydra/sweeper: optuna]\nhydra: {sweeper: {sampler: {_target_: os.mkdir}}}",
    "known target": "hydra: {callbacks: {sweep_report: {_target_: hydra_plugins.hydra_joblib_launcher.os.mkdir}}}",
    "log handler": "hydra: {job_logging: {handlers: {x: {class: os.mkdir, path: TRACE}}}}",
    "log formatter": "hydra: {job_logging: {formatters: {x: {(): os.mkdir, path: TRACE}}}}",
    "log file": "hydra: {job_logging: {handlers: {file: {filename: TRACE}}}}",
    "environment": "hydra: {job: {env_set: {LD_PRELOAD: TRACE, WANDB_BASE_URL: 'https://example.org'}}}",
    "other launcher": "defaults: [override /hydra/launcher: joblib]\nhydra: {launcher: {backend: mine}}",
    "search space": "defaults: [override /hydra/sweeper: optuna]\nhydra: {sweeper: {custom_search_space: os.system}}",
    "name of the log": "hydra: {job: {name: ../../x}}",
}  # fmt: skip


def problems(*argv):
    try:
        check_overrides(argv, CONF)
    except ConfigError as error:
        lines = str(error).split("\n  ")
        return lines[1:] if len(lines) > 1 else lines
    return []


def experiment(folder, text):
    path = folder / "experiment" / "theirs.yaml"
    path.parent.mkdir(exist_ok=True)
    path.write_text(f"# @package _global_\nseed: 3\n{text}\n")
    return ["--config-dir", str(folder), "experiment=theirs"]


@pytest.mark.parametrize("trap", TRAPS)
def test_a_settings_file_that_could_run_code_is_refused_by_name(tmp_path, trap):
    found = problems(*experiment(tmp_path, TRAPS[trap].replace("TRACE", str(tmp_path / "trace"))))
    assert found
    for text in found:
        assert text.startswith(("experiment/theirs.yaml: hydra.", "hydra."))
        assert "--trust" in text
    assert not (tmp_path / "trace").exists()


def test_the_run_itself_makes_nothing(tmp_path):
    argv = experiment(tmp_path, TRAPS["callback"].replace("TRACE", str(tmp_path / "trace")))
    child = Forked(*argv, f"hydra.run.dir={tmp_path / 'run'}", log=tmp_path / "log")
    assert wait(child) == 2
    text = child.log.read_text()
    assert text.startswith("ConfigError: ")
    assert "experiment/theirs.yaml: hydra.callbacks.x" in text
    assert not (tmp_path / "trace").exists()
    assert not (tmp_path / "run").exists()


def test_where_a_run_writes_and_what_a_sweep_varies_a_file_may_say(tmp_path):
    text = "hydra: {run: {dir: here}, sweep: {dir: there}, sweeper: {params: {seed: '1,2'}}}"
    assert problems(*experiment(tmp_path, text)) == []


def test_a_launcher_of_the_package_may_be_chosen_and_one_of_a_folder_not(tmp_path):
    assert problems("-m", "hydra/launcher=joblib", "hydra.launcher.n_jobs=2", "seed=1,2") == []
    assert problems("-m", "hydra/sweeper=accuracy", "hydra/sweeper/sampler=random", "seed=1,2") == []
    path = tmp_path / "hydra" / "launcher" / "mine.yaml"
    path.parent.mkdir(parents=True)
    path.write_text("_target_: os.mkdir\npath: trace\n")
    (text, *_) = problems("--config-dir", str(tmp_path), "hydra/launcher=mine")
    assert text.startswith("hydra.launcher.")
    assert "--trust" in text


def test_a_target_on_the_command_line_is_refused_too():
    (text,) = problems("+hydra.callbacks.x={_target_: os.mkdir, path: trace}")
    assert text.startswith("hydra.callbacks.x._target_: 'os.mkdir' given, code that hodec does not know")


def test_a_main_file_of_somebody_elses_needs_trust(tmp_path):
    (tmp_path / "config.yaml").write_text("seed: 3\n")
    assert any(text.startswith("--config-path") for text in problems("--config-path", str(tmp_path)))


def test_with_trust_they_are_taken_as_they_are(tmp_path, monkeypatch):
    monkeypatch.setenv(trust.VARIABLE, "")
    argv = experiment(tmp_path, TRAPS["callback"].replace("TRACE", str(tmp_path / "trace")))
    assert problems(*argv)
    assert trust.take_flag([*argv, "--trust"]) == argv
    assert problems(*argv) == []
