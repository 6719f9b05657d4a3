"""Networks by name, and weights from files: ``build_model``, ``model_names``, ``load_weights``."""

from torch import nn

from hodec.errors import ConfigError, Use, literal, near_matches
from hodec.models.resnet_cifar import DEPTHS, CifarResNet
from hodec.models.weights import load_weights

__all__ = ["build_model", "load_weights", "model_names"]

PREFIX = "torchvision/"


def build_model(name: str, *, in_channels: int, num_classes: int, image_size: int | None = None) -> nn.Module:
    """A network with fresh weights, drawn from torch's global generator.

    Args:
        name: a CIFAR ResNet (``resnet20``, ``resnet32``, ``resnet44``, ``resnet56``, ``resnet110``) or a
            torchvision network, with or without its prefix: ``torchvision/resnet18`` or ``resnet18``.
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
    # torchvision takes over a second to import: only now is it needed
    from hodec.models import torchvision_nets

    bare, known = name.removeprefix(PREFIX), torchvision_nets.names()
    if bare not in known:
        raise ConfigError(
            f"{{model}} {literal(repr(name))} is unknown.{near_matches(bare, [*DEPTHS, *known])} Choose from "
            f"{', '.join(DEPTHS)}, or {PREFIX}NAME with NAME one of torchvision's classification networks",
            model=Use("model"),
        )
    return torchvision_nets.build(bare, in_channels=in_channels, num_classes=num_classes, image_size=image_size)


def model_names() -> list[str]:
    """Every name that ``build_model`` takes; torchvision's stand with their prefix."""
    from hodec.models import torchvision_nets

    return [*DEPTHS, *(PREFIX + name for name in torchvision_nets.names())]
