"""The swap of dense layers for factorized ones: the only place that does it."""

import copy
import logging
from collections.abc import Mapping, Sequence
from typing import cast

import torch
from torch import Tensor, nn

from hodec.calibration.input_covariance import InputCovariance, check_covariances, whitened_projection
from hodec.conversion.eligibility import layer_type_name, names_by_module, refusal, weight_of
from hodec.conversion.inner import check_inner, mend_encoders, stand_in
from hodec.errors import ConvertError, PlanError, Use, literal, near_matches
from hodec.formats.base import working_copy
from hodec.formats.layer_types import layer_type_of
from hodec.formats.roles import REBUILT, Role
from hodec.inference import uncompiled
from hodec.inputs import ModelInput
from hodec.layers.base import FactorizedLayer, same_random_state
from hodec.layers.inner import put_inside
from hodec.layers.weight import weight_path
from hodec.linalg.svd import check_finite, naming, norm
from hodec.methods import get_method
from hodec.plan.layer import LayerPlan
from hodec.plan.plan import Plan

log = logging.getLogger(__name__)


# Where a module keeps what was registered on it for its calls.
HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
)

# Where a converted model keeps its plan.
PLAN_ATTRIBUTE = "hodec_plan"


def convert(
    model: nn.Module,
    plan: Plan,
    *,
    decompose: bool = True,
    covariances: Mapping[str, InputCovariance] | None = None,
    init_factors: Mapping[str, Sequence[Tensor]] | None = None,
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

    Raises:
        PlanError: the plan is for another model, or the covariances for another plan.
        ConvertError: the converted model does not run, in training or evaluation mode.
        TrainingError: a planned weight holds NaN or Inf.
    """
    model = uncompiled(model)
    _check_belongs(model, plan)
    covariances = check_covariances(covariances or {}, plan)
    compressed = copy.deepcopy(model)
    with same_random_state(model.parameters()):
        for name, layer_plan in plan.items():
            inside = layer_plan.role is not Role.LAYER
            dense = stand_in(compressed, name) if inside else compressed.get_submodule(name)
            initial = (init_factors or {}).get(name)
            covariance = covariances.get(name)
            if decompose:
                check_finite(weight_of(dense), f"layer {name}")
            with naming(f"layer {name}"):
                layer = _factorized(dense, layer_plan, decompose=decompose, covariance=covariance, init_factors=initial)
            if inside:
                put_inside(compressed, name, layer)
                continue
            for each in (name, *layer_plan.aliases):
                compressed.set_submodule(each, layer)
        mend_encoders(compressed, plan)
        if plan.inputs:
            _dry_run(compressed, model, plan)
    setattr(compressed, PLAN_ATTRIBUTE, plan)  # so that it can be saved without naming it again
    return compressed


def _factorized(
    dense: nn.Module,
    plan: LayerPlan,
    *,
    decompose: bool,
    covariance: InputCovariance | None,
    init_factors: Sequence[Tensor] | None,
) -> FactorizedLayer:
    cls = get_method(plan.method).layer(plan.layer_type)
    modes, own = plan.modes, dense._parameters
    execution = "" if plan.resolved_execution == REBUILT else plan.resolved_execution
    weight, bias = cast(nn.Parameter, own["weight"]), own.get("bias")
    if decompose:
        source = dense if covariance is None else _nearest(dense, plan, covariance)
        layer = cls.from_dense(source, plan.ranks, init_factors=init_factors, modes=modes, execution=execution)
        layer = layer.to(weight.dtype)
    else:
        layer = cls.like(dense, plan.ranks, modes=modes, execution=execution)
    layer.execution = plan.resolved_execution
    layer.train(dense.training).requires_grad_(weight.requires_grad)
    if layer.bias is not None and bias is not None:
        layer.bias.requires_grad_(bias.requires_grad)
    for hooks in HOOKS:
        getattr(layer, hooks).update(getattr(dense, hooks))
    layer._is_full_backward_hook = dense._is_full_backward_hook
    return layer


def _nearest(dense: nn.Module, plan: LayerPlan, covariance: InputCovariance) -> nn.Module:
    """A layer like ``dense`` with the nearest weight of the planned ranks; half precision would blur these ranks."""
    near = copy.copy(dense)
    weight = whitened_projection(plan, working_copy(weight_of(dense)), covariance)
    near._parameters = {**dense._parameters, "weight": nn.Parameter(weight)}
    return near


def _check_belongs(model: nn.Module, plan: Plan) -> None:
    modules = dict(model.named_modules(remove_duplicate=False))
    names = names_by_module(model)
    for name, layer in plan.items():
        if layer.role is not Role.LAYER:
            check_inner(model, name, layer)
            continue
        module = modules.get(name)
        if module is None:
            raise PlanError(
                f"the plan names layer {name}, which this model lacks: it was made for another model."
                f"{near_matches(name, tuple(modules))}"
            )
        layer_type, weight = layer_type_of(module), getattr(module, "weight", torch.empty(0))
        shape = tuple(layer_type.to_oihw(weight).shape if layer_type and weight.ndim > 1 else weight.shape)
        if layer_type_name(module) != layer.layer_type or shape != layer.shape:
            raise PlanError(
                f"{name}: the plan is for a {layer.layer_type} weight {layer.shape}, this model has "
                f"{type(module).__name__} {shape}; make the plan from this model"
            )
        reason = refusal(model, name, module, get_method(layer.method))
        if not reason and set(names[module]) != {name, *layer.aliases}:
            reason = f"it hangs in this model as {', '.join(names[module])}, but not so in the plan"
        if reason:
            raise PlanError(f"{name} cannot be factorized: {reason}; make the plan from this model")


def _dry_run(compressed: nn.Module, dense: nn.Module, plan: Plan) -> None:
    """Run throw-away copies in both modes: some parents (fast paths) break only in evaluation mode."""
    first = next(iter(compressed.parameters()))
    inputs = plan.example_input().to(first.device, first.dtype)
    called: set[str] = set()
    for training in (True, False):
        mode, error = "training" if training else "evaluation", _failure(compressed, inputs, training, called)
        if error is None:
            continue
        if _failure(dense, inputs, training, set()) is not None:  # e.g. a detector, which trains with targets only
            log.warning("not even the dense model runs in %s mode on such inputs (%s): not tried", mode, error)
            called.update(plan)
            continue
        why, names = literal(f"{type(error).__name__}: {error}"), literal(", ".join(plan))
        raise ConvertError(
            f"the converted model does not run in {mode} mode: {why}. A layer is used in a way a swap breaks; leave it "
            f"dense with {{exclude}} (planned: {names})",
            exclude=Use("exclude", "[..]"),
        ) from error
    if unused := [name for name in plan if name not in called]:
        raise ConvertError(
            f"{literal(', '.join(unused))}: the forward pass does not call the factorized layer, because the model "
            "holds the dense one in a second place (a list, a closure); leave it dense with {exclude}",
            exclude=Use("exclude", "[..]"),
        )


@torch.no_grad()
def _failure(model: nn.Module, inputs: ModelInput, training: bool, called: set[str]) -> Exception | None:
    """What a copy of the model raises, if it does; the names of the factorized layers it calls join ``called``."""
    trial = copy.deepcopy(model)
    for name, module in trial.named_modules():
        if isinstance(module, FactorizedLayer):
            module.register_forward_hook(lambda *_, name=name: called.add(name))
            _note_readings(module, name, called)
    try:
        inputs.run(trial.train(training))
    except Exception as error:
        return error
    return None


def _note_readings(layer: FactorizedLayer, name: str, called: set[str]) -> None:
    """Let a factorized weight of a throw-away copy note, under its path in the plan, that it is used."""
    path, whole = weight_path(name), layer.weight_in_whole

    def noted() -> Tensor:
        called.add(path)
        return whole()

    layer.register_forward_hook(lambda *_: called.add(path))
    layer.weight_in_whole = noted  # type: ignore[method-assign]


def conversion_errors(dense: nn.Module, plan: Plan, compressed: nn.Module | None = None) -> dict[str, float]:
    """Relative error norm(W - factorized W) / norm(W) of each planned layer.

    Args:
        dense: the dense model.
        plan: its plan.
        compressed: what it was converted to; without it, the plain projections are measured.
    """
    errors, dense = {}, uncompiled(dense)
    for name, layer in plan.items():
        weight = dense.get_parameter(layer.parameter(name)).detach().float()
        near = layer.project(weight) if compressed is None else _dense_weight(compressed, layer.module(name)).to(weight)
        whole = norm(weight)
        errors[name] = norm(weight - near) / whole if whole else 0.0
    return errors


def _dense_weight(model: nn.Module, name: str) -> Tensor:
    layer = model.get_submodule(name)
    if not isinstance(layer, FactorizedLayer):
        raise ConvertError(f"{type(layer).__name__} is not a factorized layer: convert the model by the same plan")
    return layer.dense_weight().detach()
