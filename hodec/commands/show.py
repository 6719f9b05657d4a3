"""hodec show: print a plan, or the plan of a compressed model."""

import argparse
from pathlib import Path

from hodec.commands import Answer

HELP = "print a plan.json, or the plan inside a compressed model"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """PATH."""
    parser.add_argument("path", help="plan.json, compressed.safetensors or compressed.json")


def run(options: argparse.Namespace) -> Answer:
    """The plan as a table.

    Raises:
        HodecError: a file that is missing or holds no plan.
    """
    from hodec.errors import PlanError
    from hodec.files import read_json
    from hodec.plan import Plan

    path = Path(options.path)
    if path.is_dir():
        raise PlanError(f"{path} is a folder; give a file in it: plan.json, or compressed.safetensors of a run")
    value = read_json(path.with_suffix(".json") if path.suffix == ".safetensors" else path, "plan")
    plan = Plan.from_dict(value["plan"] if isinstance(value, dict) and "plan" in value else value)
    return Answer(str(plan), plan.to_dict())
