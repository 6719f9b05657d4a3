"""Which layers can be swapped, why the others cannot, and the swap itself: the only place that does it."""

import copy
import fnmatch
import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from hodec.cost.count import Batch, Inputs, inference, run_batches, trace_runs, uncompiled
from hodec.errors import ConvertError, PlanError, near_matches
from hodec.formats.base import working_copy
from hodec.formats.runs import Runs
from hodec.kinds import KINDS, kind_of
from hodec.layers.base import FactorizedLayer, same_random_state
from hodec.linalg import check_finite, naming, norm
from hodec.methods import Method, get_method
from hodec.metric import Metric, project_in_metric
from hodec.plan import LayerPlan, Plan

log = logging.getLogger(__name__)

# Modules that read their children's weights directly instead of calling them.
READS_WEIGHTS = (nn.MultiheadAttention, nn.TransformerEncoderLayer)

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

NOT_CALLED = "never called by the forward pass with this input: unused, or its weight is used functionally"


@dataclass(frozen=True)
class LayerSite:
    """A layer that can be factorized, where it stands and how much it runs.

    Attributes:
        kind: name in KINDS: ``conv2d``, ``linear``, ..
        weight: dense weight with output channels first, (O, I, K_1, ..) or (O, I).
        runs: its calls for one image.
        aliases: further names of the same module.
    """

    kind: str
    weight: Tensor
    runs: Runs
    aliases: tuple[str, ...] = ()

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.weight.shape)


def eligible_layers(
    model: nn.Module, method: Method, example_input: Inputs
) -> tuple[dict[str, LayerSite], dict[str, str]]:
    """The layers that ``method`` can factorize, and each other weight layer with the reason why not.

    Args:
        model: any net; it is run once in evaluation mode and left as it was.
        example_input: a tensor (or several) as the model takes, batch first.

    Raises:
        PlanError: a layer is lazy and has no weight yet.
        TrainingError: an eligible weight holds NaN or Inf.
    """
    names = _names_by_module(model)
    _check_no_lazy(names)
    runs = trace_runs(model, example_input)
    sites, refused = {}, {}
    for module, (name, *aliases) in names.items():
        if not _has_weight(module):
            continue
        reason = _refusal(model, name, module, method) or ("" if name in runs else NOT_CALLED)
        if reason:
            refused[name] = reason
            continue
        kind, weight = KINDS[_kind_name(module)], weight_of(module)
        check_finite(weight, f"layer {name}")
        sites[name] = LayerSite(kind.name, kind.canonical(weight), runs[name], tuple(aliases))
    return sites, refused


def weight_of(module: Any) -> Tensor:
    """A layer's dense weight, without its history."""
    weight: Tensor = module.weight.detach()
    return weight


