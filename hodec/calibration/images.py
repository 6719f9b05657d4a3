"""Images as inputs of a model file: layout and size by the file, numbers as stated."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hodec.errors import DataError

IMAGE_ENDINGS = {".png", ".jpg", ".jpeg", ".bmp", ".webp", ".tif", ".tiff", ".gif"}

Array = NDArray[np.generic]
Wanted = tuple[str, np.dtype[Any], tuple[int | None, ...] | None]


@dataclass(frozen=True)
class Pixels:
    """How the pixels of an image, 0..255, become numbers: (pixel - mean) / std.

    Attributes:
        mean, std: of each channel, or one for all. By default those of ImageNet's images, which most published
            classifiers were trained on; of an input of whole numbers, none.
        order: of the channels, ``rgb`` or ``bgr``.
    """

    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    order: str = "rgb"

    def stated(self, channels: int, *, whole: bool) -> "Pixels":
        """With the defaults filled in."""
        usual = channels == 3 and not whole
        mean = self.mean or ((123.675, 116.28, 103.53) if usual else (0.0,))
        std = self.std or ((58.395, 57.12, 57.375) if usual else (1.0 if whole else 255.0,))
        return Pixels(mean, std, self.order)


def image_calls(
    files: Sequence[Path], inputs: Sequence[Wanted], sizes: Mapping[str, tuple[int, ...]], pixels: Pixels
) -> tuple[list[dict[str, Array]], str]:
    """One call an image, and how they were made.

    Args:
        inputs: name, type and axes of the inputs that are to be fed; one, with four axes.
        sizes: by name, where axes are open; 224 without.

    Raises:
        DataError: a file that takes other inputs, or an image that cannot be read.
    """
    if len(inputs) != 1 or len(inputs[0][2] or ()) != 4:
        names = ", ".join(name for name, _, _ in inputs)
        raise DataError(
            f"--data: a folder of images feeds one input with four axes; this model takes {names}. Fill the others by "
            "--input NAME=NUMBER, or give arrays"
        )
    name, dtype, dims = inputs[0]
    size = tuple(n or given for n, given in zip(dims or (), sizes.get(name, (1, 0, 0, 0))))
    last = size[1] not in (1, 3, 4) and size[3] in (1, 3, 4)
    channels, height, width = (size[3], size[1], size[2]) if last else (size[1] or 3, size[2], size[3])
    height, width = height or 224, width or 224
    if channels not in (1, 3):
        raise DataError(f"--data: images have 1 or 3 channels, the model's input {name} takes {channels}; give arrays")
    if size[0] > 1:
        raise DataError(f"--data: input {name} takes {size[0]} images at a time; give them as arrays")
    pixels = pixels.stated(channels, whole=dtype.kind in "iu")
    for what, numbers in (("--mean", pixels.mean), ("--std", pixels.std)):
        if len(numbers) not in (1, channels):
            raise DataError(f"{what}: {len(numbers)} numbers given for {channels} channels; allowed: 1 or {channels}")
    calls = [{name: _array(file, pixels, (channels, height, width), last=last).astype(dtype)} for file in files]
    order = f"{pixels.order.upper()}, " * (channels == 3)
    words = (
        f"{len(files)} images as {'NHWC' if last else 'NCHW'} {channels}x{height}x{width}, {order}"
        f"(pixel - {_listed(pixels.mean)}) / {_listed(pixels.std)}"
    )
    return calls, words


def _listed(numbers: Sequence[float]) -> str:
    texts = [f"{n:g}" for n in numbers]
    return texts[0] if len(texts) == 1 else f"[{', '.join(texts)}]"


def _array(file: Path, pixels: Pixels, size: tuple[int, int, int], *, last: bool) -> NDArray[np.float32]:
    """(1, C, H, W), or (1, H, W, C) where channels come ``last``: the whole image, scaled to the size."""
    try:
        from PIL import Image
    except ImportError as error:
        raise DataError("--data: a folder of images needs Pillow: pip install pillow; or give arrays") from error
    channels, height, width = size
    try:
        with Image.open(file) as image:
            scaled = image.convert("L" if channels == 1 else "RGB").resize((width, height), Image.Resampling.BILINEAR)
            array: NDArray[Any] = np.asarray(scaled, np.float32).reshape(height, width, channels)
    except (OSError, ValueError) as error:
        raise DataError(f"--data: image {file} cannot be read: {error}") from error
    if pixels.order == "bgr" and channels == 3:
        array = array[..., ::-1]
    array = (array - np.asarray(pixels.mean, np.float32)) / np.asarray(pixels.std, np.float32)
    turned = array if last else array.transpose(2, 0, 1)
    return np.ascontiguousarray(turned, np.float32)[None]
