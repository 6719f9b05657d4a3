"""A plan for the layers of a graph: the same rules and the same Plan as for a model with a Python class."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, cast

import torch
from onnx import helper
from torch import nn

from hodec.cost.count import Cost
from hodec.errors import PlanError, near_matches
from hodec.errors import Use as Named
from hodec.methods import Method, get_method
from hodec.onnx_graph.constants import Constants
from hodec.onnx_graph.graph_cost import graph_cost
from hodec.onnx_graph.model_file import ModelFile, without_axes
from hodec.onnx_graph.recipes import numbers_of
from hodec.onnx_graph.session import example_feeds
from hodec.onnx_graph.sites import GraphSite, Use, attributes, eligible_sites, weight_uses
from hodec.onnx_graph.sizes import Size, give_axes, input_sizes, measured_sizes, tensor_sizes
from hodec.plan.layer import LayerPlan
from hodec.plan.plan import Plan
from hodec.ranks import RULES, Ascend, Budget
from hodec.ranks.base import NeedsModel, RankRule, methods_of, plan_layers


@dataclass(frozen=True)
class GraphFacts:
    """What planning needs to know of a graph.

    Attributes:
        inputs: sizes of the example input.
        sizes: sizes of the tensors for that.
        cost: of one image.
        batch: images in the example.
    """

    constants: Constants
    inputs: Mapping[str, Size]
    sizes: Mapping[str, Size]
    cost: Cost
    batch: int


def look_at(model: ModelFile, shapes: Mapping[str, Size]) -> GraphFacts:
    """Sizes and cost of a graph, for inputs of these sizes (its own where none are given).

    Inputs and outputs of ``model`` that have no number of axes get it.

    Raises:
        ConfigError: sizes that do not fit its inputs, or are needed and not given.
    """
    inputs = input_sizes(model, shapes)
    constants = Constants(model)
    sizes = tensor_sizes(constants, inputs)
    uses, _ = weight_uses(constants, sizes)
    wanted = [name for use in uses for name in (use.data, use.weight, use.node.output[0])]
    wanted += [value.name for value in without_axes(model.graph.output)]
    missing = [name for name in wanted if name not in sizes]
    if missing:
        sizes |= measured_sizes(model, missing, example_feeds(model, inputs))
    give_axes(model, {**sizes, **inputs})
    batch = next((size[0] for size in inputs.values() if size), 1)
    return GraphFacts(constants, inputs, sizes, graph_cost(constants, sizes, batch=batch), batch)


@dataclass(frozen=True)
class Options:
    """Settings of a plan, as in ``make_plan``."""

    include: list[str] | None = None
    exclude: list[str] | None = None
    allow_larger: bool = False
    n_modes: int = 2
    execution: str = "auto"


def plan_graph(facts: GraphFacts, rule: RankRule, method: str, options: Options) -> tuple[Plan, dict[str, GraphSite]]:
    """A plan over the names of the graph's nodes, and the sites it is about.

    Raises:
        PlanError: a rule that needs a model, nothing to decompose, or settings that do not fit.
    """
    check_rule(rule.name)
    sites, skipped, fits = _sites_by_method(facts, methods_of(rule, method))
    layers = plan_layers(
        {name: site.layer for name, site in sites.items()},
        skipped,
        rule,
        method=method,
        bind=lambda needy: _bind(needy, facts, sites, method),
        fits=fits,
        **vars(options),
    )
    for name in list(layers):
        if reason := _too_large(layers[name], options.allow_larger):
            del layers[name]
            skipped[name] = reason
    if not layers:
        raise PlanError(
            f"no layer is left to decompose: {'; '.join(f'{n}: {r}' for n, r in list(skipped.items())[:5])}"
        )
    return _whole_plan(layers, skipped, rule.name, facts), sites


def _sites_by_method(
    facts: GraphFacts, methods: Sequence[str]
) -> tuple[dict[str, GraphSite], dict[str, str], dict[str, list[str]]]:
    """Sites that at least one method can decompose, why no method can decompose others, and each site's methods."""
    sites: dict[str, GraphSite] = {}
    skipped: dict[str, str] = {}
    fits: dict[str, list[str]] = {}
    for method in methods:
        found, refused = eligible_sites(facts.constants, facts.sizes, get_method(method), batch=facts.batch)
        sites |= found
        skipped = refused | skipped
        for name in found:
            fits.setdefault(name, []).append(method)
    for name, able in fits.items():
        # a budget would not know that a file may refuse a linear tensor train: others are asked where they fit
        others = [one for one in able if not _is_linear_train(get_method(one), sites[name])]
        fits[name] = others or able
    uses, _ = weight_uses(facts.constants, facts.sizes)
    ordered = {use.name: sites[use.name] for use in uses if use.name in sites}
    return ordered, {name: reason for name, reason in skipped.items() if name not in sites}, fits


def _is_linear_train(method: Method, site: GraphSite) -> bool:
    return method.format(site.layer.layer_type).uses_modes and not site.layer.shape[2:]


# Said of the tensor train of a linear layer where its chain of products costs more than the dense layer.
MERGED_LINEAR = "a merged tensor train of a linear layer is its dense weight, which saves nothing in a file"


def _is_merged_linear(layer: LayerPlan) -> bool:
    return layer.format.uses_modes and not layer.shape[2:] and layer.resolved_execution == "merged"


