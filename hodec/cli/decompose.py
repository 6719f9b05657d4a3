"""hodec decompose: a model file in, a smaller model file out."""

import argparse
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hodec.cli import Answer
from hodec.cli.rule_options import (
    add_method_options,
    add_rule_options,
    decided_flags,
    method_from,
    rule_from,
)
from hodec.errors import ConfigError

if TYPE_CHECKING:
    from hodec.onnx_graph.decompose import Outcome
    from hodec.plan.plan import Plan

HELP = "make an ONNX model file smaller by decomposing its layers"

# What stands for a usual choice of method and rule.
PRESETS = {"amct": {"method": "spatial_svd", "rule": "amct"}}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """IN -o OUT, and what to do with each layer."""
    parser.add_argument("path", metavar="IN", help="model.onnx; it is only read")
    parser.add_argument("-o", "--output", required=True, metavar="OUT", help="the smaller model")
    parser.add_argument("--force", action="store_true", help="replace OUT if it is there")
    add_method_options(parser)
    add_rule_options(parser)
    parser.add_argument("--preset", choices=tuple(PRESETS), help="amct: spatial_svd at the ranks of Ascend's AMCT")
    parser.add_argument("--allow-larger", action="store_true", help="keep layers that cost more than they do dense")
    parser.add_argument("--plan", metavar="PLAN", help="a plan.json to follow, made by --plan-out and perhaps edited")
    parser.add_argument("--plan-out", metavar="PLAN", help="where to write the plan; replaced if it is there")
    add_shape_argument(parser)


def add_shape_argument(parser: argparse.ArgumentParser) -> None:
    """--shape NAME:1,3,224,224."""
    parser.add_argument(
        "--shape",
        action="append",
        default=[],
        metavar="NAME:1,3,224,224",
        help="size of an input that the model leaves open (default: batch 1, images of 224, other axes 32)",
    )


def run(options: argparse.Namespace) -> Answer:
    """Decompose the file; says what changed.

    Raises:
        HodecError: options that do not go together, a file that cannot be read or written, nothing to decompose.
    """
    _check_plan_options(options)
    _apply_preset(options)
    what = _what(options)
    outcome = _decompose(options, what)
    if options.plan_out:
        _save_plan(outcome.plan, options.plan_out, options.output)
    return Answer(_text(outcome, options.output), {"output": options.output, **outcome.to_dict()})


def _what(options: argparse.Namespace) -> dict[str, Any]:
    """What is to be done: a plan, or a rule and its settings."""
    if options.plan:
        from hodec.plan.plan import Plan

        return {"plan": Plan.load(options.plan)}
    return {"rule": rule_from(options), **method_from(options), "allow_larger": options.allow_larger}


def _decompose(options: argparse.Namespace, what: dict[str, Any]) -> "Outcome":
    from hodec.onnx_graph.decompose import decompose_file
    from hodec.onnx_graph.planning import Options
    from hodec.onnx_graph.sizes import parse_shapes

    settings = Options(**{key: what.pop(key) for key in Options.__dataclass_fields__ if key in what})
    shapes = parse_shapes(options.shape)
    return decompose_file(options.path, options.output, options=settings, shapes=shapes, force=options.force, **what)


def _check_plan_options(options: argparse.Namespace) -> None:
    if options.plan_out:
        check_place(options.plan_out)
    if options.plan_out and Path(options.plan_out).resolve() in {
        Path(p).resolve() for p in (options.path, options.output)
    }:
        raise ConfigError(f"--plan-out: {options.plan_out} is one of the models; name another file")
    if not options.plan:
        return
    for flag in (*decided_flags(), "--preset", "--allow-larger"):
        if getattr(options, flag.strip("-").replace("-", "_")):
            raise ConfigError(f"{flag} and --plan: the plan says that already; edit the plan, or leave it out")


def check_place(given: str) -> None:
    """Refuse a place for the plan before any work is done.

    Raises:
        ConfigError: no folder to write to, or something there that is no file.
    """
    path = Path(given)
    if not path.parent.is_dir():
        raise ConfigError(f"--plan-out: folder {path.parent} does not exist; make it first")
    if not os.access(path.parent, os.W_OK):
        raise ConfigError(f"--plan-out: folder {path.parent} cannot be written to; name another one")
    if path.exists() and not path.is_file():
        raise ConfigError(f"--plan-out: {path} is no file that could be replaced; name another one")


def _apply_preset(options: argparse.Namespace) -> None:
    for key, value in PRESETS.get(options.preset, {}).items():
        given = getattr(options, key)
        if given not in (None, value):
            raise ConfigError(f"--preset {options.preset} stands for --{key} {value}, and --{key} {given} is given")
        setattr(options, key, value)


def _save_plan(plan: "Plan", path: str, out: str) -> None:
    try:
        plan.save(path)
    except OSError as error:
        raise ConfigError(
            f"--plan-out: {path} could not be written: {error.strerror}; the model {out} is written"
        ) from error


def _text(outcome: "Outcome", out: str) -> str:
    """A few lines for people."""
    lines = [f"{len(outcome.changes)} layers decomposed, {len(outcome.plan.skipped)} left dense"]
    lines += [
        f"  {name} -> {', '.join(change.nodes)}  {change.layer.method} {list(change.layer.ranks)}, "
        f"weight error {change.error:.3f}"
        for name, change in outcome.changes.items()
    ]
    lines += [f"  {name} stays: {reason}" for name, reason in outcome.plan.skipped.items()]
    lines.append(_pair("parameters", outcome.before.params, outcome.after.params))
    lines.append(_pair("multiply-adds", outcome.before.macs, outcome.after.macs))
    lines.append(_pair("bytes", outcome.bytes_before, outcome.bytes_after))
    if outcome.difference is not None:
        lines.append(f"outputs on random inputs differ by {outcome.difference:.3g} of the largest")
    return "\n".join([*lines, *(f"note: {remark}" for remark in outcome.remarks), f"written: {out}"])


def _pair(what: str, before: int, after: int) -> str:
    return f"{what}: {before:,} -> {after:,} ({after / before - 1:+.1%})" if before else f"{what}: {before} -> {after}"
