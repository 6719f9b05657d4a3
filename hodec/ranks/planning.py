"""make_plan: the eligible layers, their modes, the ranks a rule chooses for them, and what that costs."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import SupportsIndex

from torch import nn

from hodec.conversion.coverage import own_weights, parameter_costs
from hodec.conversion.eligibility import (
    Layers,
    LayerSite,
    Pattern,
    check_no_lazy,
    eligible_layers,
    match_layers,
    match_names,
    names_by_module,
    pattern_words,
    patterns,
)
from hodec.conversion.ties import NOT_CALLED, READ_DIRECTLY
from hodec.cost.count import count_by_parameter
from hodec.errors import PlanError, Use, literal
from hodec.formats.modes import MOST_MODES, Modes
from hodec.inference import running_input, uncompiled
from hodec.inputs import Inputs, form_of
from hodec.io.tensors import is_divided
from hodec.methods import Method, any_of, get_method
from hodec.plan.layer import LayerPlan
from hodec.plan.plan import Plan
from hodec.ranks.context import LayerContext, NetContext
from hodec.ranks.rule import RankRule
from hodec.ranks.shard_weights import on_its_device, with_numbers
from hodec.ranks.table import AnyRule, as_rule


@dataclass(frozen=True)
class PlanSettings:
    """How layers are planned, whatever the rule; see ``make_plan``."""

    include: Layers | None = None
    exclude: Layers | None = None
    allow_larger: bool = False
    n_modes: int = 2
    modes: Mapping[str, Modes] | None = None
    execution: str = "auto"


def make_plan(
    model: nn.Module,
    rule: AnyRule,
    *,
    method: str = "tt",
    example_input: Inputs,
    include: Layers | None = None,
    exclude: Layers | None = None,
    allow_larger: bool = False,
    n_modes: int = 2,
    modes: Mapping[str, Modes] | None = None,
    execution: str = "auto",
    weights: str | Path | None = None,
) -> Plan:
    """Decide per layer how it is factorized; nothing is changed yet.

    Args:
        model: the dense model, on any device, left as it was. On the meta device (``with torch.device("meta"):``) it
            takes no memory, and is planned by rules that read no weights (``manual``, ``ratio``), or with ``weights``.
        rule: what chooses the ranks: ``hodec.ranks.Energy(0.9)``; the name of a rule, ``"energy"``; or ranks by hand,
            ``16``, ``[4, 16, 16, 4]`` or ``{"layer1.*": 8}``, see ``hodec.ranks.Manual``.
        method: name in ``hodec.METHODS``; not used where the rule has ``methods`` of its own.
        example_input: as the model takes, batch first: a tensor, arguments in a tuple, keyword arguments in a dict, or
            a loader's batch, of which ``forward`` gets what it takes. Sizes decide the costs.
        include, exclude: a layer glob (``"layer1.*"``), a regular expression that the whole name matches, a class of
            modules (``nn.Conv2d``), or several in a list; by default every eligible layer is included.
        allow_larger: keep layers that would cost more than they do dense.
        n_modes: how many modes a side the channels split into, 1..4; for ``tt``, 1 is Tucker-2.
        modes: layer glob -> modes, where the even split is not wanted; the last match counts.
        execution: ``auto`` (by cost), ``merged`` or ``chain``.
        weights: of a model on the meta device: a folder of safetensors files (shards), their index, or one such file;
            the rule reads it layer by layer.

    Returns:
        The plan, with every other layer or parameter that is multiplied by under ``skipped`` with its reason, and what
        is left (norms, biases, tables) counted under ``other``.

    Raises:
        PlanError: unknown method, a glob that matches nothing, ranks that do not fit, no layer left, or a rule that
            needs weights or a run of a net on the meta device.
        CheckpointError: ``weights`` that are unreadable or of another model.
        TrainingError: a weight with NaN or Inf.

    Examples:
        >>> net = nn.Sequential(nn.Conv2d(16, 32, 3), nn.ReLU(), nn.Conv2d(32, 32, 3))
        >>> plan = hodec.make_plan(net, 8, method="tucker", example_input=torch.zeros(1, 16, 8, 8))
        >>> plan["2"].ranks, plan["2"].params_before, plan["2"].params_after
        ((8, 8), 9216, 1088)
        >>> plan = hodec.make_plan(net, hodec.ranks.Ratio(0.5), exclude="0", example_input=torch.zeros(1, 16, 8, 8))
        >>> list(plan), list(plan.skipped)
        (['2'], ['0'])

        A net that no memory holds, from the shards of its weights::

            with torch.device("meta"):
                model = build()
            plan = hodec.make_plan(model, "energy", method="svd", example_input=tokens, weights="checkpoint/")
    """
    settings = PlanSettings(include, exclude, allow_larger, n_modes, modes, execution)
    rule, model = as_rule(rule), uncompiled(model)
    if any(map(is_divided, model.parameters())):
        raise PlanError(
            "the model is divided among processes (fully_shard, DTensor): plan it before it is, or plan the same net "
            "on the meta device"
        )
    check_no_lazy(names_by_module(model))
    example_input = running_input(model, on_its_device(model, example_input))
    sites, skipped = eligible_layers(model, any_of(rule.methods_for(method)), example_input)
    cost, macs = count_by_parameter(model, example_input)
    used = (name for name, reason in skipped.items() if reason == NOT_CALLED and macs.get(f"{name}.weight"))
    skipped |= dict.fromkeys(used, READ_DIRECTLY)
    skipped |= own_weights(model, {*sites, *skipped}, macs, method)
    sites = with_numbers(model, sites, rule, weights)
    net = NetContext(cost, model.get_submodule, model, example_input)
    layers = plan_layers(sites, skipped, rule, net, method=method, settings=settings)
    skipped = {name: skipped[name] for name in _paths(model) if name in skipped}
    costs, other = parameter_costs(model, list(layers), list(skipped), macs)
    given = example_input.sizes, form_of(example_input)
    return Plan(layers, skipped, rule.name, cost.params, cost.macs, *given, costs, other)


def _paths(model: nn.Module) -> Iterator[str]:
    """The names of all modules, each with those of its own parameters behind it."""
    for name, module in model.named_modules():
        yield name
        yield from (f"{name}.{key}".removeprefix(".") for key in module._parameters)


def plan_layers(
    sites: Mapping[str, LayerSite],
    skipped: dict[str, str],
    rule: RankRule,
    net: NetContext,
    *,
    method: str,
    settings: PlanSettings,
    fits: Mapping[str, Sequence[str]] | None = None,
) -> dict[str, LayerPlan]:
    """``make_plan`` for layers that were found anywhere, in a model file too.

    Args:
        sites: the layers that ``method``, or one of the rule's, can factorize.
        skipped: why others cannot; each layer that stays dense joins them.
        net: the whole net.
        fits: layer -> the methods that can factorize it, where its type alone does not say so.

    Raises:
        PlanError: as ``make_plan``.
    """
    _check_n_modes(settings.n_modes)
    included = _included(sites, settings, skipped, net.model)
    methods = [get_method(name) for name in rule.methods_for(method)]
    given = _given_modes(settings.modes or {}, included)
    contexts: dict[str, LayerContext] = {}
    for name in included:
        site = sites[name]
        able = [m for m in methods if site.served_by(m) and (not fits or m.name in fits[name])]
        found = _contexts(name, site, able, settings, given.get(name), skipped)
        several = [replace(one, block=net.block) for one in found]
        if several:
            contexts[name] = replace(several[0], others=tuple(several[1:]))
    layers = _chosen(contexts, rule, net, settings, skipped)
    if not layers:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in list(skipped.items())[:5])
        raise PlanError(f"no layer is left to factorize ({len(skipped)} looked at). {reasons or 'The model has none.'}")
    return layers


def _check_n_modes(given: object) -> None:
    if not (isinstance(given, SupportsIndex) and 1 <= given.__index__() <= MOST_MODES):
        text = literal(f"{given!r} given; allowed: a whole number of at least 1 and at most {MOST_MODES}")
        raise PlanError(f"{{setting}}: {text}", setting=Use("method.n_modes"))


def _chosen(
    contexts: Mapping[str, LayerContext],
    rule: RankRule,
    net: NetContext,
    settings: PlanSettings,
    skipped: dict[str, str],
) -> dict[str, LayerPlan]:
    """The layers as the rule has them; those that it leaves dense, or that would cost more, join ``skipped``."""
    choices = rule.choose(contexts, net) if contexts else {}
    layers: dict[str, LayerPlan] = {}
    for name, context in contexts.items():
        choice = choices[name]
        if choice.ranks is None:
            skipped[name] = choice.reason
            continue
        chosen = next(one for one in (context, *context.others) if one.method == (choice.method or one.method))
        layer = chosen.planned(choice.ranks, choice.notes)
        if layer.saves() or (settings.allow_larger and rule.may_enlarge):
            layers[name] = layer
        else:
            why = f"; rule {rule.name} makes no layer larger" * (settings.allow_larger and not rule.may_enlarge)
            skipped[name] = _not_worth_it(layer) + why
    return layers if rule.may_enlarge else _without_growth(layers, rule, skipped)


def _without_growth(layers: dict[str, LayerPlan], rule: RankRule, skipped: dict[str, str]) -> dict[str, LayerPlan]:
    """The layers without those embeddings whose products raise the net's multiply-adds: dense they only look up.

    The one that adds most for what it saves goes first; embeddings that the other layers make up for stay.
    """
    growth = {name: layer.macs_after - layer.macs_before for name, layer in layers.items()}
    adding = [name for name in layers if growth[name] > 0]
    for name in sorted(adding, key=lambda n: -growth[n] / (layers[n].params_before - layers[n].params_after)):
        if sum(growth.values()) <= 0:
            break
        more = f"its products would raise the net's multiply-adds by {growth.pop(name):,}"
        skipped[name] = f"{more}, which the other layers do not save; rule {rule.name} raises no cost of the net"
    return {name: layer for name, layer in layers.items() if name in growth}


def _included(
    sites: Mapping[str, LayerSite], settings: PlanSettings, skipped: dict[str, str], model: nn.Module | None
) -> list[str]:
    """The names that ``include`` and ``exclude`` leave; the others join ``skipped``. Tied layers go with theirs."""
    names, tied = list(sites), {tie.name: name for name, site in sites.items() for tie in site.ties}
    known, include, exclude = [*names, *tied, *skipped], patterns(settings.include), patterns(settings.exclude)

    def matched(one: Pattern, setting: str) -> set[str]:
        return {tied.get(n, n) for n in match_layers(one, known, setting, model)}

    wanted = {n for one in include for n in matched(one, "include")} if include else set(names)
    dropped = {n: one for one in exclude for n in matched(one, "exclude")}
    for name in names:
        if name in dropped:
            skipped[name] = f"excluded by {pattern_words(dropped[name])}"
        elif name not in wanted:
            skipped[name] = "not among include"
    return [name for name in names if name not in skipped]


def _given_modes(modes: Mapping[str, Modes], names: Sequence[str]) -> dict[str, Modes]:
    """The layers whose modes were given; of several globs that match a layer the last counts."""
    if not isinstance(modes, Mapping) or not all(isinstance(split, Modes) for split in modes.values()):
        text = literal(f"{modes!r} given; allowed: {{layer glob: Modes((8, 8), (4, 16))}}. For as many modes a side in")
        raise PlanError(
            f"{{setting}}: {text} every layer give {{count}}",
            setting=Use("method.modes"),
            count=Use("method.n_modes", 2),
        )
    return {name: split for glob, split in modes.items() for name in match_names(glob, names, "method.modes")}


def _contexts(
    name: str,
    site: LayerSite,
    methods: Sequence[Method],
    settings: PlanSettings,
    given: Modes | None,
    skipped: dict[str, str],
) -> list[LayerContext]:
    """How each method sees a layer; where none can factorize it, the first one's reason joins ``skipped``."""
    formats = {method.name: method.format(site.layer_type, site.groups) for method in methods}
    if site.groups > 1:  # of which no method splits the channels or has a chain
        asked = {"modes": given is not None, f"execution {settings.execution}": settings.execution == "chain"}
        note = "a grouped convolution: {} does not apply"
        site = replace(site, notes=(*site.notes, *(note.format(what) for what, is_asked in asked.items() if is_asked)))
        given, settings = None, replace(settings, execution="auto")
    if given is not None and not any(fmt.uses_modes for fmt in formats.values()):
        raise PlanError(f"{name}: method {' or '.join(formats)} splits no channels into modes; leave method.modes out")
    out, inp = site.shape[:2]
    contexts, reasons = [], []
    for method, fmt in formats.items():
        split = (given if fmt.uses_modes else None) or Modes.split(inp, out, settings.n_modes if fmt.uses_modes else 1)
        split.check(inp, out)
        if len(split.inputs) < fmt.min_modes:
            reasons.append(f"method {method} needs at least {fmt.min_modes} modes a side for a {site.layer_type} layer")
        elif reason := _unsuitable(site, get_method(method), split):
            reasons.append(reason)
        else:
            # a choice among methods is not to end at an execution that one of them lacks
            chosen = len(formats) == 1 or settings.execution in fmt.executions
            execution = settings.execution if chosen else "auto"
            contexts.append(LayerContext(name, method, site, fmt, split, execution))
    if not contexts:
        skipped[name] = reasons[0] if reasons else "no method alone has layers for all that share its weight"
    return contexts


def _unsuitable(site: LayerSite, method: Method, split: Modes) -> str:
    """Why a layer, or one that is tied to it, should stay dense at these modes."""
    reasons = [method.format(site.layer_type, site.groups).unsuitable(site.shape, split)]
    if any(tie.layer_type != site.layer_type for tie in site.ties):  # rows of it are looked up
        turned = Modes(split.outputs, split.inputs)
        reasons.append(method.format("embedding").unsuitable(site.shape[::-1], turned))
    return next(filter(None, reasons), "")


def _not_worth_it(layer: LayerPlan) -> str:
    return (
        f"at ranks {list(layer.ranks)} it would cost {layer.params_after:,} parameters (dense "
        f"{layer.params_before:,}) and {layer.macs_after:,} MACs (dense {layer.macs_before:,}): not worth it"
    )
