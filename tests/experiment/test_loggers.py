"""Curves go where they are wanted, and no logger stops a training."""

import csv
import json
import logging
import socket
import sys
import threading
import time
from types import SimpleNamespace

import pytest
import wandb_files
from tiny_runs import tiny
from train_script import SETTINGS, StartedSmall, finish, kill_within

from hodec.errors import ConfigError
from hodec.experiment import loggers
from hodec.experiment.config.groups import kinds_of
from hodec.experiment.config.schema import Config
from hodec.experiment.loggers import CsvLogger, Loggers, WandbLogger, flat, loggers_of
from hodec.experiment.pipeline import run


def table(path):
    with path.open(newline="") as f:
        return list(csv.DictReader(f))


def test_csv_holds_all_columns_of_all_phases(tmp_path):
    path = tmp_path / "metrics.csv"
    logger = CsvLogger(path)
    logger.log_metrics({"loss": 1.5, "admm/rho": 0.1}, 0)
    logger.log_metrics({"loss": 1.0, "val": 0.5}, 1)
    assert table(path) == [
        {"step": "0", "loss": "1.5", "admm/rho": "0.1", "val": ""},
        {"step": "1", "loss": "1.0", "admm/rho": "", "val": "0.5"},
    ]


def test_csv_goes_on_where_a_resumed_run_does(tmp_path):
    path = tmp_path / "metrics.csv"
    first = CsvLogger(path)
    for step in range(3):
        first.log_metrics({"loss": float(step)}, step)
    again = CsvLogger(path)
    again.log_metrics({"loss": 9.0}, 1)
    assert [(row["step"], row["loss"]) for row in table(path)] == [("0", "0.0"), ("1", "9.0")]


def test_rows_are_flattened_to_numbers():
    row = {"phase": "admm", "lr": 0.1, "on": True, "admm/layers": {"conv1": {"rho": 1, "note": "x"}}, "none": None}
    assert flat(row) == {"lr": 0.1, "admm/layers/conv1/rho": 1}


def config(name, **settings):
    return Config(logger=kinds_of("logger")[name](**settings))


def test_the_setting_chooses_the_logger(tmp_path):
    with loggers_of(config("csv"), tmp_path) as chosen:
        assert [type(one) for one in chosen.loggers] == [CsvLogger]
        chosen.log({"phase": "admm", "loss": 1.0}, 0)
    assert table(tmp_path / "metrics.csv") == [{"step": "0", "loss": "1.0"}]


def test_an_error_of_one_logger_stops_neither_the_run_nor_the_others(tmp_path, caplog):
    class Broken:
        def log_metrics(self, metrics, step):
            raise BrokenPipeError

        finalize = log_metrics

    both = Loggers([Broken(), CsvLogger(tmp_path / "metrics.csv")])
    both.log({"loss": 1.0}, 0)
    both.close("success")
    assert len(table(tmp_path / "metrics.csv")) == 1
    assert "Broken did not take a row: BrokenPipeError; the run goes on" in caplog.text
    assert "Broken did not finish" in caplog.text


def test_tensorboard_says_what_is_missing(tmp_path, monkeypatch):
    def missing(*args, **kwargs):
        raise ModuleNotFoundError("Neither `tensorboard` nor `tensorboardX` is available.")

    monkeypatch.setattr(loggers, "TensorBoardLogger", missing)
    with pytest.raises(ConfigError, match="pip install tensorboard"), loggers_of(config("tensorboard"), tmp_path):
        pass


def test_tensorboard_writes_events(tmp_path):
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    for steps in ((0, 1), (2,)):  # a run, and its second start
        with loggers_of(config("tensorboard"), tmp_path) as chosen:
            for step in steps:
                chosen.log({"loss": 1.0 + step, "admm": {"rho": 0.5}}, step)
    events = reader.EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(one.step, one.value) for one in events.Scalars("loss")] == [(0, 1.0), (1, 2.0), (2, 3.0)]
    assert "admm/rho" in events.Tags()["scalars"]


class FakeRun:
    def __init__(self, mode, log=None):
        self.mode, self.dir, self.rows, self.ended, self.axes = mode, "/somewhere/run/files", [], None, {}
        self.log = log or (lambda row, step, commit: self.rows.append((step, row)))

    def define_metric(self, name, **options):
        self.axes[name] = options

    def finish(self, exit_code):
        self.ended = exit_code


