"""A plan for the layers of a graph: the same rules and the same Plan as for a model with a Python class."""

from collections.abc import Mapping, Sequence

import onnx_ir as ir
import torch
from torch import nn

from hodec.errors import PlanError, near_matches
from hodec.formats.roles import Role
from hodec.methods import Method, get_method
from hodec.onnx_graph.consumers import WeightConsumer
from hodec.onnx_graph.contents import nothing_to_decompose, skipped_costs
from hodec.onnx_graph.facts import GraphFacts
from hodec.onnx_graph.recipes import numbers_of
from hodec.onnx_graph.sites import GraphSite, refusal, site_of
from hodec.onnx_graph.sizes import Size
from hodec.plan.layer import LayerPlan
from hodec.plan.plan import Plan
from hodec.ranks import RULES, RankRule
from hodec.ranks.context import NetContext
from hodec.ranks.planning import PlanSettings, plan_layers

# Ranks of files are multiples of this. onnxruntime works on 16 channels at a time with AVX-512, on 8 with AVX2, and
# pads the last block. At 0.6 of the multiply-adds a file is this much faster than dense, with ranks at multiples of
# 1 / 8 / 16 / 32: nudenet 1.27 / 1.38 / 1.47 / 1.48, PP-OCRv4 recognition 1.29 / 1.31 / 1.33 / 1.34, page orientation
# 1.07 / 1.30 / 1.38 / 1.39 (AVX-512, one thread; benchmarks/file_latency.py). The loss, as the singular values tell it,
# rises by 1 % (PP-OCRv4) and 6 % (page orientation) from 1 to 16, by 6 % and 19 % from 1 to 32.
BLOCK = 16


def plan_graph(
    facts: GraphFacts, rule: RankRule, method: str, settings: PlanSettings
) -> tuple[Plan, dict[str, GraphSite]]:
    """A plan over the names of the graph's nodes; and its sites, by the names of their first nodes.

    Raises:
        PlanError: a rule that needs a model, nothing to decompose, or settings that do not fit.
    """
    from hodec.onnx_graph.latency import latency_table

    check_rule(rule)
    sites, skipped, fits = eligible_sites(facts, rule.methods_for(method))
    if not sites:
        raise nothing_to_decompose(facts, skipped)
    layers = plan_layers(
        {name: site.layer for name, site in sites.items()},
        skipped,
        rule,
        NetContext(facts.cost, lambda name: _stand_in(sites[name]), times=latency_table(facts, sites), block=BLOCK),
        method=method,
        settings=settings,
        fits=fits,
    )
    for name in list(layers):
        if reason := _too_large(layers[name], settings.allow_larger):
            del layers[name]
            skipped[name] = reason
    if not layers:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in list(skipped.items())[:5])
        raise PlanError(f"no layer is left to decompose: {reasons}")
    cost, inputs, costs, other = facts.cost, _plan_inputs(facts), *skipped_costs(facts, layers, skipped)
    return Plan(layers, skipped, rule.name, cost.params, cost.macs, inputs, None, costs, other), sites


def eligible_sites(
    facts: GraphFacts, methods: Sequence[str]
) -> tuple[dict[str, GraphSite], dict[str, str], dict[str, list[str]]]:
    """The weights that at least one of the methods can decompose, why others stay as they are, and each one's methods.

    Sites are named after their first nodes, in the order of the graph; a reason is that of the first method.
    """
    sites, refused, fits = dict[str, GraphSite](), dict(facts.refused), dict[str, list[str]]()
    for group in facts.groups:
        reasons = {name: refusal(group, facts.graph, get_method(name), facts.sizes) for name in methods}
        able = [name for name, reason in reasons.items() if not reason]
        site = site_of(group, facts.graph, facts.sizes, batch=facts.batch) if able else None
        if site is None:
            reason = "its weight holds NaN or Inf" if able else next(iter(reasons.values()))
            refused |= {one.name: reason for one in group}
            continue
        # a budget would not know that a file may refuse a linear tensor train: others are asked where they fit
        others = [one for one in able if not _is_linear_train(get_method(one), site)]
        sites[group[0].name], fits[group[0].name] = site, others or able
    return sites, refused, fits


def _is_linear_train(method: Method, site: GraphSite) -> bool:
    layer = site.layer
    return (
        method.format(layer.layer_type, layer.groups).uses_modes
        and site.layer.role is Role.LAYER
        and not layer.shape[2:]
    )


