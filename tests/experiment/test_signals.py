"""Asked to stop anywhere, a run says one line, with the command that goes on with it."""

import os
import signal
import sys
import time

import pytest
import yaml
from hydra.types import RunMode
from omegaconf import OmegaConf
from train_script import SETTINGS, Forked, finish, wait

from hodec.experiment import phases, pipeline
from hodec.experiment.config.arguments import VARIABLE
from hodec.experiment.main import resume_command
from hodec.experiment.redaction import clean_record, command, redacted
from hodec.experiment.signals import NUMBERS, Stopped, soft, stoppable

# Where a run can be outside a fit: (the object, its function) that each is replaced by a wait.
PLACES = {
    "plan": (phases, "plan_by_rule"),
    "convert": (phases, "reestimate_batchnorm"),
    "evaluate": (pipeline, "measure"),
    "report": (pipeline, "report"),
}


# Every signal at one place and one signal at every place; the other pairs are slow.
PAIRS = [
    pytest.param(place, number, marks=[] if place == "plan" or number == signal.SIGTERM else [pytest.mark.slow])
    for place in PLACES
    for number in (signal.SIGINT, *NUMBERS)
]


@pytest.fixture(autouse=True)
def heard():
    """Each signal ends a process, also where the tests were started by nohup."""
    before = {number: signal.signal(number, signal.SIG_DFL) for number in NUMBERS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize(("place", "number"), PAIRS)
def test_outside_a_fit(tmp_path, monkeypatch, place, number):
    owner, name = PLACES[place]
    real, mark = getattr(owner, name), tmp_path / "there"

    def waits(*args, **kwargs):
        mark.touch()
        time.sleep(60)
        return real(*args, **kwargs)

    monkeypatch.setattr(owner, name, waits)
    argv = [*SETTINGS, "dense_epochs=1", "retrain_epochs=0", f"hydra.run.dir={tmp_path / 'run'}"]
    argv = [one for one in argv if one not in ("dense_epochs=3", "retrain_epochs=3")]
    child = Forked(*argv, log=tmp_path / "log")
    assert wait(child, mark.exists) is None, child.log.read_text()
    child.kill(number)
    assert wait(child) == 128 + number
    text = child.log.read_text()
    assert f"stopped by {signal.Signals(number).name}; go on with: python train.py data=fake" in text
    assert text.endswith(f"hydra.run.dir={tmp_path / 'run'}\n")
    assert "Traceback" not in text
    assert not (tmp_path / "run" / "run.lock").exists()
    if (place, number) == ("report", signal.SIGTERM):
        monkeypatch.setattr(owner, name, real)
        finish(Forked(*argv, log=tmp_path / "again"))
        assert "this run is finished" in (tmp_path / "again").read_text()


def test_a_signal_that_is_ignored_stays_so():
    """Under nohup a terminal that closes ends nothing."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with stoppable():
            os.kill(os.getpid(), signal.SIGHUP)
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_afterwards_all_is_as_it_was():
    before = [signal.getsignal(number) for number in NUMBERS]
    with pytest.raises(Stopped) as stop, stoppable():
        os.kill(os.getpid(), signal.SIGTERM)
    assert (stop.value.code, str(stop.value)) == (143, "stopped by SIGTERM")
    assert [signal.getsignal(number) for number in NUMBERS] == before


def test_what_something_else_sees_to_is_left_to_it():
    with stoppable(), soft(lambda number: number == signal.SIGTERM):
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(Stopped, match="SIGHUP"):
            os.kill(os.getpid(), signal.SIGHUP)


def test_a_job_of_a_sweep_goes_on_with_the_settings_files_of_the_sweep(monkeypatch):
    argv = ["train.py", "-m", "-cd", "mine", "hydra.searchpath=[other]", "seed=0,1", "--config-name=own"]
    monkeypatch.setattr(sys, "argv", argv)
    monkeypatch.delenv(VARIABLE, raising=False)
    job = OmegaConf.create({"overrides": {"task": ["seed=1"]}, "runtime": {"output_dir": "sweep/1"}})
    job.mode = RunMode.MULTIRUN
    words = "--config-name=own --config-dir=mine 'hydra.searchpath=[other]' seed=1 hydra.run.dir=sweep/1"
    assert resume_command(job) == f"python train.py {words}"


# -- secrets ---------------------------------------------------------------------------------------------------


def test_secrets_are_in_no_command(monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "0123456789abcdef")
    monkeypatch.setenv("HOME_PAGE", "an ordinary value")
    words = [
        "+hydra.job.env_set={MY_TOKEN: hunter2hunter2, OTHER: x}", "hydra.api_key=abc", "seed=3",
        "data.root=s3://user:hunter2@host/keys/data", "logger.project=0123456789abcdef",
        "init=s3://user:hunter2@host/x", "logger.token='hunter2 hunter2'",
    ]  # fmt: skip
    text = command(words)
    for secret in ("hunter2", "abc", "0123456789abcdef"):
        assert secret not in text, text
    for word in ("seed=3", "OTHER: x", "host/keys/data", "logger.project=***"):
        assert word in text, text


def test_secrets_of_the_environment_are_in_no_settings(monkeypatch):
    monkeypatch.setenv("SERVICE_PASSWORD", "correct horse")
    monkeypatch.setenv("TOKEN", "short")
    tree = {"logger": {"project": "x correct horse"}, "include": ["correct horse", "short"], "seed": 3, "plan": None}
    expected = {"logger": {"project": "x ***"}, "include": ["***", "short"], "seed": 3, "plan": None}
    assert redacted(tree) == expected


def test_secrets_are_in_no_record_of_hydra(tmp_path, monkeypatch):
    """As Hydra writes it before the job begins: arguments, the variables it sets, the settings."""
    monkeypatch.setenv("WANDB_API_KEY", "0123456789abcdef")
    given = ["+hydra.job.env_set.MY_TOKEN=hunter2", "data.root=s3://user:hunter2@host/x", "logger.project='a b'"]
    words = [*given, "logger.api_key='hunter2 hunter2'", "init=0123456789abcdef"]
    record = {
        "overrides.yaml": words,
        "config.yaml": {"logger": {"api_key": "hunter2", "keys": ["a"]}, "data": {"root": "s3://user:hunter2@host/x"}},
        "hydra.yaml": {"hydra": {"job": {"env_set": {"MY_TOKEN": "hunter2"}, "config": {"exclude_keys": ["init"]}},
                                 "overrides": {"task": words}, "help": {"template": "[key=value ...]"}}},
    }  # fmt: skip
    for name, value in record.items():
        (tmp_path / ".hydra").mkdir(exist_ok=True)
        (tmp_path / ".hydra" / name).write_text(yaml.safe_dump(value))
    (tmp_path / "multirun.yaml").write_text(yaml.safe_dump(record["hydra.yaml"]))
    job = OmegaConf.create(
        {"output_subdir": ".hydra", "runtime": {"output_dir": str(tmp_path)}, "sweep": {"dir": str(tmp_path)}}
    )
    job.mode = RunMode.MULTIRUN
    clean_record(job)
    texts = [path.read_text() for path in (*(tmp_path / ".hydra").iterdir(), tmp_path / "multirun.yaml")]
    assert len(texts) == 4
    for text in texts:
        assert "hunter2" not in text
        assert "0123456789abcdef" not in text
    kept = yaml.safe_load((tmp_path / ".hydra" / "hydra.yaml").read_text())["hydra"]
    assert kept["help"] == record["hydra.yaml"]["hydra"]["help"]
    assert kept["job"]["config"] == {"exclude_keys": ["init"]}
    assert kept["overrides"]["task"][2] == "logger.project='a b'"


def test_a_record_without_secrets_is_left_as_it_is(tmp_path):
    folder = tmp_path / ".hydra"
    folder.mkdir()
    texts = {"overrides.yaml": "- seed=3 \n", "config.yaml": "{[", "hydra.yaml": "a:   1\n"}
    for name, text in texts.items():
        (folder / name).write_text(text)
    clean_record(
        OmegaConf.create({"output_subdir": ".hydra", "runtime": {"output_dir": str(tmp_path)}, "mode": RunMode.RUN})
    )
    assert {path.name: path.read_text() for path in folder.iterdir()} == texts
