"""Finding the planned layers inside somebody's module, and refusing what ADMM cannot work with."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn
from torch.nn import Parameter
from torch.optim import Optimizer

from hodec.errors import ConfigError, PlanError, TrainingError, Use, near_matches
from hodec.inference import plain_name
from hodec.plan.layer import LayerPlan

# Strategies that put weights into pieces of memory of their own, in which ADMM finds no layer.
FLATTENING = ("FSDPStrategy", "DeepSpeedStrategy", "XLAFSDPStrategy")

# What gives such pieces away: an attribute of parameters under DeepSpeed's third stage, the wrapper of the first FSDP.
ZERO3_MARK, FSDP1 = "ds_id", "FullyShardedDataParallel"

WAY_OUT = (
    "ADMM finds no layers in them. Use torch.distributed.fsdp.fully_shard, which divides each weight by itself (in "
    "Lightning strategy=ModelParallelStrategy(..)), or strategy='ddp' where a device holds the net"
)


def find_root(module: nn.Module, plan: Mapping[str, LayerPlan], root: str | None) -> str:
    """Name prefix (``""`` or ``"backbone."``) under which all planned layers hang.

    Raises:
        PlanError: nowhere, or in several places; the message says which ``root=`` to give.
        TrainingError: a planned weight is no parameter, or weights are kept in flat pieces.
    """
    check_flat(module)
    if not plan:
        raise PlanError("the plan has no layers, so ADMM has nothing to train: leave it out")
    if computed := [name for name, layer in plan.items() if layer.computed_from]:
        raise TrainingError(
            f"{', '.join(computed[:3])}: the weight is computed from other parameters at each call (weight_norm, a "
            "standardized convolution), and ADMM can pull parameters only. Make them plain before the plan is made "
            "(torch.nn.utils.parametrize.remove_parametrizations), or leave them out of it with {exclude}; convert "
            "takes them as they are",
            exclude=Use("exclude", f"[{', '.join(computed)}]"),
        )
    parameters = _parameters(module)
    shapes = {name: tuple(p.shape) for name, p in parameters.items()}
    if root is not None:
        prefixes = [f"{root}." if root else ""]
    else:
        names = {plain_name(name) for name, _ in module.named_modules(remove_duplicate=False)}
        prefixes = ["", *sorted(f"{name}." for name in names if name)]
    paths = {plain_name(layer.parameter(name)): layer.stored_shape for name, layer in plan.items()}
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
    return {name: parameters[root + plain_name(layer.parameter(name))] for name, layer in plan.items()}


def _parameters(module: nn.Module) -> dict[str, Parameter]:
    return {plain_name(name): p for name, p in module.named_parameters(remove_duplicate=False)}


@dataclass(frozen=True)
class Binding:
    """The planned weights that training changes now, and what changes them.

    Attributes:
        weights: layer -> its weight.
        places: layer -> its optimizer and the number of its parameter group there; ``load_state_dict`` of an optimizer
            makes the groups anew.
        owners: the optimizers of these weights; the first one's steps are counted.
        frozen: planned layers that nothing trains now.
        signature: see ``signature_of``, when it was made.
    """

    weights: dict[str, Parameter]
    places: dict[str, tuple[Optimizer, int]]
    owners: list[Optimizer]
    frozen: list[str]
    signature: tuple[object, ...]

    def group(self, name: str) -> dict[str, Any]:
        """The parameter group of a layer, with its learning rate."""
        owner, number = self.places[name]
        return owner.param_groups[number]

    @property
    def is_sgd(self) -> bool:
        """Whether a gradient moves the weights by the learning rate times itself."""
        return len(self.owners) == 1 and isinstance(self.owners[0], torch.optim.SGD)


def bind(weights: Mapping[str, Parameter], optimizers: Sequence[Optimizer]) -> Binding:
    """Find what trains each planned weight.

    Raises:
        TrainingError: no optimizer has any of them although none is frozen, or one that has some is LBFGS.
    """
    found = {id(p): (o, i) for o in optimizers for i, group in enumerate(o.param_groups) for p in group["params"]}
    trained = {name: w for name, w in weights.items() if w.requires_grad and id(w) in found}
    places = {name: found[id(w)] for name, w in trained.items()}
    owners = [o for o in optimizers if any(o is owner for owner, _ in places.values())]
    if any(isinstance(owner, torch.optim.LBFGS) for owner in owners):
        raise TrainingError("LBFGS evaluates the loss several times a step, the pull would be added each time: use SGD")
    if not trained and any(w.requires_grad for w in weights.values()):
        raise TrainingError(
            f"the optimizer has none of the {len(weights)} planned layers ({', '.join(list(weights)[:3])}, ..), so "
            "ADMM has nothing to train: give it their weights, or leave ADMM out"
        )
    frozen = [name for name in weights if name not in trained]
    return Binding(trained, places, owners, frozen, signature_of(weights, optimizers))


def signature_of(weights: Mapping[str, Parameter], optimizers: Sequence[Optimizer]) -> tuple[object, ...]:
    """What changes where layers are frozen or unfrozen, or join an optimizer; cheap enough to look at each step."""
    sizes = [len(group["params"]) for optimizer in optimizers for group in optimizer.param_groups]
    return (*(w.requires_grad for w in weights.values()), *sizes)


def check_flat(module: nn.Module) -> None:
    """Refuse weights that are kept in flat pieces.

    Raises:
        TrainingError: saying whose they are, and the way out.
    """
    flat = any(type(one).__name__ == FSDP1 for one in module.modules())
    zero = any(hasattr(p, ZERO3_MARK) for p in module.parameters())
    if flat or zero:
        owner = FSDP1 if flat else "DeepSpeed (ZeRO-3)"
        raise TrainingError(f"{owner} keeps the weights of this model in flat pieces, and {WAY_OUT}")


def unwrapped(optimizer: Optimizer | Sequence[Optimizer]) -> list[Optimizer]:
    """The optimizers themselves, without what Lightning, Fabric or accelerate put around them.

    Raises:
        TrainingError: one of DeepSpeed, which trains flat copies of the weights.
        ConfigError: something that is no optimizer.
    """
    if type(optimizer).__module__.split(".")[0] == "deepspeed":
        raise TrainingError(f"{type(optimizer).__name__} trains flat copies of the weights, and {WAY_OUT}")
    several = not isinstance(optimizer, Optimizer) and isinstance(optimizer, Iterable)
    found = list[Optimizer]()
    for one in cast(Iterable[Optimizer], optimizer if several else [optimizer]):
        while isinstance(inner := getattr(one, "optimizer", None), Optimizer):
            one = inner
        if not hasattr(one, "param_groups"):
            kind = f"a {type(optimizer).__name__} given" + (f", of {type(one).__name__}" if several else "")
            raise ConfigError(f"optimizer: {kind}; allowed: an optimizer, or several in a list")
        found.append(one)
    return found


def check_trainer(strategy: str, optimizers: Sequence[Optimizer], precision: str) -> None:
    """Refuse what ADMM cannot work with in a Trainer.

    Raises:
        TrainingError: weights in flat pieces, or fp16 scaling inside a fused optimizer.
    """
    if strategy in FLATTENING:
        raise TrainingError(f"{strategy} splits weights into flat pieces, and {WAY_OUT}")
    if precision == "16-mixed" and any(getattr(o, "_step_supports_amp_scaling", False) for o in optimizers):
        raise TrainingError(
            "a fused optimizer with precision=16-mixed keeps gradients scaled when the pull is added: use {bf16}, or "
            "the optimizer with fused=False",
            bf16=Use("trainer.precision", "bf16-mixed"),
        )
