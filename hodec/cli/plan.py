"""hodec plan: plan a network by its name, or a model file: look at it, edit the plan, apply it."""

import argparse
import logging
import shlex
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from hodec.cli import Answer, value_of
from hodec.cli.calibration import add_data_options, calibration_from, check_data_given, inputs_from, progress_bar
from hodec.cli.decompose import add_dequantize_argument, add_input_arguments
from hodec.cli.rule_options import add_method_options, add_rule_options, decided_flags, method_from, read, rule_from
from hodec.errors import CheckpointError, ConfigError, PlanError, flag_of
from hodec.experiment.config.options import CIFAR_RESNETS
from hodec.experiment.config.trust import entry_targets
from hodec.io.atomic import check_apart, check_place, writing
from hodec.options import Settings, setting, settings_of

if TYPE_CHECKING:
    from torch import nn

    from hodec.plan.plan import Plan

log = logging.getLogger(__name__)

HELP = "plan a network by its name, or an ONNX file: which layers become what, at which ranks and cost"


@dataclass(frozen=True)
class ImageSpec(Settings):
    """What a net is built for; the defaults are those of CIFAR-10."""

    image_size: int = setting(32, "side of the square images in pixels", low=1)
    in_channels: int = setting(3, "channels of an image", low=1)
    num_classes: int = setting(10, "classes", low=1)


