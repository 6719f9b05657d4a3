"""compress_file: a model file made small by a search over data, within an allowed loss on data it was not fitted to."""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import onnx_ir as ir
import torch
from numpy.typing import ArrayLike

from hodec.calibration.data import Given, InputSpec, Samples, function_of, load_samples
from hodec.calibration.images import Pixels
from hodec.errors import ConfigError, ConvertError, DataError, NothingPays
from hodec.export.runtime import Array, Cannot, open_session
from hodec.io.atomic import check_apart, check_place, writing
from hodec.linalg.svd import sharing
from hodec.onnx_graph.calibrate import TrialGraph
from hodec.onnx_graph.chance import CONFIDENCE
from hodec.onnx_graph.compress_int8 import write_int8
from hodec.onnx_graph.facts import graph_facts
from hodec.onnx_graph.graph import OnnxGraph, load_graph, name_of
from hodec.onnx_graph.judge import Judge, judge_of
from hodec.onnx_graph.planning import eligible_sites
from hodec.onnx_graph.profile import SMALL_BLOCK
from hodec.onnx_graph.report import write_report
from hodec.onnx_graph.saved import Saved
from hodec.onnx_graph.search import TARGETS, Search, Trial
from hodec.onnx_graph.sensitivity import Progress, Sensitivity
from hodec.onnx_graph.session import run_session
from hodec.onnx_graph.sizes import Size
from hodec.onnx_graph.storage import FLOAT32, STORES
from hodec.onnx_graph.trial_file import LosesMore, runner, write_trial
from hodec.onnx_graph.verdict import Compressed
from hodec.onnx_graph.writing import check_target
from hodec.ranks.planning import PlanSettings
from hodec.ranks.rule import Limits

log = logging.getLogger(__name__)

# As of ``hodec.compress``: by these two nets lose least where they are not retrained.
METHODS = ("spatial_svd", "svd")
# Target -> the shortest form that weights are stored in where nothing is said. 16 bits change outputs by some 1e-4, and
# no runtime gets slower by either; 8 bits are for those who ask for a small file.
SHORTEST = {"latency": "float16", "macs": "float16", "size": "int8"}


@dataclass(frozen=True)
class Calibration:
    """The data of a file, and how they are read.

    Attributes:
        data: see ``load_samples``.
        labels: one row a sample.
        values: name of an input -> the number that fills it, or its array.
        shapes: sizes of inputs that the file leaves open.
        pixels: how images become numbers.
    """

    data: Given
    labels: str | Path | Array | None = None
    values: Mapping[str, ArrayLike] = field(default_factory=dict)
    shapes: Mapping[str, Size] = field(default_factory=dict)
    pixels: Pixels = field(default_factory=Pixels)

    def read(self, graph: OnnxGraph) -> Samples:
        """The calls that the file takes.

        Raises:
            DataError: see ``load_samples``.
        """
        return load_samples(
            self.data, input_specs(graph), values=self.values, sizes=self.shapes, pixels=self.pixels, labels=self.labels
        )


def _check_choices(target: str, store: str | None) -> None:
    for flag, value, allowed in (("--target", target, TARGETS), ("--store", store, STORES)):
        if value is not None and value not in allowed:
            raise ConfigError(f"{flag}: {value!r} given; allowed: {' | '.join(allowed)}")


