"""torchvision's classification networks with fresh weights, fitted to the data's channels, classes, size."""

from typing import Any

import torch
import torchvision
from torch import Tensor, nn
from torch.func import functional_call

from hodec.errors import ConfigError, Use

# what a builder must be told beside the number of classes: one output tensor, and no warning about its init
EXTRA_ARGUMENTS: dict[str, dict[str, Any]] = {
    "googlenet": {"aux_logits": False, "init_weights": True},
    "inception_v3": {"aux_logits": False, "init_weights": True},
}
# side lengths tried, in this order, to tell the user which one would do
CANDIDATE_SIZES = (8, 16, 24, 32, 48, 64, 75, 96, 112, 128, 160, 192, 224, 256, 299, 320, 384, 448, 512)


def names() -> list[str]:
    """Bare names of torchvision's classification networks, such as ``resnet18``."""
    return torchvision.models.list_models(module=torchvision.models)


def build(name: str, *, in_channels: int, num_classes: int, image_size: int | None = None) -> nn.Module:
    """The torchvision network ``name`` with fresh weights.

    Args:
        name: one of ``names()``.
        in_channels: channels of a image; the first convolution is made anew when it takes another number.
        num_classes: outputs of the last layer.
        image_size: side of the images in pixels; transformers with a fixed grid are built for it.
            None skips the check and keeps torchvision's own size.

    Raises:
        ConfigError: if the network cannot take images of that size.
    """
    if _grid_argument(name, image_size) and not _would_fit(name, image_size, None):
        raise _size_error(name, image_size, None)
    model = _construct(name, num_classes, image_size)
    _adapt_first_conv(model, in_channels)
    if image_size is not None and not _takes(model, in_channels, image_size):
        raise _size_error(name, image_size, model)
    return model


def _construct(name: str, num_classes: int, image_size: int | None) -> nn.Module:
    extra = EXTRA_ARGUMENTS.get(name, {}) | _grid_argument(name, image_size)
    return torchvision.models.get_model(name, weights=None, num_classes=num_classes, **extra)


def _grid_argument(name: str, image_size: int | None) -> dict[str, Any]:
    """The argument by which a transformer with position weights per pixel is told its size."""
    if image_size is None:
        return {}
    grids: dict[str, dict[str, Any]] = {
        "vit": {"image_size": image_size},
        "maxvit": {"input_size": (image_size, image_size)},
    }
    return grids.get(name.split("_")[0], {})


def _adapt_first_conv(model: nn.Module, in_channels: int) -> None:
    path, conv = next((n, m) for n, m in model.named_modules() if isinstance(m, nn.Conv2d))
    if conv.in_channels == in_channels:
        return
    new = nn.Conv2d(
        in_channels,
        conv.out_channels,
        kernel_size=conv.kernel_size,  # type: ignore[arg-type]  # torch types its own pairs as open tuples
        stride=conv.stride,  # type: ignore[arg-type]
        padding=conv.padding,  # type: ignore[arg-type]
        dilation=conv.dilation,  # type: ignore[arg-type]
        bias=conv.bias is not None,
        padding_mode=conv.padding_mode,
    )
    model.set_submodule(path, new)


def _takes(model: nn.Module, in_channels: int, image_size: int) -> bool:
    """Whether an evaluation pass over one such image works; shapes only: no arithmetic, no memory."""
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    on_meta = {key: torch.empty_like(tensor, device="meta") for key, tensor in tensors.items()}
    image = torch.empty(1, in_channels, image_size, image_size, device="meta")
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            out: Tensor = functional_call(model, on_meta, (image,))
        return out.ndim == 2
    except (RuntimeError, ValueError, AssertionError):
        return False
    finally:
        model.train(was_training)


def _size_error(name: str, image_size: int | None, model: nn.Module | None) -> ConfigError:
    """The error for a size that does not fit, with one that does; ``model`` as for ``_would_fit``."""
    larger = [size for size in CANDIDATE_SIZES if size > (image_size or 0)]
    fit = next((size for size in larger if _would_fit(name, size, model)), None)
    remedy = "set {size}" if fit else "choose another {model}"
    return ConfigError(
        f"torchvision/{name} does not take images of {image_size}x{image_size}: {remedy}",
        size=Use("data.image_size", fit or ""),
        model=Use("model"),
    )


def _would_fit(name: str, image_size: int | None, model: nn.Module | None) -> bool:
    """Whether images of this size pass.

    Args:
        model: the built network; None when its structure depends on the size, and a weightless one is built.
    """
    if image_size is None:
        return True
    if model is None:
        try:
            with torch.device("meta"):
                model = _construct(name, 2, image_size)
        except (RuntimeError, ValueError, AssertionError):
            return False
    channels = next(m.in_channels for m in model.modules() if isinstance(m, nn.Conv2d))
    return _takes(model, channels, image_size)