@pytest.fixture
def wandb_module(monkeypatch):
    """A wandb whose `init` is replaced: it counts modes, and refuses those in `dead`."""

    fake = SimpleNamespace(modes=[], dead=(), options=[], run=None)

    def init(*, mode, settings, **options):
        fake.modes.append(mode)
        fake.options.append({**options, "timeout": settings.init_timeout})
        if mode in fake.dead:
            raise RuntimeError("Run initialization has timed out\nsecond line")
        fake.run = FakeRun(mode)
        return fake.run

    monkeypatch.setitem(
        sys.modules,
        "wandb",
        SimpleNamespace(
            init=init,
            Settings=lambda **given: SimpleNamespace(**given),
            teardown=lambda exit_code: fake.modes.append("down"),
        ),
    )
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("NETRC", "/nowhere/netrc")
    monkeypatch.setenv("HOME", "/nowhere")
    return fake


def start(folder, **settings):
    return WandbLogger(config("wandb", **settings), folder)


def test_without_a_key_wandb_is_offline(wandb_module, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    logger = start(tmp_path / "sweep" / "run")
    assert wandb_module.modes == ["offline"]
    assert "wandb sync /somewhere/run" in caplog.text
    options = wandb_module.options[0]
    assert (options["group"], options["name"], options["timeout"]) == ("sweep", "run", 20)
    assert options["config"]["seed"] == 0
    assert options["reinit"] == "finish_previous"
    logger.log_metrics({"loss": 1.0}, 3)
    logger.finalize("failed")
    assert wandb_module.run.rows == [(3, {"loss": 1.0, "epoch_of_run": 3})]
    assert wandb_module.run.axes["*"]["step_metric"] == "epoch_of_run"
    assert wandb_module.run.ended == 1


def test_a_run_that_is_gone_on_with_keeps_its_wandb_id(wandb_module, tmp_path):
    for folder in (tmp_path / "one", tmp_path / "one", tmp_path / "two"):
        start(folder).finalize("success")
    first, again, other = (options["id"] for options in wandb_module.options)
    assert first == again != other
    assert {options["resume"] for options in wandb_module.options} == {"allow"}


def test_with_a_key_wandb_is_online(wandb_module, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    start(tmp_path, init_timeout=7)
    assert wandb_module.modes == ["online"]
    assert wandb_module.options[0]["timeout"] == 7


@pytest.mark.parametrize("mode", ["online", "offline", "disabled"])
def test_a_mode_that_is_set_is_taken(wandb_module, tmp_path, mode):
    start(tmp_path, mode=mode)
    assert wandb_module.modes == [mode]


def test_a_dead_server_means_offline_with_one_warning(wandb_module, tmp_path, caplog):
    wandb_module.dead = ("online",)
    start(tmp_path, mode="online")
    assert wandb_module.modes == ["online", "down", "offline"], "else the first one holds the id"
    warnings = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert warnings == ["wandb online did not start (Run initialization has timed out)"]


def test_a_wandb_that_cannot_even_be_offline_stops_nothing(wandb_module, tmp_path, caplog):
    wandb_module.dead = ("online", "offline")
    logger = start(tmp_path, mode="online")
    logger.log_metrics({"loss": 1.0}, 0)
    logger.finalize("success")
    assert "wandb offline did not start" in caplog.text


@pytest.fixture
def silent_server():
    """Takes connections and never answers."""
    server = socket.create_server(("127.0.0.1", 0))
    held = []

    def accept():
        while True:
            try:
                held.append(server.accept()[0])
            except OSError:
                return

    threading.Thread(target=accept, daemon=True).start()
    yield f"http://127.0.0.1:{server.getsockname()[1]}"
    server.close()


@pytest.mark.slow
@pytest.mark.parametrize("answer", ["nothing", "refused"])
def test_the_real_wandb_goes_offline_within_its_timeout(tmp_path, monkeypatch, silent_server, answer):
    monkeypatch.setenv("WANDB_BASE_URL", silent_server if answer == "nothing" else "http://127.0.0.1:9")
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    began = time.perf_counter()
    logger = start(tmp_path, init_timeout=5)
    logger.log_metrics({"loss": 1.0}, 0)
    logger.finalize("success")
    assert time.perf_counter() - began < 30
    assert list(tmp_path.glob("wandb/offline-run-*/*.wandb"))


@pytest.mark.slow
def test_the_real_wandb_without_a_key_writes_files(tmp_path, monkeypatch):
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    monkeypatch.setenv("HOME", str(tmp_path))
    for step in (0, 1):  # killed after the first epoch, started again
        logger = start(tmp_path)
        logger.log_metrics({"loss": 1.0}, step)
        logger.finalize("success")
    files = list(tmp_path.glob("wandb/offline-run-*/*.wandb"))
    assert files
    assert len({path.stem for path in files}) == 1, "one id, one curve"


@pytest.mark.slow
def test_a_killed_run_is_one_run_to_wandb_with_all_its_curves(tmp_path, monkeypatch):
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.delenv("WANDB_SERVICE", raising=False)  # that of other tests, which outlives the killed run
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    monkeypatch.setenv("HOME", str(tmp_path))
    folder = tmp_path / "run"
    argv = (*SETTINGS, "logger=wandb", f"hydra.run.dir={folder}")
    kill_within(StartedSmall(*argv, log=tmp_path / "first"), folder, "admm")
    finish(StartedSmall(*argv, log=tmp_path / "second"))
    files = sorted(folder.glob("wandb/offline-run-*/*.wandb"))
    assert (len(files), len({path.stem for path in files})) == (2, 1), "two files of one id"
    kept = [wandb_files.read(path) for path in files]
    history = {row["epoch_of_run"]: row for one in kept for row in one["history"]}
    rows = [flat(json.loads(line)) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert sorted(history) == list(range(len(rows)))
    for step, mine in enumerate(rows):
        assert {key: history[step][key] for key in mine if key != "epoch"} == {k: mine[k] for k in mine if k != "epoch"}
    expected = loggers.leaves(json.loads((folder / "metrics.json").read_text()))
    assert {key: kept[-1]["summary"][key] for key in expected} == expected


def test_several_loggers_take_the_same_curves(tmp_path):
    pytest.importorskip("tensorboard")
    with loggers_of(config("csv", also=["tensorboard", "csv"]), tmp_path) as chosen:
        assert len(chosen.loggers) == 2
        chosen.log({"loss": 1.0}, 0)
        chosen.log_results({"compressed": {"test_accuracy": 1.0}})  # which neither of them shows
    assert table(tmp_path / "metrics.csv") == [{"step": "0", "loss": "1.0"}]
    assert list((tmp_path / "tensorboard").iterdir())
    with pytest.raises(ConfigError, match=r"also: 'mlflow' given; allowed: .* csv, wandb, tensorboard"):
        config("csv", also=["mlflow"])


def test_what_wandb_knows_a_run_by_is_settings(wandb_module, tmp_path):
    start(tmp_path / "sweep" / "run", entity="team", run_group="g", job_type="sweep", tags=["a", "b"], notes="why")
    given = wandb_module.options[0]
    names = ("entity", "group", "job_type", "tags", "notes")
    assert [given[name] for name in names] == ["team", "g", "sweep", ["a", "b"], "why"]


@pytest.mark.slow
def test_what_wandb_has_offline_is_what_the_run_has_written(tmp_path, monkeypatch):
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    monkeypatch.setenv("HOME", str(tmp_path))
    folder = tmp_path / "run"
    metrics = run(tiny(logger={"name": "wandb", "also": ["csv"], "tags": ["a"]}, report=True), folder)
    (path,) = folder.glob("wandb/offline-run-*/*.wandb")
    kept = wandb_files.read(path)
    rows = [flat(json.loads(line)) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    for row, mine in zip(kept["history"], rows, strict=True):
        assert {key: row[key] for key in mine if key != "epoch"} == {key: mine[key] for key in mine if key != "epoch"}
    assert [row["epoch_of_run"] for row in kept["history"]] == list(range(len(rows)))
    expected = loggers.leaves(json.loads((folder / "metrics.json").read_text()))
    assert {key: kept["summary"][key] for key in expected} == expected
    assert kept["summary"]["compressed/validation_accuracy"] == metrics["compressed"]["validation_accuracy"]
    assert kept["artifacts"] == {
        "plan": ["plan.json"],
        "report": ["report.html", "report.md"],
        "model": ["compressed.json", "compressed.safetensors"],
    }
    assert list(kept["run"].tags) == ["a"]
    assert len(table(folder / "metrics.csv")) == len(rows)
