"""The whole way of a model file: look, plan, rewrite, check, write."""

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from hodec.cost.count import Cost
from hodec.errors import ConvertError
from hodec.linalg.svd import sharing
from hodec.onnx_graph.constants import Constants
from hodec.onnx_graph.graph_cost import graph_cost
from hodec.onnx_graph.model_file import ModelFile, first_line, load_model
from hodec.onnx_graph.planning import GraphFacts, Options, check_plan, look_at, plan_graph
from hodec.onnx_graph.rewrite import Change, rewrite
from hodec.onnx_graph.session import Cannot, example_feeds, run_model
from hodec.onnx_graph.sites import GraphSite
from hodec.onnx_graph.sizes import Size, tensor_sizes
from hodec.onnx_graph.writing import check_target, staged
from hodec.plan.plan import Plan
from hodec.ranks import RankRule

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Outcome:
    """What a decomposition came to.

    Attributes:
        changes: node -> what became of it.
        before, after: cost of one image, counted in the graphs themselves.
        bytes_before, bytes_after: size of the files, data files among them.
        difference: largest difference of an output over its largest number, on random inputs; None where the model
            could not be run.
        remarks: what could not be checked, and why.
    """

    plan: Plan
    changes: Mapping[str, Change]
    before: Cost
    after: Cost
    bytes_before: int
    bytes_after: int
    difference: float | None
    remarks: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {
            "changes": {name: change.to_dict() for name, change in self.changes.items()},
            "skipped": dict(self.plan.skipped),
            "rule": self.plan.rule,
            "params": [self.before.params, self.after.params],
            "macs": [self.before.macs, self.after.macs],
            "bytes": [self.bytes_before, self.bytes_after],
            "difference": self.difference,
            "remarks": list(self.remarks),
        }


def decompose_file(  # noqa: PLR0913
    source: str | Path,
    out: str | Path,
    *,
    method: str = "tucker",
    rule: RankRule | None = None,
    plan: Plan | None = None,
    options: Options | None = None,
    shapes: Mapping[str, Size] | None = None,
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
        force: replace an existing ``out``.

    Raises:
        CheckpointError: the file cannot be read.
        PlanError: nothing to decompose, or a plan that does not fit.
        ConvertError: the result cannot be written, or does not pass a check.
    """
    model, out = load_model(source), Path(out)
    check_target(out, model, force=force)
    size = _bytes_of((model.path, *model.data_files))
    facts = look_at(model, shapes or {})
    feeds = example_feeds(model, facts.inputs)
    with sharing():
        plan, sites = _planned(facts, rule, plan, method, options or Options())
        wanted, remarks = _dense_outputs(model, feeds, facts.inputs)
        changes = rewrite(model, sites, plan)
    after = _cost_after(model, facts)
    with staged(model, out) as finished:
        _check_file(finished)
        difference, more = _check_outputs(finished, feeds, wanted)
        written = _bytes_of(finished.parent.iterdir())
    return Outcome(plan, changes, facts.cost, after, size, written, difference, tuple([*remarks, *more]))


def _planned(
    facts: GraphFacts, rule: RankRule | None, plan: Plan | None, method: str, options: Options
) -> tuple[Plan, dict[str, GraphSite]]:
    if plan is not None:
        return plan, check_plan(plan, facts)
    if rule is None:
        raise ConvertError("there is neither a rule nor a plan")
    return plan_graph(facts, rule, method, options)


def _bytes_of(files: Iterable[Path]) -> int:
    return sum(path.stat().st_size for path in files)


def _cost_after(model: ModelFile, facts: GraphFacts) -> Cost:
    constants = Constants(model)
    sizes = {**facts.sizes, **tensor_sizes(constants, facts.inputs)}
    return graph_cost(constants, sizes, batch=facts.batch)


def _dense_outputs(
    model: ModelFile, feeds: Mapping[str, Any], inputs: Mapping[str, Size]
) -> tuple[list[Any] | None, list[str]]:
    """What the given model answers, or why that is not known."""
    try:
        return run_model(model.path, feeds), []
    except Cannot as error:
        sizes = " ".join(f"--shape {name}:{','.join(map(str, size))}" for name, size in inputs.items())
        remark = (
            f"onnxruntime does not run the given model on inputs of {sizes} ({error}); only the replaced layers were "
            "checked. Give sizes that it runs on"
        )
        log.warning(remark)
        return None, [remark]


def _check_file(path: Path) -> None:
    try:
        onnx.checker.check_model(str(path))
    except (onnx.checker.ValidationError, ValueError, RuntimeError) as error:
        raise ConvertError(
            f"the decomposed model is not valid: {first_line(error)}; this is a fault of hodec"
        ) from error


def _check_outputs(
    path: Path, feeds: Mapping[str, Any], wanted: Sequence[Any] | None
) -> tuple[float | None, list[str]]:
    """Largest relative difference of the outputs; the result must run and be finite where the given model is."""
    if wanted is None:
        return None, []
    try:
        given = run_model(path, feeds)
    except Cannot as error:
        raise ConvertError(f"the decomposed model does not run in onnxruntime: {error}") from error
    if not all(is_finite(one) for one in wanted):
        return None, ["the given model answers random inputs with NaN or Inf, so outputs were not compared"]
    if not all(is_finite(one) for one in given):
        raise ConvertError(
            "the decomposed model gives NaN or Inf where the given one does not; try larger ranks, another method, or "
            "the float32 model"
        )
    return max((relative_difference(a, b) for a, b in zip(given, wanted, strict=True)), default=0.0), []


def is_finite(value: Any) -> bool:
    """Whether an output holds neither NaN nor Inf; outputs that are no numbers count as finite."""
    array = np.asarray(value) if isinstance(value, np.ndarray) else np.zeros(0)
    return array.dtype.kind != "f" or bool(np.isfinite(array).all())


def relative_difference(given: Any, wanted: Any) -> float:
    """Largest difference over the largest number; 0 for outputs that are no floating numbers."""
    if not isinstance(wanted, np.ndarray) or wanted.dtype.kind != "f" or not wanted.size:
        return 0.0
    if given.shape != wanted.shape:
        return float("inf")
    top = float(np.abs(wanted).max())
    difference = float(np.abs(given.astype(np.float64) - wanted).max())
    return difference / top if top else difference
