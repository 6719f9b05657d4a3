"""Kernel times of small models, as onnxruntime's own profiler tells them, and the width of its channel blocks."""

import json
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from hodec.export.runtime import Array, Session, open_session
from hodec.onnx_graph.session import run_session

Feeds = Mapping[str, Array]
# A run counts as undisturbed if its thread had the processor for this share of the time. With six programs on each
# core, the least of such runs repeats within 0.6 % (median of 272 small sessions of nudenet and PP-OCRv4; nine in ten
# within 2.4 %).
UNDISTURBED, FEW, PATIENCE = 0.95, 4, 4
# Channels: below a block onnxruntime keeps its blocked order at multiples of these only, see docs/files.md.
SMALL_BLOCK = 4


@dataclass(frozen=True)
class Kernel:
    """One node of the optimized graph in one run.

    Attributes:
        name: made by onnxruntime from the node's name, or from that of its output.
        size: of its first output, channels padded to the runtime's block.
    """

    name: str
    ms: float
    size: tuple[int, ...]


def profiles(
    problems: Sequence[tuple[bytes, Feeds]],
    *,
    threads: int = 1,
    seconds: float = 0.3,
    rounds: tuple[int, int] = (8, 60),
) -> list[list[list[Kernel]]]:
    """The kernels of each run of each model, in order; the models run in turns.

    With one thread, runs that other programs interrupted are left out, as far as others are there: until each model has
    a few, it may take longer.

    Args:
        problems: models and what they are fed.
        seconds: to spend on all of them; exceeded by the least rounds, and by ``PATIENCE`` for runs in one go.
        rounds: least and most runs of each; two more come first and are not told.

    Raises:
        Cannot: a model that does not load or run.
    """
    with tempfile.TemporaryDirectory(prefix="hodec-") as folder:
        opened = [
            open_session(model, threads=threads, profile=Path(folder) / str(k)) for k, (model, _) in enumerate(problems)
        ]
        sessions = list(enumerate(zip(opened, (feeds for _, feeds in problems), strict=True)))
        whole: list[list[bool]] = [[] for _ in opened]
        began = time.perf_counter()
        for turn in range(2 + rounds[1]):
            enough = min(sum(each[2:]) for each in whole) >= FEW
            until = began + seconds * (1 if enough else PATIENCE)
            if turn >= 2 + rounds[0] and time.perf_counter() > until:
                break
            first = turn % len(sessions)
            for k, (session, feeds) in (*sessions[first:], *sessions[:first]):
                whole[k].append(_in_one_go(session, feeds, threads))
        return [_chosen(_runs(session)[2:], each[2:]) for session, each in zip(opened, whole, strict=True)]


def _in_one_go(session: Session, feeds: Feeds, threads: int) -> bool:
    """Run the model; whether its thread ran nearly all the time. With several threads nobody knows."""
    began, own = time.perf_counter(), time.thread_time()
    run_session(session, feeds)
    own, taken = time.thread_time() - own, time.perf_counter() - began
    return threads > 1 or own >= UNDISTURBED * taken


def _chosen(runs: list[list[Kernel]], whole: Sequence[bool]) -> list[list[Kernel]]:
    return [run for run, good in zip(runs, whole, strict=True) if good] or runs


def _runs(session: Session) -> list[list[Kernel]]:
    events = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
    runs: list[list[Kernel]] = [[]]
    for event in events:
        if event["name"] == "model_run":
            runs.append([])
        elif event["name"].endswith("_kernel_time"):
            sizes = event["args"].get("output_type_shape") or [{}]
            size = next(iter(sizes[0].values()), ())
            runs[-1].append(Kernel(event["name"].removesuffix("_kernel_time"), event["dur"] / 1e3, tuple(size)))
    return runs[:-1]


@cache
def block_width() -> int:
    """How many channels onnxruntime's convolutions work on at a time on this machine, 1 where it blocks none.

    It stores activations in blocks of that many channels (16 with AVX-512, 8 with AVX2) and pads the last one: found
    from the size that a convolution to one channel has in a profile.
    """
    nodes = [helper.make_node("Conv", ["x", "w"], ["y"]), helper.make_node("Conv", ["y", "v"], ["z"])]
    weights = {"w": np.ones((1, 1, 1, 1), np.float32), "v": np.ones((1, 1, 1, 1), np.float32)}
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, 1, 8, 8]) for name in "xz"]
    arrays = [numpy_helper.from_array(array, name) for name, array in weights.items()]
    graph = helper.make_graph(nodes, "block", ends[:1], ends[1:], arrays)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
    feeds: Feeds = {"x": np.ones((1, 1, 8, 8), np.float32)}
    (runs,) = profiles([(onnx.ModelProto.SerializeToString(model), feeds)], seconds=0.0, rounds=(1, 1))
    return max(kernel.size[1] for kernel in runs[0] if len(kernel.size) == 4)
