"""The command line of a program, also in the processes that a launcher starts by another one."""

import argparse
import json
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

from hodec.errors import ConfigError

VARIABLE = "HODEC_ARGV"
# options that start no run
INFORM = {
    "--help", "-h", "--hydra-help", "--version", "--info", "-i", "--shell-completion", "-sc", "--experimental-rerun",
}  # fmt: skip


def remember() -> None:
    """Hand this process's command line to those that it starts."""
    os.environ[VARIABLE] = json.dumps({"pid": os.getpid(), "argv": sys.argv})


def given() -> list[str]:
    """The command line that the user wrote: of this process, or of the one that started it as a worker."""
    stored = json.loads(os.environ.get(VARIABLE, "{}"))
    return list(sys.argv if stored.get("pid", os.getpid()) == os.getpid() else stored["argv"])


def only_informs(argv: Sequence[str]) -> bool:
    """Whether the arguments of ``hodec train`` ask for help or the like and start no run."""
    return any(word.partition("=")[0] in INFORM for word in argv)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message.removeprefix('argument ')}; see --help")


def parser() -> _Parser:
    """The options of a program with ``hydra.main`` that do not only inform, as Hydra documents them."""
    options = _Parser(add_help=False)
    options.add_argument("overrides", nargs="*")
    for names in (("--multirun", "-m"), ("--run", "-r"), ("--resolve",)):
        options.add_argument(*names, action="store_true")
    valued = {"config-dir": "cd", "config-path": "cp", "config-name": "cn", "cfg": "c", "package": "p"}
    for name, short in valued.items():
        options.add_argument(f"--{name}", f"-{short}")
    return options


def composing(argv: Sequence[str]) -> list[str]:
    """Of the arguments of ``hodec train`` those that say which files the settings are read from."""
    arguments, _ = parser().parse_known_args(list(argv))
    chosen = {name: getattr(arguments, name.replace("-", "_")) for name in ("config-path", "config-name", "config-dir")}
    places = [line for line in arguments.overrides if line.lstrip("+").startswith("hydra.searchpath=")]
    return [*(f"--{name}={value}" for name, value in chosen.items() if value), *places]
