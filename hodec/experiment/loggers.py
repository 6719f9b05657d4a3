"""Where the curves go besides metrics.jsonl: a CSV table, wandb, TensorBoard. None of them may stop a training."""

import csv
import io
import logging
import os
from collections.abc import Callable, Mapping
from netrc import NetrcParseError, netrc
from pathlib import Path
from typing import Any, Protocol, cast

from hodec.errors import ConfigError
from hodec.experiment.config.options import WandbSettings
from hodec.experiment.config.schema import Config
from hodec.io.atomic import write_text

log = logging.getLogger(__name__)


class CurveLogger(Protocol):
    """Takes one flat row of numbers per epoch."""

    def log(self, row: Mapping[str, float], step: int) -> None:
        """Add a row; ``step`` counts epochs over all phases."""

    def close(self, exit_code: int) -> None:
        """The run is over."""


class NoLogger:
    """For all but the first of several processes that train together."""

    def log(self, row: Mapping[str, float], step: int) -> None:
        pass

    def close(self, exit_code: int) -> None:
        pass


class CsvLogger:
    """``metrics.csv``, rewritten whole each epoch, so that new columns and resumed runs are no trouble."""

    def __init__(self, path: Path) -> None:
        self.path, self.rows = path, list[dict[str, Any]]()
        if path.exists():
            with path.open(newline="", encoding="utf-8") as f:
                self.rows = list(csv.DictReader(f))

    def log(self, row: Mapping[str, float], step: int) -> None:
        self.rows = [r for r in self.rows if int(r["step"]) < step] + [{"step": step, **row}]
        columns = list(dict.fromkeys(key for r in self.rows for key in r))
        text = io.StringIO()
        writer = csv.DictWriter(text, columns, restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows(self.rows)
        write_text(self.path, text.getvalue())

    def close(self, exit_code: int) -> None:
        pass


class WandbLogger:
    """One wandb run per hodec run; offline without a key, offline after ``init_timeout`` seconds without an answer."""

    def __init__(self, settings: WandbSettings, folder: Path, config: Mapping[str, Any], name: str) -> None:
        import wandb

        mode: Any = settings.mode
        if mode == "auto":
            mode = "online" if _has_wandb_key() else "offline"
        options: dict[str, Any] = {"project": settings.project, "group": folder.parent.name, "name": name}
        options |= {"dir": str(folder), "config": dict(config), "reinit": "finish_previous"}
        timeout = wandb.Settings(init_timeout=settings.init_timeout, silent=True)
        self.run: Any = None
        for attempt in dict.fromkeys((mode, "offline")):
            try:
                self.run = wandb.init(mode=attempt, settings=timeout, **options)
                break
            except Exception as error:  # wandb's own errors have no common base; a logger must not stop a training
                log.warning("wandb %s did not start (%s)", attempt, _first_line(error))
        if self.run is not None and attempt == "offline":
            log.info("wandb is offline; upload with: wandb sync %s", Path(self.run.dir).parent)

    def log(self, row: Mapping[str, float], step: int) -> None:
        try:
            if self.run is not None:
                self.run.log(dict(row), step=step)
        except Exception as error:
            log.warning("wandb did not take a row: %s", _first_line(error))

    def close(self, exit_code: int) -> None:
        try:
            if self.run is not None:
                self.run.finish(exit_code=exit_code)
        except Exception as error:
            log.warning("wandb did not finish: %s", _first_line(error))


class TensorBoardLogger:
    """Event files under ``tensorboard/`` in the run folder."""

    def __init__(self, folder: Path) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ConfigError("logger=tensorboard needs the tensorboard package: pip install tensorboard") from error
        self.writer = SummaryWriter(str(folder / "tensorboard"))

    def log(self, row: Mapping[str, float], step: int) -> None:
        for key, value in row.items():
            self.writer.add_scalar(key, value, step)
        self.writer.flush()

    def close(self, exit_code: int) -> None:
        self.writer.close()


def make_logger(config: Config, folder: Path, settings: Mapping[str, Any], name: str) -> CurveLogger:
    """The logger that ``config.logger`` asks for.

    Args:
        folder: the run folder.
        settings: all settings as plain values, for trackers that show them.
        name: what the run is called there.
    """
    makers: dict[str, Callable[[], CurveLogger]] = {
        "csv": lambda: CsvLogger(folder / "metrics.csv"),
        "wandb": lambda: WandbLogger(cast(WandbSettings, config.logger), folder, settings, name),
        "tensorboard": lambda: TensorBoardLogger(folder),
    }
    return makers[config.logger.name]()


def flat(row: Mapping[str, Any], prefix: str = "") -> dict[str, float]:
    """The numbers of a nested row under joined keys: {"a": {"conv1": {"rho": 1}}} -> {"a/conv1/rho": 1}."""
    numbers: dict[str, float] = {}
    for key, value in row.items():
        if isinstance(value, Mapping):
            numbers |= flat(value, f"{prefix}{key}/")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            numbers[f"{prefix}{key}"] = value
    return numbers


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _has_wandb_key() -> bool:
    if os.environ.get("WANDB_API_KEY"):
        return True
    try:
        return netrc().authenticators("api.wandb.ai") is not None
    except (OSError, NetrcParseError):
        return False