def _names_by_module(model: nn.Module) -> dict[nn.Module, list[str]]:
    names: dict[nn.Module, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        names.setdefault(module, []).append(name)
    return names


def _has_weight(module: nn.Module) -> bool:
    """Layers that a reader of the plan would ask about: everything that multiplies by a matrix or kernel."""
    kinds = nn.Linear | nn.modules.conv._ConvNd | nn.Embedding | nn.Bilinear | nn.MultiheadAttention
    return isinstance(module, kinds)


def _refusal(model: nn.Module, name: str, module: Any, method: Method) -> str:
    """Why a layer cannot be factorized by this method, or an empty string."""
    if not name:
        return "it is the whole model, which leaves nothing to swap it in: wrap it in nn.Sequential"
    if isinstance(module, nn.MultiheadAttention):
        return "its projections of queries, keys and values are weights of its own, in no layer to swap"
    if parametrize.is_parametrized(module) or "weight" not in module._parameters:
        return "its weight is parametrized (weight_norm, spectral_norm, ..); remove the parametrization first"
    parent = model.get_submodule(name.rpartition(".")[0])
    if isinstance(parent, READS_WEIGHTS):
        return f"{type(parent).__name__} reads the weights of its children directly"
    if _kind_name(module) not in method.layers:
        return f"method {method.name} has no layer for {type(module).__name__}"
    if getattr(module, "groups", 1) != 1:
        return f"grouped convolution (groups={module.groups})"
    if isinstance(module, nn.Embedding) and (module.max_norm is not None or module.sparse or module.scale_grad_by_freq):
        return "an embedding with max_norm, sparse or scale_grad_by_freq treats its rows one by one"
    return _tied_with(model, module)


def _kind_name(module: nn.Module) -> str:
    kind = kind_of(module)
    return kind.name if kind else ""


def _tied_with(model: nn.Module, module: nn.Module) -> str:
    for name, other in model.named_modules():
        for key, parameter in module._parameters.items():
            if other is not module and any(p is parameter for p in other._parameters.values() if p is not None):
                return f"its {key} is shared with {name or 'the model itself'}"
    return ""


def _check_no_lazy(names: Mapping[nn.Module, Sequence[str]]) -> None:
    """A run would initialize lazy layers, and the given model is to stay as it is."""
    for module, (name, *_) in names.items():
        if isinstance(module, nn.modules.lazy.LazyModuleMixin) and module.has_uninitialized_params():
            raise PlanError(f"layer {name} is lazy and has no weight yet: run the model once before planning")


def match_names(pattern: str, names: Sequence[str], what: str) -> list[str]:
    """The names that a glob matches.

    Raises:
        PlanError: none does; the message has near matches.
    """
    found = [name for name in names if fnmatch.fnmatchcase(name, pattern)]
    if not found:
        stem = pattern.replace("*", "").rstrip(".")
        hint = near_matches(stem, tuple(names)) or f" Layers are: {', '.join(names[:6])}, .."
        raise PlanError(f"{what} {pattern!r} matches no layer.{hint}")
    return found


def convert(
    model: nn.Module,
    plan: Plan,
    *,
    decompose: bool = True,
    metrics: Mapping[str, Metric] | None = None,
    starts: Mapping[str, Sequence[Tensor]] | None = None,
) -> nn.Module:
    """A copy of ``model`` whose planned layers are factorized; the given model is left as it was.

    Hooks on a planned layer go over to its factorized one. Global random numbers are not moved.

    Args:
        model: the dense model the plan was made for (names and weight shapes must agree).
        plan: which layers, at which ranks.
        decompose: False builds the structure only, with random factors, to load saved ones into.
        metrics: of the layers' inputs, see ``collect_metrics``: these layers lose least of their outputs instead of
            least of their weights.
        starts: layer -> factors to start from, ``AdmmCallback.factors``: formats that are found by iteration (CP)
            would otherwise not end where ADMM has led them.

    Raises:
        PlanError: the plan is for another model, or the metrics for another plan.
        ConvertError: the converted model does not run, in training or evaluation mode.
        TrainingError: a planned weight holds NaN or Inf.
    """
    model = uncompiled(model)
    _check_belongs(model, plan)
    metrics = _checked(metrics or {}, plan)
    small = copy.deepcopy(model)
    with same_random_state(model.parameters()):
        for name, layer_plan in plan.items():
            dense = small.get_submodule(name)
            start = (starts or {}).get(name)
            metric = metrics.get(name)
            if decompose:
                check_finite(weight_of(dense), f"layer {name}")
            with naming(f"layer {name}"):
                layer = _factorized(dense, layer_plan, decompose=decompose, metric=metric, start=start)
            for each in (name, *layer_plan.aliases):
                small.set_submodule(each, layer)
        if plan.inputs:
            _dry_run(small, model, plan)
    setattr(small, PLAN_ATTRIBUTE, plan)  # so that it can be saved without naming it again
    return small


def _checked(metrics: Mapping[str, Metric], plan: Plan) -> Mapping[str, Metric]:
    for name, metric in metrics.items():
        if name not in plan:
            raise PlanError(
                f"there is a metric for {name}, which is not in the plan: collect the metrics with this plan"
            )
        metric.check(name, plan[name])
    return metrics


def _factorized(
    dense: Any,
    plan: LayerPlan,
    *,
    decompose: bool,
    metric: Metric | None,
    start: Sequence[Tensor] | None,
) -> FactorizedLayer:
    cls = get_method(plan.method).layers[plan.kind]
    how: dict[str, Any] = {"modes": plan.modes, "execution": plan.runs_as}
    if decompose:
        source = dense if metric is None else _nearest(dense, plan, metric)
        layer = cls.from_dense(source, plan.ranks, start=start, **how).to(dense.weight.dtype)
    else:
        layer = cls.like(dense, plan.ranks, **how)
    layer.train(dense.training).requires_grad_(dense.weight.requires_grad)
    if layer.bias is not None:
        layer.bias.requires_grad_(dense.bias.requires_grad)
    for hooks in HOOKS:
        getattr(layer, hooks).update(getattr(dense, hooks))
    layer._is_full_backward_hook = dense._is_full_backward_hook
    return layer


def _nearest(dense: Any, plan: LayerPlan, metric: Metric) -> Any:
    """A layer like ``dense`` with the nearest weight of the planned ranks; half precision would blur these ranks."""
    near = copy.copy(dense)
    weight = project_in_metric(plan, working_copy(dense.weight.detach()), metric)
    near._parameters = {**dense._parameters, "weight": nn.Parameter(weight)}
    return near


def _check_belongs(model: nn.Module, plan: Plan) -> None:
    modules = dict(model.named_modules(remove_duplicate=False))
    names = _names_by_module(model)
    for name, layer in plan.items():
        module = modules.get(name)
        if module is None:
            raise PlanError(
                f"the plan names layer {name}, which this model lacks: it was made for another model."
                f"{near_matches(name, tuple(modules))}"
            )
        kind, weight = kind_of(module), getattr(module, "weight", torch.empty(0))
        shape = tuple(kind.canonical(weight).shape if kind and weight.ndim > 1 else weight.shape)
        if _kind_name(module) != layer.kind or shape != layer.shape:
            raise PlanError(
                f"{name}: the plan is for a {layer.kind} weight {layer.shape}, this model has "
                f"{type(module).__name__} {shape}; make the plan from this model"
            )
        reason = _refusal(model, name, module, get_method(layer.method))
        if not reason and set(names[module]) != {name, *layer.aliases}:
            reason = f"it hangs in this model as {', '.join(names[module])}, but not so in the plan"
        if reason:
            raise PlanError(f"{name} cannot be factorized: {reason}; make the plan from this model")


def _dry_run(small: nn.Module, dense: nn.Module, plan: Plan) -> None:
    """Run throw-away copies in both modes: some parents (fast paths) break only in evaluation mode."""
    first = next(iter(small.parameters()))
    inputs = [x.to(first.device, first.dtype if x.is_floating_point() else x.dtype) for x in plan.example_inputs()]
    called: set[str] = set()
    for training in (True, False):
        mode, error = "training" if training else "evaluation", _failure(small, inputs, training, called)
        if error is None:
            continue
        if _failure(dense, inputs, training, set()) is not None:  # e.g. a detector, which trains with targets only
            log.warning("not even the dense model runs in %s mode on such inputs (%s): not tried", mode, error)
            called.update(plan)
            continue
        raise ConvertError(
            f"the converted model does not run in {mode} mode: {type(error).__name__}: {error}. A layer is "
            f"used in a way a swap breaks; leave it dense with exclude=[..] (planned: {', '.join(plan)})"
        ) from error
    if unused := [name for name in plan if name not in called]:
        raise ConvertError(
            f"{', '.join(unused)}: the forward pass does not call the factorized layer, because the model holds the "
            "dense one in a second place (a list, a closure); leave it dense with exclude=[..]"
        )


@torch.no_grad()
def _failure(model: nn.Module, inputs: Sequence[Tensor], training: bool, called: set[str]) -> Exception | None:
    """What a copy of the model raises, if it does; the names of the factorized layers it calls join ``called``."""
    trial = copy.deepcopy(model)
    for name, module in trial.named_modules():
        if isinstance(module, FactorizedLayer):
            module.register_forward_hook(lambda *_, name=name: called.add(name))
    try:
        trial.train(training)(*inputs)
    except Exception as error:
        return error
    return None


def conversion_errors(dense: nn.Module, plan: Plan, small: nn.Module | None = None) -> dict[str, float]:
    """Relative error norm(W - factorized W) / norm(W) of each planned layer.

    Args:
        dense: the dense model.
        plan: its plan.
        small: what it was converted to; without it, the plain projections are measured.
    """
    errors, dense = {}, uncompiled(dense)
    for name, layer in plan.items():
        weight = weight_of(dense.get_submodule(name)).float()
        near = layer.project(weight) if small is None else _dense_weight(small.get_submodule(name)).to(weight)
        whole = norm(weight)
        errors[name] = norm(weight - near) / whole if whole else 0.0
    return errors


def _dense_weight(layer: nn.Module) -> Tensor:
    if not isinstance(layer, FactorizedLayer):
        raise ConvertError(f"{type(layer).__name__} is not a factorized layer: convert the model by the same plan")
    return layer.dense_weight().detach()


@torch.no_grad()
def reestimate_batchnorm(model: nn.Module, batches: Iterable[Batch]) -> int:
    """Replace BatchNorm's running statistics by averages over ``batches``; returns how many were used.

    Without any batch the statistics stay as they are.

    Truncation changes every layer's output distribution, and most of the accuracy lost right after it comes
    back when the statistics are right again.

    Args:
        model: any net; modes are restored. A net without BatchNorm is left alone.
        batches: model inputs (N, ..), or (images, labels); moved to the model's device.
    """
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.track_running_stats]
    if not norms:
        return 0
    before = [(norm.momentum, copy.deepcopy(norm.state_dict())) for norm in norms]
    used = 0
    try:
        with inference(model):
            for norm in norms:
                norm.reset_running_stats()
                norm.momentum = None  # cumulative average
                norm.training = True
            used = run_batches(model, batches)
    finally:
        for norm, (momentum, state) in zip(norms, before, strict=True):
            norm.momentum = momentum
            if not used:
                norm.load_state_dict(state)
    return used
