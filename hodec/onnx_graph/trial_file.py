"""The file of a trial: written, run on what was held out, timed, and moved into place only if it is good."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import cast

import numpy as np

from hodec.calibration.data import Samples
from hodec.cost.count import Cost
from hodec.errors import NothingPays
from hodec.export.runtime import Array, Session, open_session
from hodec.onnx_graph.bench import bench_files
from hodec.onnx_graph.calibrate import Replacement
from hodec.onnx_graph.changes import Change
from hodec.onnx_graph.cost import parameters
from hodec.onnx_graph.decompose import check_file, flushed, measured_macs
from hodec.onnx_graph.facts import GraphFacts, graph_facts
from hodec.onnx_graph.graph import load_graph
from hodec.onnx_graph.planning import check_plan
from hodec.onnx_graph.rewrite import rewrite
from hodec.onnx_graph.search import Search, Trial
from hodec.onnx_graph.session import run_session
from hodec.onnx_graph.shifts import shifted
from hodec.onnx_graph.storage import FLOAT32, store
from hodec.onnx_graph.verdict import Compressed
from hodec.onnx_graph.writing import written
from hodec.plan.plan import Plan


def runner(opened: Session) -> Callable[[Mapping[str, Array]], list[Array]]:
    """A session as what a judge runs."""
    return lambda feeds: cast(list[Array], run_session(opened, feeds))


def write_fitted(
    facts: GraphFacts, plan: Plan, tried: Mapping[str, Replacement]
) -> tuple[GraphFacts, dict[str, Change], int]:
    """A fresh copy of the graph with the plan's layers replaced by fitted ones, in memory."""
    again = graph_facts(load_graph(facts.graph.path), {}, facts.feeds)
    sites = check_plan(plan, again)
    shifts = {name: np.asarray(one.shift, np.float64) for name, one in tried.items()}
    again = shifted(again, sites, shifts)
    changes, macs = rewrite(again, sites, plan, {name: one.weight for name, one in tried.items()})
    return again, changes, macs


# Said of weights in fewer bytes.
STORED = "which runtimes turn into float32 when they load the file"


class LosesMore(NothingPays):
    """A written file that loses more than is allowed, or wins nothing."""


def write_trial(
    trial: Trial,
    search: Search,
    held: Samples,
    out: Path,
    *,
    seconds: float,
    judged: bool = True,
    smaller: bool = False,
    stored: str = FLOAT32,
) -> Compressed:
    """The file of a trial, with its figures, measured on it.

    Args:
        seconds: how long latency is measured.
        judged: whether the file has to lose no more than is allowed.
        smaller: whether it has to take fewer bytes than the dense one where size is the target.
        stored: how its weights are stored, a key of ``STORES``. A file of rounded weights has to be sure of what it
            keeps as the trial was; one of the trial's own need only keep it on what was held out.

    Raises:
        LosesMore: it loses more in onnxruntime, or is slower or no smaller where it was to be so; nothing is written.
    """
    facts, judge = search.facts, search.judge
    again, changes, planned = write_fitted(facts, trial.plan, trial.tried)
    remarks, params = flushed(again), parameters(again.graph)
    remarks = (*remarks, *_stored(again, stored))
    with written(again.graph, out) as files:
        check_file(files[0])
        loss = judge.loss(runner(open_session(files[0], threads=search.net.threads)))
        if judged and not (judge.accepts(loss.score) if stored == FLOAT32 else judge.is_sure(loss)):
            short = "" if stored == FLOAT32 else f", its weights in {stored},"
            raise LosesMore(f"the decomposed file{short} has {judge.told_of(loss)}; nothing is written")
        size = sum(path.stat().st_size for path in files)
        if smaller and search.target == "size" and size >= facts.graph.bytes:
            raise LosesMore(f"the file is no smaller: {size:,} bytes of {facts.graph.bytes:,}; nothing is written")
        bench = bench_files(facts.graph.path, files[0], seconds=seconds, values=facts.feeds)
        if judged and search.target == "latency" and bench.high < 1:
            raise LosesMore(f"the decomposed file is slower: {bench.ratio_words}; nothing is written")
        macs, uncounted = measured_macs(again, out.parent) or (planned, facts.uncounted)
    return Compressed(
        output=str(out), plan=trial.plan, changes=changes, judge=judge.words, dense=judge.dense, score=loss.score,
        chance=judge.chance(loss), allowed=judge.allowed, scale=judge.scale, unit=judge.unit,
        samples=(len(search.fit), len(held)), words=search.fit.words,
        before=facts.cost, after=Cost(params, macs // facts.batch), of_one=facts.of_one, uncounted=uncounted,
        bytes_before=facts.graph.bytes, bytes_after=size, bench=bench, threads=search.net.threads,
        layers=len(search.sites), remarks=remarks,
    )  # fmt: skip


def _stored(facts: GraphFacts, kind: str) -> tuple[str, ...]:
    """Store the weights of a graph in fewer bytes; a remark where any are."""
    count = store(facts.graph, kind)
    words = f"{count} weights are stored as {kind}, {STORED}"
    return (words,) if count else ()
