"""Where the curves go besides metrics.jsonl: a CSV table, wandb, TensorBoard. None of them may stop a training.

A logger has two methods of Lightning's ``Logger``, so that those of Lightning fit too. CSV and wandb are our own:
Lightning's ``CSVLogger`` deletes the table of the run that it goes on with, and its ``WandbLogger`` neither falls back
to offline, nor counts steps in epochs over all phases, nor ends the run with an exit code.
"""

import csv
import logging
import os
import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from netrc import NetrcParseError, netrc
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, cast, runtime_checkable

from pytorch_lightning.loggers import TensorBoardLogger

from hodec.errors import ConfigError, first_line
from hodec.experiment.config.logger_options import WandbSettings
from hodec.experiment.config.own import CustomLogger
from hodec.experiment.config.schema import Config
from hodec.experiment.own_code import own_logger
from hodec.experiment.redaction import redacted
from hodec.io.atomic import JsonObject, write_text
from hodec.text_table import csv_text

if TYPE_CHECKING:
    from wandb import Run

log = logging.getLogger(__name__)


class RunLogger(Protocol):
    """One place where the curves go."""

    def log_metrics(self, metrics: dict[str, float], step: int) -> None:
        """Take the row of one epoch; ``step`` counts epochs over all phases."""

    def finalize(self, status: str) -> None:
        """End the run: ``success`` or ``failed``."""


@runtime_checkable
class ResultLogger(Protocol):
    """A logger that takes the results of a run as well as its curves."""

    def log_results(self, metrics: JsonObject) -> None:
        """Take what ``metrics.json`` holds."""

    def log_files(self, folder: Path) -> None:
        """Take the files that outlive the run, from its folder."""


class Loggers:
    """All loggers of a run; an error of one of them is a warning."""

    def __init__(self, loggers: Sequence[RunLogger] = ()) -> None:
        self.loggers = loggers
        self.began = False

    def log(self, row: Mapping[str, object], step: int) -> None:
        """Hand the numbers of a nested row to all loggers."""
        self.began, numbers = True, flat(row)
        self._each("did not take a row", lambda logger: logger.log_metrics(numbers, step))

    def log_again(self, rows: Sequence[Mapping[str, object]]) -> None:
        """Hand wandb the rows of earlier starts: those that its service held when it was killed are lost to it."""
        again = Loggers([logger for logger in self.loggers if isinstance(logger, WandbLogger)])
        for step, row in enumerate(rows):
            again.log({key: value for key, value in row.items() if key != "epoch"}, step)

    def log_results(self, metrics: JsonObject) -> None:
        """Hand what ``metrics.json`` holds to the loggers that show results."""
        self._each("did not take the results", lambda logger: _of_results(logger).log_results(metrics))

    def log_files(self, folder: Path) -> None:
        """Hand plan, report and model of a finished run to the loggers that keep files."""
        self._each("did not take the files", lambda logger: _of_results(logger).log_files(folder))

    def close(self, status: str) -> None:
        """End the run in all loggers: ``success`` or ``failed``."""
        self._each("did not finish", lambda logger: logger.finalize(status))

    def _each(self, failure: str, call: Callable[[RunLogger], None]) -> None:
        for logger in self.loggers:
            try:
                call(logger)
            except Exception as error:  # wandb's own errors have no common base
                log.warning("%s %s: %s; the run goes on", type(logger).__name__, failure, first_line(error))


class _NoResults:
    """For loggers that take curves alone."""

    def log_results(self, metrics: JsonObject) -> None:
        pass

    def log_files(self, folder: Path) -> None:
        pass


def _of_results(logger: RunLogger) -> ResultLogger:
    return logger if isinstance(logger, ResultLogger) else _NoResults()


class CsvLogger:
    """``metrics.csv``, rewritten as a whole each epoch: columns may join, and resumed runs go on in it."""

    def __init__(self, path: Path) -> None:
        self.path, self.rows = path, list[dict[str, object]]()
        if path.exists():
            try:
                with path.open(newline="", encoding="utf-8") as f:
                    self.rows = [{**row, "step": int(row["step"])} for row in csv.DictReader(f)]
            except (OSError, ValueError, KeyError, TypeError, csv.Error) as error:
                log.warning("%s is no table of curves (%s) and begins anew", path, error)

    def log_metrics(self, metrics: dict[str, float], step: int) -> None:
        self.rows = [row for row in self.rows if int(str(row["step"])) < step] + [{"step": step, **metrics}]
        columns = list(dict.fromkeys(key for row in self.rows for key in row))
        write_text(self.path, csv_text(self.rows, columns))

    def finalize(self, status: str) -> None:
        pass


