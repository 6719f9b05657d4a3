"""Milliseconds that the layers of a model file take in onnxruntime on this machine, dense and factorized.

Each layer is measured in a small session of its own (``layer_session``), in turns with the dense layer, at the sizes
that it really runs at and at ranks that are multiples of the runtime's channel block; between those, times are
interpolated linearly. They are kept in a JSON file for the onnxruntime version, the machine and the number of threads.
"""

import logging
import math
import time
import weakref
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise, product
from pathlib import Path

import onnx_ir as ir
import onnxruntime
from torch import nn

from hodec.conversion.eligibility import LayerSite
from hodec.cost.latency import Machine, cache_folder, read_times, write_times
from hodec.cost.timing import processor
from hodec.errors import ConfigError, PlanError
from hodec.export.runtime import Array, Cannot, open_session
from hodec.formats.ops import Op, total_params
from hodec.formats.roles import Role
from hodec.inputs import Inputs
from hodec.io.atomic import sha256
from hodec.onnx_graph.facts import GraphFacts
from hodec.onnx_graph.flush import flush
from hodec.onnx_graph.graph import OnnxGraph, load_graph
from hodec.onnx_graph.layer_session import NEIGHBOUR, LayerSession, random_kernels
from hodec.onnx_graph.profile import SMALL_BLOCK, Kernel, block_width, profiles
from hodec.onnx_graph.recipes import Recipe, ops_of, steps_of
from hodec.onnx_graph.session import run_session
from hodec.onnx_graph.sites import GraphSite
from hodec.onnx_graph.writing import MAX_BYTES
from hodec.plan.layer import LayerPlan

log = logging.getLogger(__name__)

Counts = tuple[int, ...]


def latency_table(
    facts: GraphFacts, sites: Mapping[str, GraphSite], *, threads: int = 1, folder: str | Path | None = None
) -> "FileTimes":
    """The times of a file's layers. Nothing is measured before it is asked for.

    Args:
        sites: the layers that may be decomposed, as ``eligible_sites`` gives them.
        threads: of each operator in onnxruntime.
        folder: where times are kept; by default that of all tables, see ``HODEC_CACHE``.

    Raises:
        ConfigError: threads below 1.
    """
    if isinstance(threads, bool) or not isinstance(threads, int) or threads < 1:
        raise ConfigError(f"latency table: threads={threads!r} is not a whole number of at least 1")
    machine = Machine(processor(), f"onnxruntime {onnxruntime.__version__}", threads)
    path = (cache_folder() if folder is None else Path(folder)) / machine.file
    times = SessionTimes(threads, path, machine, read_times(path, machine))
    weakref.finalize(times, write_times, path, machine, times.ms)  # at the latest when the process ends
    return FileTimes(facts, sites, times)


@dataclass(eq=False)
class SessionTimes:
    """Times of small sessions: those that are known, and those that are measured now.

    Attributes:
        ms: key of a small session -> milliseconds.
        measured: how many were timed now.
        seconds: of timing one of them, see ``UNDISTURBED``.
    """

    threads: int
    path: Path
    machine: Machine
    ms: dict[str, float] = field(default_factory=dict)
    measured: int = 0
    seconds: float = 0.06

    def save(self) -> None:
        """Write what was measured, not only at the end of the process."""
        write_times(self.path, self.machine, self.ms)

    def dense(self, session: LayerSession) -> float:
        """Milliseconds of the dense layer."""
        if session.key not in self.ms:
            self._measure(session, {})
        return self.ms[session.key]

    def factorized(self, session: LayerSession, layer: LayerPlan) -> float:
        """Milliseconds of the planned layer in its place."""
        ops = ops_of(layer)
        if not _on_grid(ops):
            key = f"{session.key}: {layer.method} {layer.resolved_execution} {_words(ops)}"
            if key not in self.ms:
                self._measure(session, {key: _recipe_maker(layer, ops)})
            return self.ms[key]
        corners = list(_corners(inner_counts(ops), block_width()))
        wanted = [counts for _, counts in corners]
        keys = {counts: f"{session.key}: {_words(with_counts(ops, counts))}" for counts in wanted}
        if any(key not in self.ms for key in keys.values()):
            if len(wanted[0]) == 1:  # all of them now: they are compared with the same dense layer
                wanted = [*wanted, *((n,) for n in _saving(ops, block_width()))]
            recipes = {
                f"{session.key}: {_words(one)}": _recipe_maker(layer, one)
                for one in (with_counts(ops, counts) for counts in wanted)
            }
            self._measure(session, {key: make for key, make in recipes.items() if key not in self.ms})
        return sum(weight * self.ms[keys[counts]] for weight, counts in corners)

    def _measure(self, session: LayerSession, recipes: Mapping[str, Callable[[], Recipe]]) -> None:
        """Time the recipes in the place of a layer, in turns with the dense layer."""
        problems = [session.dense(), *(session.factorized(make) for make in recipes.values())]
        try:
            runs = profiles(problems, threads=self.threads, seconds=self.seconds * len(problems))
        except Cannot as error:
            raise PlanError(
                f"{session.consumer.name} cannot be timed: onnxruntime does not run it by itself ({error}); leave it "
                "dense with {exclude}",
                exclude=session.consumer.exclusion,
            ) from error
        dense, *others = (min(map(layer_ms, each)) for each in runs)
        known = self.ms.setdefault(session.key, dense)
        self.ms |= {key: known * ms / dense for key, ms in zip(recipes, others, strict=True)}
        self.measured += len(problems)
        log.debug("%s: %.4g ms dense, %s", session.consumer.name, dense, others)


