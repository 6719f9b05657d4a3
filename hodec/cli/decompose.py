"""hodec decompose: a model file in, a smaller model file out."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hodec.cli import Answer, value_of
from hodec.cli.calibration import add_data_options, calibration_from, check_data_given, inputs_from, progress_bar
from hodec.cli.rule_options import add_method_options, add_rule_options, decided_flags, method_from, rule_from
from hodec.errors import ConfigError
from hodec.io.atomic import check_apart, check_place, write_json, writing

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
    add_input_arguments(parser)
    add_data_options(parser)
    parser.add_argument("--no-data", action="store_true", help="go by the weights alone, which predict little")
    parser.add_argument("--max-drop", metavar="DROP", help="with --data: write nothing that loses more, as in compress")
    add_dequantize_argument(parser)


def add_dequantize_argument(parser: argparse.ArgumentParser) -> None:
    """--dequantize."""
    text = "take the quantization of a QDQ model out first; the result is a float model"
    parser.add_argument("--dequantize", action="store_true", help=text)


def add_input_arguments(parser: argparse.ArgumentParser) -> None:
    """--shape and --input."""
    shape = "size of an input that the model leaves open (default: batch 1, images of 224, other axes 32)"
    parser.add_argument("--shape", action="append", default=[], metavar="NAME:1,3,224,224", help=shape)
    values = (
        "a number that fills an input (sr=16000), or an .npy file for it (default: random numbers, ones where whole "
        "numbers are taken)"
    )
    parser.add_argument("--input", action="append", default=[], metavar="NAME=VALUE", help=values)


def run(options: argparse.Namespace) -> Answer:
    """Decompose the file; says what changed."""
    _check_plan_options(options)
    _apply_preset(options)
    check_data_options(options)
    if options.data:
        return _fitted(options)
    from hodec.onnx_graph.decompose import decompose_file

    how = inputs_from(options) | {"dequantized": options.dequantize, "force": options.force} | _what(options)
    outcome = decompose_file(options.path, options.output, **how)
    _save_plan(outcome.plan, options)
    return Answer(_text(outcome, options.output), {"output": options.output, **outcome.to_dict()})


def _save_plan(plan: "Plan", options: argparse.Namespace) -> None:
    if options.plan_out:
        with writing(Path(options.plan_out), ConfigError, f"the model {options.output} is written"):
            write_json(Path(options.plan_out), plan.to_dict())


def _fitted(options: argparse.Namespace) -> Answer:
    """Decompose the file with factors that are fitted to data."""
    from hodec.onnx_graph.compress import Task
    from hodec.onnx_graph.fit_file import fit_file

    task = Task(calibration_from(options), loss=options.loss, max_drop=options.max_drop)
    with progress_bar() as progress:
        how = {"force": options.force, "progress": progress} | _what(options)
        result = fit_file(options.path, options.output, task, **how)
    _save_plan(result.plan, options)
    return Answer(str(result), result.to_dict())


def _what(options: argparse.Namespace) -> dict[str, Any]:
    """A plan, or a rule with a method and its settings."""
    from hodec.plan.plan import Plan
    from hodec.ranks.planning import PlanSettings

    if options.plan:
        return {"plan": Plan.load(options.plan)}
    rule, how = rule_from(options), method_from(options)
    method, settings = how.pop("method"), PlanSettings(**how, allow_larger=options.allow_larger)
    return {"rule": rule, "method": method, "options": settings}


def check_data_options(options: argparse.Namespace) -> None:
    """Without data, a default that may ruin a model has to be asked for."""
    if options.data and options.no_data:
        raise ConfigError("--no-data: given together with --data; allowed: one of the two")
    if options.data and options.dequantize:
        raise ConfigError("--dequantize: given together with --data; write the float model first, and fit that to data")
    if options.max_drop and not options.data:
        raise ConfigError("--max-drop: what a model loses is measured on data; add --data DATA")
    check_data_given(options)
    chosen = options.plan or any(value_of(options, flag) for flag in decided_flags())
    if not (options.data or options.no_data or chosen):
        raise ConfigError(
            "without data the default halves the multiply-adds by the weights alone, which ruins many models: give "
            "inputs with --data DATA, or let hodec compress find what an allowed loss permits; --no-data does it anyway"
        )


def _check_plan_options(options: argparse.Namespace) -> None:
    if options.plan_out:
        check_place(Path(options.plan_out), ConfigError, "--plan-out: ")
        others = options.path, options.output, options.data, options.labels
        check_apart(Path(options.plan_out), others, ConfigError, "--plan-out: ")
    for flag in (*decided_flags(), "--preset", "--allow-larger") if options.plan else ():
        if value_of(options, flag):
            raise ConfigError(f"{flag} and --plan: the plan says that already; edit the plan, or leave it out")


def _apply_preset(options: argparse.Namespace) -> None:
    for key, value in PRESETS.get(options.preset, {}).items():
        given = getattr(options, key)
        if given not in (None, value):
            raise ConfigError(f"--preset {options.preset} stands for --{key} {value}, and --{key} {given} is given")
        setattr(options, key, value)


def _text(outcome: "Outcome", out: str) -> str:
    """A few lines for people."""
    from hodec.onnx_graph.changes import layer_lines

    lines = [f"{len(outcome.changes)} layers decomposed, {len(outcome.plan.skipped)} left dense"]
    layers = {name: change.to_dict() for name, change in outcome.changes.items()}
    lines += layer_lines(layers, outcome.plan.skipped)
    lines += outcome.costs()
    if outcome.difference is not None:
        lines.append(f"outputs on random inputs differ by {outcome.difference:.3g} of the largest")
    if outcome.changes:
        worst = max(outcome.changes, key=lambda name: outcome.changes[name].error)
        mean = sum(change.error for change in outcome.changes.values()) / len(outcome.changes)
        lines.append(
            f"by the weights alone: layers lose {mean:.1%} of their weights' norm on average, {worst} "
            f"{outcome.changes[worst].error:.1%}; what the model loses is not known without --data"
        )
    return "\n".join([*lines, *(f"note: {remark}" for remark in outcome.remarks), f"written: {out}"])
