"""`hodec show | report`: look at plans, models and runs from the shell."""

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from hodec.errors import HodecError

OK, FAILED = 0, 2


def show(options: argparse.Namespace) -> str:
    """Print a plan, or the plan of a compressed model."""
    from hodec.files import read_json
    from hodec.plan import Plan

    path = Path(options.path)
    value = read_json(path.with_suffix(".json") if path.suffix == ".safetensors" else path, "plan")
    plan = Plan.from_dict(value["plan"] if isinstance(value, dict) and "plan" in value else value)
    return json.dumps(plan.to_dict(), indent=1) if options.json else str(plan)


def report(options: argparse.Namespace) -> str:
    """Write the report of a run folder, or of a sweep when the folder holds several runs."""
    from hodec.report.render import write_report, write_sweep

    folder = Path(options.path)
    written = write_report(folder) if (folder / "config.yaml").exists() else write_sweep(folder)
    return json.dumps({"report": str(written)}) if options.json else str(written)


VERBS: dict[str, tuple[Callable[[argparse.Namespace], str], str]] = {
    "show": (show, "print a plan.json, or the plan inside a compressed model"),
    "report": (report, "write the report of a run folder or of a sweep's folder"),
}


def parser() -> argparse.ArgumentParser:
    """The command line, one subcommand a verb."""
    top = argparse.ArgumentParser(prog="hodec", description="Look at plans, compressed models and runs.")
    verbs = top.add_subparsers(dest="verb", required=True, metavar="VERB")
    for name, (_, text) in VERBS.items():
        verb = verbs.add_parser(name, help=text, description=text)
        verb.add_argument("path", help="file or folder")
        verb.add_argument("--json", action="store_true", help="print JSON")
    return top


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb; 0 when it worked, 2 with one line on stderr when it could not."""
    options = parser().parse_args(argv)
    try:
        print(VERBS[options.verb][0](options))
    except HodecError as error:
        print(f"hodec {options.verb}: {error}", file=sys.stderr)
        return FAILED
    return OK


if __name__ == "__main__":
    sys.exit(main())
