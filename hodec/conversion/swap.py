"""The swap of dense layers for factorized ones: the only place that does it."""

import copy
import logging
from collections.abc import Mapping, Sequence
from typing import cast

import torch
from torch import Tensor, nn

from hodec.calibration.input_covariance import InputCovariance, check_covariances, whitened_projection
from hodec.conversion.dry_run import find_fault, put
from hodec.conversion.eligibility import groups_of, layer_type_name, names_by_module, refusal, weight_of
from hodec.conversion.inner import check_inner, mend_encoders, stand_in
from hodec.conversion.keeping import forget_plan, keep_plan
from hodec.conversion.ties import check_ties
from hodec.errors import ConvertError, HodecError, PlanError, near_matches
from hodec.formats.base import working_copy
from hodec.formats.layer_types import LAYER_TYPES, layer_type_of
from hodec.formats.roles import REBUILT, Role
from hodec.inference import uncompiled
from hodec.io.tensors import is_divided
from hodec.layers.base import FactorizedLayer, factor_parameters, same_random_state
from hodec.layers.inner import multiply_out
from hodec.layers.plain import HOOKS, Plain, copied, plain_layer, users
from hodec.layers.tied import ROWS, share_factors
from hodec.linalg.svd import check_finite, naming, norm, singular_values
from hodec.methods import get_method
from hodec.plan.layer import LayerPlan
from hodec.plan.plan import Plan, check_plan

log = logging.getLogger(__name__)


ON_ERROR = ("raise", "skip")

DIVIDED = (
    "the model is divided among processes (fully_shard, DTensor) and cannot be copied: give the net as it is built, "
    "before fully_shard, as skeleton: hodec.convert_divided(model, plan, skeleton), or admm.convert(skeleton=..); on "
    "the meta device it takes no memory"
)


def convert(
    model: nn.Module,
    plan: Plan,
    *,
    decompose: bool = True,
    covariances: Mapping[str, InputCovariance] | None = None,
    init_factors: Mapping[str, Sequence[Tensor]] | None = None,
    on_error: str = "raise",
) -> nn.Module:
    """A copy of ``model`` whose planned layers are factorized; the given model is left as it was.

    Hooks on a planned layer go over to its factorized one. Global random numbers are not moved.

    Args:
        model: the dense model the plan was made for (names and weight shapes must agree).
        plan: which layers, at which ranks.
        decompose: False builds the structure only, with factors of zero, to load saved ones into.
        covariances: of the layers' inputs, see ``collect_covariances``: these layers lose least of their outputs
            instead of least of their weights.
        init_factors: layer -> factors to start from, ``Admm.projection.factors``: formats that are found by iteration
            (CP) would otherwise not end where ADMM has led them.
        on_error: ``raise``, or ``skip``: a layer that cannot be swapped stays dense, with a warning, and the plan that
            the result keeps (``result.hodec_plan``) has it under ``skipped`` with the reason.

    Raises:
        PlanError: the plan is for another model, or the covariances for another plan.
        ConvertError: the converted model does not run, in training or evaluation mode; the message names the layer.
        TrainingError: a planned weight holds NaN or Inf.

    Examples:
        >>> net = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
        >>> plan = hodec.make_plan(net, 4, method="svd", example_input=torch.zeros(1, 64))
        >>> small = hodec.convert(net, plan)
        >>> type(small[0]).__name__, sum(p.numel() for p in small.parameters())
        ('SVDLinear', 882)
    """
    check_on_error(on_error)
    model = _without_wrappers(uncompiled(model), plan)
    if any(map(is_divided, model.parameters())):
        raise ConvertError(DIVIDED)
    dense = _dense_layers(model, plan)
    check_ties(model, plan)
    covariances = check_covariances(covariances or {}, plan)
    compressed = copied(model)
    originals = {name: _originals(compressed, name, layer) for name, layer in plan.items()}
    with same_random_state(model.parameters()):
        for name, layer_plan in plan.items():
            try:
                layer = factorized(
                    name, dense[name][0], layer_plan,
                    decompose=decompose, covariance=covariances.get(name), init_factors=(init_factors or {}).get(name),
                )  # fmt: skip
            except HodecError as error:
                plan = _without(plan, [name], error, on_error)
                continue
            put(compressed, name, layer_plan, _in_place(originals[name], layer, dense[name], layer_plan))
        mend_encoders(compressed, plan)
        while plan.inputs and (fault := find_fault(compressed, model, plan, originals)):
            for name in fault.layers:
                put(compressed, name, plan[name], originals[name])
            plan = _without(plan, fault.layers, fault.error, on_error)
    keep_plan(compressed, plan)
    return compressed