# Said of the tensor train of a linear layer where its chain of products costs more than the dense layer.
MERGED_LINEAR = "a merged tensor train of a linear layer is its dense weight, which saves nothing in a file"


def _is_merged_linear(layer: LayerPlan) -> bool:
    return layer.format.uses_modes and not layer.shape[2:] and layer.resolved_execution == "merged"


def _too_large(layer: LayerPlan, allowed: bool) -> str:
    """Why the nodes would hold more than the dense layer does, though the format does not; or an empty string."""
    if _is_merged_linear(layer):
        return MERGED_LINEAR
    elements = numbers_of(layer)
    if allowed or elements <= layer.params_before:
        return ""
    return f"as plain nodes it would hold {elements:,} parameters (dense {layer.params_before:,}): not worth it"


def _plan_inputs(facts: GraphFacts) -> tuple[tuple[Size, str], ...]:
    """Size and type of each example input, in torch's words."""
    types = {name: str((value.dtype or ir.DataType.FLOAT).numpy()) for name, value in facts.graph.inputs.items()}
    known = {word for word in types.values() if isinstance(getattr(torch, word, None), torch.dtype)}
    sizes = ((size, types[name]) for name, size in facts.inputs.items() if all(size))
    return tuple((size, word if word in known else "float32") for size, word in sizes)


def check_rule(rule: RankRule) -> None:
    """Refuse a rule that has to run a net.

    Raises:
        PlanError: naming it and the rules that can be used.
    """
    if rule.runs_net:
        usable = ", ".join(name for name, one in RULES.items() if not one.runs_net)
        raise PlanError(
            f"rule {rule.name} {rule.runs_net}: that takes a model with a Python class; for files: {usable}"
        )


def _stand_in(site: GraphSite) -> nn.Module:
    """A layer with a node's settings and no weights. Of nodes that share a weight, the one that strides most counts."""
    groups, (out, inp, *kernel) = site.layer.groups, site.layer.shape
    if site.layer.layer_type != "conv2d":
        return nn.Identity()
    stride, dilation = (
        max(((*(one.ints(key) or [1] * len(kernel)),) for one in site.consumers), key=max)
        for key in ("strides", "dilations")
    )
    dtype, device = site.layer.weight.dtype, torch.device("meta")
    inp *= groups
    return nn.Conv2d(inp, out, tuple(kernel), stride, dilation=dilation, groups=groups, device=device, dtype=dtype)  # type: ignore[arg-type]


def check_plan(plan: Plan, facts: GraphFacts) -> dict[str, GraphSite]:
    """The sites that a given plan is about, if it fits this graph.

    Raises:
        PlanError: naming the layer, and what does not fit.
    """
    known = {one.name: group for group in facts.groups for one in group}
    return {name: _fitting(name, layer, known, facts) for name, layer in plan.items()}


def _fitting(
    name: str, layer: LayerPlan, known: Mapping[str, tuple[WeightConsumer, ...]], facts: GraphFacts
) -> GraphSite:
    group, method = known.get(name, ()), get_method(layer.method)
    reason = facts.refused.get(name) or (group and refusal(group, facts.graph, method, facts.sizes))
    if reason:
        raise PlanError(f"{name} cannot be decomposed: {reason}")
    if not group or group[0].name != name:
        raise PlanError(
            f"the plan names node {name}, which this model lacks: it was made for another model."
            f"{near_matches(name, tuple(known))}"
        )
    site = site_of(group, facts.graph, facts.sizes, batch=facts.batch)
    if site is None:
        raise PlanError(f"{name} cannot be decomposed: its weight holds NaN or Inf")
    found = site.layer
    given = (layer.layer_type, layer.shape, layer.aliases, layer.groups, layer.role)
    if (found.layer_type, found.shape, found.aliases, found.groups, found.role) != given:
        raise PlanError(
            f"{name}: the plan is for a {layer.layer_type} weight {layer.shape} shared with {list(layer.aliases)}, "
            f"this model has {found.layer_type} {found.shape} shared with {list(found.aliases)}; make the plan "
            "from this model"
        )
    if _is_merged_linear(layer):
        raise PlanError(f"{name}: {MERGED_LINEAR}")
    return site
