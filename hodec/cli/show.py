"""hodec show: print a plan, the plan of a compressed model, or what was changed in a model file."""

import argparse
from pathlib import Path

from hodec.cli import Answer

HELP = "print a plan.json, the plan inside a compressed model, or what decompose changed in an ONNX file"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """PATH."""
    parser.add_argument("path", help="plan.json, compressed.safetensors, compressed.json, or small.onnx of decompose")


def run(options: argparse.Namespace) -> Answer:
    """The plan as a table, or the map of changes."""
    from hodec.errors import PlanError
    from hodec.io.atomic import read_json
    from hodec.plan.plan import Plan

    path = Path(options.path)
    if path.is_dir():
        raise PlanError(f"{path} is a folder; give a file in it: plan.json, or compressed.safetensors of a run")
    if path.suffix == ".onnx":
        from hodec.onnx_graph.changes import read_changes

        changes = read_changes(path)
        return Answer(str(changes), changes.to_dict())
    value = read_json(path.with_suffix(".json") if path.suffix == ".safetensors" else path, "plan")
    plan = Plan.from_dict(value["plan"] if isinstance(value, dict) and "plan" in value else value)
    return Answer(str(plan), plan.to_dict())
