"""Weights inside modules that hold several: which of them can be planned, and the swap of one for its factors."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import cast

from torch import Tensor, nn

from hodec.cost.inner import trace_inner_weights
from hodec.errors import PlanError, near_matches
from hodec.formats.calls import CallSites
from hodec.formats.layer_types import LAYER_TYPES, DenseExperts
from hodec.formats.roles import REBUILT, Role
from hodec.inputs import Inputs
from hodec.layers.inner import inner_weights, layer_type_inside
from hodec.methods import Method, get_method
from hodec.plan.layer import LayerPlan
from hodec.plan.plan import Plan

NOT_RUN = "the module that holds it is never called by the forward pass with this input"


@dataclass(frozen=True)
class InnerWeight:
    """A weight inside a module.

    Attributes:
        weight: as it is stored, (O, I), or (E, O, I) for the experts of one layer.
        role: what uses it.
        call_sites: its calls for one image; None where the module is not called.
        aliases: its paths through further names of the module.
        reason: why it cannot be factorized, or empty.
    """

    weight: Tensor
    role: Role
    call_sites: CallSites | None
    aliases: tuple[str, ...]
    reason: str

    @property
    def layer_type(self) -> str:
        return layer_type_inside(self.weight)


def inner_weights_of(
    model: nn.Module, names: Mapping[nn.Module, Sequence[str]], method: Method, example_input: Inputs
) -> dict[str, InnerWeight]:
    """Path -> weight, of all weights inside recurrent modules, attention and experts.

    Args:
        names: module -> its names in the model.
    """
    uses, found = trace_inner_weights(model, example_input), dict[str, InnerWeight]()
    for module, (name, *others) in names.items():
        for leaf, role in inner_weights(module).items():
            path, *aliases = (f"{one}.{leaf}" if one else leaf for one in (name, *others))
            weight = parameter_at(model, path)
            if weight is None:  # a parametrization or weight_norm computes it
                continue
            role, call_sites = uses.get(path, (role, None))
            reason = inner_refusal(model, path, method) or ("" if call_sites else NOT_RUN)
            found[path] = InnerWeight(weight.detach(), role, call_sites, tuple(aliases), reason)
    return found


def parameter_at(model: nn.Module, path: str) -> nn.Parameter | None:
    """The parameter of that path; None where there is none."""
    owner, _, leaf = path.rpartition(".")
    try:
        return model.get_submodule(owner)._parameters.get(leaf)
    except AttributeError:
        return None


def inner_refusal(model: nn.Module, path: str, method: Method) -> str:
    """Why a weight inside a module cannot be factorized by this method, or an empty string."""
    weight = cast(nn.Parameter, parameter_at(model, path))
    if not method.serves(layer_type_inside(weight)):
        return f"method {method.name} has no layer for {'stacked experts' if weight.ndim == 3 else 'Linear'}"
    if weight.ndim == 3 and not weight.is_floating_point():
        return f"its experts are stored as {weight.dtype}"
    holders = [
        f"{name}.{key}" if name else key
        for name, module in model.named_modules()
        for key, one in module._parameters.items()
        if one is weight
    ]
    return f"it is shared with {next(one for one in holders if one != path)}" if len(holders) > 1 else ""


def stand_in(model: nn.Module, path: str) -> nn.Module:
    """A dense layer without a bias that holds a weight inside a module, to be factorized like any other."""
    weight = cast(nn.Parameter, parameter_at(model, path))
    if weight.ndim == 3:
        layer: nn.Module = DenseExperts(*weight.shape, device="meta")
    else:
        layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    layer._parameters["weight"] = weight
    return layer.train(model.get_submodule(path.rpartition(".")[0]).training)


def check_inner(model: nn.Module, name: str, layer: LayerPlan) -> None:
    """Refuse a planned weight that this model has otherwise.

    Raises:
        PlanError: naming it.
    """
    weight = parameter_at(model, name)
    owner, _, leaf = name.rpartition(".")
    holders = [owner, owner.rpartition(".")[0]]
    known = {f"{one}.{path}" if one else path for one in holders for path in inner_weights(_module(model, one))}
    if weight is None or name not in known:
        paths = tuple(path for path, _ in model.named_parameters())
        raise PlanError(
            f"the plan names the weight {name}, which this model lacks: it was made for another model."
            f"{near_matches(name, paths)}"
        )
    shape = tuple(LAYER_TYPES[layer_type_inside(weight)].to_oihw(weight).shape)
    if shape != layer.shape:
        raise PlanError(
            f"{name}: the plan is for a {layer.layer_type} weight {layer.shape}, this model has {shape}; make the plan "
            "from this model"
        )
    if reason := inner_refusal(model, name, get_method(layer.method)):
        raise PlanError(f"{name} cannot be factorized: {reason}; make the plan from this model")


def _module(model: nn.Module, name: str) -> nn.Module:
    try:
        return model.get_submodule(name)
    except AttributeError:
        return nn.Identity()


def mend_encoders(model: nn.Module, plan: Plan) -> None:
    """Let torch's encoder layers call their planned children, in ``model`` itself.

    In evaluation mode they would give the dense weights to a fused kernel instead, and an encoder would hand them
    nested tensors, which only that kernel takes.
    """
    called = [name for name, layer in plan.items() if layer.resolved_execution != REBUILT]
    for name, module in model.named_modules():
        inside = [one for one in called if one.startswith(f"{name}." if name else "")]
        if inside and isinstance(module, nn.TransformerEncoderLayer):
            module.activation_relu_or_gelu = 0
        if inside and isinstance(module, nn.TransformerEncoder):
            module.use_nested_tensor = False
