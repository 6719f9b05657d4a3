"""The verbs of the command line, one module each.

A verb's module holds ``HELP`` (one line), ``add_arguments(parser)`` and ``run(options) -> Answer``, which raises a
``HodecError`` for options, files and places that will not do. Heavy imports stand inside ``run``: ``hodec --help`` must
not wait for torch.
"""

from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from hodec.errors import ConfigError


@dataclass(frozen=True)
class Answer:
    """What a verb has to say: to people and, as JSON, to programs."""

    text: str
    value: object


def value_of(options: Namespace, flag: str) -> Any:
    """What a flag such as ``--round-to`` was given."""
    return getattr(options, flag.strip("-").replace("-", "_"))


@contextmanager
def experiment_packages() -> Iterator[None]:
    """What runs within imports the experiment.

    Raises:
        ConfigError: its packages are not installed.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] == "hodec":
            raise
        raise ConfigError(f"{error.name} is missing; pip install 'hodec[experiment]'") from error
