"""Random numbers of an epoch, and what they do to a batch of images. Pure functions, no loop over images."""

import hashlib
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Augment:
    """What is done to training images held in memory.

    Attributes:
        crop_padding: width in pixels of the black border out of which a image is cropped to its size, >= 0.
        flip: whether each image is mirrored left to right with probability 1/2.
    """

    crop_padding: int = 0
    flip: bool = False


NO_AUGMENT = Augment()


def stream(seed: int, epoch: int, purpose: str) -> torch.Generator:
    """A generator on the CPU whose numbers depend on these three alone, and differ between any two triples."""
    digest = hashlib.blake2b(f"{seed}/{epoch}/{purpose}".encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)


def epoch_order(size: int, *, seed: int, epoch: int) -> Tensor:
    """The order in which an epoch visits ``size`` images: a permutation, int64 (size,)."""
    return torch.randperm(size, generator=stream(seed, epoch, "order"))


def draw_shifts(size: int, augment: Augment, *, seed: int, epoch: int) -> Tensor:
    """Where crops begin: int64 (size, 2) of rows and columns, each in 0..2 * crop_padding."""
    generator = stream(seed, epoch, "crop")
    return torch.randint(2 * augment.crop_padding + 1, (size, 2), generator=generator)


def draw_flips(size: int, *, seed: int, epoch: int) -> Tensor:
    """Which images are mirrored: bool (size,)."""
    return torch.randint(2, (size,), generator=stream(seed, epoch, "flip")).bool()


def crop(images: Tensor, shifts: Tensor, padding: int) -> Tensor:
    """Cut each image out of itself with a black border.

    Args:
        images: (N, C, H, W), any type.
        shifts: int64 (N, 2), rows and columns in 0..2 * padding; ``padding`` itself gives the image back.
        padding: width of the border in pixels.
    """
    height, width = images.shape[-2:]
    padded = F.pad(images, [padding] * 4)
    windows = padded.unfold(2, height, 1).unfold(3, width, 1)  # (N, C, 2p + 1, 2p + 1, H, W), a view
    which = torch.arange(len(images), device=images.device)
    return windows[which, :, shifts[:, 0], shifts[:, 1]]


def mirror(images: Tensor, flips: Tensor) -> Tensor:
    """Mirror the images of (N, C, H, W) marked in ``flips`` bool (N,) left to right."""
    return torch.where(flips.view(-1, 1, 1, 1), images.flip(-1), images)
