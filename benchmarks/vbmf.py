"""VBMF's rank from a Gram spectrum, against the common form that computes a full SVD first.

    python -m benchmarks.vbmf

The full form is given the same noise search, so the ratio is what the spectrum alone brings. Weights are convolutions
of O to O channels with 3x3 kernels, unfolded (O, 9 O), of planted rank O / 4.
"""

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from benchmarks.rows import Row, Target
from benchmarks.settings import Settings, standalone
from benchmarks.timing import in_turns
from benchmarks.work import FLOAT, Work
from hodec.linalg.svd import singular_values
from hodec.ranks.evbmf import signals

GROUP = "vbmf"
CHANNELS = (128, 256, 512)
TARGET = Target(">=", 50)


def full_svd_rank(matrix: Tensor) -> int:
    """EVBMF as it is usually ported: all singular vectors, square, of which none is used."""
    _, values, _ = np.linalg.svd(matrix.numpy())
    return max(1, signals(torch.from_numpy(values), *matrix.shape))


def vbmf_rank(matrix: Tensor) -> int:
    """EVBMF from singular values alone, which come from a Gram matrix; at least 1."""
    return max(1, signals(singular_values(matrix), *matrix.shape))


def planted(channels: int) -> Tensor:
    """Unit noise plus a product of rank channels / 4, shape (O, 9 O), float32."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(channels, 9 * channels, generator=generator)
    left = torch.randn(channels, channels // 4, generator=generator)
    return noise + left @ torch.randn(channels // 4, 9 * channels, generator=generator)


def spectrum_work(rows: int, cols: int) -> Work:
    """Gram matrix and eigenvalues without vectors, at the cost of float32 although both are float64 here."""
    return Work(float(rows * rows) * cols, 4 / 3 * rows**3, FLOAT * float(rows * cols))


def rows(settings: Settings) -> Iterator[Row]:
    """One row a size."""
    for channels in CHANNELS[:1] if settings.quick else CHANNELS:
        yield compare(channels, settings)


def compare(channels: int, settings: Settings) -> Row:
    """Ranks of both forms, and their times."""
    matrix = planted(channels)
    ours, theirs = vbmf_rank(matrix), full_svd_rank(matrix)
    works = {"ours": lambda: vbmf_rank(matrix), "full": lambda: full_svd_rank(matrix)}
    times = in_turns(works, seconds=settings.seconds(4), rounds=settings.rounds(3, 20))
    least, seconds = spectrum_work(*matrix.shape), times.median("ours")
    return Row(
        GROUP,
        f"VBMF rank of {channels}x{9 * channels}",
        "full SVD",
        **times.beside("ours", "full"),
        target=TARGET if ours == theirs else None,
        limit=settings.ceilings.limit(seconds, flops=least.flops, nbytes=least.nbytes),
        note=f"ranks {ours} and {theirs}" + ("" if ours == theirs else ": they DIFFER, so no target is judged"),
    )


if __name__ == "__main__":
    standalone(rows)
