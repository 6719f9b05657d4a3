"""int8 on top of decomposition: both files quantized with the same data, and one table of the four."""

import tempfile
from dataclasses import replace
from pathlib import Path

from hodec.calibration.data import Samples
from hodec.export.runtime import open_session
from hodec.io.atomic import write_bytes
from hodec.onnx_graph.bench import Bench
from hodec.onnx_graph.int8 import FileRow, Quantized, four_rows, quantize_file
from hodec.onnx_graph.search import Search, Trial
from hodec.onnx_graph.storage import FLOAT32
from hodec.onnx_graph.trial_file import runner, write_trial
from hodec.onnx_graph.verdict import Compressed

# Lines of the table.
DENSE, DENSE_INT8, DECOMPOSED, BOTH = "fp32 dense", "int8 dense", "decomposed", "decomposed, int8"


def write_int8(
    trial: Trial, search: Search, held: Samples, out: Path, *, seconds: float, stored: str = FLOAT32
) -> Compressed:
    """The file of a trial in 8 bits, its layers that lose most left in float.

    It stays in float altogether where 8 bits lose more than is allowed, or do not make it what the target is, smaller
    or faster.

    Raises:
        LosesMore: the decomposed file loses more than is allowed; nothing is written.
        ConvertError: onnxruntime cannot quantize the file; nothing is written.
    """
    judge, source, threads = search.judge, search.facts.graph.path, search.net.threads
    with tempfile.TemporaryDirectory(prefix="hodec-") as name:
        folder = Path(name)
        result = write_trial(trial, search, held, folder / "float.onnx", seconds=seconds, stored=stored)
        files, made = {DENSE: source}, dict[str, Quantized]()
        for what, path in ((DENSE_INT8, source), (BOTH, folder / "float.onnx")):
            made[what] = quantize_file(
                path, folder / f"{len(files)}.onnx", search.fit.calls, held_out=held.calls,
                score=judge.sure, least=judge.dense - judge.allowed, threads=threads,
            )  # fmt: skip
            files[what] = made[what].path
        files = {what: files[what] for what in (DENSE, DENSE_INT8)} | {
            DECOMPOSED: folder / "float.onnx",
            BOTH: files[BOTH],
        }
        rows = four_rows(files, judge.score, seconds=seconds)
        lines = tuple(str(row) for row in rows)
        both, alone = rows[-1], rows[-2]
        smaller = search.target == "size"
        better = both.bytes < alone.bytes if smaller else _speed(both) > _speed(alone)
        if made[BOTH].reached and better:
            write_bytes(out, both.path.read_bytes())
            floats = f"{len(made[BOTH].floats)} of its {made[BOTH].layers} layers are in float"
            chance = judge.chance(judge.loss(runner(open_session(out, threads=threads))))
            kept = replace(
                result, output=str(out), score=both.score, bytes_after=both.bytes, bench=_bench(both), chance=chance
            )
            return replace(kept, rows=lines, remarks=(*result.remarks, f"in 8 bits; {floats}"))
    why = f"make it no {'smaller' if smaller else 'faster'}" if made[BOTH].reached else "lose more than is allowed"
    result = write_trial(trial, search, held, out, seconds=seconds, stored=stored)
    return replace(result, rows=lines, remarks=(*result.remarks, f"in float, as 8 bits {why}"))


def _bench(row: FileRow) -> Bench:
    if row.bench is None:
        raise ValueError(f"{row.what} was not measured")
    return row.bench


def _speed(row: FileRow) -> float:
    return _bench(row).speedup
