"""A conversion whose weights come one layer at a time: from shards, or from a model that is divided among processes."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

from hodec.calibration.input_covariance import InputCovariance, check_covariances
from hodec.conversion.inner import stand_in
from hodec.conversion.swap import convert, factorized
from hodec.errors import ConvertError
from hodec.formats.roles import Role
from hodec.inference import uncompiled
from hodec.layers.base import same_random_state
from hodec.layers.plain import copied, plain_layer
from hodec.plan.plan import Plan, check_plan


@dataclass(frozen=True)
class Unit:
    """What is made at a time: the factors of one planned layer, or one tensor that stays as it is.

    Attributes:
        keys: paths in the converted model's ``state_dict``, each tensor once.
        sources: paths in the dense model's that they are made from.
        layer: of the plan; empty for a tensor that stays.
    """

    keys: tuple[str, ...]
    sources: tuple[str, ...]
    layer: str = ""


class Streamed:
    """The conversion of a model by a plan, unit by unit; equal, bit for bit, to ``convert`` of the whole model.

    Args:
        skeleton: the dense model, best on the meta device; its numbers are not looked at.
        plan, covariances, init_factors: as for ``convert``.

    Raises:
        PlanError, ConvertError: as ``convert``.

    Attributes:
        small: the converted model on the meta device.
    """

    def __init__(
        self,
        skeleton: nn.Module,
        plan: Plan,
        *,
        covariances: Mapping[str, InputCovariance] | None = None,
        init_factors: Mapping[str, Sequence[Tensor]] | None = None,
    ) -> None:
        check_plan(plan)
        self.plan, self.init_factors = plan, init_factors or {}
        self.covariances = check_covariances(covariances or {}, plan)
        self.blank = copied(uncompiled(skeleton)).to("meta")
        self.small = convert(self.blank, plan, decompose=False)

    @cached_property
    def aliases(self) -> dict[str, list[str]]:
        """Path in the dense model -> all paths of that tensor, itself among them."""
        return shared_paths(self.blank)

    @cached_property
    def units(self) -> list[Unit]:
        """What is made, in the order of the converted model; together they are all its tensors, each once."""
        units, done = dict[tuple[str, ...], Unit](), set[str]()
        own, aliases = self.small.state_dict(), shared_paths(self.small)
        layers = {self._prefix(name): name for name in self.plan}
        for key in own:
            if key in done:
                continue
            name = next((layers[p] for path in aliases[key] if (p := _holder(path, layers))), "")
            keys = tuple(path for path in self._keys(name) if path not in done) if name else (key,)
            units[keys] = Unit(keys, self._sources(name) if name else (key,), name)
            done.update(path for each in keys for path in aliases[each])
        return list(units.values())

    def _prefix(self, name: str) -> str:
        return f"{self.plan[name].module(name)}."

    def _keys(self, name: str) -> list[str]:
        prefix = self._prefix(name)
        return [f"{prefix}{key}" for key in self.small.get_submodule(prefix[:-1]).state_dict()]

    def _sources(self, name: str) -> tuple[str, ...]:
        if self.plan[name].role is not Role.LAYER:
            return (name,)
        return tuple(f"{name}.{key}" for key in self.blank.get_submodule(name).state_dict())

    def nbytes(self, unit: Unit) -> int:
        """Bytes of what a unit is made into."""
        own = self.small.state_dict()
        return sum(own[key].nbytes for key in unit.keys)

    @torch.no_grad()
    def make(self, unit: Unit, given: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The tensors of a unit, in the types of the skeleton.

        Args:
            given: its ``sources`` -> their numbers.

        Raises:
            TrainingError: a weight holds NaN or Inf.
        """
        dense = self.blank.state_dict()
        given = {path: tensor.to(dense[path].dtype) for path, tensor in given.items()}
        if not unit.layer:
            return {unit.keys[0]: given[unit.sources[0]]}
        name, plan = unit.layer, self.plan[unit.layer]
        with same_random_state(given.values()):
            layer = factorized(
                name, self._dense(name, given), plan, decompose=True,
                covariance=self.covariances.get(name), init_factors=self.init_factors.get(name),
            )  # fmt: skip
        made = {self._prefix(name) + key: tensor for key, tensor in layer.state_dict().items()}
        return {key: given.get(key, made[key]) for key in unit.keys}  # a bias stays as it is

    def _dense(self, name: str, given: Mapping[str, Tensor]) -> nn.Module:
        """The plain layer of the plan's entry ``name``, with its numbers."""
        if self.plan[name].role is Role.LAYER:
            return filled_layer(self.blank, name, given)
        layer = stand_in(self.blank, name)
        layer._parameters["weight"] = nn.Parameter(given[name], requires_grad=False)
        return layer


def filled_layer(blank: nn.Module, name: str, given: Mapping[str, Tensor]) -> nn.Module:
    """The plain layer that one of a model on the meta device amounts to, with numbers.

    Args:
        given: path in the model's ``state_dict`` -> numbers, of all tensors of the layer.

    Raises:
        ConvertError: it amounts to none.
    """
    module = copied(blank.get_submodule(name))
    put_tensors(module, {path.removeprefix(f"{name}."): tensor for path, tensor in given.items()})
    plain = plain_layer(module)
    if plain is None:
        raise ConvertError(f"{name}: with its weights it is no plain layer any more; leave it out of the plan")
    return plain.layer


def _holder(path: str, prefixes: Collection[str]) -> str:
    """Which of the prefixes a path has; empty where it has none."""
    while path := path.rpartition(".")[0]:
        if f"{path}." in prefixes:
            return f"{path}."
    return ""


def shared_paths(model: nn.Module) -> dict[str, list[str]]:
    """Path in ``state_dict`` -> all paths of the same parameter or buffer there, itself among them."""
    groups: dict[int, list[str]] = {}
    tensors = model.state_dict(keep_vars=True)
    for path, tensor in tensors.items():
        groups.setdefault(id(tensor), []).append(path)
    return {path: groups[id(tensor)] for path, tensor in tensors.items()}


def put_tensors(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Write tensors into a model, by their paths; in the place of one on the meta device the tensor itself is put.

    All that hold such a parameter get the new one.
    """
    own, fresh = model.state_dict(keep_vars=True), dict[int, Tensor]()
    for path, tensor in tensors.items():
        old = own[path]
        if not old.is_meta:
            with torch.no_grad():
                old.copy_(tensor)
            continue
        new = tensor.to(old.dtype)
        fresh[id(old)] = nn.Parameter(new, requires_grad=old.requires_grad) if isinstance(old, nn.Parameter) else new
    for module in model.modules():
        for leaf, old in (*module._parameters.items(), *module._buffers.items()):
            if id(old) in fresh:
                setattr(module, leaf, fresh[id(old)])  # a recurrent module takes note of it
