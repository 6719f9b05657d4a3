"""VBMF's rank from a Gram spectrum, against the common form that computes a full SVD first.

    python -m benchmarks.vbmf

Both forms run in one process on one thread, in turn, and the ratio of their medians is printed; target: 20 or more.
The full form is given the same noise search, so the ratio is what the spectrum alone brings. Weights are convolutions
of O to O channels with 3x3 kernels, unfolded (O, 9 O), of planted rank O / 4.
"""

import statistics
import time
from collections.abc import Callable

import numpy as np
import torch
from threadpoolctl import threadpool_info, threadpool_limits
from torch import Tensor

from hodec.ranks.vbmf import signals, vbmf_rank

CHANNELS = (128, 256, 512)
ROUNDS = 3
TARGET = 20


def full_svd_rank(matrix: Tensor) -> int:
    """EVBMF as it is usually ported: all singular vectors, square, of which none is used."""
    _, values, _ = np.linalg.svd(matrix.numpy())
    return max(1, signals(torch.from_numpy(values), *matrix.shape))


def planted(channels: int) -> Tensor:
    """Unit noise plus a product of rank channels / 4, shape (O, 9 O), float32."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(channels, 9 * channels, generator=generator)
    left = torch.randn(channels, channels // 4, generator=generator)
    return noise + left @ torch.randn(channels // 4, 9 * channels, generator=generator)


def seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def compare(channels: int) -> str:
    """One line: ranks, medians and their ratio."""
    matrix = planted(channels)
    ours, theirs = vbmf_rank(matrix), full_svd_rank(matrix)  # also the warm-up
    times = [(seconds(lambda: vbmf_rank(matrix)), seconds(lambda: full_svd_rank(matrix))) for _ in range(ROUNDS)]
    fast, full = (statistics.median(column) for column in zip(*times, strict=True))
    verdict = "meets" if full / fast >= TARGET else "MISSES"
    return (
        f"{channels}x{9 * channels}: ranks {ours} and {theirs}, Gram {fast * 1e3:.1f} ms, full SVD "
        f"{full * 1e3:.1f} ms, ratio {full / fast:.0f}x ({verdict} {TARGET}x)"
    )


def main() -> None:
    torch.set_num_threads(1)
    with threadpool_limits(1):
        threads = max(torch.get_num_threads(), *(pool["num_threads"] for pool in threadpool_info()))
        print(f"torch {torch.__version__}, numpy {np.__version__}, threads: {threads}")
        for channels in CHANNELS:
            print(compare(channels), flush=True)


if __name__ == "__main__":
    main()
