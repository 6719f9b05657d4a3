"""Networks by name, and weights from files: ``build_model``, ``model_names``, ``load_weights``."""

from torch import nn

from hodec.errors import ConfigError, Use, literal, near_matches
from hodec.models import resnet_cifar
from hodec.models.weights import load_weights

__all__ = ["build_model", "load_weights", "model_names"]

PREFIX = "torchvision/"


def build_model(name: str, *, in_channels: int, num_classes: int, image_size: int | None = None) -> nn.Module:
    """A network with fresh weights, drawn from torch's global generator.

    Args:
        name: a CIFAR ResNet (``resnet20``, ``resnet32``, ``resnet44``, ``resnet56``, ``resnet110``) or a
            torchvision network, with or without its prefix: ``torchvision/resnet18`` or ``resnet18``.
        in_channels: channels of a image, >= 1.
        num_classes: outputs of the last layer, >= 1.
        image_size: side of the square images in pixels, >= 1; None leaves the size unchecked.

    Returns:
        A module in training mode, (N, in_channels, H, W) -> (N, num_classes).

    Raises:
        ConfigError: if the name is unknown, a number is below 1, or the network cannot take such images.
    """
    numbers = {"in_channels": in_channels, "num_classes": num_classes, "image_size": image_size}
    for key, value in numbers.items():
        if value is not None and value < 1:
            raise ConfigError(f"{key}={value} is outside 1, 2, ...: no network can be built for it")
    if name in resnet_cifar.DEPTHS:
        return resnet_cifar.build(name, in_channels=in_channels, num_classes=num_classes)
    # torchvision takes over a second to import: only now is it needed
    from hodec.models import torchvision_nets

    bare = name.removeprefix(PREFIX)
    if bare not in torchvision_nets.names():
        raise _unknown(name)
    return torchvision_nets.build(bare, in_channels=in_channels, num_classes=num_classes, image_size=image_size)


def model_names() -> list[str]:
    """Every name that ``build_model`` takes; torchvision's stand with their prefix."""
    from hodec.models import torchvision_nets

    return [*resnet_cifar.DEPTHS, *(PREFIX + name for name in torchvision_nets.names())]


def _unknown(name: str) -> ConfigError:
    known = model_names()
    # the prefix would hide how near a bare name is
    bare = [key.removeprefix(PREFIX) for key in known]
    close = near_matches(name.removeprefix(PREFIX), bare)
    own = ", ".join(resnet_cifar.DEPTHS)
    return ConfigError(
        f"{{model}}: {literal(repr(name))} is unknown.{literal(close)} Choose from {own}, or {PREFIX}NAME with NAME "
        "one of torchvision's classification networks",
        model=Use("model"),
    )
