"""timm's classification networks with fresh weights; timm is imported when one of them is asked for."""

from types import ModuleType

import torch
from torch import Tensor, nn

from hodec.errors import ConfigError, Use, near_matches

PREFIX = "timm/"


def build(name: str, *, in_channels: int, num_classes: int, image_size: int | None = None) -> nn.Module:
    """The timm network ``name``, such as ``resnet18``, with fresh weights, in training mode.

    Args:
        name: one of ``timm.list_models()``.
        in_channels: channels of an image.
        num_classes: outputs of the last layer.
        image_size: side of the images in pixels, for which transformers with a fixed grid are built. None skips the
            check and keeps timm's own size.

    Raises:
        ConfigError: timm is not installed, it has no such network, or that does not take images of this size.
    """
    timm = _timm()
    if not timm.is_model(name):
        close = near_matches(name, timm.list_models()) or " They are listed by timm.list_models()"
        raise ConfigError(f"{{model}} timm/{name} is unknown to timm {timm.__version__}.{close}", model=Use("model"))
    sized = {"img_size": image_size} if image_size is not None and _takes_size(timm, name) else {}
    try:
        model: nn.Module = timm.create_model(
            name, pretrained=False, in_chans=in_channels, num_classes=num_classes, **sized
        )
        fits = image_size is None or _passes(model, in_channels, image_size, num_classes)
    except (RuntimeError, ValueError, AssertionError, TypeError, IndexError) as error:  # of a net that does not fit
        raise _misfit(name, image_size, str(error)) from error
    if not fits:
        raise _misfit(name, image_size, f"it gives no scores of {num_classes} classes")
    return model


def _timm() -> ModuleType:
    try:
        import timm
    except ModuleNotFoundError as error:
        raise ConfigError("a net of timm needs timm, which is not installed: pip install timm") from error
    return timm  # type: ignore[no-any-return]


def _takes_size(timm: ModuleType, name: str) -> bool:
    """Whether a net is built for one size of images, as timm's own settings of it say."""
    settings = timm.models.get_pretrained_cfg(name, allow_unregistered=False)
    return bool(settings and settings.fixed_input_size)


def _passes(model: nn.Module, in_channels: int, image_size: int, num_classes: int) -> bool:
    image = torch.zeros(1, in_channels, image_size, image_size)
    model.eval()
    try:
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            out: object = model(image)
    finally:
        model.train()
    return isinstance(out, Tensor) and tuple(out.shape) == (1, num_classes)


def _misfit(name: str, image_size: int | None, reason: str) -> ConfigError:
    first = (reason.strip().splitlines() or [""])[0].replace("{", "(").replace("}", ")")
    return ConfigError(
        f"timm/{name} does not take images of {image_size}x{image_size} ({first}): choose another {{size}}, or another "
        "net",
        size=Use("data.image_size"),
    )
