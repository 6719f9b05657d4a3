"""torchvision's classification networks with fresh weights, fitted to the data's channels, classes, size."""

import torch
import torchvision
from torch import Tensor, nn
from torch.func import functional_call

from hodec.errors import ConfigError, Use

# Arguments beside the number of classes: one output tensor, and no warning about the initialisation.
EXTRA_ARGUMENTS: dict[str, dict[str, object]] = dict.fromkeys(
    ("googlenet", "inception_v3"), {"aux_logits": False, "init_weights": True}
)
# Sides in pixels that are tried, in this order, to find one that a net takes; 75 is the least of inception_v3.
CANDIDATE_SIZES = (8, 16, 24, 32, 48, 64, 75, 96, 112, 128, 160, 192, 224, 256, 299, 320, 384, 448, 512)
MISFIT = (RuntimeError, ValueError, AssertionError)  # errors of a net that gets images of a wrong size


def names() -> list[str]:
    """Bare names of torchvision's classification networks, such as ``resnet18``."""
    return [str(name) for name in torchvision.models.list_models(module=torchvision.models)]


def build(name: str, *, in_channels: int, num_classes: int, image_size: int | None = None) -> nn.Module:
    """The torchvision network ``name`` with fresh weights.

    Args:
        name: one of ``names()``.
        in_channels: channels of an image; the first convolution is made anew when it takes another number.
        num_classes: outputs of the last layer.
        image_size: side of the images in pixels; transformers with a fixed grid are built for it.
            None skips the check and keeps torchvision's own size.

    Raises:
        ConfigError: if the network cannot take images of that size.
    """
    if image_size is not None and _grid_argument(name, image_size) and not _would_fit(name, image_size, None):
        raise _size_error(name, image_size, None)
    model = _construct(name, num_classes, image_size)
    conv = _first_conv(model)
    if conv.in_channels != in_channels:
        conv.in_channels = in_channels
        conv.weight = nn.Parameter(conv.weight.new_empty(conv.out_channels, in_channels, *conv.kernel_size))
        conv.reset_parameters()
    if image_size is not None and not _would_fit(name, image_size, model):
        raise _size_error(name, image_size, model)
    return model


def _construct(name: str, num_classes: int, image_size: int | None) -> nn.Module:
    extra = EXTRA_ARGUMENTS.get(name, {}) | _grid_argument(name, image_size)
    model: nn.Module = torchvision.models.get_model(name, weights=None, num_classes=num_classes, **extra)
    return model


def _grid_argument(name: str, image_size: int | None) -> dict[str, object]:
    """The argument by which a transformer with position weights per pixel is told its size."""
    grids: dict[str, dict[str, object]] = {
        "vit": {"image_size": image_size},
        "maxvit": {"input_size": (image_size, image_size)},
    }
    return {} if image_size is None else grids.get(name.split("_")[0], {})


def _first_conv(model: nn.Module) -> nn.Conv2d:
    return next(module for module in model.modules() if isinstance(module, nn.Conv2d))


def _size_error(name: str, image_size: int, model: nn.Module | None) -> ConfigError:
    """The error for a size that does not fit, with one that does; ``model`` as for ``_would_fit``."""
    fit = next((size for size in CANDIDATE_SIZES if size > image_size and _would_fit(name, size, model)), None)
    remedy = "set {remedy}" if fit else "choose another {remedy}"
    return ConfigError(
        f"torchvision/{name} does not take images of {image_size}x{image_size}: {remedy}",
        remedy=Use("data.image_size", fit) if fit else Use("model"),
    )


def _would_fit(name: str, image_size: int, model: nn.Module | None) -> bool:
    """Whether an evaluation pass over one such image works; shapes only: no arithmetic, no memory.

    Args:
        model: the built network; None when its structure depends on the size, and a weightless one is built.
    """
    try:
        if model is None:
            with torch.device("meta"):
                model = _construct(name, 2, image_size)
        return _passes(model, image_size)
    except MISFIT:
        return False


def _passes(model: nn.Module, image_size: int) -> bool:
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    on_meta = {key: torch.empty_like(tensor, device="meta") for key, tensor in tensors.items()}
    image = torch.empty(1, _first_conv(model).in_channels, image_size, image_size, device="meta")
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            out: Tensor = functional_call(model, on_meta, (image,))
        return out.ndim == 2
    finally:
        model.train(was_training)
