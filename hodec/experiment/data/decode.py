"""Image files to pixels, with the file's name in every error."""

import os
import struct
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from hodec.errors import DataError

CHUNK = 256  # images a thread decodes before it asks for more
DEEP_MODES = ("I", "F", "I;16", "I;16L", "I;16B", "I;16N")  # more than 8 bits: Pillow would clip them
READ_ERRORS = (OSError, SyntaxError, ValueError, EOFError, struct.error, Image.DecompressionBombError)


def open_rgb(file: str) -> Image.Image:
    """A decoded image in RGB.

    Raises:
        DataError: if the file is missing, truncated, no image, or has more than 8 bits per channel.
    """
    try:
        with Image.open(file) as image:
            if image.mode not in DEEP_MODES:
                # by way of RGBA, since Pillow warns about palettes with transparent entries
                clear = image.convert("RGBA") if "transparency" in image.info else image
                return clear.convert("RGB")
    except READ_ERRORS as error:
        raise DataError(f"{file}: not readable as a image ({error}); repair or remove the file") from error
    raise DataError(f"{file}: more than 8 bits per channel ({image.mode}); save it with 8 bits")


def header_size(file: str) -> tuple[int, int]:
    """Height and width in pixels, read without decoding."""
    try:
        with Image.open(file) as image:
            return image.height, image.width
    except READ_ERRORS as error:
        raise DataError(f"{file}: not readable as a image ({error}); repair or remove the file") from error


def check_size(file: str, found: tuple[int, int], expected: tuple[int, int]) -> None:
    """Raise ``DataError`` when the image has not the (height, width) that the others have."""
    if found != expected:
        raise DataError(
            f"{file}: {found[0]}x{found[1]} pixels (height x width) where the first image has "
            f"{expected[0]}x{expected[1]}; set data.image_size={min(expected)} to bring all to one size"
        )


def decode_all(files: Sequence[str], size: tuple[int, int], *, resize: bool) -> Tensor:
    """Decode images on all cores.

    Args:
        files: paths of N images.
        size: height and width in pixels of the result.
        resize: scale and cut the middle out of every image to ``size``; else all must have it.

    Returns:
        uint8 (N, 3, height, width), independent of the number of cores.

    Raises:
        DataError: for the first file that cannot be read, or is of another size.
    """
    images = torch.empty(len(files), 3, *size, dtype=torch.uint8)
    pixels = images.numpy()

    def fill(start: int) -> None:
        for index, file in enumerate(files[start : start + CHUNK], start):
            image = open_rgb(file)
            if resize:
                image = ImageOps.fit(image, (size[1], size[0]), method=Image.Resampling.BILINEAR)
            check_size(file, (image.height, image.width), size)
            pixels[index] = np.asarray(image).transpose(2, 0, 1)

    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        # in the order of the files, so the first bad one is named whichever thread was quicker
        for _ in pool.map(fill, range(0, len(files), CHUNK)):
            pass
    return images


def check_headers(files: Sequence[str], expected: tuple[int, int] | None) -> None:
    """Open every file without decoding it.

    Args:
        files: paths of images.
        expected: the (height, width) all must have; None allows any.

    Raises:
        DataError: for the first file that is no image, or is of another size.
    """

    def look(start: int) -> None:
        for file in files[start : start + CHUNK]:
            found = header_size(file)
            check_size(file, found, expected or found)

    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        for _ in pool.map(look, range(0, len(files), CHUNK)):
            pass
