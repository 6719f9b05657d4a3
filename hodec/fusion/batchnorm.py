"""BatchNorm in inference is one factor and one offset a channel: which layer it can be folded into, and how.

A pair is folded only when all that the layer puts out goes into that norm and nothing else reads it. That is seen while
the model runs: every torch function that is given the layer's output is a reader.
"""

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeGuard, cast

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from hodec.conversion.eligibility import READS_WEIGHTS
from hodec.errors import ConvertError
from hodec.formats.layer_types import LayerType, layer_type_of
from hodec.inputs import Inputs, as_input
from hodec.layers.base import FactorizedLayer
from hodec.layers.plain import HOOKS

NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


@dataclass(frozen=True)
class Call:
    """The shapes of a layer's input and output in one call."""

    given: tuple[int, ...]
    made: tuple[int, ...]


@dataclass(frozen=True)
class Folds:
    """The batch norms that can be folded, and those that stay.

    Attributes:
        norms: layer name -> name of the norm behind it.
        kept: name of each other norm -> why it stays.
    """

    norms: Mapping[str, str]
    kept: Mapping[str, str]


BatchNorm = nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d | nn.SyncBatchNorm


def is_norm(module: nn.Module) -> TypeGuard[BatchNorm]:
    """Whether it is a batch norm whose inference is known: no subclass."""
    return type(module) in NORMS


def foldable(module: nn.Module) -> bool:
    """Whether a factor and an offset a channel can be multiplied into it."""
    layer_type = _layer_type(module)
    return layer_type is not None and not layer_type.is_embedding


def _layer_type(module: nn.Module) -> LayerType | None:
    return module.layer_type if isinstance(module, FactorizedLayer) else layer_type_of(module)


def find_folds(model: nn.Module, inputs: Inputs, calls: Mapping[str, Sequence[Call]]) -> Folds:
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
    norm, layer = cast(BatchNorm, model.get_submodule(name)), model.get_submodule(source)
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
    made = calls[source][0].made
    # a norm of 2-d input takes axis 1 for channels, which an unbatched convolution's output has elsewhere
    if len(made) != cast(LayerType, _layer_type(layer)).dims + 2 or made[1] != norm.num_features:
        return f"the {len(made)}-d output before it has its channels on another axis"
    return ""


class _Readers(TorchFunctionMode):
    """The readers of the layers' outputs: every torch function that is given one, by the norm that it runs in."""

    def __init__(self) -> None:
        super().__init__()
        self.inside = ""
        self.outputs: dict[int, tuple[str, Tensor]] = {}  # holding them keeps their ids from being used again
        self.readers: dict[str, set[str]] = {}

    def __torch_function__(
        self,
        func: Callable[..., object],
        types: Sequence[type],
        args: Sequence[object] = (),
        kwargs: Mapping[str, object] | None = None,
    ) -> object:
        self.saw((args, kwargs))
        return func(*args, **(kwargs or {}))

    def saw(self, values: object) -> None:
        for value in tree_leaves(values):
            if id(value) in self.outputs:
                self.readers.setdefault(self.outputs[id(value)][0], set()).add(self.inside)


@torch.no_grad()
def sources_of(model: nn.Module, inputs: Inputs) -> dict[str, str]:
    """Norm name -> name of the layer whose output it alone reads, while the model runs on these inputs."""
    readers, hooks = _Readers(), []

    def made(name: str, output: object) -> None:
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
            result = as_input(inputs, model).run(model)
        readers.saw(result)
    finally:
        for hook in hooks:
            hook.remove()
    alone = {name: next(iter(by)) for name, by in readers.readers.items() if len(by) == 1}
    counts = list(alone.values())
    return {norm: layer for layer, norm in alone.items() if norm and counts.count(norm) == 1}


# -- folding --------------------------------------------------------------------------------------------------------


def scale_and_shift(norm: nn.Module) -> tuple[Tensor, Tensor]:
    """The factor and the offset of each channel of a batch norm, float64 where the device has it."""
    if not is_norm(norm) or norm.running_mean is None or norm.running_var is None:
        raise ConvertError(f"{type(norm).__name__} has no running statistics to fold")
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
    last = cast(nn.Linear, module[-1] if isinstance(module, nn.Sequential) else module)
    layer_type = layer_type_of(last)
    groups, sides = getattr(last, "groups", 1), [1] * (last.weight.ndim - 2)
    weight = last.weight.detach().to(scale)
    if layer_type is not None and layer_type.in_first:  # (in, out / groups, ..), the groups' outputs one after another
        each = scale.reshape(groups, 1, -1, *sides)
        weight = (weight.unflatten(0, (groups, -1)) * each).flatten(0, 1)
    else:
        weight = weight * scale.reshape(-1, 1, *sides)
    bias = shift if last.bias is None else last.bias.detach().to(scale) * scale + shift
    last.weight = nn.Parameter(weight.to(last.weight.dtype), requires_grad=False)
    last.bias = nn.Parameter(bias.to(last.weight.dtype), requires_grad=False)
    return module
