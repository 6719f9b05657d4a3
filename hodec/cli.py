"""The `hodec` command: one verb per module of hodec.commands."""

import argparse
import json
import sys
from collections.abc import Sequence
from importlib import import_module
from types import ModuleType

from hodec.errors import HodecError

OK, FAILED = 0, 2
VERBS = ("show", "report", "plan", "export", "decompose", "bench")


def verb_module(verb: str) -> ModuleType:
    """The module of a verb."""
    return import_module(f"hodec.commands.{verb}")


def parser() -> argparse.ArgumentParser:
    """The command line, one subcommand a verb."""
    top = argparse.ArgumentParser(prog="hodec", description="Plans, model files, compressed models and runs.")
    verbs = top.add_subparsers(dest="verb", required=True, metavar="VERB")
    for name in VERBS:
        module = verb_module(name)
        verb = verbs.add_parser(name, help=module.HELP, description=module.HELP)
        module.add_arguments(verb)
        verb.add_argument("--json", action="store_true", help="print JSON")
    return top


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb; 0 when it worked, 2 with one line on stderr when it could not."""
    options = parser().parse_args(argv)
    try:
        answer = verb_module(options.verb).run(options)
    except HodecError as error:
        print(f"hodec {options.verb}: {error}", file=sys.stderr)
        return FAILED
    print(json.dumps(answer.value, indent=1) if options.json else answer.text)
    return OK


if __name__ == "__main__":
    sys.exit(main())
