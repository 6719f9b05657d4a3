"""The settings of the loggers."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from hodec.options import BadParts, Option, setting

LOGGERS = ("csv", "wandb", "tensorboard")


def _bad_loggers(value: Sequence[str]) -> BadParts:
    """The names that are no logger, or a list with one twice."""
    yield from (("", name) for name in value if name not in LOGGERS)
    if len(set(value)) < len(value):
        yield "", value


@dataclass(frozen=True, kw_only=True)
class LoggerSettings(Option):
    """What every logger has."""

    group: ClassVar[str] = "logger"

    also: list[str] | None = setting(
        None,
        "further loggers that take the same curves, with their defaults",
        words="a list among " + ", ".join(LOGGERS),
        example="[csv,tensorboard]",
        check=_bad_loggers,
    )


@dataclass(frozen=True)
class CsvSettings(LoggerSettings):
    """metrics.jsonl and metrics.csv in the run folder, nothing else."""

    name: ClassVar[str] = "csv"


@dataclass(frozen=True)
class WandbSettings(LoggerSettings):
    """Weights & Biases; without a key or a network the run goes on offline."""

    name: ClassVar[str] = "wandb"

    project: str = setting("hodec", "name under which runs are gathered")
    mode: str = setting(
        "auto", "auto: online with a key, else offline", choices=("auto", "online", "offline", "disabled")
    )
    init_timeout: int = setting(20, "seconds to wait for its server before going offline", low=1)
    entity: str | None = setting(None, "team or user that the run belongs to; null: the one of the key")
    run_group: str | None = setting(None, "name under which it groups runs; null: the folder of the sweep")
    job_type: str | None = setting(None, "what kind of run this is within its group")
    tags: list[str] | None = setting(None, "words to find the run by")
    notes: str | None = setting(None, "a text about the run")
    artifacts: bool = setting(True, "hand over the plan, the report and the small model at the end")


@dataclass(frozen=True)
class TensorBoardSettings(LoggerSettings):
    """Event files in the run folder; needs the extra: pip install 'hodec[tensorboard]'."""

    name: ClassVar[str] = "tensorboard"
