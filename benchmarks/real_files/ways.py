"""How a smaller file is asked for: commands as a user types them, in a process of their own."""

import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from benchmarks import THREAD_VARIABLES
from benchmarks.real_files.case import SEEDS, Case

MOST_SECONDS = 1800
# What the lines of the four files begin with.
FOUR = ("fp32 dense", "int8 dense", "decomposed")
SCORE = '''"""The score that the search may ask for."""

from pathlib import Path

from benchmarks.real_files.cases import all_cases

CASE = all_cases(Path({cache!r}))[{name!r}]


def score(run):
    """Of a model, given as a function from a dict of inputs to a dict of outputs."""
    return CASE.score(lambda feeds: list(run(feeds).values()), {seed}, {n})
'''


@dataclass(frozen=True)
class Made:
    """What became of a command.

    Attributes:
        path: the file, or None.
        said: the verdict, or why there is none.
        four: the lines of the four files, where the command has 8 bits tried.
    """

    path: Path | None
    seconds: float
    said: str
    four: tuple[str, ...] = ()


def weights_only(*flags: str) -> Callable[[Case, Path], list[str]]:
    """``hodec decompose`` without data."""
    return lambda case, folder: ["decompose", str(case.path), *flags, *_shapes(case)]


def compressed(*flags: str) -> Callable[[Case, Path], list[str]]:
    """``hodec compress`` with data and a score."""

    def command(case: Case, folder: Path) -> list[str]:
        data, score = write_data(case, folder), write_score(case, folder)
        return ["compress", str(case.path), "--data", str(data), "--eval", f"{score}:score", *flags]

    return command


WAYS: dict[str, Callable[[Case, Path], list[str]]] = {
    "as typed": weights_only("--no-data"),
    "weights, 0.8 of MACs": weights_only("--methods", "[svd, spatial_svd]", "--macs", "0.8"),
    "weights, 0.5 of MACs": weights_only("--methods", "[svd, spatial_svd]", "--macs", "0.5"),
    "compress, latency": compressed("--max-drop", "0.01"),
    "compress, latency, int8": compressed("--max-drop", "0.01", "--int8"),
    "compress, size": compressed("--max-drop", "0.01", "--target", "size"),
    "compress, size, int8": compressed("--max-drop", "0.01", "--target", "size", "--int8"),
    "compress, macs": compressed("--max-drop", "0.01", "--target", "macs"),
}


def made(case: Case, way: str, folder: Path) -> Made:
    """Run the command of a way; what it wrote lies in ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    out = folder / f"{way.replace(', ', '-').replace(' ', '-')}.onnx"
    out.unlink(missing_ok=True)
    command = [sys.executable, "-m", "hodec.cli", *WAYS[way](case, folder), "-o", str(out)]
    alone = os.environ | dict.fromkeys(THREAD_VARIABLES, "1")
    started = time.perf_counter()
    try:
        done = subprocess.run(command, capture_output=True, text=True, env=alone, timeout=MOST_SECONDS)
    except subprocess.TimeoutExpired:
        return Made(None, MOST_SECONDS, f"stopped after {MOST_SECONDS} s")
    seconds = time.perf_counter() - started
    out.with_suffix(".log").write_text(" ".join(command) + "\n" + done.stdout + done.stderr)
    lines = [line.strip() for line in (done.stderr if done.returncode else done.stdout).splitlines() if line.strip()]
    said = lines[-1 if done.returncode else 0] if lines else f"exit {done.returncode}"
    four = tuple(line for line in lines if line.startswith(FOUR))
    return Made(out if out.exists() else None, seconds, said, four)


def write_data(case: Case, folder: Path) -> Path:
    """A folder with one .npz for each calibration input."""
    data = folder / "data"
    data.mkdir(parents=True, exist_ok=True)
    for k, feeds in enumerate(case.feeds(SEEDS["calibration"], case.sizes.calibration)):
        np.savez(data / f"{k:04d}.npz", **feeds)  # type: ignore[arg-type]
    return data


def write_score(case: Case, folder: Path) -> Path:
    """A Python file with the function ``score``, on labelled inputs that are neither fitted nor in the table."""
    path = folder / "score.py"
    told = SCORE.format(cache=str(case.cache.resolve()), name=case.name, seed=SEEDS["search"], n=case.sizes.search)
    path.write_text(told)
    return path


def _shapes(case: Case) -> list[str]:
    return [word for shape in case.shapes for word in ("--shape", shape)]
