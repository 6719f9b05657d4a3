"""Networks by name, and weights from files: ``build_model``, ``model_names``, ``load_weights``."""

from collections.abc import Callable
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from inspect import signature

from torch import nn

from hodec.errors import ConfigError, Use, literal, near_matches
from hodec.models import timm_nets
from hodec.models.resnet_cifar import DEPTHS, CifarResNet
from hodec.models.weights import load_weights

__all__ = ["build_model", "load_weights", "model_names"]

PREFIX = "torchvision/"
ENTRY_POINTS = "hodec.models"
"""The group of entry points by which a package offers nets: name -> a function or class with some of the arguments
of ``build_model`` but the name."""


def build_model(name: str, *, in_channels: int, num_classes: int, image_size: int | None = None) -> nn.Module:
    """A network with fresh weights, drawn from torch's global generator.

    Args:
        name: a CIFAR ResNet (``resnet20``, ``resnet32``, ``resnet44``, ``resnet56``, ``resnet110``), a torchvision
            network, with or without its prefix: ``torchvision/resnet18`` or ``resnet18``, one of timm
            (``timm/resnet18``), or one that an installed package offers by an entry point of ``hodec.models``.
        in_channels: channels of an image, >= 1.
        num_classes: outputs of the last layer, >= 1.
        image_size: side of the square images in pixels, >= 1; None leaves the size unchecked.

    Returns:
        A module in training mode, (N, in_channels, H, W) -> (N, num_classes).

    Raises:
        ConfigError: if the name is unknown, a number is below 1, or the network cannot take such images.
    """
    numbers = {"in_channels": in_channels, "num_classes": num_classes, "data.image_size": image_size}
    for key, value in numbers.items():
        if value is not None and value < 1:
            raise ConfigError("{number} given; allowed: a whole number from 1", number=Use(key, value))
    if name in DEPTHS:
        return CifarResNet(DEPTHS[name], in_channels=in_channels, num_classes=num_classes)
    if name.startswith(timm_nets.PREFIX):
        bare = name.removeprefix(timm_nets.PREFIX)
        return timm_nets.build(bare, in_channels=in_channels, num_classes=num_classes, image_size=image_size)
    if name in _offered():
        return _built(_offered()[name], in_channels=in_channels, num_classes=num_classes, image_size=image_size)
    # torchvision takes over a second to import: only now is it needed
    from hodec.models import torchvision_nets

    bare, known = name.removeprefix(PREFIX), torchvision_nets.names()
    if bare not in known:
        raise ConfigError(
            f"{{model}} {literal(repr(name))} is unknown.{near_matches(bare, [*DEPTHS, *_offered(), *known])} Choose "
            f"from {', '.join([*DEPTHS, *_offered()])}, or {PREFIX}NAME with NAME one of torchvision's classification "
            f"networks, or {timm_nets.PREFIX}NAME with one of timm's",
            model=Use("model"),
        )
    return torchvision_nets.build(bare, in_channels=in_channels, num_classes=num_classes, image_size=image_size)


def model_names() -> list[str]:
    """Every name that ``build_model`` takes but those of timm; torchvision's stand with their prefix."""
    from hodec.models import torchvision_nets

    return [*DEPTHS, *_offered(), *(PREFIX + name for name in torchvision_nets.names())]


@cache
def _offered() -> dict[str, EntryPoint]:
    return {point.name: point for point in entry_points(group=ENTRY_POINTS)}


def _built(point: EntryPoint, **sizes: int | None) -> nn.Module:
    """The net of an installed package.

    Raises:
        ConfigError: it cannot be loaded, or makes something else.
    """
    origin = f"entry point {point.name} = {point.value} of {ENTRY_POINTS}"
    try:
        make: Callable[..., object] = point.load()
    except Exception as error:  # whatever an import raises
        reason = f"{type(error).__name__}: {error}"
        raise ConfigError(f"{origin} cannot be loaded ({reason}); mend or uninstall its package") from error
    taken = signature(make).parameters
    net = make(**{key: size for key, size in sizes.items() if key in taken})
    if not isinstance(net, nn.Module):
        raise ConfigError(f"{origin} makes a {type(net).__name__}; allowed: a torch.nn.Module")
    return net
