"""Two model files side by side: run in turns in onnxruntime, with an interval that the ratio of their times lies in."""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import cast

import numpy as np
from numpy.typing import ArrayLike, NDArray

from hodec.cost.timing import samples_ms
from hodec.errors import ConfigError, ConvertError, Use
from hodec.export.runtime import Array, Cannot, Session, open_session
from hodec.onnx_graph.feeds import example_inputs
from hodec.onnx_graph.graph import OnnxGraph, load_graph
from hodec.onnx_graph.session import is_finite, relative_difference, run_session
from hodec.onnx_graph.sizes import Size


@dataclass(frozen=True)
class Bench:
    """Two models compared.

    Attributes:
        first_ms, second_ms: median latency of one call, milliseconds.
        speedup: median of first / second over turns.
        low, high: 95 % interval of that, see ``interval``. A ratio whose interval holds 1 is no gain and no loss.
        threads: of each operator.
        noise: how far the ratio of the first model's two calls in each turn is from 1: |log median| plus the standard
            error of that median.
        turns: how often both ran.
        difference: largest absolute difference of outputs.
        relative: the same over the largest number of the first model's outputs; None if they are not finite, or none
            is compared.
        first_bytes, second_bytes: size of the files, data files among them.
        uncompared: how many outputs are not compared, as they are no arrays of numbers.
    """

    first_ms: float
    second_ms: float
    speedup: float
    low: float
    high: float
    threads: int
    noise: float
    turns: int
    difference: float | None
    relative: float | None
    first_bytes: int
    second_bytes: int
    uncompared: int = 0

    def to_dict(self) -> dict[str, object]:
        """Plain JSON values."""
        return asdict(self)

    @property
    def is_told(self) -> bool:
        """Whether the files' times differ by more than the noise."""
        return not self.low <= 1 <= self.high

    @property
    def ratio_words(self) -> str:
        """``1.46x (1.45 to 1.47)``, or that no difference can be told."""
        words = f"{self.speedup:.2f}x ({self.low:.2f} to {self.high:.2f})"
        return words if self.is_told else f"no difference told, {words}"

    @property
    def _apart(self) -> str:
        count = self.uncompared
        left_out = f"outputs that are no arrays of numbers ({count}) are not compared" if count else ""
        if self.relative is None:
            return left_out or "outputs are not finite"
        words = f"outputs differ by at most {self.difference:.3g} ({self.relative:.3g} of the largest)"
        return f"{words}; {left_out}" if left_out else words

    def __str__(self) -> str:
        threads = "one thread" if self.threads == 1 else f"{self.threads} threads"
        told = "" if self.is_told else "no difference can be told: "
        lines = [
            f"latency: {self.first_ms:.3f} ms -> {self.second_ms:.3f} ms, {told}{self.speedup:.2f} times as fast "
            f"({threads}, {self.turns} turns, 95 % interval {self.low:.2f} to {self.high:.2f}, noise {self.noise:.1%})",
            self._apart,
            f"bytes: {self.first_bytes:,} -> {self.second_bytes:,} ({self.second_bytes / self.first_bytes - 1:+.1%})",
        ]
        if self.noise > 0.05:  # a ratio of some percent is lost in it
            lines.append("note: this machine is busy; measure again for a ratio to rely on")
        return "\n".join(lines)


