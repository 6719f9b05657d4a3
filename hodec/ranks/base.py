"""make_plan: the eligible layers, their modes, the ranks a rule chooses for them, and what that costs."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from torch import nn

from hodec.conversion.eligibility import LayerSite, eligible_layers, match_names
from hodec.conversion.swap import uncompiled
from hodec.cost.count import Inputs, as_inputs, count_cost
from hodec.errors import PlanError
from hodec.formats.base import Format
from hodec.formats.modes import Modes
from hodec.methods import Method, any_of, get_method
from hodec.plan.layer import LayerPlan
from hodec.plan.plan import Plan


@dataclass(frozen=True)
class Candidate:
    """A layer a rule may choose ranks for: its site, and how the method sees it.

    Attributes:
        form: the format's mathematics for this kind of layer.
        modes: how its channels split.
        most: ranks at which the format is exact for every such weight.
    """

    name: str
    method: str
    site: LayerSite
    format: Format
    modes: Modes
    execution: str = "auto"

    @property
    def most(self) -> tuple[int, ...]:
        return self.format.max_ranks(self.site.shape, self.modes)

    def planned(self, ranks: tuple[int, ...], notes: tuple[str, ...] = ()) -> LayerPlan:
        """The layer plan at these ranks, checked."""
        return LayerPlan(
            method=self.method,
            layer_type=self.site.layer_type,
            shape=self.site.shape,
            modes=self.modes,
            ranks=tuple(ranks),
            call_sites=self.site.call_sites,
            execution=self.execution,
            aliases=self.site.aliases,
            notes=notes,
        ).check(self.name)


@dataclass(frozen=True)
class Choice:
    """What a rule says of one layer: ranks with notes on what it clipped or rounded, or why it stays dense.

    ``method`` is the one it chose, where it could choose.
    """

    ranks: tuple[int, ...] | None
    notes: tuple[str, ...] = ()
    reason: str = ""
    method: str = ""


class RankRule(Protocol):
    """What chooses ranks.

    Attributes:
        name: the rule's word in plans and configs.
        reads_weights: whether it needs a trained model (ranks of random weights mean nothing).
    """

    name: str
    reads_weights: bool

    def choose(self, candidates: Mapping[str, Candidate]) -> dict[str, Choice]:
        """A choice for every candidate.

        Raises:
            PlanError: the rule's own settings do not fit these layers.
        """
        ...


@runtime_checkable
class NeedsModel(Protocol):
    """A rule that looks at the whole model, not only at single layers."""

    def bind(self, model: nn.Module, example_input: Inputs, method: str) -> None:
        """Remember the model that the next ``choose`` is about."""


@runtime_checkable
class ChoosesMethod(Protocol):
    """A rule that may choose each layer's method too, among ``methods`` (empty: that of the plan)."""

    methods: tuple[str, ...]

    def choose_among(self, options: Mapping[str, Sequence[Candidate]]) -> dict[str, Choice]:
        """A choice for every layer, among candidates of several methods.

        Raises:
            PlanError: the rule's own settings do not fit these layers.
        """


def methods_of(rule: RankRule, method: str) -> tuple[str, ...]:
    """The methods a layer may take: those that the rule chooses among, else ``method``."""
    return (rule.methods if isinstance(rule, ChoosesMethod) else ()) or (method,)


def make_plan(  # noqa: PLR0913
    model: nn.Module,
    rule: RankRule,
    *,
    method: str = "tt",
    example_input: Inputs,
    include: list[str] | None = None,
    exclude: list[str] | None = None,
    allow_larger: bool = False,
    n_modes: int = 2,
    modes: Mapping[str, Modes] | None = None,
    execution: str = "auto",
) -> Plan:
    """Decide per layer how it is factorized; nothing is changed yet.

    Args:
        model: the dense model, on any device, left as it was.
        rule: what chooses the ranks, e.g. ``hodec.ranks.Manual(16)``.
        method: name in ``hodec.METHODS``; not used where the rule has ``methods`` of its own.
        example_input: a tensor (or several) as the model takes, batch first; sizes decide the costs.
        include, exclude: layer globs; by default every eligible layer is included.
        allow_larger: keep layers that would cost more than they do dense.
        n_modes: how many modes a side the channels split into, 1..4; for ``tt``, 1 is Tucker-2.
        modes: layer glob -> modes, where the even split is not wanted; the last match counts.
        execution: ``auto`` (by cost), ``merged`` or ``chain``.

    Returns:
        The plan, with every other weight layer under ``skipped`` with its reason.

    Raises:
        PlanError: unknown method, a glob that matches nothing, ranks that do not fit, or no layer left.
        TrainingError: a weight with NaN or Inf.
    """
    model = uncompiled(model)
    sites, skipped = eligible_layers(model, any_of(methods_of(rule, method)), example_input)
    layers = plan_layers(
        sites,
        skipped,
        rule,
        method=method,
        bind=lambda needy: needy.bind(model, example_input, method),
        include=include,
        exclude=exclude,
        allow_larger=allow_larger,
        n_modes=n_modes,
        modes=modes,
        execution=execution,
    )
    cost = count_cost(model, example_input)
    inputs = tuple((tuple(x.shape), str(x.dtype).removeprefix("torch.")) for x in as_inputs(example_input))
    order = [name for name, _ in model.named_modules() if name in skipped]
    return Plan(layers, {name: skipped[name] for name in order}, rule.name, cost.params, cost.macs, inputs)


