"""Two model files side by side: run in turns in onnxruntime, one thread, with a gauge of the machine's own noise."""

import math
import statistics
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from hodec.errors import ConfigError, ConvertError
from hodec.onnx_graph.decompose import is_finite, relative_difference
from hodec.onnx_graph.model_file import ModelFile, load_model
from hodec.onnx_graph.session import Cannot, example_feeds, run_session, session
from hodec.onnx_graph.sizes import Size, input_sizes

# Turns at least, and at most, whatever the time they take; runs of each model before that.
LEAST, MOST, WARM_UP = 10, 2000, 2
# Noise above which a ratio is not worth reading closely.
NOISY = 0.05


@dataclass(frozen=True)
class Bench:
    """Two models compared.

    Attributes:
        first_ms, second_ms: median latency of one call, milliseconds.
        speedup: median of first / second over turns.
        noise: how far the first model's two calls in each turn are from a ratio of 1, as the median would tell it.
        turns: how often both ran.
        difference: largest absolute difference of outputs.
        relative: the same over the largest number of the first model's outputs; None if they are not finite.
        first_bytes, second_bytes: size of the files, data files among them.
    """

    first_ms: float
    second_ms: float
    speedup: float
    noise: float
    turns: int
    difference: float | None
    relative: float | None
    first_bytes: int
    second_bytes: int

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)

    def __str__(self) -> str:
        apart = "outputs are not finite" if self.relative is None else (
            f"outputs differ by at most {self.difference:.3g} ({self.relative:.3g} of the largest)"
        )  # fmt: skip
        lines = [
            f"latency: {self.first_ms:.3f} ms -> {self.second_ms:.3f} ms, {self.speedup:.2f} times as fast "
            f"(one thread, {self.turns} turns, noise {self.noise:.1%})",
            apart,
            f"bytes: {self.first_bytes:,} -> {self.second_bytes:,} ({self.second_bytes / self.first_bytes - 1:+.1%})",
        ]
        if self.noise > NOISY:
            lines.append("note: this machine is busy; measure again for a ratio to rely on")
        return "\n".join(lines)


def bench_files(
    first: str | Path, second: str | Path, *, seconds: float = 10.0, shapes: Mapping[str, Size] | None = None
) -> Bench:
    """Compare two models on the same seeded random inputs.

    Each turn runs the first model twice and the second one between: what one call of the same model differs from the
    other is the noise that the ratio stands in.

    Args:
        seconds: how long to measure, above 0.
        shapes: sizes of inputs that the models leave open.

    Raises:
        CheckpointError: a file that cannot be read.
        ConvertError: a model that does not run, or models whose inputs or outputs do not agree.
    """
    if not 0 < seconds < math.inf:
        raise ConfigError(f"--seconds {seconds} is not a number above 0")
    models = [load_model(first), load_model(second)]
    sizes = [input_sizes(model, shapes or {}) for model in models]
    if sizes[0] != sizes[1]:
        raise ConvertError(f"the models take different inputs: {dict(sizes[0])} and {dict(sizes[1])}")
    feeds = example_feeds(models[0], sizes[0])
    opened = [_opened(model, feeds) for model in models]
    outputs = [run_session(one, feeds) for one in opened]
    difference, relative = _differences(*outputs)
    before, between, after = _turns(opened[0], opened[1], feeds, seconds)
    pairs = list(zip(before, between, after, strict=True))
    return Bench(
        first_ms=1e3 * statistics.median([*before, *after]),
        second_ms=1e3 * statistics.median(between),
        speedup=statistics.median(math.sqrt(a * c) / b for a, b, c in pairs),
        noise=abs(math.log(statistics.median(a / c for a, _, c in pairs))) + _spread([a / c for a, _, c in pairs]),
        turns=len(pairs),
        difference=difference,
        relative=relative,
        first_bytes=_bytes(models[0]),
        second_bytes=_bytes(models[1]),
    )


def _opened(model: ModelFile, feeds: Mapping[str, Any]) -> Any:
    try:
        opened = session(model.path, optimize=True)
        for _ in range(WARM_UP):
            run_session(opened, feeds)
    except Cannot as error:
        raise ConvertError(f"onnxruntime does not run {model.path}: {error}") from error
    return opened


def _turns(first: Any, second: Any, feeds: Mapping[str, Any], seconds: float) -> tuple[list[float], ...]:
    times: tuple[list[float], ...] = ([], [], [])
    end = time.perf_counter() + seconds
    while len(times[0]) < LEAST or (time.perf_counter() < end and len(times[0]) < MOST):
        for one, taken in zip((first, second, first), times, strict=True):
            start = time.perf_counter()
            one.run(None, dict(feeds))
            taken.append(time.perf_counter() - start)
    return times


def _spread(ratios: list[float]) -> float:
    """Standard error of the median of ratios near 1, from their quartiles."""
    low, _, high = statistics.quantiles(ratios, n=4)
    return 0.93 * (high - low) / math.sqrt(len(ratios))


def _differences(given: list[Any], other: list[Any]) -> tuple[float | None, float | None]:
    if len(given) != len(other) or any(np.shape(a) != np.shape(b) for a, b in zip(given, other)):
        raise ConvertError("the models give outputs of different number or size")
    if not all(is_finite(one) for one in (*given, *other)):
        return None, None
    floats = [(a, b) for a, b in zip(given, other) if isinstance(a, np.ndarray) and a.dtype.kind == "f" and a.size]
    worst = max((float(np.abs(a.astype(np.float64) - b).max()) for a, b in floats), default=0.0)
    return worst, max((relative_difference(b, a) for a, b in floats), default=0.0)


def _bytes(model: ModelFile) -> int:
    return sum(path.stat().st_size for path in (model.path, *model.data_files))