def _without_wrappers(model: nn.Module, plan: Plan) -> nn.Module:
    """The model; where parts of it were compiled after the plan was made, a copy in which these are as written."""
    compiled = [name for name, one in model.named_modules() if hasattr(one, "_orig_mod")]
    if not compiled or any("_orig_mod" in name for name in plan):
        return model
    plain = copied(model)
    for name in reversed(compiled):  # those inside others first
        plain.set_submodule(name, uncompiled(plain.get_submodule(name)))
    return plain


def check_on_error(on_error: str) -> None:
    """Refuse another word than those of ON_ERROR."""
    if on_error not in ON_ERROR:
        raise ConvertError(f"on_error={on_error!r} is not one of {', '.join(ON_ERROR)}")


def structure(model: nn.Module, plan: Plan) -> dict[str, nn.ModuleList]:
    """The factorized layers of a plan for this model, see ``put``, with factors of zero; the model is left as it was.

    Raises:
        PlanError: the plan is for another model.
    """
    layers = {}
    for name, dense in _dense_layers(model, plan).items():
        one = plan[name]
        layer = factorized(name, dense[0], one, decompose=False, covariance=None, init_factors=None)
        layers[name] = _in_place(_originals(model, name, one), layer, dense, one)
    return layers


def _originals(model: nn.Module, name: str, layer: LayerPlan) -> nn.ModuleList:
    """The modules in the place of a planned layer, see ``put``."""
    if layer.role is not Role.LAYER:
        return nn.ModuleList([stand_in(model, name)])
    return nn.ModuleList(model.get_submodule(each) for each in layer.names(name))


def _in_place(
    originals: nn.ModuleList, layer: FactorizedLayer, dense: Sequence[nn.Module], plan: LayerPlan
) -> nn.ModuleList:
    """The factorized layers in the place of these, of which ``layer`` is the first: tied ones have its factors.

    Each has the hooks of its original, and its bias itself, which a further module may use.
    """
    layers = [layer, *(_tied(layer, one, user) for one, user in zip(dense[1:], plan.users[1:], strict=True))]
    for original, made in zip(originals, layers, strict=True):
        hand_over_hooks(original, made)
        bias = original._parameters.get("bias")
        if made.bias is not None and bias is not None:
            made.bias = bias
    return nn.ModuleList(layers)


def _tied(layer: FactorizedLayer, dense: nn.Module, user: LayerPlan) -> FactorizedLayer:
    """The layer for a dense one with the same weight as that of ``layer``, with the same factors."""
    cls = type(layer) if user.layer_type == layer.layer_type.name else ROWS[type(layer)]
    made = cls.like(dense, user.ranks, modes=user.modes)
    made.execution = user.resolved_execution
    share_factors(made, layer)
    return made.train(dense.training)


def _without(plan: Plan, names: Sequence[str], error: HodecError, on_error: str) -> Plan:
    """The plan with these layers left dense, and a warning; or the error, where it is to be raised."""
    if on_error == "raise" or len(plan) == len(names):
        raise error
    for name in names:
        log.warning("%s stays dense: %s", name, error)
        plan = plan.without(name, f"it could not be converted: {error}")
    return plan


def factorized(
    name: str,
    dense: nn.Module,
    plan: LayerPlan,
    *,
    decompose: bool,
    covariance: InputCovariance | None,
    init_factors: Sequence[Tensor] | None,
) -> FactorizedLayer:
    cls = get_method(plan.method).layer(plan.layer_type, plan.groups)
    modes, own = plan.modes, dense._parameters
    execution = "" if plan.resolved_execution == REBUILT else plan.resolved_execution
    weight, bias = cast(nn.Parameter, own["weight"]), own.get("bias")
    if decompose:
        check_finite(weight_of(dense), f"layer {name}")
        with naming(f"layer {name}"):
            source = dense if covariance is None else _nearest(dense, plan, covariance)
            layer = cls.from_dense(source, plan.ranks, init_factors=init_factors, modes=modes, execution=execution)
        layer = layer.to(weight.dtype)
    else:
        layer = cls.like(dense, plan.ranks, modes=modes, execution=execution)
    layer.execution = plan.resolved_execution
    layer.train(dense.training).requires_grad_(weight.requires_grad)
    if layer.bias is not None and bias is not None:
        layer.bias.requires_grad_(bias.requires_grad)
    return layer