class WandbLogger:
    """One wandb run per run; offline without a key, offline after ``init_timeout`` seconds without an answer.

    Its id stands in the run's folder, so that a run that is gone on with is the same one to wandb.
    """

    def __init__(self, config: Config, folder: Path) -> None:
        import wandb

        settings = config.logger if isinstance(config.logger, WandbSettings) else WandbSettings()
        self.artifacts = settings.artifacts
        mode = settings.mode
        if mode == "auto":
            mode = "online" if _has_wandb_key() else "offline"
        self.run: Run | None = None
        for attempt in dict.fromkeys((mode, "offline")):
            try:
                self.run = wandb.init(
                    mode=attempt,  # type: ignore[arg-type]
                    id=_wandb_id(folder),
                    resume="allow",
                    project=settings.project,
                    entity=settings.entity,
                    group=settings.run_group or folder.parent.name,
                    job_type=settings.job_type,
                    tags=settings.tags,
                    notes=settings.notes,
                    name=folder.name,
                    dir=str(folder),
                    config=cast(dict[str, object], redacted(config.to_dict())),
                    reinit="finish_previous",
                    settings=wandb.Settings(init_timeout=settings.init_timeout, silent=True),
                )
                break
            except Exception as error:  # wandb's own errors have no common base; a logger must not stop a training
                log.warning("wandb %s did not start (%s)", attempt, first_line(error))
                with suppress(Exception):
                    wandb.teardown(exit_code=1)  # else its service holds the id, and offline cannot have it
        if self.run is None:
            return
        # The epochs of a phase begin at 0 again: the axis of all curves counts them over the whole run.
        self.run.define_metric("epoch_of_run", hidden=True)
        self.run.define_metric("*", step_metric="epoch_of_run", step_sync=True)
        if attempt == "offline":
            log.info("wandb is offline; upload with: wandb sync %s", Path(self.run.dir).parent)

    def log_metrics(self, metrics: dict[str, float], step: int) -> None:
        if self.run is not None:
            # commit: wandb keeps a row that has a step until the next one, and a run that is killed would lose it
            self.run.log({**metrics, "epoch_of_run": step}, step=step, commit=True)

    def log_results(self, metrics: JsonObject) -> None:
        """Put every leaf of ``metrics.json`` into the summary, by which the runs of a project are sorted."""
        if self.run is not None:
            self.run.summary.update(leaves(metrics))

    def log_files(self, folder: Path) -> None:
        """Keep the plan, the report and the compressed model as artifacts of the run."""
        if self.run is None or not self.artifacts:
            return
        import wandb

        for kind, names in ARTIFACTS.items():
            files = [folder / name for name in names if (folder / name).is_file()]
            if files:
                artifact = wandb.Artifact(f"{kind}-{self.run.id}", type=kind)
                for file in files:
                    artifact.add_file(str(file))
                self.run.log_artifact(artifact)

    def finalize(self, status: str) -> None:
        if self.run is not None:
            self.run.finish(exit_code=int(status != "success"))


def _wandb_id(folder: Path) -> str:
    path = folder / "wandb" / "hodec_run_id"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, secrets.token_hex(4))
    return path.read_text(encoding="utf-8")


# Kind of an artifact -> its files in the run folder.
ARTIFACTS = {
    "plan": ("plan.json",),
    "report": ("report.html", "report.md"),
    "model": ("compressed.safetensors", "compressed.json"),
}


def _tensorboard(config: Config, folder: Path) -> RunLogger:
    try:
        return TensorBoardLogger(folder, name="tensorboard", version="", flush_secs=1)
    except ModuleNotFoundError as error:
        raise ConfigError("logger=tensorboard needs the tensorboard package: pip install tensorboard") from error


LOGGERS: dict[str, Callable[[Config, Path], RunLogger]] = {
    "csv": lambda config, folder: CsvLogger(folder / "metrics.csv"),
    "wandb": WandbLogger,
    "tensorboard": _tensorboard,
    "custom": lambda config, folder: cast(RunLogger, own_logger(cast(CustomLogger, config.logger), folder)),
}


@contextmanager
def loggers_of(config: Config, folder: Path) -> Iterator[Loggers]:
    """Open the loggers that the settings ask for, and end them with whether the block succeeded.

    Raises:
        ConfigError: the package of a logger is not installed.
    """
    names = dict.fromkeys([config.logger.name, *(getattr(config.logger, "also", None) or [])])
    loggers, status = Loggers([LOGGERS[name](config, folder) for name in names]), "failed"
    try:
        yield loggers
        status = "success"
    finally:
        loggers.close(status)


def flat(row: Mapping[str, object]) -> dict[str, float]:
    """Return the numbers of a nested row under joined keys: {"a": {"conv1": {"rho": 1}}} -> {"a/conv1/rho": 1}."""
    found = leaves(row).items()
    return {key: one for key, one in found if isinstance(one, int | float) and not isinstance(one, bool)}


def leaves(tree: Mapping[str, object], prefix: str = "") -> dict[str, object]:
    """Return the values of a nested object under joined keys: {"a": {"b": "x"}} -> {"a/b": "x"}."""
    found: dict[str, object] = {}
    for key, value in tree.items():
        found |= leaves(value, f"{prefix}{key}/") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return found


def _has_wandb_key() -> bool:
    if os.environ.get("WANDB_API_KEY"):
        return True
    try:
        return netrc().authenticators("api.wandb.ai") is not None
    except (OSError, NetrcParseError):
        return False
