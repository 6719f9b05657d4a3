"""What all benchmarks are told."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch

from benchmarks.machine import Ceilings, measure_ceilings
from benchmarks.page import line, table
from benchmarks.rows import Row
from hodec.cost.timing import device_name


@dataclass(frozen=True)
class Settings:
    """How to measure.

    Attributes:
        ceilings: of this machine, see ``measure_ceilings``.
        out: folder for plots; it exists.
        quick: small sizes and few rounds: shows that everything runs, and no more.
        compiled: whether nets by ``torch.compile`` are measured too, which takes minutes.
        channels: input and output channels of the 3x3 kernels to decompose; by default those of ``quick`` or not.
    """

    ceilings: Ceilings
    out: Path
    quick: bool = False
    compiled: bool = False
    channels: tuple[int, ...] = ()

    @property
    def kernel_channels(self) -> tuple[int, ...]:
        return self.channels or ((256,) if self.quick else (512, 1024))

    def rounds(self, least: int, most: int = 40) -> tuple[int, int]:
        """Least and most rounds."""
        return (1, 2) if self.quick else (least, most)

    def seconds(self, seconds: float) -> float:
        """Time for one comparison."""
        return 0.3 if self.quick else seconds


def not_installed(*modules: str) -> str:
    """Which of these optional packages are not there: ``tltorch is not installed``; empty when all are."""
    absent = [name for name in modules if find_spec(name) is None]
    return f"{', '.join(absent)} {'is' if len(absent) == 1 else 'are'} not installed" if absent else ""


def standalone(rows: Callable[[Settings], Iterable[Row]]) -> None:
    """Run one benchmark by itself and print its table; nothing is written."""
    torch.set_num_threads(1)
    print(f"torch {torch.__version__}, numpy {np.__version__}, {device_name()}\n\n{table([])}", flush=True)
    for row in rows(Settings(measure_ceilings(), Path())):
        print(line(row) + (f"  {row.note}" if row.note else ""), flush=True)
