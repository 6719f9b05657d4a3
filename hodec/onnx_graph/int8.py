"""A model file in 8 bits: static quantization by onnxruntime with calibration data, and layers that lose most in float.

Every convolution and product is quantized first (QDQ: nodes that round stand around float operators, which onnxruntime
joins into integer kernels). Where that loses more than is allowed, each layer is quantized alone to see what it loses;
then as few as reach the score go back to float, those that lose most first.
"""

import logging
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import ArrayLike

from hodec.errors import ConvertError
from hodec.export.runtime import Cannot, open_session
from hodec.io.atomic import write_bytes
from hodec.onnx_graph.bench import Bench, bench_files
from hodec.onnx_graph.chance import Feeds, Run, Score
from hodec.onnx_graph.cost import COUNTS
from hodec.onnx_graph.graph import load_graph
from hodec.onnx_graph.quantizer import inner_names, prepared, quantized
from hodec.onnx_graph.session import run_session
from hodec.onnx_graph.writing import MAX_BYTES, check_target

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Quantized:
    """A quantized file.

    Attributes:
        float_score, score: of the file that was quantized, and of the quantized one.
        reached: whether the score is as good as was asked for.
        floats: names of the layers that went back to float, the one that lost most first.
        layers: how many layers there are.
    """

    path: Path
    float_score: float
    score: float
    reached: bool
    floats: tuple[str, ...]
    layers: int


def quantize_file(  # noqa: PLR0913
    source: str | Path,
    out: str | Path,
    feeds: Sequence[Feeds],
    *,
    held_out: Sequence[Feeds] | None = None,
    score: Score | None = None,
    least: float | None = None,
    allowed: float = 0.05,
    threads: int = 1,
    force: bool = False,
) -> Quantized:
    """Write a file in 8 bits.

    Args:
        feeds: calibration data: what each call is fed, by the names of the inputs.
        held_out: data that layers are put in order by, and the file is judged by where no score is given; by default
            the last quarter of ``feeds``, which is then not calibrated on.
        score: of a file, by its runs, greater is better. By default 1 minus the relative distance of its outputs to
            the float file's on ``held_out``.
        least: the score to reach; by default the float file's, less the share ``allowed`` of its size.
        force: replace an existing ``out``.

    Raises:
        ConvertError: too few feeds, a file that onnxruntime cannot quantize or then not run, or no score even with
            every layer in float; then nothing is written.
    """
    graph, out = load_graph(source), Path(out)
    check_target(out, graph, force=force)
    if graph.bytes >= MAX_BYTES:
        raise ConvertError(f"{source} has {graph.bytes:,} bytes; onnxruntime quantizes files below {MAX_BYTES:,}")
    feeds, held_out = _split(feeds, held_out)
    model = prepared(Path(source))
    try:
        near = closeness(_run(model, threads), held_out)
    except Cannot as error:
        raise ConvertError(f"{source} does not run on these data: {error}") from error
    wanted = score or near
    aim = wanted(_run(model, threads))
    floor = aim - allowed * abs(aim) if least is None else least
    mixed = Mixed(model, quantized(model, feeds))
    # layers are put in order by outputs: a score of a task is often the same for several
    order = partial(_by_harm, mixed, lambda each: near(_run(each, threads)))
    try:
        floats, found = _fewest_floats(mixed, lambda each: wanted(_run(each, threads)), floor, order=order)
    except Cannot as error:
        raise ConvertError(
            f"{source}: onnxruntime does not run what its quantizer makes of it ({error}); leave it in float"
        ) from error
    if not math.isfinite(found):
        raise ConvertError(f"{source}: the quantized file has no score, even with every layer in float")
    write_bytes(out, mixed.model(floats).SerializeToString())
    return Quantized(out, aim, found, found >= floor, floats, len(mixed.layers))