def layer_ms(run: Sequence[Kernel]) -> float:
    """Milliseconds of the layer in one run of its small session: without its neighbours and what follows them."""
    ends = [k for k, kernel in enumerate(run) if f"{NEIGHBOUR}.end" in kernel.name]
    inside = run[: ends[0]] if ends else run
    return sum(kernel.ms for kernel in inside if NEIGHBOUR not in kernel.name)


class FileTimes:
    """Milliseconds of one file's layers, for ``Budget(latency_ms=..)``.

    A plan does not say which node a layer is: where several have the same sizes and other surroundings, a time is their
    mean. A weight that is rebuilt from its factors when the file is loaded, as of recurrent nodes, takes 0 on both
    sides: its node stays as it is, and counts with the rest.

    Attributes:
        times: what is known of small sessions.
    """

    def __init__(self, facts: GraphFacts, sites: Mapping[str, GraphSite], times: SessionTimes) -> None:
        self.times, self._facts = times, facts
        self._sessions: dict[Hashable, list[tuple[LayerSession, ...]]] = {}
        for site in sites.values():
            sessions = tuple(LayerSession(one, facts.graph, facts.sizes) for one in site.consumers)
            self._sessions.setdefault(_identity(site.layer), []).append(sessions)
        self._known: dict[Hashable, float] = {}

    def before(self, layer: LayerPlan) -> float:
        """Milliseconds of the dense layer."""
        return self._mean(layer, None, self.times.dense)

    def after(self, layer: LayerPlan) -> float:
        """Milliseconds of a planned layer, factorized."""
        how = (layer.method, layer.modes, layer.ranks, layer.resolved_execution)
        return self._mean(layer, how, lambda session: self.times.factorized(session, layer))

    def rest_ms(self, model: nn.Module | None, example_input: Inputs, layers: Iterable[LayerPlan]) -> float:
        """Milliseconds of the dense file without these layers, at least 0.

        Args:
            model, example_input: not used; a table of PyTorch layers needs them.
        """
        return max(0.0, self.whole_ms() - sum(self.before(layer) for layer in layers))

    def whole_ms(self) -> float:
        """Milliseconds of one call of the whole dense file, the least of many; subnormal weights count as 0."""
        facts = self._facts
        sizes = ", ".join(f"{name} {list(size)}" for name, size in facts.inputs.items())
        key = f"file {sha256(facts.graph.path)}: {sizes}"
        if key not in self.times.ms:
            self.times.ms[key] = file_ms(facts.graph, facts.feeds, self.times.threads)
            self.times.measured += 1
        return self.times.ms[key]

    def predicted_ms(self, plan: Mapping[str, LayerPlan]) -> float:
        """Milliseconds of the whole file with the planned layers factorized."""
        return self.whole_ms() + sum(self.after(layer) - self.before(layer) for layer in plan.values())

    def slower(self, plan: Mapping[str, LayerPlan]) -> dict[str, str]:
        """The planned layers that take as long as dense or longer, each with a reason to leave it dense."""
        times = {name: (self.before(layer), self.after(layer)) for name, layer in plan.items()}
        return {
            name: f"in onnxruntime it would take {after:.3g} ms (dense {before:.3g} ms): not worth it"
            for name, (before, after) in times.items()
            if after >= before
        }

    def save(self) -> None:
        """Write what was measured now, not only at the end of the process."""
        self.times.save()

    def _mean(self, layer: LayerPlan, how: Hashable, ms: Callable[[LayerSession], float]) -> float:
        same = _identity(layer)
        if layer.role is not Role.LAYER:
            return 0.0
        if (same, how) not in self._known:
            groups = self._sessions[same]
            self._known[same, how] = sum(ms(one) for group in groups for one in group) / len(groups)
        return self._known[same, how]


