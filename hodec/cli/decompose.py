"""hodec decompose: a model file in, a smaller model file out."""

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from hodec.cli import Answer
from hodec.cli.rule_options import add_method_options, add_rule_options, decided_flags, method_from, rule_from
from hodec.errors import ConfigError
from hodec.io.atomic import check_place, writing

if TYPE_CHECKING:
    from hodec.onnx_graph.decompose import Outcome

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
    add_input_arguments(parser)


def add_shape_argument(parser: argparse.ArgumentParser) -> None:
    """--shape NAME:1,3,224,224."""
    parser.add_argument(
        "--shape",
        action="append",
        default=[],
        metavar="NAME:1,3,224,224",
        help="size of an input that the model leaves open (default: batch 1, images of 224, other axes 32)",
    )


def add_input_arguments(parser: argparse.ArgumentParser) -> None:
    """--shape and --input."""
    add_shape_argument(parser)
    parser.add_argument(
        "--input",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="a number that fills an input (sr=16000), or an .npy file for it (default: random numbers, ones where "
        "whole numbers are taken)",
    )


def run(options: argparse.Namespace) -> Answer:
    """Decompose the file; says what changed."""
    _check_plan_options(options)
    _apply_preset(options)
    outcome = _work(options)()
    if options.plan_out:
        with writing(Path(options.plan_out), ConfigError, f"the model {options.output} is written"):
            outcome.plan.save(options.plan_out)
    return Answer(_text(outcome, options.output), {"output": options.output, **outcome.to_dict()})


def _work(options: argparse.Namespace) -> Callable[[], "Outcome"]:
    """``decompose_file`` with its arguments: a plan, or a rule and its settings."""
    from hodec.onnx_graph.decompose import decompose_file
    from hodec.onnx_graph.feeds import parse_values
    from hodec.onnx_graph.sizes import parse_shapes
    from hodec.plan.plan import Plan
    from hodec.ranks.planning import PlanSettings

    inputs = {"shapes": parse_shapes(options.shape), "values": parse_values(options.input)}
    work = partial(decompose_file, options.path, options.output, **inputs, force=options.force)
    if options.plan:
        return partial(work, plan=Plan.load(options.plan))
    rule, settings = rule_from(options), method_from(options)
    method = settings.pop("method")
    plan_settings = PlanSettings(**settings, allow_larger=options.allow_larger)
    return partial(work, rule=rule, method=method, options=plan_settings)


def _check_plan_options(options: argparse.Namespace) -> None:
    if options.plan_out:
        check_place(Path(options.plan_out), ConfigError, "--plan-out: ")
        if Path(options.plan_out).resolve() in {Path(one).resolve() for one in (options.path, options.output)}:
            raise ConfigError(f"--plan-out: {options.plan_out} is one of the models; name another file")
    for flag in (*decided_flags(), "--preset", "--allow-larger") if options.plan else ():
        if getattr(options, flag.strip("-").replace("-", "_")):
            raise ConfigError(f"{flag} and --plan: the plan says that already; edit the plan, or leave it out")


def _apply_preset(options: argparse.Namespace) -> None:
    for key, value in PRESETS.get(options.preset, {}).items():
        given = getattr(options, key)
        if given not in (None, value):
            raise ConfigError(f"--preset {options.preset} stands for --{key} {value}, and --{key} {given} is given")
        setattr(options, key, value)


def _text(outcome: "Outcome", out: str) -> str:
    """A few lines for people."""
    lines = [f"{len(outcome.changes)} layers decomposed, {len(outcome.plan.skipped)} left dense"]
    lines += [
        f"  {name} -> {', '.join(change.nodes)}  {change.layer.method} {list(change.layer.ranks)}, "
        f"weight error {change.error:.3f}"
        for name, change in outcome.changes.items()
    ]
    lines += [f"  {name} stays: {reason}" for name, reason in outcome.plan.skipped.items()]
    without = f" without {', '.join(outcome.uncounted)}, which cannot be counted" if outcome.uncounted else ""
    lines.append(_pair("parameters", outcome.before.params, outcome.after.params))
    lines.append(_pair(f"multiply-adds{without}", outcome.before.macs, outcome.after.macs))
    lines.append(_pair("bytes", outcome.bytes_before, outcome.bytes_after))
    if outcome.difference is not None:
        lines.append(f"outputs on random inputs differ by {outcome.difference:.3g} of the largest")
    return "\n".join([*lines, *(f"note: {remark}" for remark in outcome.remarks), f"written: {out}"])


def _pair(what: str, before: int, after: int) -> str:
    return f"{what}: {before:,} -> {after:,} ({after / before - 1:+.1%})" if before else f"{what}: {before} -> {after}"