def _fewest_floats(
    mixed: "Mixed", score: Callable[[onnx.ModelProto], float], floor: float, *, order: Callable[[], list[str]]
) -> tuple[tuple[str, ...], float]:
    """The layers to put back to float so that the score reaches ``floor``, and the score; all where none are enough."""
    found = score(mixed.model([]))
    if found >= floor or not mixed.layers:
        return (), found
    names = order()
    scores = {0: found}
    low, high = 0, 1
    while True:  # twice as many until they are enough, then fewer by halves of the difference
        scores[high] = score(mixed.model(names[:high]))
        log.info("%d of %d layers in float: score %.4g, %.4g wanted", high, len(names), scores[high], floor)
        if scores[high] >= floor or high == len(names):
            break
        low, high = high, min(2 * high, len(names))
    while high - low > 1 and scores[high] >= floor:
        middle = (low + high) // 2
        scores[middle] = score(mixed.model(names[:middle]))
        low, high = (low, middle) if scores[middle] >= floor else (middle, high)
    return tuple(names[:high]), scores[high]


def _split(feeds: Sequence[Feeds], held_out: Sequence[Feeds] | None) -> tuple[Sequence[Feeds], Sequence[Feeds]]:
    if held_out is None:
        if len(feeds) < 4:
            raise ConvertError(f"{len(feeds)} calls to calibrate on and to judge by; at least 4 are needed")
        at = len(feeds) - max(1, len(feeds) // 4)
        return feeds[:at], feeds[at:]
    if not feeds or not held_out:
        raise ConvertError("quantization needs at least one call to calibrate on and one to judge by")
    return feeds, held_out


def closeness(run: Run, feeds: Sequence[Feeds]) -> Score:
    """1 - norm(outputs - outputs of ``run``) / norm(outputs of ``run``), over all floating outputs on ``feeds``."""
    wanted = [list(run(each)) for each in feeds]

    def score(other: Run) -> float:
        lost = total = 0.0
        for each, outputs in zip(feeds, wanted, strict=True):
            for found, right in zip(other(each), outputs, strict=True):
                if np.asarray(right).dtype.kind == "f":
                    lost += float(np.square(np.subtract(found, right, dtype=np.float64)).sum())
                    total += float(np.square(right, dtype=np.float64).sum())
        return 1.0 - (lost / total) ** 0.5 if total else 1.0

    return score


def _run(model: onnx.ModelProto, threads: int) -> Run:
    return partial(run_session, open_session(model.SerializeToString(), threads=threads))  # type: ignore[return-value]


class Mixed:
    """A model and its quantized form, of which some layers are put back to float.

    Attributes:
        layers: names of the convolutions and products that are in both.
    """

    def __init__(self, floats: onnx.ModelProto, quantized: onnx.ModelProto) -> None:
        self.floats, self.quantized = floats, quantized
        self._nodes = {node.name: node for node in floats.graph.node}
        known = {name for node in quantized.graph.node for name in node.output}
        known |= {one.name for one in (*floats.graph.initializer, *quantized.graph.input)}
        self.layers = [
            node.name
            for node in quantized.graph.node
            if node.op_type in COUNTS
            and (mine := self._nodes.get(node.name)) is not None
            and mine.input != node.input
            and all(name in known for name in mine.input if name)
        ]

    def model(self, names: Iterable[str]) -> onnx.ModelProto:
        """The quantized model with these layers in float; a value is rounded only where 8 bits make or read it."""
        model: onnx.ModelProto = onnx.ModelProto.FromString(self.quantized.SerializeToString())
        if chosen := {*names}:
            self._give_weights(model.graph, chosen)
            _unround(model.graph, {*self.layers} - chosen)
            _remove_unread(model.graph)
        return model

    def _give_weights(self, graph: onnx.GraphProto, chosen: set[str]) -> None:
        weights = {one.name: one for one in self.floats.graph.initializer}
        given = {one.name for one in graph.initializer}
        for node in graph.node:
            for k, name in enumerate(self._nodes[node.name].input) if node.name in chosen else ():
                if name not in weights:
                    continue
                node.input[k] = name if name in given else f"{name}.float"  # the quantizer gives its nodes such names
                if node.input[k] not in given:
                    given.add(node.input[k])
                    graph.initializer.add().CopyFrom(weights[name])
                    graph.initializer[-1].name = node.input[k]


def _unround(graph: onnx.GraphProto, quantized: set[str]) -> None:
    """Let nodes read values as they were made, where neither their maker nor they are among the quantized layers."""
    makers = {name: node for node in graph.node for name in node.output}
    constants, ends = {one.name for one in graph.initializer}, {one.name for one in graph.output}
    for back in [node for node in graph.node if node.op_type == "DequantizeLinear"]:
        there = makers.get(back.input[0])
        if there is None or there.op_type != "QuantizeLinear" or there.input[0] in constants:
            continue
        value, rounded = there.input[0], back.output[0]
        maker = makers.get(value)
        if maker is not None and maker.name in quantized:
            continue
        if rounded in ends and maker is not None:  # an output of the graph keeps its name
            _rename(graph, rounded, f"{rounded}.rounded")
            _rename(graph, value, rounded)
            value, rounded = rounded, f"{rounded}.rounded"
        for reader in graph.node:
            if reader.name not in quantized:
                _replace(reader.input, rounded, value)


def _rename(graph: onnx.GraphProto, name: str, new: str) -> None:
    for node in graph.node:
        _replace(node.input, name, new)
        _replace(node.output, name, new)


def _replace(names: Any, name: str, new: str) -> None:
    if name in names:
        names[:] = [new if one == name else one for one in names]


def _remove_unread(graph: onnx.GraphProto) -> None:
    """Remove nodes that nothing reads, and then initializers."""
    ends = {one.name for one in graph.output}
    while True:
        read = ends | {name for node in graph.node for name in node.input}
        read |= {name for node in graph.node for name in inner_names(node)}
        unread = [node for node in graph.node if not read & {*node.output}]
        if not unread:
            break
        for node in unread:
            graph.node.remove(node)
    for one in [one for one in graph.initializer if one.name not in read]:
        graph.initializer.remove(one)


def _by_harm(mixed: Mixed, score: Callable[[onnx.ModelProto], float]) -> list[str]:
    """The layers, the one first that loses most in 8 bits alone, with all others in float."""
    alone = {name: score(mixed.model([one for one in mixed.layers if one != name])) for name in mixed.layers}
    return sorted(mixed.layers, key=lambda name: alone[name])


# -- one table of four files -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class FileRow:
    """One line of the table.

    Attributes:
        what: ``fp32 dense``, ``int8 dense``, ``decomposed`` or ``decomposed, int8``.
        bench: the file beside the dense one; None for that itself.
    """

    what: str
    path: Path
    score: float
    bytes: int
    bench: Bench | None

    def __str__(self) -> str:
        ratio = "1.00x" if self.bench is None else self.bench.ratio_words
        return f"{self.what:<17} score {self.score:.4g}, {self.bytes:,} bytes, {ratio}"


def four_rows(
    files: Mapping[str, Path],
    score: Score,
    *,
    seconds: float = 10.0,
    threads: int = 1,
    values: Mapping[str, ArrayLike] | None = None,
) -> list[FileRow]:
    """The table: score, bytes and latency ratio of each file beside the first.

    Args:
        files: what stands in the line -> file; the dense one first.
        seconds: how long to measure each pair.
        values: of the inputs, see ``bench_files``.

    Raises:
        ConvertError: a file that does not run.
    """
    rows: list[FileRow] = []
    first = next(iter(files.values()))
    measured = partial(bench_files, seconds=seconds, threads=threads, values=values)
    for what, path in files.items():
        try:
            opened = open_session(path, threads=threads)
            found = score(partial(run_session, opened))  # type: ignore[arg-type]
        except Cannot as error:
            raise ConvertError(f"onnxruntime does not run {path}: {error}") from error
        bench = measured(first, path) if rows else None
        rows.append(FileRow(what, path, found, load_graph(path).bytes, bench))
    return rows
