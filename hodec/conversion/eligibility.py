"""Which layers can be factorized, and why the others cannot."""

import fnmatch
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar, cast

from torch import Tensor, nn

from hodec.conversion.inner import inner_weights_of
from hodec.conversion.ties import Candidate, sharing_refusal, tied_sets
from hodec.cost.count import trace_call_sites
from hodec.errors import PlanError, Use, literal, near_matches
from hodec.formats.calls import CallSites
from hodec.formats.layer_types import DENSE_CLASSES, LAYER_TYPES, layer_type_of
from hodec.formats.roles import Role
from hodec.inputs import Inputs
from hodec.layers.base import FactorizedLayer
from hodec.layers.plain import Plain, plain_layer
from hodec.linalg.svd import check_finite
from hodec.methods import Method
from hodec.plan.layer import Tie

# Modules that read their children's weights directly instead of calling them.
READS_WEIGHTS = (nn.MultiheadAttention, nn.TransformerEncoderLayer)

Found = TypeVar("Found")

COMPUTED = (
    "its weight is computed from other parameters ({how}): conversion takes what that gives in evaluation mode and "
    "removes them, and ADMM has nothing to pull"
)


@dataclass(frozen=True)
class LayerSite:
    """A layer that can be factorized, where it stands and how much it runs.

    Attributes:
        layer_type: name in LAYER_TYPES: ``conv2d``, ``linear``, ..
        weight: dense weight with output channels first, (O, I, K_1, ..) or (O, I); on the meta device it tells shape
            and type only.
        call_sites: its calls for one image.
        aliases: further names of the same module.
        role: what uses the weight.
        groups, computed_from, ties: see ``LayerPlan``.
        notes: what conversion does to the layer beside factorizing it.
        read: gives the numbers of a weight that is on the meta device, output channels first; None: there are none.
    """

    layer_type: str
    weight: Tensor
    call_sites: CallSites
    aliases: tuple[str, ...] = ()
    role: Role = Role.LAYER
    groups: int = 1
    computed_from: int = 0
    notes: tuple[str, ...] = ()
    ties: tuple[Tie, ...] = ()
    read: Callable[[], Tensor] | None = None

    def values(self) -> Tensor:
        """The weight with its numbers; one that lies in a file is read anew at each call, and nothing keeps it.

        Raises:
            PlanError: it is on the meta device, and no file is known.
            TrainingError: one from a file holds NaN or Inf.
        """
        if not self.weight.is_meta:
            return self.weight
        if self.read is None:
            raise PlanError("the weight is on the meta device, which keeps no numbers")
        return self.read()

    def changed(self, change: Callable[[Tensor], Tensor]) -> "LayerSite":
        """The same layer with another weight of this shape; one that lies in a file is changed as it is read."""
        if self.weight.is_meta:
            return replace(self, read=lambda: change(self.values()))
        return replace(self, weight=change(self.weight))

    def served_by(self, method: Method) -> bool:
        """Whether a method has a layer for it, and one with the same factors for each that is tied to it."""
        tied = all(method.tied_layer(self.layer_type, tie.layer_type, self.groups) for tie in self.ties)
        return method.serves(self.layer_type, self.groups) and tied

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.weight.shape)


def eligible_layers(
    model: nn.Module, method: Method, example_input: Inputs
) -> tuple[dict[str, LayerSite], dict[str, str]]:
    """The layers that ``method`` can factorize, and each other weight layer with the reason why not.

    Args:
        model: any net; it is run once in evaluation mode and left as it was.
        example_input: as the model takes, batch first; see ``hodec.inputs.as_input``.

    Raises:
        PlanError: a layer is lazy and has no weight yet.
        TrainingError: an eligible weight holds NaN or Inf; one on the meta device has no numbers to look at.
    """
    names = names_by_module(model)
    check_no_lazy(names)
    call_sites = trace_call_sites(model, example_input)
    inner = inner_weights_of(model, names, method, example_input)
    sites, refused = {}, {path: one.reason for path, one in inner.items() if one.reason}
    candidates: dict[str, Candidate] = {}
    for module, (name, *aliases) in names.items():
        if not _has_weight(module) or any(f"{path}.weight" in inner for path in (name, *aliases)):
            continue
        plain = plain_layer(module)
        reason = refusal(model, name, module, plain, method)
        if plain is None or reason:
            refused[name] = reason
            continue
        layer_type = LAYER_TYPES[layer_type_name(plain.layer)]
        candidates[name] = Candidate(module, plain, layer_type, groups_of(plain.layer), tuple(aliases))
    sets, shared = tied_sets(model, candidates, call_sites, method)
    refused |= shared
    for name, ties in sets.items():
        sites[name] = _site(name, candidates[name], call_sites[name], ties)
    for path, one in inner.items():
        if not one.reason and one.call_sites is not None:
            _check_numbers(one.weight, f"weight {path}")
            weight = LAYER_TYPES[one.layer_type].to_oihw(one.weight)
            sites[path] = LayerSite(one.layer_type, weight, one.call_sites, one.aliases, one.role)
    return in_order(model, sites), in_order(model, refused)


