"""fit_file: the layers of a plan, or of a rule's choice, fitted to data: decomposing a file with data."""

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import cast

from hodec.errors import ConvertError, PlanError
from hodec.linalg.svd import sharing
from hodec.onnx_graph.chance import Loss
from hodec.onnx_graph.compress import Task, prepared
from hodec.onnx_graph.planning import check_plan, check_rule, plan_graph
from hodec.onnx_graph.search import ByData, Search, Trial
from hodec.onnx_graph.sensitivity import Progress
from hodec.onnx_graph.trial_file import write_trial
from hodec.onnx_graph.verdict import Compressed
from hodec.plan.plan import Plan
from hodec.ranks import RankRule
from hodec.ranks.context import LayerContext, NetContext
from hodec.ranks.planning import PlanSettings
from hodec.ranks.rule import Choice


def fit_file(  # noqa: PLR0913
    source: str | Path,
    out: str | Path,
    task: Task,
    *,
    method: str = "tucker",
    rule: RankRule | None = None,
    plan: Plan | None = None,
    options: PlanSettings | None = None,
    threads: int | None = None,
    seconds: float = 3.0,
    force: bool = False,
    progress: Progress = lambda what, done, total: None,
) -> Compressed:
    """Decompose the layers of an ONNX file so that their outputs on data change least, and write the smaller model.

    A rule that reads weights sees them whitened by the inputs' covariances: what it cuts off is then a share of a
    layer's outputs.

    Args:
        task: the data; with a ``max_drop`` the file is written only if it loses no more on the held-out part.
        method, rule, plan, options, force: as in ``decompose_file``.
        threads, seconds, progress: as in ``compress_file``.

    Raises:
        LosesMore: the file loses more than the task's ``max_drop``; nothing is written.
        DataError, ConfigError, PlanError, ConvertError, CheckpointError: what has to be mended; nothing is written.
    """
    if (rule is None) == (plan is None):
        raise ConvertError("allowed: either a rule or a plan")
    if plan is not None and not len(plan):
        raise PlanError("the plan has no layers, so that nothing can be fitted; give one with layers, or a rule")
    if rule is not None:
        check_rule(rule)
    methods = rule.methods_for(method) if rule else tuple(dict.fromkeys(one.method for one in (plan or {}).values()))
    search, held = prepared(source, Path(out), task, methods=methods, threads=threads, force=force)
    search.target = "macs"
    search.tables.progress, search.settings = progress, options or PlanSettings()
    with sharing():
        if plan is None:
            plan = _planned(search, cast(RankRule, rule), method)
        else:
            check_plan(plan, search.facts)
        tried = search.fitted(plan, sequential=True)
        trial = Trial(0.0, plan, tried, Loss(math.nan, math.nan), 0.0)
        return write_trial(trial, search, held, Path(out), seconds=seconds, judged=task.max_drop is not None)


def _planned(search: Search, rule: RankRule, method: str) -> Plan:
    def choose(layers: Mapping[str, LayerContext], net: NetContext) -> dict[str, Choice]:
        return rule.choose(search.tables.whitened(layers) if rule.reads_weights else layers, net)

    by_data = ByData(methods=rule.methods_for(method), chooser=choose)
    plan, _ = plan_graph(search.facts, by_data, method, search.settings)
    return replace(plan, rule=rule.name)