def plan_layers(  # noqa: PLR0913
    sites: Mapping[str, LayerSite],
    skipped: dict[str, str],
    rule: RankRule,
    *,
    method: str,
    bind: Callable[[NeedsModel], None],
    include: list[str] | None = None,
    exclude: list[str] | None = None,
    allow_larger: bool = False,
    n_modes: int = 2,
    modes: Mapping[str, Modes] | None = None,
    execution: str = "auto",
    fits: Mapping[str, Sequence[str]] | None = None,
) -> dict[str, LayerPlan]:
    """``make_plan`` without a model: the plans of eligible layers, wherever they were found.

    Args:
        sites: the layers that ``method``, or one of the rule's, can factorize.
        skipped: why others cannot; each layer that stays dense joins them.
        bind: shows the whole net to a rule that needs it.
        fits: layer -> the methods that can factorize it, where its kind alone does not say so.

    Raises:
        PlanError: as ``make_plan``.
    """
    chosen = _included(list(sites), include, exclude, skipped)
    methods = [get_method(name) for name in methods_of(rule, method)]
    by_layer = {
        name: split for glob, split in (modes or {}).items() for name in match_names(glob, chosen, "method.modes")
    }
    options: dict[str, list[Candidate]] = {}
    for name in chosen:
        able = [one for one in methods if sites[name].layer_type in one.layers and (not fits or one.name in fits[name])]
        options[name] = _options(name, sites[name], able, n_modes, by_layer.get(name), execution, skipped)
    options = {name: candidates for name, candidates in options.items() if candidates}
    if isinstance(rule, NeedsModel):
        bind(rule)
    choices = _choices(rule, options) if options else {}
    layers = _affordable(options, choices, allow_larger, skipped)
    if not layers:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in list(skipped.items())[:5])
        raise PlanError(f"no layer is left to factorize ({len(skipped)} looked at). {reasons or 'The model has none.'}")
    return layers


def _choices(rule: RankRule, options: Mapping[str, Sequence[Candidate]]) -> dict[str, Choice]:
    if isinstance(rule, ChoosesMethod) and rule.methods:
        return rule.choose_among(options)
    return rule.choose({name: candidate for name, (candidate,) in options.items()})


def _included(
    names: list[str], include: list[str] | None, exclude: list[str] | None, skipped: dict[str, str]
) -> list[str]:
    known = [*names, *skipped]
    wanted = {n for pattern in include or ["*"] for n in (match_names(pattern, known, "include") if include else names)}
    dropped = {n: pattern for pattern in exclude or [] for n in match_names(pattern, known, "exclude")}
    for name in names:
        if name in dropped:
            skipped[name] = f"excluded by {dropped[name]!r}"
        elif name not in wanted:
            skipped[name] = "not among include"
    return [name for name in names if name not in skipped]


def _options(  # noqa: PLR0913
    name: str,
    site: LayerSite,
    methods: Sequence[Method],
    n_modes: int,
    given: Modes | None,
    execution: str,
    skipped: dict[str, str],
) -> list[Candidate]:
    """What each method makes of a layer; where none can do anything, the first one's reason joins ``skipped``."""
    formats = {method.name: method.format(site.layer_type) for method in methods}
    if given is not None and not any(fmt.uses_modes for fmt in formats.values()):
        raise PlanError(f"{name}: method {' or '.join(formats)} splits no channels into modes; leave method.modes out")
    out, inp = site.shape[:2]
    found, reasons = [], []
    for method, fmt in formats.items():
        split = (given if fmt.uses_modes else None) or Modes.split(inp, out, n_modes if fmt.uses_modes else 1)
        split.check(inp, out)
        if len(split.inputs) < fmt.min_modes:
            reasons.append(f"method {method} needs at least {fmt.min_modes} modes a side for a {site.layer_type} layer")
        elif reason := fmt.unsuitable(site.shape, split):
            reasons.append(reason)
        else:
            # a choice among methods is not to end at an execution that one of them lacks
            how = execution if len(formats) == 1 or execution in fmt.executions else "auto"
            found.append(Candidate(name, method, site, fmt, split, how))
    if not found:
        skipped[name] = reasons[0]
    return found


def _affordable(
    options: Mapping[str, Sequence[Candidate]],
    choices: Mapping[str, Choice],
    allow_larger: bool,
    skipped: dict[str, str],
) -> dict[str, LayerPlan]:
    layers = {}
    for name, candidates in options.items():
        choice = choices[name]
        if choice.ranks is None:
            skipped[name] = choice.reason
            continue
        candidate = next(one for one in candidates if one.method == (choice.method or one.method))
        layer = candidate.planned(choice.ranks, choice.notes)
        if allow_larger or layer.saves():
            layers[name] = layer
            continue
        skipped[name] = (
            f"at ranks {list(layer.ranks)} it would cost {layer.params_after:,} parameters (dense "
            f"{layer.params_before:,}) and {layer.macs_after:,} MACs (dense {layer.macs_before:,}): not worth it"
        )
    return layers
