"""The dry run of a converted model: whether it runs in both modes, and if not, which layer is to blame."""

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn

from hodec.errors import ConvertError, Use, literal
from hodec.formats.roles import Role
from hodec.inputs import ModelInput
from hodec.layers.base import FactorizedLayer
from hodec.layers.inner import put_inside
from hodec.layers.plain import copied
from hodec.layers.weight import weight_path
from hodec.plan.layer import LayerPlan
from hodec.plan.plan import Plan

log = logging.getLogger(__name__)


class Fault(NamedTuple):
    """What keeps a converted model from running.

    Attributes:
        layers: those to blame; several where only together they break it, or none of them is called.
        error: what to tell.
    """

    layers: Sequence[str]
    error: ConvertError


def put(model: nn.Module, name: str, layer: LayerPlan, modules: nn.ModuleList) -> None:
    """Hang modules, factorized or dense, into a model in the place of a planned layer, or of a weight inside one.

    Args:
        modules: one for the layer itself and one for each that is tied to it.
    """
    if layer.role is not Role.LAYER:
        put_inside(model, name, modules[0])
        return
    for names, module in zip(layer.names(name).values(), modules, strict=True):
        for each in names:
            model.set_submodule(each, module)


def find_fault(
    compressed: nn.Module, dense: nn.Module, plan: Plan, originals: Mapping[str, nn.ModuleList]
) -> Fault | None:
    """Run throw-away copies in both modes: some parents (fast paths) break only in evaluation mode.

    Args:
        originals: planned layer -> the dense ones in its place, see ``put``.
    """
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

        def fails(names: Sequence[str], training: bool = training) -> bool:
            trial = copied(compressed)
            for name in plan.keys() - names:
                put(trial, name, plan[name], cast(nn.ModuleList, copied(originals[name])))
            return _failure(trial, inputs, training, set()) is not None

        return _broken(guilty(list(plan), fails), mode, error)
    if unused := [name for name in plan if name not in called]:
        message = (
            f"{literal(', '.join(unused))}: the forward pass does not call the factorized layer, because the model "
            "holds the dense one in a second place (a list, a closure); leave it dense with {exclude}"
        )
        return Fault(unused, ConvertError(message, exclude=Use("exclude", f"[{literal(', '.join(unused))}]")))
    return None


def _broken(layers: Sequence[str], mode: str, error: Exception) -> Fault:
    why, names = literal(f"{type(error).__name__}: {error}"), literal(", ".join(layers))
    made = ConvertError(
        f"{names}: with this layer factorized the model does not run in {mode} mode: {why}. It is used in a way a swap "
        "breaks; leave it dense with {exclude}, or convert with on_error='skip'",
        exclude=Use("exclude", f"[{', '.join(layers)}]"),
    )
    made.__cause__ = error
    return Fault(layers, made)


def guilty(names: Sequence[str], fails: Callable[[Sequence[str]], bool]) -> Sequence[str]:
    """One of the names that fails alone, found by halving; or the fewest neighbours found that fail together."""
    while len(names) > 1:
        half = len(names) // 2
        part = next((part for part in (names[:half], names[half:]) if fails(part)), None)
        if part is None:
            return names
        names = part
    return names


@torch.no_grad()
def _failure(model: nn.Module, inputs: ModelInput, training: bool, called: set[str]) -> Exception | None:
    """What a copy of the model raises, if it does; the names of the factorized layers it calls join ``called``."""
    trial = copied(model)
    for name, module in trial.named_modules():
        if isinstance(module, FactorizedLayer):
            _note_use(module, weight_path(name), called)
    try:
        inputs.run(trial.train(training))
    except Exception as error:
        return error
    return None


def _note_use(layer: FactorizedLayer, name: str, called: set[str]) -> None:
    """Let a layer of a throw-away copy note that it is called, or that its weight is read."""
    whole = layer.weight_in_whole

    def noted() -> Tensor:
        called.add(name)
        return whole()

    layer.register_forward_hook(lambda *_: called.add(name))
    layer.weight_in_whole = noted  # type: ignore[method-assign]