def hand_over_hooks(old: nn.Module, new: nn.Module) -> None:
    """Register on ``new`` what is registered on ``old`` for its calls, but for what computes its weight."""
    for hooks in HOOKS:
        getattr(new, hooks).update(users(getattr(old, hooks)))
    new._is_full_backward_hook = old._is_full_backward_hook


def merge(model: nn.Module) -> nn.Module:
    """A copy of a converted model with its factors multiplied out again: torch's layers with the settings they had.

    What was a layer of another package is one of torch again, or ``SameConv2d`` where it padded as TensorFlow does.

    Outputs are the same to rounding; hooks, training modes and what takes gradients are kept (a weight does where its
    factors do). The size is that of the dense model again.

    Examples:
        >>> net = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
        >>> plan = hodec.make_plan(net, 4, method="svd", example_input=torch.zeros(1, 64))
        >>> small = hodec.convert(net, plan)
        >>> dense, x = hodec.merge(small), torch.randn(8, 64)
        >>> dense[0], torch.allclose(dense(x), small(x), atol=1e-5)
        (Linear(in_features=64, out_features=64, bias=True), True)
    """
    dense = multiply_out(copied(uncompiled(model)))
    names = {module: each for module, each in names_by_module(dense).items() if isinstance(module, FactorizedLayer)}
    weights: dict[frozenset[nn.Parameter], nn.Parameter] = {}
    with same_random_state(dense.parameters()):
        for layer, each in names.items():
            made = layer.to_dense()
            own = frozenset(factor_parameters(layer))
            made.weight = weights.setdefault(own, cast(nn.Parameter, made.weight))  # tied layers share it again
            if layer.bias is not None:
                made.bias = layer.bias
            hand_over_hooks(layer, made)
            if each == [""]:
                return made
            for name in each:
                dense.set_submodule(name, made)
    forget_plan(dense)
    return dense


def _nearest(dense: nn.Module, plan: LayerPlan, covariance: InputCovariance) -> nn.Module:
    """A layer like ``dense`` with the nearest weight of the planned ranks; half precision would blur these ranks."""
    near = copy.copy(dense)
    weight = whitened_projection(plan, working_copy(weight_of(dense)), covariance)
    near._parameters = {**dense._parameters, "weight": nn.Parameter(weight)}
    return near


def _dense_layers(model: nn.Module, plan: Plan) -> dict[str, list[nn.Module]]:
    """Planned layer -> the plain one that it amounts to, and those tied to it.

    Raises:
        PlanError: no plan, or one for another model.
    """
    check_plan(plan)
    names, found = names_by_module(model), dict[str, list[nn.Module]]()
    for name, layer in plan.items():
        if layer.role is not Role.LAYER:
            check_inner(model, name, layer)
            found[name] = [stand_in(model, name)]
            continue
        tied = list(layer.names(name))
        found[name] = [_dense_layer(model, each, one, names) for each, one in zip(tied, layer.users, strict=True)]
    return found


def _dense_layer(model: nn.Module, name: str, layer: LayerPlan, names: Mapping[nn.Module, Sequence[str]]) -> nn.Module:
    """The plain layer that one of the plan amounts to, whether or not others share its weight."""
    module = next((module for module, each in names.items() if name in each), None)
    if module is None:
        raise PlanError(
            f"the plan names layer {name}, which this model lacks: it was made for another model."
            f"{near_matches(name, tuple(n for each in names.values() for n in each))}"
        )
    plain = plain_layer(module)
    reason = _difference(module, plain, layer)
    if reason:
        raise PlanError(f"{name}: the plan is for a {reason}; make the plan from this model")
    reason = refusal(model, name, module, plain, get_method(layer.method))
    if not reason and set(names[module]) != {name, *layer.aliases}:
        reason = f"it hangs in this model as {', '.join(names[module])}, but not so in the plan"
    if reason:
        raise PlanError(f"{name} cannot be factorized: {reason}; make the plan from this model")
    return module if plain is None else plain.layer


