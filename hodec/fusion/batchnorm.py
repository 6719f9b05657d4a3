"""BatchNorm in inference is one factor and one offset a channel: which layer it can be folded into, and how.

A pair is folded only when all that the layer puts out goes into that norm and nothing else reads it. That is read off
the traced graph; a forward pass that cannot be traced is watched while it runs instead.
"""

import copy
import inspect
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.utils import parametrize
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from hodec.conversion.eligibility import READS_WEIGHTS
from hodec.conversion.swap import HOOKS
from hodec.formats.layer_types import layer_type_of
from hodec.layers.base import FactorizedLayer

log = logging.getLogger(__name__)

NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


@dataclass(frozen=True)
class Call:
    """Shapes of what one call of a layer was given and has made."""

    given: tuple[int, ...]
    made: tuple[int, ...]


@dataclass(frozen=True)
class Folds:
    """What can be folded.

    Attributes:
        norms: layer name -> name of the norm behind it.
        kept: name of each other norm -> why it stays.
    """

    norms: Mapping[str, str]
    kept: Mapping[str, str]


def is_norm(module: nn.Module) -> bool:
    """A batch norm whose inference is known: no subclass."""
    return type(module) in NORMS


def find_folds(model: nn.Module, inputs: Sequence[Tensor], calls: Mapping[str, Sequence[Call]]) -> Folds:
    """The norms of a model in evaluation mode, each with its layer or the reason why it stays.

    Args:
        model: in evaluation mode; it is not changed.
        inputs: what it is run with.
        calls: layer and norm names -> their calls with these inputs.
    """
    sources = sources_of(model, inputs)
    norms, kept = {}, {}
    for name, module in model.named_modules():
        if not is_norm(module):
            continue
        source = sources.get(name, "")
        reason = _refusal(model, name, source, calls) if source else "its input is not one layer's output alone"
        if reason:
            kept[name] = reason
        else:
            norms[source] = name
    return Folds(norms, kept)


def _refusal(model: nn.Module, name: str, source: str, calls: Mapping[str, Sequence[Call]]) -> str:
    """Why a norm cannot be folded into the layer before it, or an empty string."""
    norm: Any = model.get_submodule(name)
    layer: Any = model.get_submodule(source)
    if norm.running_mean is None or norm.running_var is None:
        return "it has no running statistics: it normalizes by each batch even in evaluation"
    for what, module in ((name, norm), (source, layer)):
        if any(getattr(module, hooks) for hooks in HOOKS):
            return f"{what or 'the model'} has hooks, which would see other numbers"
        if len(calls.get(what, ())) != 1:
            return f"{what or 'the model'} is called {len(calls.get(what, ()))} times"
        if parametrize.is_parametrized(module):
            return f"{what or 'the model'} is parametrized"
    if isinstance(model.get_submodule(source.rpartition(".")[0]), READS_WEIGHTS):
        return f"the parent of {source} reads its weights directly"
    return _misfit(layer, norm, calls[source][0].made)


def _misfit(layer: Any, norm: Any, made: tuple[int, ...]) -> str:
    layer_type: Any = layer.layer_type if isinstance(layer, FactorizedLayer) else layer_type_of(layer)
    # a norm of 2-d input takes axis 1 for channels, which an unbatched convolution's output has elsewhere
    if len(made) != layer_type.dims + 2 or made[1] != norm.num_features:
        return f"the {len(made)}-d output before it has its channels on another axis"
    return ""


def sources_of(model: nn.Module, inputs: Sequence[Tensor]) -> dict[str, str]:
    """Norm name -> name of the layer whose output it alone reads."""
    try:
        return _traced(model, len(inputs))
    except Exception as error:  # whatever a forward pass does with a stand-in for its input
        log.debug("the forward pass cannot be traced (%s: %s): watched instead", type(error).__name__, error)
        return _watched(model, inputs)


# -- by tracing -----------------------------------------------------------------------------------------------------


