"""int8 on top of decomposition: both files quantized with the same data, and one table of the four."""

import logging
import tempfile
from dataclasses import replace
from functools import partial
from pathlib import Path

from hodec.calibration.data import Samples
from hodec.errors import CheckpointError, ConvertError
from hodec.export.runtime import open_session
from hodec.io.atomic import write_bytes
from hodec.onnx_graph.bench import Bench
from hodec.onnx_graph.chance import Loss
from hodec.onnx_graph.graph import load_graph
from hodec.onnx_graph.int8 import FileRow, Quantized, four_rows, quantize_file
from hodec.onnx_graph.search import Search, Trial
from hodec.onnx_graph.storage import FLOAT32, store
from hodec.onnx_graph.trial_file import STORED, runner, write_trial
from hodec.onnx_graph.verdict import Compressed
from hodec.onnx_graph.writing import written

log = logging.getLogger(__name__)

# Sizes of which the larger is less than this times the smaller count as equal.
NEAR = 1.05
# Lines of the table.
DENSE, DENSE_INT8, DECOMPOSED, BOTH = "fp32 dense", "int8 dense", "decomposed", "decomposed, int8"


def write_int8(
    trial: Trial, search: Search, held: Samples, out: Path, *, seconds: float, stored: str = FLOAT32
) -> Compressed:
    """The file of a trial in 8 bits, its layers that lose most left in float.

    It stays in float altogether where onnxruntime cannot quantize it, or where 8 bits lose more than is allowed or do
    not make it what the target is, smaller or faster.

    Raises:
        LosesMore: the decomposed file loses more than is allowed, or no file is smaller where size is the target;
            nothing is written.
    """
    float_file = partial(write_trial, trial, search, held, seconds=seconds, stored=stored)
    with tempfile.TemporaryDirectory(prefix="hodec-") as name:
        alone = Path(name) / "float.onnx"
        result = float_file(alone)
        try:
            rows, both, loss = _four(alone, stored, search, held, seconds=seconds)
        except (ConvertError, CheckpointError) as error:  # the search was long, and its file is good
            log.warning("%s", error)
            result = float_file(out, judged=False, smaller=True)
            return replace(result, remarks=(*result.remarks, f"in float, as 8 bits cannot be had: {error}"))
        lines, row = tuple(map(str, rows)), rows[-1]
        sure = both.reached and search.judge.is_sure(loss)
        better, how = _is_better(row, rows[-2], search.target)
        better = better and (search.target != "size" or row.bytes < rows[0].bytes)
        if sure and better:
            write_bytes(out, both.path.read_bytes())
            said = f"in 8 bits; {len(both.floats)} of its {both.layers} layers are in float"
            chance = search.judge.chance(loss)
            remarks = [one for one in result.remarks if STORED not in one]  # of the file in float
            kept = replace(result, output=str(out), score=loss.score, chance=chance, bytes_after=row.bytes)
            return replace(kept, bench=_bench(row), rows=lines, remarks=(*remarks, said))
    # judged once: measured again, a file near the dense one's speed may come out the slower one
    why = f"make it no {how}" if sure else "lose more than is allowed"
    result = float_file(out, judged=False, smaller=True)
    return replace(result, rows=lines, remarks=(*result.remarks, f"in float, as 8 bits {why}"))


def _four(
    alone: Path, stored: str, search: Search, held: Samples, *, seconds: float
) -> tuple[list[FileRow], Quantized, Loss]:
    """The lines of the four files, of which ``alone`` is the decomposed one; that in 8 bits, and what it loses."""
    judge, source = search.judge, search.facts.graph.path
    dense = _quantized(source, alone.with_name("dense.int8.onnx"), search, held)
    both = _quantized(alone, alone.with_name("both.onnx"), search, held)
    if stored != FLOAT32:
        _shorten(both.path)  # layers that went back to float
    files = {DENSE: source, DENSE_INT8: dense.path, DECOMPOSED: alone, BOTH: both.path}
    rows = four_rows(files, judge.score, seconds=seconds, values=search.facts.feeds)
    return rows, both, judge.loss(runner(open_session(both.path, threads=search.net.threads)))


def _quantized(path: Path, out: Path, search: Search, held: Samples) -> Quantized:
    """The file in 8 bits, with as few layers in float as keep the score."""
    judge, calls, floor = search.judge, search.fit.calls, search.judge.dense - search.judge.allowed
    threads = search.net.threads
    return quantize_file(path, out, calls, held_out=held.calls, score=judge.sure, least=floor, threads=threads)


def _shorten(path: Path) -> None:
    """Store what is still float32 as float16."""
    graph = load_graph(path)
    store(graph, "float16")
    with written(graph, path):
        pass


def _is_better(one: FileRow, other: FileRow, target: str) -> tuple[bool, str]:
    """Whether a file is more of what the target asks for, and the word for that; equal ones differ by the other."""
    here, there = _bench(one), _bench(other)
    if target == "size":
        equal = max(one.bytes, other.bytes) <= NEAR * min(one.bytes, other.bytes)
        return (here.speedup > there.speedup, "faster") if equal else (one.bytes < other.bytes, "smaller")
    equal = here.low <= there.high and there.low <= here.high
    return (one.bytes < other.bytes, "smaller") if equal else (here.speedup > there.speedup, "faster")


def _bench(row: FileRow) -> Bench:
    if row.bench is None:
        raise ValueError(f"{row.what} was not measured")
    return row.bench