def bench_files(
    first: str | Path,
    second: str | Path,
    *,
    seconds: float = 10.0,
    shapes: Mapping[str, Size] | None = None,
    values: Mapping[str, ArrayLike] | None = None,
    threads: int = 1,
) -> Bench:
    """Compare two models on the same seeded random inputs.

    Each turn runs the first model twice and the second one: what one call of the same model differs from the other is
    the noise that the ratio stands in.

    Args:
        seconds: how long to measure, above 0.
        shapes: sizes of inputs that the models leave open.
        values: numbers that fill inputs, or arrays for them.
        threads: of each operator in onnxruntime. With one, times are the thread's own, which others on the same core
            do not lengthen; with more they are those on the clock.

    Raises:
        CheckpointError: a file that cannot be read.
        ConvertError: a model that does not run, or models whose inputs or outputs do not agree.
    """
    if not 0 < seconds < math.inf:
        raise ConfigError("{seconds} is not a number above 0", seconds=Use("seconds", seconds))
    if threads < 1:
        raise ConfigError("{threads} is not a whole number above 0", threads=Use("threads", threads))
    graphs = [load_graph(first), load_graph(second)]
    (sizes, feeds), (others, _) = (example_inputs(graph, shapes or {}, values or {}) for graph in graphs)
    if sizes != others:
        raise ConvertError(f"the models take different inputs: {sizes} and {others}")
    opened = [_opened(graph, feeds, threads) for graph in graphs]
    difference, relative, uncompared = _differences(*(run_session(one, feeds) for one in opened))
    works = {name: partial(one.run, None, feeds) for name, one in zip("abc", (*opened, opened[0]))}
    before, between, after = samples_ms(works, seconds=seconds, rounds=(10, 2000), wall=threads > 1).values()
    pairs = list(zip(before, between, after, strict=True))
    own, ratios = [a / c for a, _, c in pairs], [math.sqrt(a * c) / b for a, b, c in pairs]
    low, high = interval(ratios, own)
    return Bench(
        first_ms=statistics.median([*before, *after]),
        second_ms=statistics.median(between),
        speedup=statistics.median(ratios),
        low=low,
        high=high,
        threads=threads,
        noise=abs(math.log(statistics.median(own))) + _median_error(own),
        turns=len(pairs),
        difference=difference,
        relative=relative,
        first_bytes=graphs[0].bytes,
        second_bytes=graphs[1].bytes,
        uncompared=uncompared,
    )


def interval(ratios: Sequence[float], own: Sequence[float], *, resamples: int = 2000) -> tuple[float, float]:
    """95 % interval of the median of ``ratios``, turn after turn, by a circular block bootstrap of the turns.

    A machine slows down for longer than a turn, so blocks of n^(1/3) turns are drawn, not single ones. Both ends move
    out by how far the median of ``own``, the ratios of one model to itself in the same turns, is from 1.

    Source: Politis and Romano, A Circular Block-Resampling Procedure for Stationary Data, 1992.
    """
    logs, generator = np.log(np.asarray(ratios)), np.random.default_rng(0)
    count = len(logs)
    width = math.ceil(count ** (1 / 3))
    starts = generator.integers(count, size=(resamples, math.ceil(count / width), 1))
    drawn = ((starts + np.arange(width)) % count).reshape(resamples, -1)[:, :count]
    low, high = np.quantile(np.median(logs[drawn], axis=1), [0.025, 0.975])
    bias = abs(math.log(statistics.median(own)))
    return math.exp(low - bias), math.exp(high + bias)


def _opened(graph: OnnxGraph, feeds: Mapping[str, Array], threads: int) -> Session:
    """A session of the model, tried once."""
    try:
        opened = open_session(graph.path, threads=threads)
        run_session(opened, feeds)
    except Cannot as error:
        raise ConvertError(f"onnxruntime does not run {graph.path}: {error}") from error
    return opened


def _median_error(ratios: list[float]) -> float:
    """Standard error of the median: 1.253 / 1.349 of the distance of the quartiles over sqrt(n), of normal numbers."""
    low, _, high = statistics.quantiles(ratios, n=4)
    return 0.93 * (high - low) / math.sqrt(len(ratios))


def _differences(first: list[object], second: list[object]) -> tuple[float | None, float | None, int]:
    """Largest absolute and relative difference of two models' outputs, and how many are not compared.

    The differences are None where outputs are not finite, or none is compared.
    """
    if len(first) != len(second) or any(np.shape(a) != np.shape(b) for a, b in zip(first, second)):  # type: ignore[call-overload]
        raise ConvertError("the models give outputs of different number or size")
    pairs = [(_numbers(a), _numbers(b)) for a, b in zip(first, second)]
    known = [(a, b) for a, b in pairs if a is not None and b is not None]
    uncompared = len(pairs) - len(known)
    if not known or not all(is_finite(one) for pair in known for one in pair):
        return None, None, 0 if known else uncompared
    worst = max((float(np.abs(a - b).max()) for a, b in known if a.size), default=0.0)
    return worst, max((relative_difference(b, a) for a, b in known), default=0.0), uncompared


def _numbers(output: object) -> NDArray[np.float64] | None:
    """An output in double precision; None where it is no array of numbers."""
    known = isinstance(output, np.ndarray) and (output.dtype.kind in "fiub" or output.dtype.name == "bfloat16")
    return cast(Array, output).astype(np.float64) if known else None
