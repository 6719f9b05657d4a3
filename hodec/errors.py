"""The errors a user can cause, by what has to be mended, and how a message names a setting."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Self

# Names in a file must neither end a message's line nor steer the terminal; "\n  " sets the items of a list apart.
CONTROL = re.compile(r"\n(?!  )|[\x00-\x09\x0b-\x1f\x7f-\x9f]")


@dataclass(frozen=True)
class Use:
    """A setting that a message names, with the value that mends things.

    Attributes:
        setting: its key among all settings: ``ranks.macs``, ``method.n_modes``, ``exclude``.
        value: what to give it, as it is written: ``0.4``, ``[conv1]``; the empty string names the setting alone.
        flags: the words of the command line, where they are not made from those: ``--exclude conv1``.
    """

    setting: str
    value: object = ""
    flags: str = ""

    def in_python(self) -> str:
        """``macs=0.4``: the argument of a constructor or function."""
        name = PYTHON.get(self.setting, self.setting.rpartition(".")[2])
        return name if self.value == "" else f"{name}={self.value}"

    def in_hydra(self) -> str:
        """``ranks.macs=0.4``: an override of the experiment; quoted where a shell would take it apart."""
        return quoted(self.setting if self.value == "" else f"{self.setting}={self.value}")

    def in_flags(self) -> str:
        """``--macs 0.4``: a flag of the command line; quoted where a shell would take the value apart."""
        if self.flags:
            return self.flags
        flag, value = flag_of(self.setting), str(self.value)
        if flag in ("--include", "--exclude"):  # which take one glob each
            value = value.strip("[]")
        return f"{flag} {quoted(value)}" if value else flag


# Settings that go by another name: a choice of rule, and the ranks given by hand.
PYTHON = {"ranks": "rule"}
FLAGS = {"ranks": "rule", "tt_ranks": "ranks"}


def flag_of(key: str) -> str:
    """``--round-to`` for the setting ``ranks.round_to``."""
    return f"--{FLAGS.get(key, key.rpartition('.')[2]).replace('_', '-')}"


def quoted(text: str) -> str:
    """``text`` as a shell has to read it."""
    return f"'{text}'" if any(c in text for c in "[]{}*, ") else text


def listed(names: Sequence[str], most: int = 5) -> str:
    """The first names with commas between them, and how many more there are."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def literal(value: object) -> str:
    """``value`` as text that stands in the message of a ``HodecError`` with ``uses``: its braces are doubled."""
    return str(value).replace("{", "{{").replace("}", "}}")


class HodecError(Exception):
    """Base of every error that names a cause and its remedy; the command line turns it into exit code 2.

    Args:
        message: what was given, what is allowed and the way out. With ``uses`` it is a template: ``{target}`` stands
            for the setting given as ``target=Use(..)``, and literal braces are doubled.
        uses: the settings that the message names. ``str(error)`` has them as arguments in Python, ``told`` as each
            other surface writes them.

    Attributes:
        exit_code: of the command line.

    Examples:
        >>> try:
        ...     hodec.make_plan(nn.Linear(8, 8), 2, method="qr", example_input=torch.zeros(1, 8))
        ... except hodec.HodecError as error:
        ...     print(type(error).__name__)
        PlanError
    """

    exit_code = 2

    def __init__(self, message: str = "", **uses: Use) -> None:
        self.message, self.uses = message, uses
        super().__init__(self.told(Use.in_python))

    def told(self, words: Callable[[Use], str]) -> str:
        """The message with each setting in a surface's words, ``Use.in_hydra`` or ``Use.in_flags``.

        Control characters, which names in somebody's file may hold, are written as escapes.
        """
        named = {name: words(use) for name, use in self.uses.items()}
        text = self.message.format(**named) if named else self.message
        return CONTROL.sub(lambda found: repr(found[0])[1:-1], text)

    def prefixed(self, text: str) -> Self:
        """The same error with ``text`` before its message."""
        return type(self)(f"{literal(text) if self.uses else text}{self.message}", **self.uses)


class RankError(HodecError):
    """Ranks that do not fit the modes of a tensor."""


class PlanError(HodecError):
    """A plan that cannot be made, read, or applied to this model."""


class ConvertError(HodecError):
    """A layer that cannot be swapped, or a converted model that does not run."""


class ConfigError(HodecError):
    """A setting that is unknown, of the wrong type or out of range."""


class DataError(HodecError):
    """A data set that is missing, empty or unreadable."""


class TrainingError(HodecError):
    """Training that cannot start as asked, or that broke down (NaN, divergence)."""


class MachineError(TrainingError):
    """Training that this machine lacks something for, memory or a compiler: elsewhere the same settings may do."""


class CheckpointError(HodecError):
    """A file that is truncated, altered, or belongs to another model or run."""


class NothingPays(HodecError):
    """A search that found nothing worth a file."""

    exit_code = 3


def first_line(error: BaseException) -> str:
    """The first line that says something, of the error at the bottom: libraries append traces and dumps."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0][:300] if lines else type(error).__name__


def near_matches(given: str, known: "list[str] | tuple[str, ...]", count: int = 3) -> str:
    """Suggestion for a misspelt word: ``' Did you mean: a, b?'``, or ``''`` when nothing is close."""
    import difflib

    close = difflib.get_close_matches(str(given), list(known), n=count, cutoff=0.5)
    return f" Did you mean: {', '.join(close)}?" if close else ""