def _too_large(layer: LayerPlan, allowed: bool) -> str:
    """Why the nodes would hold more than the dense layer does, though the format does not; or an empty string."""
    if _is_merged_linear(layer):
        return MERGED_LINEAR
    numbers = numbers_of(layer)
    if allowed or numbers <= layer.params_before:
        return ""
    return f"as plain nodes it would hold {numbers:,} numbers (dense {layer.params_before:,}): not worth it"


def _whole_plan(layers: dict[str, LayerPlan], skipped: dict[str, str], rule: str, facts: GraphFacts) -> Plan:
    graph = facts.constants.model.graph
    kinds = {value.name: value.type.tensor_type.elem_type for value in graph.input}
    inputs = tuple((size, _dtype_word(kinds[name])) for name, size in facts.inputs.items() if all(size))
    return Plan(layers, skipped, rule, facts.cost.params, facts.cost.macs, inputs)


def _dtype_word(kind: int) -> str:
    word = str(helper.tensor_dtype_to_np_dtype(kind))
    return word if isinstance(getattr(torch, word, None), torch.dtype) else "float32"


def check_rule(name: str) -> None:
    """Refuse a rule that has to evaluate a net.

    Raises:
        PlanError: naming it and the rules that can be used.
    """
    if name in RULES and "evaluate" in RULES[name].settings:
        usable = ", ".join(one for one, entry in RULES.items() if "evaluate" not in entry.settings)
        raise PlanError(
            f"rule {name} has to evaluate and train a model, which a file cannot; rules for files: {usable}"
        )


def _bind(rule: NeedsModel, facts: GraphFacts, sites: Mapping[str, GraphSite], method: str) -> None:
    """Show a rule the whole net: the budget its cost, Ascend's rule each layer's settings."""
    for kind, show in BINDERS.items():
        if isinstance(rule, kind):
            show(rule, facts, sites, method)
            return
    raise PlanError(f"rule {type(rule).__name__} needs a model with a Python class; a file has none")


def _bind_budget(rule: Any, facts: GraphFacts, sites: Mapping[str, GraphSite], method: str) -> None:
    if rule.latency_ms is not None:
        raise PlanError(
            "{time} is no target for a model file: milliseconds are measured on PyTorch layers; give {macs} or "
            "{params}, and measure the result with hodec bench",
            time=Named("ranks.latency_ms", rule.latency_ms),
            macs=Named("ranks.macs", 0.4),
            params=Named("ranks.params", 0.4),
        )
    rule.bind_cost(facts.cost)


def _bind_ascend(rule: Any, facts: GraphFacts, sites: Mapping[str, GraphSite], method: str) -> None:
    layers = {name: _stand_in(site) for name, site in sites.items()}
    rule.bind(cast(nn.Module, SimpleNamespace(get_submodule=layers.__getitem__)), (), method)


BINDERS: dict[type, Callable[[Any, GraphFacts, Mapping[str, GraphSite], str], None]] = {
    Budget: _bind_budget,
    Ascend: _bind_ascend,
}


def _stand_in(site: GraphSite) -> nn.Module:
    """A layer with a node's settings and no numbers. Of nodes that share a weight, the one that strides most counts."""
    out, inp, *kernel = site.layer.shape
    if site.layer.layer_type != "conv2d":
        return nn.Identity()
    given = [attributes(use.node) for use in site.uses]
    ones = [1] * len(kernel)
    stride = max((tuple(one.get("strides") or ones) for one in given), key=max)
    dilation = max((tuple(one.get("dilations") or ones) for one in given), key=max)
    dtype, device = site.layer.weight.dtype, torch.device("meta")
    return nn.Conv2d(inp, out, tuple(kernel), stride, dilation=dilation, device=device, dtype=dtype)  # type: ignore[arg-type]


def check_plan(plan: Plan, facts: GraphFacts) -> dict[str, GraphSite]:
    """The sites that a given plan is about, if it fits this graph.

    Raises:
        PlanError: naming the layer, and what does not fit.
    """
    uses, _ = weight_uses(facts.constants, facts.sizes)
    found: dict[str, GraphSite] = {}
    for method in dict.fromkeys(layer.method for layer in plan.values()):
        sites, refused = eligible_sites(facts.constants, facts.sizes, get_method(method), batch=facts.batch)
        for name, layer in plan.items():
            if layer.method == method:
                found[name] = _fitting(name, layer, sites, refused, uses)
    return {name: found[name] for name in plan}


def _fitting(
    name: str, layer: LayerPlan, sites: Mapping[str, GraphSite], refused: Mapping[str, str], uses: list[Use]
) -> GraphSite:
    if name in refused:
        raise PlanError(f"{name} cannot be decomposed: {refused[name]}")
    if name not in sites:
        known = tuple(use.name for use in uses)
        raise PlanError(
            f"the plan names node {name}, which this model lacks: it was made for another model."
            f"{near_matches(name, known)}"
        )
    site = sites[name].layer
    if (site.layer_type, site.shape, site.aliases) != (layer.layer_type, layer.shape, layer.aliases):
        raise PlanError(
            f"{name}: the plan is for a {layer.layer_type} weight {layer.shape} shared with {list(layer.aliases)}, "
            f"this model has {site.layer_type} {site.shape} shared with {list(site.aliases)}; make the plan "
            "from this model"
        )
    if _is_merged_linear(layer):
        raise PlanError(f"{name}: {MERGED_LINEAR}")
    return sites[name]