class _Tracer(fx.Tracer):
    """Takes factorized layers for one step, like torch's own."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, FactorizedLayer) or super().is_leaf_module(m, module_qualified_name)


def _traced(model: nn.Module, given: int) -> dict[str, str]:
    if foldable(model):  # a model that is one layer has no norm in it
        return {}
    parameters = list(inspect.signature(model.forward).parameters.values())
    # what is not given has its default: traced as a stand-in, `mask is None` would come out wrong
    fixed = {p.name: p.default for p in parameters[given:] if p.default is not inspect.Parameter.empty}
    graph = _Tracer().trace(model, concrete_args=fixed or None)
    sources: dict[str, str] = {}
    for node in graph.nodes:
        if node.op != "call_module" or not is_norm(model.get_submodule(node.target)):
            continue
        before = node.args[0] if node.args else node.kwargs.get("input")
        if isinstance(before, fx.Node) and before.op == "call_module" and set(before.users) == {node}:
            layer = model.get_submodule(str(before.target))
            if foldable(layer):
                sources[str(node.target)] = str(before.target)
    return sources


def foldable(module: nn.Module) -> bool:
    """Layers that a factor and an offset a channel can be multiplied into."""
    layer_type = module.layer_type if isinstance(module, FactorizedLayer) else layer_type_of(module)
    return layer_type is not None and not layer_type.is_embedding  # type: ignore[union-attr]


# -- by watching ----------------------------------------------------------------------------------------------------


class _Readers(TorchFunctionMode):
    """Who reads the layers' outputs: every torch function that is given one, by the norm it runs in."""

    def __init__(self) -> None:
        super().__init__()
        self.inside = ""
        self.outputs: dict[int, tuple[str, Tensor]] = {}  # holding them keeps their ids from being used again
        self.readers: dict[str, set[str]] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.saw((args, kwargs))
        return func(*args, **(kwargs or {}))

    def saw(self, values: Any) -> None:
        for value in tree_leaves(values):
            if id(value) in self.outputs:
                self.readers.setdefault(self.outputs[id(value)][0], set()).add(self.inside)


@torch.no_grad()
def _watched(model: nn.Module, inputs: Sequence[Tensor]) -> dict[str, str]:
    readers, hooks = _Readers(), []

    def made(name: str, output: Any) -> None:
        if isinstance(output, Tensor):
            readers.outputs[id(output)] = (name, output)

    def enter(name: str) -> None:
        readers.inside = name

    for name, module in model.named_modules():
        if is_norm(module):
            hooks.append(module.register_forward_pre_hook(lambda *_, name=name: enter(name)))
            hooks.append(module.register_forward_hook(lambda *_, name=name: enter("")))
        elif foldable(module):
            hooks.append(module.register_forward_hook(lambda _, __, output, name=name: made(name, output)))
    try:
        with readers:
            result = model(*inputs)
        readers.saw(result)
    finally:
        for hook in hooks:
            hook.remove()
    alone = {name: next(iter(by)) for name, by in readers.readers.items() if len(by) == 1}
    counts = list(alone.values())
    return {norm: layer for layer, norm in alone.items() if norm and counts.count(norm) == 1}


# -- folding --------------------------------------------------------------------------------------------------------


def scale_and_shift(norm: Any) -> tuple[Tensor, Tensor]:
    """The factor and the offset of each channel, float64 where the device has it: y = scale * x + shift."""
    wide = torch.float32 if norm.running_mean.device.type == "mps" else torch.float64
    mean, var = norm.running_mean.to(wide), norm.running_var.to(wide)
    scale = torch.rsqrt(var + norm.eps)
    scale = scale if norm.weight is None else scale * norm.weight.detach().to(wide)
    shift = -mean * scale
    return scale, shift if norm.bias is None else shift + norm.bias.detach().to(wide)


def scaled_last(module: nn.Module, scale: Tensor, shift: Tensor) -> nn.Module:
    """A copy of a plain layer, or of a Sequential of them, whose outputs are multiplied by scale, with shift added.

    A bias that there is must be multiplied too; the shift joins it.
    """
    module = copy.deepcopy(module)
    last: Any = module[-1] if isinstance(module, nn.Sequential) else module
    layer_type = layer_type_of(last)
    swapped, groups = bool(layer_type and layer_type.in_first), getattr(last, "groups", 1)
    sides = [1] * (last.weight.ndim - 2)
    weight = last.weight.detach().to(scale)
    if swapped:  # (in, out / groups, ..), the groups' outputs one after another
        each = scale.reshape(groups, 1, -1, *sides)
        weight = (weight.unflatten(0, (groups, -1)) * each).flatten(0, 1)
    else:
        weight = weight * scale.reshape(-1, 1, *sides)
    bias = shift if last.bias is None else last.bias.detach().to(scale) * scale + shift
    last.weight = nn.Parameter(weight.to(last.weight.dtype), requires_grad=False)
    last.bias = nn.Parameter(bias.to(last.weight.dtype), requires_grad=False)
    return module