def _site(name: str, one: Candidate, call_sites: CallSites, ties: tuple[Tie, ...]) -> LayerSite:
    weight = weight_of(one.plain.layer)
    _check_numbers(weight, f"layer {name}")
    notes = (COMPUTED.format(how=one.plain.how),) if one.plain.computed_from else ()
    if ties:
        notes = (*notes, f"its factors are those of {', '.join(tie.name for tie in ties)} too, with the same weight")
    return LayerSite(
        one.layer_type.name, one.layer_type.to_oihw(weight), call_sites, one.aliases,
        groups=one.groups, computed_from=one.plain.computed_from, notes=notes, ties=ties,
    )  # fmt: skip


def _check_numbers(weight: Tensor, what: str) -> None:
    """``check_finite`` of a weight that has numbers."""
    if not weight.is_meta:
        check_finite(weight, what)


def in_order(model: nn.Module, found: dict[str, Found]) -> dict[str, Found]:
    """The entries in the order of the model's modules, the weights of one after it."""
    order: dict[str, None] = {}
    for name, module in model.named_modules():
        order |= dict.fromkeys([name, *(f"{name}.{key}" if name else key for key in module._parameters)])
    return {name: found[name] for name in order if name in found}


def weight_of(module: nn.Module) -> Tensor:
    """A layer's dense weight, without its history."""
    return cast(Tensor, module.weight).detach()


