"""The verbs of the command line, one module each.

A verb's module holds ``HELP`` (one line), ``add_arguments(parser)`` and ``run(options) -> Answer``, which raises a
``HodecError`` for options, files and places that will not do. Heavy imports stand inside ``run``: ``hodec --help`` must
not wait for torch.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Answer:
    """What a verb has to say: to people and, as JSON, to programs."""

    text: str
    value: object
