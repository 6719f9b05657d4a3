"""Which modules hold several weights that can be factorized, and the exchange of one for its factors."""

from typing import cast

import torch
from torch import Tensor, nn

from hodec.formats.roles import Role
from hodec.layers.attention import SEPARATE, FactorizedAttention
from hodec.layers.base import FactorizedLayer
from hodec.layers.recurrent import FactorizedRecurrent
from hodec.layers.weight import HOLDER, FactorizedProjection, FactorizedWeights, factorized_class

RECURRENT = (nn.LSTM, nn.GRU, nn.RNN)


def inner_weights(module: nn.Module) -> dict[str, Role]:
    """The paths of the weights that can be factorized inside a module, and what uses each; most have none.

    These are the weights of torch's recurrent modules and attention (no subclasses, which may use them differently),
    and the stacked weights (E, .., ..) of a module that says it has E experts.
    """
    own = module._parameters
    if type(module) in RECURRENT:
        names = cast(list[str], module._flat_weights_names)
        return {name: Role.RECURRENT for name in names if name.startswith("weight_")}
    if type(module) is nn.MultiheadAttention:
        given = [name for name in ("in_proj_weight", *SEPARATE) if getattr(module, name, None) is not None]
        return dict.fromkeys([*given, "out_proj.weight"], Role.PROJECTION)
    count = getattr(module, "num_experts", None)
    stacked = {name: p for name, p in own.items() if p is not None and p.ndim == 3 and p.shape[0] == count}
    return dict.fromkeys(stacked, Role.PARAMETER)


def layer_type_inside(weight: Tensor) -> str:
    """The name of the layer type that a weight inside a module counts as."""
    return "experts" if weight.ndim == 3 else "linear"


def put_inside(model: nn.Module, path: str, layer: nn.Module) -> None:
    """Put a factorized layer in the place of a weight, in ``model`` itself; or a dense one, whose ``weight`` it gets.

    The module keeps its identity and its hooks. Its class becomes a subclass of what it was, and that again once no
    weight inside is factorized.
    """
    owner_name, _, leaf = path.rpartition(".")
    owner = model.get_submodule(owner_name)
    if not isinstance(layer, FactorizedLayer):
        _put_back(owner, leaf, cast(nn.Parameter, layer._parameters["weight"]))
        for name in (owner_name, owner_name.rpartition(".")[0]):
            _tidy(model.get_submodule(name))
        return
    del owner._parameters[leaf]
    _factorizable(owner)
    cast(nn.ModuleDict, owner._modules[HOLDER])[leaf] = layer
    parent = model.get_submodule(owner_name.rpartition(".")[0])
    if owner is not parent and isinstance(parent, nn.MultiheadAttention):  # it is to call its ``out_proj``
        _factorizable(parent)


def _factorizable(module: nn.Module) -> None:
    if isinstance(module, FactorizedWeights):
        return
    bases: dict[type[nn.Module], type[FactorizedWeights]] = {
        nn.RNNBase: FactorizedRecurrent,
        nn.MultiheadAttention: FactorizedAttention,
        nn.Linear: FactorizedProjection,
    }
    first = next((one for base, one in bases.items() if isinstance(module, base)), FactorizedWeights)
    module.__dict__.pop("_flat_weights", None)
    module.__class__ = factorized_class(first, type(module))
    module.add_module(HOLDER, nn.ModuleDict())


@torch.no_grad()
def multiply_out(model: nn.Module, *, rebuilt_only: bool = False) -> nn.Module:
    """``model`` itself, with the weights inside its modules as dense parameters again, which take gradients as before.

    A module none of whose weights is factorized any more is of its dense class again.

    Args:
        rebuilt_only: leave alone those that run by their factors.
    """
    owners = [module for module in model.modules() if isinstance(module, FactorizedWeights)]
    for owner in owners:
        holder = cast(nn.ModuleDict, owner._modules[HOLDER])
        for leaf in [leaf for leaf in holder if not (rebuilt_only and owner.runs_factors(leaf))]:
            trained = all(p.requires_grad for p in holder[leaf].parameters())
            _put_back(owner, leaf, nn.Parameter(getattr(owner, leaf).detach().clone(), requires_grad=trained))
    for owner in reversed(owners):  # children first
        _tidy(owner)
    return model


def _put_back(owner: nn.Module, leaf: str, weight: nn.Parameter) -> None:
    del cast(nn.ModuleDict, owner._modules[HOLDER])[leaf]
    owner.register_parameter(leaf, weight)


def _tidy(module: nn.Module) -> None:
    """Give a module its dense class again where neither it nor a child has factorized weights left."""
    if not isinstance(module, FactorizedWeights) or len(cast(nn.ModuleDict, module._modules[HOLDER])):
        return
    if any(isinstance(child, FactorizedWeights) for child in module.children()):
        return
    del module._modules[HOLDER]
    module.__dict__.pop("_seen", None)
    module.__class__ = module.dense_class  # type: ignore[assignment]
    if isinstance(module, nn.RNNBase):
        module._init_flat_weights()
        module.flatten_parameters()