def compress_file(  # noqa: PLR0913
    source: str | Path,
    out: str | Path,
    *,
    data: Given | Calibration,
    labels: str | Path | Array | None = None,
    evaluate: str | Callable[..., float] | None = None,
    max_drop: str | float | None = None,
    loss: str | None = None,
    target: str = "latency",
    methods: Sequence[str] = METHODS,
    options: PlanSettings | None = None,
    limits: Limits | None = None,
    shapes: Mapping[str, Size] | None = None,
    values: Mapping[str, ArrayLike] | None = None,
    threads: int | None = None,
    seconds: float = 3.0,
    int8: bool = False,
    store: str | None = None,
    confidence: float = CONFIDENCE,
    report: str | Path | None = None,
    force: bool = False,
    progress: Progress = lambda what, done, total: None,
) -> Compressed:
    """Write the fastest or smallest file found whose loss on held-out data is allowed:

        result = hodec.compress_file("model.onnx", "small.onnx", data="calib.npz", max_drop=0.01)
        print(result)

    A third of the data is held out: every figure of quality is of that part, of the written file. ``source`` is only
    read, and ``out`` is touched once everything is checked.

    Args:
        data: ``.npz`` or ``.npy`` (first axis: samples), a folder of such or of images, ``"file.py:function"``,
            arrays by name of input, or dicts name -> array, one for each call.
        labels: whole numbers, one a sample: then accuracy is what may drop.
        evaluate: ``run -> score``, higher is better, or ``"file.py:function"``: ``run`` maps a dict name -> array to
            such a dict of outputs.
        max_drop: in the score's own unit, or a share of the dense score as ``"1%"``, which is the default; ``"5%"``
            where outputs are compared as numbers.
        loss: how outputs are compared where there is no score: ``top1``, ``tokens`` or ``error``.
        target: what is made small: ``latency`` in onnxruntime on this machine, ``macs`` or ``size``.
        methods: of which each layer takes the one that loses least.
        options: which layers.
        limits: of ranks.
        shapes, values: sizes of open inputs, and numbers that fill inputs that the data do not have.
        threads: of onnxruntime while searching; by default as many as torch uses.
        seconds: how long latency is measured.
        int8: quantize the decomposed file too, with the same data and within the same loss.
        store: how weights are stored: ``float32``, ``float16`` or ``int8``, which runtimes turn into float32 when they
            load the file. By default as short as keeps the score: ``int8`` for ``size``, else ``float16``.
        confidence: that no more than is allowed is lost on other inputs like the held-out ones, 0.5 to 1.
        report: where to write a page about it: one HTML file that needs nothing else.
        progress: told what is being done.

    Returns:
        What was written, with its figures.

    Raises:
        NothingPays: no smaller file loses as little as is allowed; nothing is written.
        DataError, ConfigError, ConvertError, CheckpointError, PlanError: what has to be mended; nothing is written.
    """
    _check_choices(target, store)
    given = data if isinstance(data, Calibration) else Calibration(data, labels, values or {}, shapes or {})
    task = Task(given, evaluate, loss, max_drop, confidence)
    _check_report(report, (source, out, *task.files))
    search, held = prepared(source, Path(out), task, methods=methods, threads=threads, force=force)
    search.target, search.tables.progress, search.scores_all = target, progress, report is not None
    search.settings, search.limits = options or PlanSettings(), _limits_for(target, limits or Limits())
    file = write_int8 if int8 else partial(write_trial, smaller=True)
    write = partial(file, search=search, held=held, out=Path(out), seconds=seconds)
    with sharing():
        result = _best_written(search, write, _kinds(store or SHORTEST[target]))
    if report is not None:
        _report(Path(report), result, search, held)
    return result


def _check_report(report: str | Path | None, others: Sequence[object]) -> None:
    if report is not None:
        check_place(Path(report), ConfigError, "--report: ")
        check_apart(Path(report), others, ConfigError, "--report: ")


def _limits_for(target: str, limits: Limits) -> Limits:
    return replace(limits, round_to=SMALL_BLOCK) if target == "size" and limits.round_to is None else limits


def _kinds(shortest: str) -> list[str]:
    """Forms that weights are stored in, the shortest first; the last one loses nothing."""
    known = [*STORES]  # longest first
    return known[known.index(shortest) :: -1]


def _best_written(search: Search, write: Callable[..., Compressed], kinds: Sequence[str]) -> Compressed:
    """The best trial as a file, its weights stored as short as it bears, or the next larger trial.

    Raises:
        NothingPays: none is left.
    """
    best = search.best() or _whole(search, kinds)
    while best is not None:
        for kind in kinds if best.plan else kinds[:-1]:  # the last one would be the file as it is
            try:
                return write(best, stored=kind)
            except LosesMore as error:
                log.warning("%s", error)
        best = _larger(search, best)
    raise NothingPays(_nothing(search))


def _whole(search: Search, kinds: Sequence[str]) -> Trial | None:
    """No layer decomposed, where weights stored in fewer bytes are what was asked for."""
    if search.target != "size" or kinds == [FLOAT32]:
        return None
    return search.whole()


def _report(path: Path, result: Compressed, search: Search, held: Samples, *, most: int = 8) -> None:
    files = (search.facts.graph.path, Path(result.output))
    runs = [runner(open_session(one, threads=search.net.threads)) for one in files]
    samples = [(runs[0](call), runs[1](call)) for call in held.calls[:most]]
    with writing(path, ConfigError, f"the model {result.output} is written"):
        write_report(path, result, search, samples)


@dataclass(frozen=True)
class Task:
    """Data, and what a file may lose on them; see ``compress_file``."""

    data: Calibration
    evaluate: str | Callable[..., float] | None = None
    loss: str | None = None
    max_drop: str | float | None = None
    confidence: float = CONFIDENCE

    @property
    def files(self) -> tuple[object, ...]:
        """What is read beside the model, where that is files."""
        return self.data.data, self.data.labels, self.evaluate


