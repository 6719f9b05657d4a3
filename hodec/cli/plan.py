"""hodec plan: plan a network by its name: look at it, edit the file, apply it."""

import argparse
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hodec.cli import Answer
from hodec.cli.rule_options import add_method_options, add_rule_options, errors_in_flags, method_from, rule_from
from hodec.errors import CheckpointError, ConfigError, PlanError

if TYPE_CHECKING:
    from torch import nn

    from hodec.plan.plan import Plan
    from hodec.ranks import RankRule

log = logging.getLogger(__name__)

HELP = "plan a network by its name: which layers become what, at which ranks and cost"

PREFIX = "torchvision/"
SEED = 0  # of untrained weights and the image: the same command makes the same plan


@dataclass(frozen=True)
class ImageSpec:
    """What a net is built for: side of its square images in pixels, their channels, and classes."""

    image_size: int
    in_channels: int
    num_classes: int


# Of CIFAR-10 and of ImageNet.
CIFAR, IMAGENET = ImageSpec(32, 3, 10), ImageSpec(224, 3, 1000)
SIZES = ("image_size", "in_channels", "num_classes")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The network, the layers, the ranks, the file."""
    net = parser.add_argument_group("network")
    net.add_argument("--model", required=True, metavar="NAME", help="resnet32, torchvision/resnet50, ..")
    net.add_argument("--weights", metavar="FILE", help="trained weights: .safetensors, .ckpt, .pt or .pth")
    for name in SIZES:
        cifar, imagenet = getattr(CIFAR, name), getattr(IMAGENET, name)
        numbers = f"{cifar}" if cifar == imagenet else f"{cifar} for CIFAR ResNets, {imagenet} for torchvision's"
        flag, text = flag_of(name), name.replace("_", " ")
        net.add_argument(flag, metavar="N", help=f"{text}; a whole number from 1 (default: {numbers})")
    add_method_options(parser)
    add_rule_options(parser)
    parser.add_argument("-o", "--output", metavar="FILE", help="write the plan there as JSON")
    parser.add_argument("--force", action="store_true", help="overwrite FILE")


def flag_of(name: str) -> str:
    """in_channels -> --in-channels."""
    return f"--{name.replace('_', '-')}"


def run(options: argparse.Namespace) -> Answer:
    """Make the plan, print it, and write it where that is asked for.

    Raises:
        HodecError: a wrong option, a file that is there already, a target that cannot be met.
    """
    target = checked_output(options.output, force=options.force)
    rule, how, images = rule_from(options), method_from(options), image_spec_from(options)
    model = built(options.model, images, options.weights)
    plan = planned(model, rule, how, images)
    if rule.reads_weights and not options.weights:
        log.warning(
            "hodec plan: rule %s reads the weights, and these are random, which have no low rank: the ranks mean "
            "little; give trained ones with --weights FILE",
            rule.name,
        )
    if target is None:
        return Answer(str(plan), plan.to_dict())
    try:
        plan.save(target)
    except OSError as error:
        raise PlanError(f"-o: {target} could not be written: {error.strerror}; name another file") from error
    return Answer(f"{plan}\n{next_steps(options.model, images, target)}", plan.to_dict())


def planned(model: "nn.Module", rule: "RankRule", how: Mapping[str, Any], images: ImageSpec) -> "Plan":
    """The plan for one image, its errors in the words of the command line."""
    import torch

    from hodec.ranks import make_plan

    side = images.image_size
    with errors_in_flags():
        return make_plan(model, rule, example_input=torch.zeros(1, images.in_channels, side, side), **how)


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
    usual = CIFAR if is_cifar(options.model) else IMAGENET
    numbers = {}
    for name in SIZES:
        text = getattr(options, name)
        if text is not None and (not text.isdecimal() or int(text) < 1):
            raise ConfigError(f"{flag_of(name)}: {text!r} given; allowed: a whole number from 1")
        numbers[name] = getattr(usual, name) if text is None else int(text)
    return ImageSpec(**numbers)


def is_cifar(model: str) -> bool:
    """Whether it is one of hodec's own nets."""
    from hodec.models.resnet_cifar import DEPTHS

    return model in DEPTHS


def built(name: str, images: ImageSpec, weights: str | None) -> "nn.Module":
    """The net, with weights from a file or seeded random ones.

    Raises:
        ConfigError: no such net, or it does not take such images.
        CheckpointError: a file that is missing, broken or another net's.
    """
    import torch

    from hodec.models import build_model, load_weights

    with errors_in_flags(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        model = build_model(
            name,
            in_channels=images.in_channels,
            num_classes=images.num_classes,
            image_size=images.image_size,
        )
        if weights is not None:
            with named("--weights"):
                load_weights(model, weights)
    return model


@contextmanager
def named(flag: str) -> Iterator[None]:
    """Put a flag before the message of what cannot be read."""
    try:
        yield
    except CheckpointError as error:
        raise CheckpointError(f"{flag}: {error.message}", **error.uses) from error


def next_steps(model: str, images: ImageSpec, path: Path) -> str:
    """How the plan is applied, as commands."""
    bare = model.removeprefix(PREFIX)
    net = f"model={model}" if is_cifar(model) else f"model=torchvision model.name={bare}"
    return (
        f"written to {path}; edit its ranks, delete layers from it, then apply it:\n"
        f"  python train.py {net} data.image_size={images.image_size} plan={path} init=WEIGHTS\n"
        f'  small = hodec.convert(model, hodec.Plan.load("{path}"))'
    )