def file_ms(
    graph: OnnxGraph, feeds: Mapping[str, Array], threads: int, *, seconds: float = 2.0, least: int = 8
) -> float:
    """Milliseconds of one call of a model as it is in its file, without subnormal weights: the least of many calls.

    With one thread they are that thread's own: what else runs on the core does not count.

    Raises:
        PlanError: onnxruntime does not run it.
    """
    content: Path | bytes = graph.path
    if graph.bytes < MAX_BYTES and flush(again := load_graph(graph.path)):
        content = ir.to_proto(again.model).SerializeToString()
    try:
        opened = open_session(content, threads=threads, folder=None if content is graph.path else graph.path.parent)
        run_session(opened, feeds)
        now = time.thread_time if threads == 1 else time.perf_counter
        taken, until = list[float](), time.perf_counter() + seconds
        while len(taken) < least or time.perf_counter() < until:
            began = now()
            run_session(opened, feeds)
            taken.append(1e3 * (now() - began))
    except Cannot as error:
        raise PlanError(f"{graph.path} cannot be timed: onnxruntime does not run it ({error})") from error
    return min(taken)


def _identity(layer: LayerPlan | LayerSite) -> Hashable:
    return layer.layer_type, layer.shape, layer.call_sites, layer.aliases


# -- ranks between those that are measured -----------------------------------------------------------------------------


def inner_counts(ops: Sequence[Op]) -> Counts:
    """The channels between the ops of a chain; those around a depthwise one are the same, and given once."""
    return tuple(op.channels for before, op in pairwise(ops) if not before.depthwise)


def with_counts(ops: Sequence[Op], counts: Counts) -> list[Op]:
    """The ops with other channels between them."""
    found, inner = list[Op](), iter(counts)
    channels = ops[0].channels
    for op in ops[:-1]:
        after = channels if op.depthwise else next(inner)
        found.append(op._replace(kernel=(after, 1 if op.depthwise else channels, *op.kernel[2:])))
        channels = after
    last = ops[-1]
    return [*found, last._replace(kernel=(last.kernel[0], channels, *last.kernel[2:]))]


def _on_grid(ops: Sequence[Op]) -> bool:
    """Whether the ops' times may be interpolated: not of contractions and groups, whose channels are products."""
    plain = not any(op.contracts or op.blocks > 1 or op.entries for op in ops)
    return len(ops) > 1 and plain and not ops[0].depthwise and not ops[-1].depthwise


def neighbours(n: int, block: int) -> list[tuple[float, int]]:
    """The measured channel counts around ``n`` with their weights in the linear interpolation.

    Kernels work on whole blocks, so that a count takes as long as the next multiple of the block. All multiples up to
    8 blocks are measured, every second one up to 16 blocks, every fourth up to 32, and so on.
    """
    width = min(block, SMALL_BLOCK) if n < block else block
    n = math.ceil(n / width) * width
    step = width
    while n > 8 * step and n >= block:
        step *= 2
    low, high = n // step * step, math.ceil(n / step) * step
    part = 0.0 if low == high else (n - low) / (high - low)
    return [(share, m) for share, m in ((1 - part, low), (part, high)) if share]


def _corners(counts: Counts, block: int) -> Iterator[tuple[float, Counts]]:
    """The measured counts around these, each with its weight."""
    for picks in product(*(neighbours(n, block) for n in counts)):
        yield math.prod(share for share, _ in picks), tuple(n for _, n in picks)


def _saving(ops: Sequence[Op], block: int) -> list[int]:
    """The counts of the grid, from one block on, at which a chain with one inner count holds less than dense."""
    shape = ops[0].channels, ops[-1].kernel[0]
    sides = [max(sizes) for sizes in zip(*(op.kernel[2:] for op in ops), strict=True)]
    dense = math.prod((*shape, *sides))
    grid, n = [], block
    while total_params(with_counts(ops, (n,))) < dense:
        grid.append(n)
        n += block * max(1, 2 ** math.ceil(math.log2((n + block) / (8 * block))))
    return [n for n in grid if neighbours(n, block) == [(1.0, n)]]


def _recipe_maker(layer: LayerPlan, ops: Sequence[Op]) -> Callable[[], Recipe]:
    shapes = [(op.kernel[0], op.entries) if op.entries else op.kernel for op in ops]
    return lambda: steps_of(layer, random_kernels(shapes))


def _words(ops: Sequence[Op]) -> str:
    return " ".join("x".join(map(str, op.kernel)) for op in ops)
