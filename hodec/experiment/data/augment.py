"""Random numbers of an epoch, and crops and flips of a batch of images: pure functions, no loop over images."""

import hashlib

import torch
import torch.nn.functional as F
from torch import Tensor


def stream(seed: int, epoch: int, purpose: str) -> torch.Generator:
    """A generator on the CPU whose numbers depend on these three alone, and differ between any two triples."""
    digest = hashlib.blake2b(f"{seed}/{epoch}/{purpose}".encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)


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