def _difference(module: nn.Module, plain: Plain | None, layer: LayerPlan) -> str:
    """What a plan is for, and what this model has instead; empty where they agree."""
    own, dense = type(module).__name__, module if plain is None else plain.layer
    layer_type, weight = layer_type_of(dense), getattr(dense, "weight", torch.empty(0))
    shape = tuple(layer_type.to_oihw(weight).shape if layer_type and weight.ndim > 1 else weight.shape)
    groups = groups_of(dense)
    if (layer_type_name(dense), shape, groups) != (layer.layer_type, layer.shape, layer.groups):
        return (
            f"{layer.layer_type} weight {layer.shape}{_in_groups(layer.groups)}, this model has {own} {shape}"
            f"{_in_groups(groups)}"
        )
    if plain is not None and plain.computed_from != layer.computed_from:
        return f"weight that {_origin(layer.computed_from)}, that of this model's {own} {_origin(plain.computed_from)}"
    return ""


def _in_groups(groups: int) -> str:
    return f" in {groups} groups" if groups > 1 else ""


def _origin(computed_from: int) -> str:
    return f"is computed from {computed_from:,} numbers" if computed_from else "is a parameter"


def conversion_errors(dense: nn.Module, plan: Plan, compressed: nn.Module | None = None) -> dict[str, float]:
    """Relative error norm(W - factorized W) / norm(W) of each planned layer.

    Args:
        dense: the dense model.
        plan: its plan.
        compressed: what it was converted to; without it, the plain projections are measured.

    Raises:
        PlanError: the plan is for another model.
        ConvertError: ``compressed`` lacks a factorized layer of the plan.

    Examples:
        >>> net = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
        >>> plan = hodec.make_plan(net, 4, method="svd", example_input=torch.zeros(1, 64))
        >>> {name: error < 1 for name, error in hodec.conversion_errors(net, plan).items()}
        {'0': True, '2': True}
    """
    errors, layers = {}, _dense_layers(uncompiled(dense), plan)
    for name, layer in plan.items():
        weight = weight_of(layers[name][0]).float()
        near = (
            layer.project(weight)
            if compressed is None
            else _dense_weight(uncompiled(compressed), layer.module(name)).to(weight)
        )
        whole = norm(weight)
        errors[name] = norm(weight - near) / whole if whole else 0.0
    return errors


def planned_spectra(dense: nn.Module, plan: Plan) -> dict[str, list[tuple[int, Tensor]]]:
    """Planned layer -> (position in its ranks, singular values, float64, largest first) for each that its ranks cut."""
    layers, spectra = _dense_layers(uncompiled(dense), plan), dict[str, list[tuple[int, Tensor]]]()
    for name, layer in plan.items():
        with naming(f"layer {name}"):
            weight = LAYER_TYPES[layer.layer_type].to_oihw(weight_of(layers[name][0]).float())
            spectra[name] = layer.format.spectra(weight, layer.modes)
    return spectra


def stable_ranks(dense: nn.Module, plan: Plan) -> dict[str, float]:
    """Planned layer -> |W|_F^2 / sigma_1^2 of its weight W as a matrix, output channels by all others.

    It is from 1 to the rank of W; 0 where W is 0.
    """
    layers, ranks = _dense_layers(uncompiled(dense), plan), dict[str, float]()
    for name, layer in plan.items():
        with naming(f"layer {name}"):
            weight = LAYER_TYPES[layer.layer_type].to_oihw(weight_of(layers[name][0]).float().cpu())
            squares = singular_values(weight.flatten(1)).square()
            ranks[name] = float(squares.sum() / squares[0]) if squares[0] else 0.0
    return ranks


def _dense_weight(model: nn.Module, name: str) -> Tensor:
    layer = dict(model.named_modules(remove_duplicate=False)).get(name)
    if not isinstance(layer, FactorizedLayer):
        own = "nothing" if layer is None else type(layer).__name__
        raise ConvertError(f"{name} is {own} in the compressed model, not a factorized layer: convert by the same plan")
    return layer.dense_weight().detach()
