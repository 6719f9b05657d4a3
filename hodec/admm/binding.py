"""Finding the planned layers inside somebody's module, and refusing what ADMM cannot work with."""

from collections.abc import Mapping

import torch
from torch import nn
from torch.nn import Parameter
from torch.optim import Optimizer

from hodec.errors import PlanError, TrainingError, Use, near_matches
from hodec.plan.layer import LayerPlan

# Strategies that split single weights over devices, so that no process can project a whole one.
SHARDED = ("FSDPStrategy", "DeepSpeedStrategy", "ModelParallelStrategy", "XLAFSDPStrategy")


def find_root(module: nn.Module, plan: Mapping[str, LayerPlan], root: str | None) -> str:
    """Name prefix (``""`` or ``"backbone."``) under which all planned layers hang.

    Raises:
        PlanError: nowhere, or in several places; the message says which ``root=`` to give.
    """
    if not plan:
        raise PlanError("the plan has no layers, so ADMM has nothing to train: leave it out")
    parameters = _parameters(module)
    shapes = {name: tuple(p.shape) for name, p in parameters.items()}
    if root is not None:
        prefixes = [f"{root}." if root else ""]
    else:
        names = {_plain(name) for name, _ in module.named_modules(remove_duplicate=False)}
        prefixes = ["", *sorted(f"{name}." for name in names if name)]
    paths = {layer.parameter(name): layer.stored_shape for name, layer in plan.items()}
    fits = [p for p in prefixes if all(shapes.get(p + path) == shape for path, shape in paths.items())]
    # One net under two names (self.features = self.net.features) is one place: the first name counts.
    different = {tuple(id(parameters[p + path]) for path in paths): p for p in reversed(fits)}
    if len(different) == 1:
        return fits[0]
    if fits:
        places = [repr(p.rstrip(".")) for p in reversed(different.values())]
        raise PlanError(
            f"the planned layers are found in several places: {', '.join(places)}; say which, e.g. root={places[0]}"
        )
    first = next(iter(plan))
    known = tuple(name.removesuffix(".weight") for name in shapes if name.endswith(".weight"))
    raise PlanError(
        f"no part of {type(module).__name__} has all planned layers with the planned shapes (the first is {first}, "
        f"{plan[first].stored_shape}).{near_matches(f'{root}.{first}' if root else first, known)} "
        "Make the plan from the model that is trained, or name the part that holds it: root='..'"
    )


def planned_weights(module: nn.Module, plan: Mapping[str, LayerPlan], root: str) -> dict[str, Parameter]:
    """Layer name -> its weight in ``module``."""
    parameters = _parameters(module)
    return {name: parameters[root + layer.parameter(name)] for name, layer in plan.items()}


def _parameters(module: nn.Module) -> dict[str, Parameter]:
    return {_plain(name): p for name, p in module.named_parameters(remove_duplicate=False)}


def _plain(name: str) -> str:
    """The name without what torch.compile's wrapper puts into it."""
    return name.replace("_orig_mod.", "").removesuffix("._orig_mod")


def trainable(weights: Mapping[str, Parameter], optimizer: Optimizer) -> tuple[dict[str, Parameter], list[str]]:
    """The weights that the optimizer changes, and the names of those it does not.

    Raises:
        TrainingError: it changes none of them, or is LBFGS.
    """
    if isinstance(optimizer, torch.optim.LBFGS):
        raise TrainingError("LBFGS evaluates the loss several times a step, the pull would be added each time: use SGD")
    owned = {id(p) for group in optimizer.param_groups for p in group["params"]}
    trained = {name: w for name, w in weights.items() if w.requires_grad and id(w) in owned}
    frozen = [name for name in weights if name not in trained]
    if not trained:
        raise TrainingError(
            f"all {len(weights)} planned layers are frozen or missing from the optimizer "
            f"({', '.join(frozen[:3])}, ..), so ADMM has nothing to train: unfreeze them, or leave ADMM out"
        )
    return trained, frozen


def the_optimizer(strategy: str, optimizers: list[Optimizer], precision: str) -> Optimizer:
    """The one optimizer ADMM works with.

    Raises:
        TrainingError: sharded weights, several optimizers, or fp16 scaling inside a fused optimizer.
    """
    if strategy in SHARDED:
        raise TrainingError(f"{strategy} splits weights over devices; ADMM projects whole ones: use strategy='ddp'")
    if len(optimizers) != 1:
        raise TrainingError(
            f"ADMM works with one optimizer, this module has {len(optimizers)}: put the planned layers and the rest "
            "into param groups of one optimizer"
        )
    optimizer: Optimizer = getattr(optimizers[0], "optimizer", optimizers[0])
    if precision == "16-mixed" and getattr(optimizer, "_step_supports_amp_scaling", False):
        raise TrainingError(
            "a fused optimizer with precision=16-mixed keeps gradients scaled when the pull is added: use {bf16}, or "
            "the optimizer with fused=False",
            bf16=Use("trainer.precision", "bf16-mixed"),
        )
    return optimizer
