"""Weights of a model on the meta device: refused where a rule needs them, or read from shards layer by layer."""

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path

from torch import Tensor, nn

from hodec.conversion.eligibility import LayerSite, weight_of
from hodec.conversion.streamed import filled_layer
from hodec.errors import CheckpointError, PlanError, Use
from hodec.formats.layer_types import LAYER_TYPES
from hodec.formats.roles import Role
from hodec.inputs import Inputs, ModelInput
from hodec.io.shards import Shards
from hodec.linalg.svd import check_finite
from hodec.ranks.rule import RankRule


def on_its_device(model: nn.Module, given: Inputs) -> Inputs:
    """The example input, moved to the meta device where the model is there: without numbers it runs on nothing else."""
    parameters = list(model.parameters())
    if not parameters or not all(p.is_meta for p in parameters):
        return given
    return ModelInput((given,)).map(lambda x: x.to("meta")).args[0]  # type: ignore[return-value]


def with_numbers(
    model: nn.Module, sites: Mapping[str, LayerSite], rule: RankRule, weights: str | Path | None
) -> dict[str, LayerSite]:
    """The layers, those on the meta device with where their numbers are.

    Raises:
        PlanError: the rule needs numbers and there are none, or ``weights`` are given for a net that has its own.
        CheckpointError: ``weights`` that are unreadable, or of another net.
    """
    blank = [name for name, site in sites.items() if site.weight.is_meta]
    if not blank:
        if weights is not None and sites:
            raise PlanError(
                f"weights={str(weights)!r}: given with a model that holds numbers of its own, which are planned by; "
                "build it on the meta device (with torch.device('meta'):), or leave weights out"
            )
        return dict(sites)
    if rule.runs_net:
        raise _refusal(rule, f"it {rule.runs_net}", len(blank), "")
    if weights is None:
        if rule.reads_weights:
            raise _refusal(rule, "it reads weights", len(blank), "weights='FOLDER' with their safetensors files, or ")
        return dict(sites)
    shards = Shards(weights)
    return {name: replace(site, read=_reader(model, name, site, shards)) for name, site in sites.items()}


def _refusal(rule: RankRule, why: str, count: int, way: str) -> PlanError:
    return PlanError(
        f"{count} layers of the model are on the meta device, which keeps no numbers, and rule {rule.name} needs them: "
        f"{why}. Give {way}a model that holds its weights, or choose ranks by {{manual}} or {{ratio}}, which read none",
        manual=Use("ranks", "manual"),
        ratio=Use("ranks", "ratio"),
    )


def paths_of(name: str, site: LayerSite) -> list[str]:
    """The paths under which a layer's weight may lie in a file; tied layers have it under any of theirs."""
    if site.role is not Role.LAYER:
        return [name, *site.aliases]
    tied = [one for tie in site.ties for one in (tie.name, *tie.aliases)]
    return [f"{each}.weight" for each in (name, *site.aliases, *tied)]


def _reader(model: nn.Module, name: str, site: LayerSite, shards: Shards) -> partial[Tensor]:
    """What reads a layer's weight, its place and shape checked now.

    Raises:
        CheckpointError: it is not there, or of another shape.
    """
    if site.computed_from:
        paths = [f"{name}.{key}" for key in model.get_submodule(name).state_dict()]
        places = {path: shards.first_of([path], f"layer {name}") for path in paths}
        return partial(_compute, model, name, site, shards, places)
    path, layer_type = shards.first_of(paths_of(name, site), f"layer {name}"), LAYER_TYPES[site.layer_type]
    if shards[path].shape != layer_type.stored_shape(site.shape):
        raise CheckpointError(
            f"{shards.path}: {path} is {shards[path].shape}, and the model's layer {name} "
            f"{layer_type.stored_shape(site.shape)}: it is of another model"
        )
    return partial(_read, shards, path, site)


def _compute(model: nn.Module, name: str, site: LayerSite, shards: Shards, places: Mapping[str, str]) -> Tensor:
    given = {path: shards.read(place) for path, place in places.items()}
    return LAYER_TYPES[site.layer_type].to_oihw(weight_of(filled_layer(model, name, given)))


def _read(shards: Shards, path: str, site: LayerSite) -> Tensor:
    weight = shards.read(path).to(site.weight.dtype)
    check_finite(weight, f"weight {path} of {shards.path}")
    return LAYER_TYPES[site.layer_type].to_oihw(weight)