IMAGENET = {"image_size": 224, "num_classes": 1000}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The network, the layers, the ranks, the file."""
    parser.add_argument("path", nargs="?", metavar="MODEL.onnx", help="a model file, instead of a network")
    add_input_arguments(parser)
    add_dequantize_argument(parser)
    net = parser.add_argument_group("network")
    net.add_argument("--model", metavar="NAME", help="resnet32, torchvision/resnet50, timm/resnet18, ..")
    net.add_argument(
        "--weights",
        metavar="FILE",
        help="trained weights: .safetensors, .ckpt, .pt or .pth; or a folder of safetensors "
        "shards, which is read layer by layer",
    )
    for name, one in settings_of(ImageSpec).items():
        other = f" for CIFAR ResNets, {IMAGENET[name]} for torchvision's" if name in IMAGENET else ""
        text = f"{one.doc}; {one.words()} (default: {one.default}{other})"
        net.add_argument(flag_of(name), metavar="N", help=text)
    add_method_options(parser)
    add_rule_options(parser)
    parser.add_argument("--allow-larger", action="store_true", help="of a file: keep layers that cost more than dense")
    add_data_options(parser)
    parser.add_argument("--curve", metavar="PAGE.html", help="of a file, with --data: quality against cost, as a page")
    parser.add_argument("-o", "--output", metavar="FILE", help="write the plan there as JSON")
    parser.add_argument("--force", action="store_true", help="overwrite FILE")


def run(options: argparse.Namespace) -> Answer:
    """Make the plan, print it, and write it where that is asked for."""
    _check_source(options)
    check_data_given(options)
    if options.curve or options.data:
        return _curve(options)
    target = checked_output(options.output, force=options.force)
    if target is not None:
        check_apart(target, (options.path, options.weights), PlanError, "-o: ")
    plan, text, steps = (plan_of_file if options.path else plan_of_net)(options, target)
    if target is None:
        return Answer(text, plan.to_dict())
    plan.save(target)
    return Answer(f"{text}\n{steps}", plan.to_dict())


def _check_source(options: argparse.Namespace) -> None:
    """Refuse anything but one of a network and a file, with what belongs to it."""
    if (options.path is None) == (options.model is None):
        both = "" if options.path is None else f" {options.path} and --model {options.model} are given;"
        raise ConfigError(f"what is to be planned?{both} allowed: one of MODEL.onnx and --model NAME")
    nets = ["weights", *settings_of(ImageSpec)]
    foreign, owner = (
        (nets, "--model NAME") if options.path else (["shape", "input", "allow_larger", "dequantize"], "MODEL.onnx")
    )
    for name in foreign:
        if getattr(options, name):
            raise ConfigError(f"{flag_of(name)} goes with {owner} only")


def _curve(options: argparse.Namespace) -> Answer:
    """Draw what a model file keeps at several costs."""
    if not (options.curve and options.data and options.path):
        raise ConfigError("--curve and --data: allowed together, of a file: hodec plan MODEL.onnx --data D --curve C")
    unread = (*decided_flags(), "--output", "--dequantize", "--allow-larger", "--force")
    if given := [flag for flag in unread if value_of(options, flag)]:
        raise ConfigError(f"{given[0]}: given with --curve, which chooses ranks at several costs; leave it out")
    path = Path(options.curve)
    check_place(path, ConfigError, "--curve: ")
    check_apart(path, (options.path, options.data, options.labels), ConfigError, "--curve: ")
    from hodec.onnx_graph.compress import METHODS, Task, prepared
    from hodec.onnx_graph.report import curve_of, curve_text, write_curve

    task = Task(calibration_from(options), loss=options.loss)
    with progress_bar() as progress:
        search, _ = prepared(options.path, None, task, methods=METHODS, threads=None, force=True)
        search.target, search.tables.progress = "macs", progress
        points = curve_of(search)
    with writing(path, ConfigError):
        write_curve(path, Path(options.path), search, points)
    value = {"judge": search.judge.words, "dense": search.judge.dense, "points": [vars(one) for one in points]}
    return Answer(f"{curve_text(points, search.judge)}\nwritten to {path}", value)


def plan_of_file(options: argparse.Namespace, target: Path | None) -> tuple["Plan", str, str]:
    """The plan of a model file, in words, and how it is applied."""
    rule, how = rule_from(options), method_from(options)
    from hodec.onnx_graph.changes import shortened
    from hodec.onnx_graph.decompose import plan_file
    from hodec.ranks.planning import PlanSettings

    method, settings = how.pop("method"), PlanSettings(**how, allow_larger=options.allow_larger)
    inputs = inputs_from(options) | {"dequantized": options.dequantize}
    plan = plan_file(options.path, rule, method=method, options=settings, **inputs)
    step = f"hodec decompose {shlex.quote(options.path)} -o small.onnx --plan {shlex.quote(str(target))}"
    return plan, str(renamed(plan, shortened)), f"written to {target}; edit its ranks, then apply it:\n  {step}"


def plan_of_net(options: argparse.Namespace, target: Path | None) -> tuple["Plan", str, str]:
    """The plan of a network, in words, and how it is applied."""
    rule, how, images = rule_from(options), method_from(options), image_spec_from(options)
    import torch  # mistakes in the options are told without it

    from hodec.ranks import make_plan

    shards = options.weights if options.weights and Path(options.weights).is_dir() else None
    if shards:  # no memory for the net
        with torch.device("meta"):
            model = built(options.model, images, None)
    else:
        model = built(options.model, images, options.weights)
    image = torch.zeros(1, images.in_channels, images.image_size, images.image_size)
    try:
        plan = make_plan(model, rule, example_input=image, weights=shards, **how)
    except CheckpointError as error:
        raise error.prefixed("--weights: ") from error
    if rule.reads_weights and not options.weights:
        log.warning(
            "hodec plan: rule %s reads the weights, and these are random, which have no low rank: the ranks mean "
            "little; give trained ones with --weights FILE",
            rule.name,
        )
    return plan, str(plan), next_steps(options.model, images, target)


def renamed(plan: "Plan", words: Callable[[str], str]) -> "Plan":
    """The plan with other names, to be read and not applied."""
    names = {name: words(name) for name in (*plan.layers, *plan.skipped)}
    if len(set(names.values())) < len(names):
        names = {name: f"{k} {short}" if short != name else name for k, (name, short) in enumerate(names.items(), 1)}
    return replace(
        plan,
        layers={names[name]: one for name, one in plan.layers.items()},
        skipped={names[name]: one for name, one in plan.skipped.items()},
        skipped_costs={names[name]: one for name, one in plan.skipped_costs.items()},
    )


def checked_output(given: str | None, *, force: bool) -> Path | None:
    """The file to write, checked before anything is computed.

    Raises:
        PlanError: it exists and ``force`` is not given, or it is no place for a file.
    """
    if given is None:
        if force:
            raise ConfigError("--force: given without -o FILE, which it would overwrite")
        return None
    path = Path(given)
    if path.is_dir() or not path.parent.is_dir():
        raise PlanError(f"-o: {given!r} given; allowed: a file in a folder that exists")
    if path.exists() and not path.is_file():
        raise PlanError(f"-o: {given} is no file that could be replaced; name another one")
    if path.exists() and not force:
        raise PlanError(f"-o: {given} exists; another name, or --force to overwrite it")
    return path


def image_spec_from(options: argparse.Namespace) -> ImageSpec:
    """The sizes given, else those that the family of nets was published with.

    Raises:
        ConfigError: no whole number from 1.
    """
    usual = {} if options.model in CIFAR_RESNETS else IMAGENET
    texts = {name: (one, getattr(options, name)) for name, one in settings_of(ImageSpec).items()}
    given = {name: read(flag_of(name), one, text) for name, (one, text) in texts.items() if text is not None}
    return ImageSpec(**{**usual, **given})  # type: ignore[arg-type]


def built(name: str, images: ImageSpec, weights: str | None) -> "nn.Module":
    """The net, with weights from a file or seeded random ones.

    Raises:
        ConfigError: no such net, or it does not take such images.
        CheckpointError: a file that is missing, broken or another net's.
    """
    import torch

    from hodec.models import build_model, load_weights

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # of untrained weights and the image: the same command makes the same plan
        model = build_model(name, **vars(images))
        if weights is not None:
            try:
                load_weights(model, weights)
            except CheckpointError as error:
                raise error.prefixed("--weights: ") from error
    return model


def next_steps(model: str, images: ImageSpec, path: Path | None) -> str:
    """How the plan is applied, as commands."""
    source, _, bare = model.rpartition("/")
    offered = model in CIFAR_RESNETS or model in entry_targets("hodec.models")
    net = f"model={model}" if offered else f"model={source or 'torchvision'} model.name={bare}"
    return (
        f"written to {path}; edit its ranks, delete layers from it, then apply it:\n"
        f"  hodec train {net} data.image_size={images.image_size} plan={path} init=WEIGHTS\n"
        f'  small = hodec.convert(model, hodec.Plan.load("{path}"))'
    )
