"""The `hodec` command: one verb per module of hodec.cli."""

import argparse
import json
import os
import sys
from collections.abc import Sequence
from importlib import import_module
from types import ModuleType
from typing import Any, NoReturn, TextIO

from hodec.errors import HodecError, Use, near_matches

# What the shell knows a program by that a closed pipe has ended: 128 + SIGPIPE.
OK, FAILED, NO_READER = 0, 2, 141
# What a plain installation lacks -> the extra that brings it.
EXTRAS = dict.fromkeys(("onnx", "onnx_ir", "onnxruntime", "onnxscript"), "onnx")
EXTRAS |= dict.fromkeys(
    ("hydra", "omegaconf", "yaml", "pytorch_lightning", "torchvision", "sklearn", "jinja2", "markupsafe", "matplotlib"),
    "experiment",
)
VERBS = ("train", "init", "show", "report", "plan", "export", "decompose", "compress", "bench", "compare")


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are one line, of the verb that they are about."""

    def error(self, message: str) -> NoReturn:
        """End with exit code 2; the usage that argparse would put above its message is in ``--help``."""
        self.exit(FAILED, f"{self.prog}: {message}; see {self.prog} --help\n")

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """As in argparse, but what is left over ends here: the parser above would not say which verb it is of."""
        options, unknown = super().parse_known_args(args, namespace)
        if unknown:
            flags = [flag.lstrip("-") for flag in self._option_string_actions]
            close = near_matches(unknown[0].partition("=")[0].lstrip("-"), flags)
            self.error(f"unrecognized arguments: {' '.join(unknown)}{'.' * bool(close)}{close}")
        return options, unknown


def verb_module(verb: str) -> ModuleType:
    """The module of a verb."""
    return import_module(f"hodec.cli.{verb}")


def parser() -> Parser:
    """The command line, one subcommand a verb."""
    top = Parser(prog="hodec", description="Plans, model files, compressed models and runs.")
    verbs = top.add_subparsers(dest="verb", required=True, metavar="VERB")
    for name in VERBS:
        module = verb_module(name)
        verb = verbs.add_parser(name, help=module.HELP, description=module.HELP)
        module.add_arguments(verb)
        verb.add_argument("--json", action="store_true", help="print JSON")
    return top


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb; 0 when it worked, 141 when nobody reads its output.

    Else there is one line on stderr: 2 where it could not, 3 where it could and nothing pays.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        if words[:1] == ["train"]:  # Hydra reads what follows
            options = argparse.Namespace(verb="train", overrides=words[1:], json=False)
        else:
            options = parser().parse_args(words)
    except SystemExit as stop:  # after --help, or a line on stderr
        raise SystemExit(_say("", sys.stdout) or stop.code) from None
    try:
        answer = verb_module(options.verb).run(options)
    except HodecError as error:
        return _say(f"hodec {options.verb}: {error.told(Use.in_flags)}\n", sys.stderr) or error.exit_code
    except ModuleNotFoundError as error:
        extra = EXTRAS.get((error.name or "").partition(".")[0])
        if extra is None:
            raise
        return (
            _say(f"hodec {options.verb}: {error.name} is missing; pip install 'hodec[{extra}]'\n", sys.stderr) or FAILED
        )
    text = json.dumps(answer.value, indent=1) if options.json else answer.text
    return _say(f"{text}\n" if text else "", sys.stdout)


def _say(text: str, stream: TextIO | None) -> int:
    """Write everything now, where a closed pipe or a full disk is no traceback yet; the exit code of what came."""
    if stream is None:  # closed by the shell
        return OK
    try:
        stream.write(text)
        stream.flush()
    except BrokenPipeError:
        _drop(stream)
        return NO_READER
    except OSError as error:
        _drop(stream)
        if stream is not sys.stderr:
            _say(f"hodec: the output could not be written: {error.strerror}\n", sys.stderr)
        return FAILED
    return OK


def _drop(stream: TextIO) -> None:
    """Let the interpreter's own flush at the end go nowhere: it would complain once more."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, stream.fileno())
    os.close(nowhere)
