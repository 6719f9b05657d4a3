"""What times depend on: the machine, its versions, its measured ceilings, and what else ran on it."""

import os
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from benchmarks.timing import in_turns
from hodec.cost.timing import device_name

PACKAGES = ("torch", "numpy", "tensorly", "tensorly-torch", "onnx", "onnxruntime")
# More than this share of the machine used by others, and times are not those of a quiet machine.
QUIET = 0.05
_STAT = Path("/proc/stat")


@dataclass(frozen=True)
class Ceilings:
    """Measured rates that no work here can exceed: float32 flop/s of matrix products and of a 3x3 convolution
    (channels last), and bytes/s of a copy (read and written counted).
    """

    torch_gemm: float
    numpy_gemm: float
    conv: float
    copy: float

    @property
    def gemm(self) -> float:
        """The better of the two libraries."""
        return max(self.torch_gemm, self.numpy_gemm)

    def limit(self, seconds: float, *, flops: float, nbytes: float, conv: bool = False) -> str:
        """The least time for this much work, and the share of ``seconds`` that it is."""
        rate = self.conv if conv else self.gemm
        least = max(flops / rate, nbytes / self.copy)
        bound = "arithmetic" if flops / rate >= nbytes / self.copy else "memory"
        return (
            f"{flops / 2e9:.3g} G multiply-adds at {rate / 1e9:.0f} GF/s, {nbytes / 1e9:.2g} GB at "
            f"{self.copy / 1e9:.0f} GB/s: at least {least:.3g} s ({bound}), {least / seconds:.0%} of that rate reached"
        )

    def __str__(self) -> str:
        return (
            f"float32 matrix product {self.torch_gemm / 1e9:.0f} GF/s in torch and {self.numpy_gemm / 1e9:.0f} in "
            f"NumPy, 3x3 convolution {self.conv / 1e9:.0f} GF/s, memory copy {self.copy / 1e9:.1f} GB/s"
        )


def measure_ceilings(*, quick: bool = False) -> Ceilings:
    """The rates on as many threads as torch and NumPy have now."""
    n, images = (512, 4) if quick else (2048, 32)
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(2, n, n, generator=generator)
    x = torch.randn(images, 256, 14, 14, generator=generator).to(memory_format=torch.channels_last)
    kernel = torch.randn(256, 256, 3, 3, generator=generator).to(memory_format=torch.channels_last)
    block = torch.zeros((4 if quick else 64) * 2**20)
    to, left, right = torch.empty_like(block), a.numpy(), b.numpy()
    works: dict[str, Callable[[], object]] = {
        "torch": lambda: a @ b,
        "numpy": lambda: np.matmul(left, right),
        "conv": lambda: F.conv2d(x, kernel, padding=1),
        "copy": lambda: to.copy_(block),
    }
    with torch.inference_mode():
        times = in_turns(works, seconds=0.2 if quick else 4.0)
    least = {name: min(samples) for name, samples in times.samples.items()}
    return Ceilings(
        torch_gemm=2 * n**3 / least["torch"],
        numpy_gemm=2 * n**3 / least["numpy"],
        conv=2 * x.numel() * 256 * 9 / least["conv"],
        copy=2 * 4 * block.numel() / least["copy"],
    )


def facts(threads: int) -> dict[str, str]:
    """Date, processor, versions, threads."""
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "processor": device_name().rsplit(",", 1)[0],
        "cores": str(os.cpu_count()),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        **{name: _version(name) for name in PACKAGES},
        "threads": str(threads),
    }


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


class Gauge:
    """The share of the machine's processors that other processes used since this was made."""

    def __init__(self) -> None:
        self.began, self.busy, self.own = time.perf_counter(), _busy_seconds(), _own_seconds()

    def others(self) -> float | None:
        """0..1; None where the system does not tell."""
        busy = _busy_seconds()
        if busy is None or self.busy is None:
            return None
        theirs = (busy - self.busy) - (_own_seconds() - self.own)
        wall = (time.perf_counter() - self.began) * (os.cpu_count() or 1)
        return min(1.0, max(0.0, theirs / wall))

    def verdict(self) -> str:
        """One sentence for the end of the table."""
        share = self.others()
        if share is None:
            return "CPU that other processes used: unknown on this system."
        text = f"Other processes used {share:.0%} of the machine's CPU during the whole run."
        return text if share <= QUIET else f"{text} These figures are NOT from a quiet machine."


def _busy_seconds() -> float | None:
    """CPU seconds of all processes since the machine started."""
    try:
        user, nice, system, _idle, _wait, irq, soft, *_ = map(int, _STAT.read_text().split("\n", 1)[0].split()[1:])
    except (OSError, ValueError):
        return None
    return (user + nice + system + irq + soft) / os.sysconf("SC_CLK_TCK")


def _own_seconds() -> float:
    """CPU seconds of this process and of its children that have ended."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system
