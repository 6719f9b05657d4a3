"""Layers that have one weight: which of them can be factorized together, with the same factors."""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn

from hodec.errors import PlanError
from hodec.formats.calls import CallSites
from hodec.formats.layer_types import LayerType
from hodec.formats.roles import Role
from hodec.layers.plain import Plain
from hodec.methods import Method
from hodec.plan.layer import Tie
from hodec.plan.plan import Plan

SHARED = (
    "its {key} is shared with {other}{why}, and both stay dense: give it a copy of its own (layer.{key} = "
    "nn.Parameter(layer.{key}.detach().clone()); in transformers also tie_word_embeddings=False) and plan again, with "
    "the memory of both"
)
NOT_CALLED = "never called by the forward pass with this input: unused, or its weight is used functionally"

READ_DIRECTLY = (
    "never called by the forward pass: what holds it multiplies by its weight by itself, which factors would not make "
    "any cheaper; where that code is yours, let it call the layer"
)


@dataclass(frozen=True)
class Candidate:
    """A layer that a method can factorize, if its weight is its own or shared with others of the kind.

    Attributes:
        module: the layer itself.
        plain: what it amounts to.
        layer_type: of that.
        groups: of that.
        aliases: further names of the same module.
    """

    module: nn.Module
    plain: Plain
    layer_type: LayerType
    groups: int
    aliases: tuple[str, ...]


def others_with(model: nn.Module, module: nn.Module) -> dict[str, list[str]]:
    """A parameter of ``module``, by its name there -> the paths in ``model`` outside the module that have it too."""
    own = set(module.modules())  # a parametrization is a module inside
    mine = {parameter: key for key, parameter in module.named_parameters()}
    found: dict[str, list[str]] = {}
    for name, other in model.named_modules():
        for leaf, parameter in other._parameters.items():
            if other not in own and parameter in mine:
                found.setdefault(mine[parameter], []).append(f"{name}.{leaf}".removeprefix("."))
    return found


def sharing_refusal(model: nn.Module, module: nn.Module) -> str:
    """Why a layer stays dense because of what its weight is computed from; empty where nothing of that is shared.

    A shared bias goes on being shared by the factorized layer; a shared weight is another matter, see ``tied_sets``.
    """
    shared = {key: paths for key, paths in others_with(model, module).items() if key not in ("weight", "bias")}
    return next((_shared(key, path) for key, (path, *_) in shared.items()), "")


def tied_sets(
    model: nn.Module, candidates: Mapping[str, Candidate], call_sites: Mapping[str, CallSites], method: Method
) -> tuple[dict[str, tuple[Tie, ...]], dict[str, str]]:
    """The layers that share their weight.

    Returns:
        Of each set, the layer whose factors all of them get (a linear one, where there is one that is called), with the
        others; and of the layers that cannot be factorized together, or are never called, the reasons.
    """
    sets: dict[str, tuple[Tie, ...]] = {}
    refused: dict[str, str] = {}
    seen = set[str]()
    for name, one in candidates.items():
        if name in seen:
            continue
        paths = [f"{name}.weight", *others_with(model, one.module).get("weight", [])]
        names = [path.removesuffix(".weight") for path in paths]
        seen.update(names)
        called = [each for each in names if each in call_sites]
        if not called:
            refused |= dict.fromkeys(set(names) & candidates.keys(), NOT_CALLED)
            continue
        first = next((each for each in called if each in candidates and not _looks_up(candidates[each])), called[0])
        if len(names) > 1 and (wrong := _misfit(paths, first, candidates, call_sites, method)):
            path, why = wrong
            others = {each: next(p for p in (path, *paths) if p != f"{each}.weight") for each in names}
            refused |= {each: _shared("weight", others[each], why) for each in names if each in candidates}
            continue
        sets[first] = tuple(
            Tie(each, candidates[each].layer_type.name, call_sites.get(each, CallSites(())), candidates[each].aliases)
            for each in names
            if each != first
        )
    return sets, refused


def _misfit(
    paths: list[str],
    first: str,
    candidates: Mapping[str, Candidate],
    call_sites: Mapping[str, CallSites],
    method: Method,
) -> tuple[str, str] | None:
    """A path of a shared weight whose user cannot get the factors of layer ``first``, and why in words."""
    for path in paths:
        name, _, leaf = path.rpartition(".")
        one = candidates.get(name)
        if leaf != "weight" or one is None or first not in candidates:
            return path, ""
        if one.plain.computed_from:
            return path, f", of which {name} computes its own"
        if name not in call_sites and not _looks_up(one):
            return path, f" ({name} is never called with this input)"
        whole = candidates[first]
        layer = method.tied_layer(whole.layer_type.name, one.layer_type.name, whole.groups)
        if layer is None or one.groups != whole.groups:
            return path, f" (method {method.name} has no layers with the same factors for both)"
    return None


def _looks_up(one: Candidate) -> bool:
    return one.layer_type.is_embedding


def _shared(key: str, path: str, why: str = "") -> str:
    return SHARED.format(key=key, other=path.rpartition(".")[0] or "the model itself", why=why)


def check_ties(model: nn.Module, plan: Plan) -> None:
    """Refuse a plan whose layers share their weights in this model with others than in the plan.

    Raises:
        PlanError: naming the layer.
    """
    for name, layer in plan.items():
        if layer.role is not Role.LAYER:
            continue
        here = sorted(others_with(model, model.get_submodule(name)).get("weight", []))
        there = sorted(f"{tie.name}.weight" for tie in layer.ties)
        if here != there:
            raise PlanError(
                f"{name} cannot be factorized: its weight is shared with {', '.join(here) or 'nothing'} in this model, "
                f"and with {', '.join(there) or 'nothing'} in the plan; make the plan from this model"
            )
