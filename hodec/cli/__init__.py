"""The verbs of the command line, one module each.

A verb's module holds ``HELP`` (one line), ``add_arguments(parser)`` and ``run(options) -> Answer``, which raises a
``HodecError`` for options, files and places that will not do; ``main`` says which extra a missing package is in.
Heavy imports stand inside ``run``: ``hodec --help`` must not wait for torch.
"""

from argparse import Namespace
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Answer:
    """What a verb has to say: to people and, as JSON, to programs."""

    text: str
    value: object


def value_of(options: Namespace, flag: str) -> Any:
    """What a flag such as ``--round-to`` was given."""
    return getattr(options, flag.strip("-").replace("-", "_"))
