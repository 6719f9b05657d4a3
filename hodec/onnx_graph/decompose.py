"""The whole way of a model file: read, plan, rewrite, check, write."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import onnx
from numpy.typing import ArrayLike

from hodec.cost.count import Cost
from hodec.errors import ConvertError, PlanError, Use, first_line
from hodec.export.runtime import Array, Cannot
from hodec.linalg.svd import sharing
from hodec.onnx_graph.cost import multiply_adds, parameters
from hodec.onnx_graph.dequantize import dequantize
from hodec.onnx_graph.facts import GraphFacts, graph_facts
from hodec.onnx_graph.feeds import inputs_words
from hodec.onnx_graph.flush import LEAST, flush
from hodec.onnx_graph.graph import OnnxGraph, load_graph, name_of
from hodec.onnx_graph.planning import check_plan, plan_graph
from hodec.onnx_graph.probe import probed
from hodec.onnx_graph.rewrite import rewrite
from hodec.onnx_graph.session import is_finite, relative_difference, run_model
from hodec.onnx_graph.sizes import Size
from hodec.onnx_graph.verdict import Written
from hodec.onnx_graph.writing import check_target, written
from hodec.plan.plan import Plan
from hodec.ranks import Budget, RankRule
from hodec.ranks.planning import PlanSettings

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Outcome(Written):
    """What a decomposition came to.

    Attributes:
        difference: largest difference of an output over its largest number, on random inputs; None where the model
            could not be run.
    """

    difference: float | None

    def to_dict(self) -> dict[str, object]:
        return super().to_dict() | {"rule": self.plan.rule, "difference": self.difference}


def decompose_file(  # noqa: PLR0913
    source: str | Path,
    out: str | Path,
    *,
    method: str = "tucker",
    rule: RankRule | None = None,
    plan: Plan | None = None,
    options: PlanSettings | None = None,
    shapes: Mapping[str, Size] | None = None,
    values: Mapping[str, ArrayLike] | None = None,
    dequantized: bool = False,
    force: bool = False,
) -> Outcome:
    """Decompose the layers of an ONNX file and write the smaller model.

    Every replaced layer is compared with its dense reconstruction, the result passes onnx.checker, loads in
    onnxruntime and gives finite outputs before ``out`` is touched; ``source`` is only read.

    Args:
        method: name in METHODS.
        rule: what chooses ranks.
        plan: a finished plan instead of a method and a rule.
        options: which layers, how many modes.
        shapes: sizes of inputs that the model leaves open, for cost and checks.
        values: numbers that fill inputs, or arrays for them, where random ones will not do.
        dequantized: take the quantization (QDQ) of the graph out first; the result is a float model.
        force: replace an existing ``out``.

    Raises:
        CheckpointError: the file cannot be read.
        PlanError: nothing to decompose, or a plan that does not fit.
        ConvertError: the result cannot be written, or does not pass a check.

    Examples:
        >>> net = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10)).eval()
        >>> dense = hodec.to_onnx(net, "model.onnx", example_input=torch.zeros(1, 64))
        >>> outcome = hodec.decompose_file("model.onnx", "small.onnx", method="svd", rule=hodec.ranks.Budget(macs=0.5))
        >>> outcome.bytes_after < outcome.bytes_before
        True
    """
    graph, out = load_graph(source), Path(out)
    check_target(out, graph, force=force)
    _check_times(rule, dequantized)
    before, count = graph.bytes, dequantize(graph) if dequantized else 0
    facts = graph_facts(graph, shapes or {}, values)
    with sharing():
        if plan is not None:
            sites = check_plan(plan, facts)
        elif rule is not None:
            plan, sites = plan_graph(facts, rule, method, options or PlanSettings())
        else:
            raise ConvertError("there is neither a rule nor a plan")
        wanted, remarks = _dense_outputs(facts)
        changes, planned_macs = rewrite(facts, sites, plan)
        remarks += _of_the_source(graph, count) + flushed(facts)
    with written(graph, out) as files:
        check_file(files[0])
        difference, more = _check_outputs(files[0], facts.feeds, wanted)
        total_macs, uncounted = measured_macs(facts, out.parent) or (planned_macs, facts.uncounted)
        size = sum(path.stat().st_size for path in files)
    return Outcome(
        plan=plan, changes=changes, before=facts.cost, after=Cost(parameters(graph), total_macs // facts.batch),
        uncounted=uncounted, bytes_before=before, bytes_after=size, difference=difference, remarks=(*remarks, *more),
        of_one=facts.of_one,
    )  # fmt: skip


def _of_the_source(graph: OnnxGraph, count: int) -> tuple[str, ...]:
    """Remarks on what was taken otherwise than the file has it; ``count`` constants were quantized."""
    said: tuple[str, ...] = ()
    if count:
        said += (f"{count} quantized constants are float now: quantize the result again, with data",)
    if graph.lists_initializers and graph.model.ir_version >= 4:
        said += ("all weights are listed as inputs, a habit of old converters: they were taken as fixed",)
    return said


def plan_file(
    source: str | Path,
    rule: RankRule,
    *,
    method: str = "tucker",
    options: PlanSettings | None = None,
    shapes: Mapping[str, Size] | None = None,
    values: Mapping[str, ArrayLike] | None = None,
    dequantized: bool = False,
) -> Plan:
    """The plan that ``decompose_file`` would make and follow; nothing is written.

    Raises:
        CheckpointError, PlanError: as ``decompose_file``.
    """
    graph = load_graph(source)
    _check_times(rule, dequantized)
    if dequantized:
        dequantize(graph)
    facts = graph_facts(graph, shapes or {}, values)
    with sharing():
        return plan_graph(facts, rule, method, options or PlanSettings())[0]


def _check_times(rule: RankRule | None, dequantized: bool) -> None:
    """Refuse a budget of milliseconds that are measured on a file whose quantization is taken out."""
    if dequantized and isinstance(rule, Budget) and rule.latency_ms is not None and rule.latency_table is None:
        raise PlanError(
            "{latency}: the whole net is timed as its file is, quantized, and the plan is of the float model; write "
            "the float model first, and decompose that",
            latency=Use("ranks.latency_ms", rule.latency_ms),
        )


def flushed(facts: GraphFacts) -> tuple[str, ...]:
    """Set weights that are 0 in all but name to 0; a remark where there are such."""
    count = flush(facts.graph)
    return (f"{count:,} weights below {LEAST:g} were set to 0: many CPUs are slow at such",) if count else ()


def measured_macs(facts: GraphFacts, folder: Path) -> tuple[int, tuple[str, ...]] | None:
    """Multiply-adds of the rewritten graph and the nodes that they leave out, by one run; None if it does not run."""
    probe = probed(facts.graph, facts.feeds, folder=folder)
    if probe.reason:
        return None
    total, uncounted = multiply_adds(probe.ran.nodes(facts.graph.graph), probe.sizes)
    return total, tuple(dict.fromkeys(name_of(node) or name_of(node.outputs[0]) for node in uncounted))


def _dense_outputs(facts: GraphFacts) -> tuple[list[object] | None, tuple[str, ...]]:
    """The outputs of the dense model; or None, and why they are not known."""
    try:
        return run_model(facts.graph.path, facts.feeds), ()
    except Cannot as error:
        remark = (
            f"onnxruntime does not run the given model on {inputs_words(facts.feeds)} ({error}); only the replaced "
            "layers were checked, and multiply-adds are those planned. Give inputs that it runs on"
        )
        log.warning(remark)
        return None, (remark,)


def check_file(path: Path) -> None:
    try:
        onnx.checker.check_model(str(path))
    except (onnx.checker.ValidationError, ValueError, RuntimeError) as error:
        raise ConvertError(
            f"the decomposed model is not valid: {first_line(error)}; this is a fault of hodec"
        ) from error


def _check_outputs(
    path: Path, feeds: Mapping[str, Array], wanted: Sequence[object] | None
) -> tuple[float | None, tuple[str, ...]]:
    """Largest relative difference of the outputs; the result must run and be finite where the given model is."""
    if wanted is None:
        return None, ()
    try:
        outputs = run_model(path, feeds)
    except Cannot as error:
        raise ConvertError(f"the decomposed model does not run in onnxruntime: {error}") from error
    if not all(is_finite(one) for one in wanted):
        return None, ("the given model answers random inputs with NaN or Inf, so outputs were not compared",)
    if not all(is_finite(one) for one in outputs):
        raise ConvertError(
            "the decomposed model gives NaN or Inf where the given one does not; try larger ranks, another method, or "
            "the float32 model"
        )
    return max((relative_difference(a, b) for a, b in zip(outputs, wanted, strict=True)), default=0.0), ()
