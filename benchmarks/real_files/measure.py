"""What a file is worth: its task score, multiply-adds, bytes, and time beside the dense file."""

import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.real_files.case import SEEDS, Case, Feeds, session
from benchmarks.real_files.ways import Made
from benchmarks.timing import in_turns

SECONDS, ROUNDS = 4.0, (10, 1000)  # of turns of both files, for one ratio


@dataclass(frozen=True)
class Row:
    """One file of a case.

    Attributes:
        case, way: what it is for, and how it was made; ``dense`` is the file as it was found.
        score: on the final inputs, a share of 1; None where nothing was written.
        macs: multiply-adds of one run, of the sizes that it has and the branches that it takes.
        uncounted: nodes whose multiply-adds are in no count.
        bytes: size.
        faster: median of the dense file's time over this one's, both in turns on one thread.
        spread: half the interquartile range of ``faster`` over the rounds, as a share of its median.
        seconds: time that making it took.
        said: the command's verdict, or why nothing was written.
        load: processes that waited for one of the machine's cores, by the system's average over a minute.
        four: the command's lines of the four files, in float and in 8 bits; scores are of the search inputs.
    """

    case: str
    way: str
    score: float | None = None
    macs: int | None = None
    uncounted: int = 0
    bytes: int | None = None
    faster: float | None = None
    spread: float | None = None
    seconds: float | None = None
    said: str = ""
    load: float | None = None
    four: Sequence[str] = ()

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def measured(case: Case, way: str, done: Made) -> Row:
    """All figures of the file that a command made, or of the dense one."""
    path = done.path or case.path
    feeds = case.feeds(SEEDS["search"], 32)[-1]
    macs, uncounted = multiply_adds_of(path, feeds)
    score = case.score(session(path), SEEDS["final"], case.sizes.final)
    size = path.stat().st_size
    if path == case.path:
        return Row(case.name, way, score, macs, uncounted, size, 1.0)
    runs = {"dense": session(case.path), "this": session(path)}
    works = {name: (lambda run=run: run(feeds)) for name, run in runs.items()}
    times = in_turns(works, seconds=SECONDS, rounds=ROUNDS)
    faster, spread = times.ratio("dense", "this"), times.spread("dense", "this")
    figures = (score, macs, uncounted, size, faster, spread, done.seconds, done.said, os.getloadavg()[0])
    return Row(case.name, way, *figures, four=done.four)


def multiply_adds_of(path: Path, feeds: Feeds) -> tuple[int, int]:
    """Multiply-adds of one run, from the sizes that it has, and the number of nodes that are not counted."""
    from hodec.onnx_graph.facts import graph_facts
    from hodec.onnx_graph.graph import load_graph

    facts = graph_facts(load_graph(path), {name: array.shape for name, array in feeds.items()}, feeds)
    return facts.total_macs, len(facts.uncounted)