def names_by_module(model: nn.Module) -> dict[nn.Module, list[str]]:
    names: dict[nn.Module, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        names.setdefault(module, []).append(name)
    return names


def _has_weight(module: nn.Module) -> bool:
    """Layers that a reader of the plan would ask about: everything that multiplies by a matrix or kernel."""
    if type(module) is nn.MultiheadAttention:  # its weights are planned one by one
        return False
    linear = nn.Linear | nn.modules.conv._ConvNd | nn.Embedding | nn.EmbeddingBag | nn.Bilinear | nn.MultiheadAttention
    return isinstance(module, linear | FactorizedLayer) or layer_type_of(module) is not None


def refusal(model: nn.Module, name: str, module: nn.Module, plain: Plain | None, method: Method) -> str:
    """Why a layer cannot be factorized by this method, or an empty string.

    Args:
        plain: what it amounts to.
    """
    if not name:
        return "it is the whole model, which leaves nothing to swap it in: wrap it in nn.Sequential"
    if isinstance(module, FactorizedLayer):
        return f"it is factorized already: {type(module).__name__} of ranks {list(module.ranks)}"
    if isinstance(module, nn.MultiheadAttention):
        return "a subclass of nn.MultiheadAttention may use its weights in its own way"
    parent = model.get_submodule(name.rpartition(".")[0])
    if isinstance(parent, nn.MultiheadAttention):
        return f"{type(parent).__name__} reads the weights of its children directly"
    if plain is None:
        return _not_plain(module, method)
    if layer_type_name(plain.layer) not in method.layers:
        return f"method {method.name} has no layer for {type(module).__name__}"
    weight = weight_of(plain.layer)
    if not (weight.is_floating_point() and weight.numel()):
        return f"its weight of size {tuple(weight.shape)} and type {weight.dtype} holds no real numbers to factorize"
    groups = groups_of(plain.layer)
    if not method.serves(layer_type_name(plain.layer), groups):
        return f"method {method.name} has no layer for a grouped {type(plain.layer).__name__} (groups={groups})"
    if isinstance(module, nn.Embedding) and (module.max_norm is not None or module.sparse or module.scale_grad_by_freq):
        return "an embedding with max_norm, sparse or scale_grad_by_freq treats its rows one by one"
    return sharing_refusal(model, module)


def groups_of(module: nn.Module) -> int:
    return cast(int, getattr(module, "groups", 1))


def layer_type_name(module: nn.Module) -> str:
    layer_type = layer_type_of(module)
    return layer_type.name if layer_type else ""


def _not_plain(module: nn.Module, method: Method) -> str:
    """Why a layer that amounts to no plain one stays dense."""
    own, base = type(module).__name__, next((cls for cls in DENSE_CLASSES.values() if isinstance(module, cls)), None)
    if base is None:
        return f"method {method.name} has no layer for {own}"
    return (
        f"{own} changes what {base.__name__} computes, by more than TensorFlow's padding or one weight made from its "
        f"parameters: put a {base.__name__} with its weight in its place (where it is parametrized, remove the "
        "parametrization), and what it does beside that into a module of its own before it"
    )


def check_no_lazy(names: Mapping[nn.Module, Sequence[str]]) -> None:
    """A run would initialize lazy layers, and the given model is to stay as it is."""
    for module, (name, *_) in names.items():
        if isinstance(module, nn.modules.lazy.LazyModuleMixin) and module.has_uninitialized_params():
            raise PlanError(f"layer {name} is lazy and has no weight yet: run the model once before planning")


Pattern = str | re.Pattern[str] | type[nn.Module]
Layers = Pattern | Sequence[Pattern]
"""Which layers: a glob, a regular expression for the whole name, a class of modules, or several of them."""


def patterns(given: Layers | None) -> list[Pattern]:
    """The single patterns; ``match_layers`` refuses what is none."""
    if given is None:
        return []
    single = isinstance(given, str | re.Pattern | type) or not isinstance(given, Iterable)
    return [cast(Pattern, given)] if single else list(cast(Iterable[Pattern], given))


def pattern_words(pattern: Pattern) -> str:
    """How a pattern is written."""
    return pattern.__name__ if isinstance(pattern, type) else repr(pattern)


def match_layers(pattern: Pattern, names: Sequence[str], setting: str, model: nn.Module | None) -> list[str]:
    """The names that a pattern matches, those of its class in ``model`` where it is one.

    Raises:
        PlanError: none does, it is no pattern, or a class is given for a model file.
    """
    if isinstance(pattern, str):
        return match_names(pattern, names, setting)
    if isinstance(pattern, re.Pattern):
        matches = [name for name in names if pattern.fullmatch(name)]
    elif isinstance(pattern, type) and model is not None:
        modules = dict(model.named_modules(remove_duplicate=False))
        matches = [name for name in names if isinstance(_module_of(name, modules), pattern)]
    else:
        classes = "" if model is None else ", a class of modules"
        text = literal(f"{pattern!r} given; allowed: a layer glob, a regular expression{classes}, or a list of these")
        raise PlanError(f"{{setting}}: {text}", setting=Use(setting))
    if not matches:
        text = literal(f"{pattern_words(pattern)} matches no layer. Layers are: {', '.join(names[:6])}, ..")
        raise PlanError(f"{{setting}} {text}", setting=Use(setting))
    return matches


def _module_of(name: str, modules: Mapping[str, nn.Module]) -> nn.Module:
    """The module of that name, or the one whose parameter it is."""
    return modules[name] if name in modules else modules[name.rpartition(".")[0]]


def match_names(pattern: str, names: Sequence[str], setting: str) -> list[str]:
    """The names that a glob matches.

    Args:
        setting: where the glob was given, ``include`` or ``ranks.ignore``, for the message.

    Raises:
        PlanError: none does; the message has near matches.
    """
    matches = [name for name in names if fnmatch.fnmatchcase(name, pattern)]
    if not matches:
        stem = pattern.replace("*", "").rstrip(".")
        hint = near_matches(stem, tuple(names)) or f" Layers are: {', '.join(names[:6])}, .."
        text = literal(f"{pattern!r} matches no layer.{hint}")
        raise PlanError(f"{{setting}} {text}", setting=Use(setting))
    return matches