def prepared(
    source: str | Path, out: Path | None, task: Task, *, methods: Sequence[str], threads: int | None, force: bool
) -> tuple[Search, Samples]:
    """A search over the file, which was run on all data, and the data that are held out.

    Raises:
        DataError, ConfigError, ConvertError, CheckpointError: what has to be mended.
    """
    graph = load_graph(source)
    if out is not None:
        check_target(out, graph, force=force)
        check_apart(out, task.files, ConvertError, "output: ")
    samples = task.data.read(graph)
    fit, held = samples.split()
    threads = threads or torch.get_num_threads()
    judge = dense_judge(graph, samples, held, task, threads=threads)
    facts = graph_facts(graph, {}, _one_sample(graph, samples.calls[0]))
    sites, _, _ = eligible_sites(facts, methods)
    tables = Sensitivity(TrialGraph(graph, sites, threads), fit, saved=Saved.of(graph, fit, methods))
    return Search(facts, sites, tables, judge, tuple(methods)), held


def input_specs(graph: OnnxGraph) -> list[InputSpec]:
    """The graph's inputs as data have to fit them."""
    specs = []
    for name, value in graph.inputs.items():
        dims = None if value.shape is None else tuple(n if isinstance(n, int) and n > 0 else None for n in value.shape)
        specs.append(InputSpec(name, (value.dtype or ir.DataType.FLOAT).numpy(), dims))
    return specs


def _one_sample(graph: OnnxGraph, call: Mapping[str, Array]) -> Mapping[str, Array]:
    """A call of one sample, by which costs are counted and times are measured; the call as it is where that cannot be.

    Calls are cut where every input leaves its first axis open and has it as long.
    """
    opened = all(one.dims is not None and one.dims[:1] == (None,) for one in input_specs(graph))
    if not opened or len({array.shape[:1] for array in call.values()}) > 1:
        return call
    cut = {name: array[:1] for name, array in call.items()}
    try:
        run_session(open_session(graph.path), cut)
    except Cannot:
        return call
    return cut


def dense_judge(graph: OnnxGraph, samples: Samples, held: Samples, task: Task, *, threads: int) -> Judge:
    """The judge of files made from this one; the dense file runs on the data first.

    Raises:
        DataError: it does not run on them, or gives NaN or Inf.
        ConvertError: an output is no tensor.
        ConfigError: see ``judge_of``.
    """
    if odd := [name_of(one) for one in graph.graph.outputs if not isinstance(one.type, ir.TensorType | None)]:
        raise ConvertError(
            f"{graph.path}: its outputs {', '.join(odd)} are no tensors (sequences or maps), which are not judged; cut "
            "the nodes that make them off the model, or decompose it without data"
        )
    function = function_of(task.evaluate) if isinstance(task.evaluate, str) else task.evaluate
    try:
        opened = open_session(graph.path, threads=threads)
        run_session(opened, samples.calls[0])
    except Cannot as error:
        raise DataError(f"onnxruntime does not run {graph.path} on the data: {error}") from error
    names = [value.name or "" for value in graph.graph.outputs]
    return judge_of(
        runner(opened),
        held,
        names,
        evaluate=function,
        loss=task.loss,
        max_drop=task.max_drop,
        confidence=task.confidence,
    )


def _larger(search: Search, refused: Trial) -> Trial | None:
    """The next trial after one whose file was refused: halfway to the dense net."""
    share = (refused.share + 1) / 2
    if 1 - share < 0.02 or not refused.plan:
        return None
    trial = search.trial(share, sequential=True)
    return trial if trial is not None and search.accepts(trial) else None


def _nothing(search: Search) -> str:
    judge = search.judge
    near = max(search.trials, key=lambda one: (one.loss.is_whole, one.score), default=None)
    said = ""
    if near is not None:
        most = "" if near.loss.is_whole else "at most "
        said = f"; the nearest has {most}{judge.told(near.score)} at {near.cost:.0%} of the {search.target}"
    held = [one.loss for one in search.trials if judge.accepts(one.score) and not judge.is_sure(one.loss)]
    few = next((f"{one.samples} samples are too few to show that others lose no more. " for one in held), "")
    return (
        f"nothing pays: no smaller file keeps {judge.told(judge.dense - judge.allowed)} of {judge.told(judge.dense)} "
        f"({judge.words}){said}. Nothing is written. {few}A larger --max-drop, more data, or training (hodec train) "
        "may help"
    )
