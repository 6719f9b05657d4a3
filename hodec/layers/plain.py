"""The plain layer that a layer amounts to: one that pads its input, or computes its weight from other parameters.

What a layer applies is read off its own forward pass, which is run on inputs of random numbers; that the plain layer
computes the same is then tried on inputs of several sizes.
"""

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.overrides import TorchFunctionMode

from hodec.formats.layer_types import DENSE_CLASSES, layer_type_of
from hodec.formats.same_padding import SAME_CONVS
from hodec.layers.base import same_random_state

Settings = dict[str, int | str | tuple[int, ...]]

_CONV = ("stride", "padding", "dilation", "groups")
_TRANSPOSED = ("stride", "padding", "output_padding", "groups", "dilation")

# torch's function of each type of layer, and its arguments behind input, weight and bias.
FUNCTIONS: dict[str, tuple[Callable[..., Tensor], tuple[str, ...]]] = {
    "linear": (F.linear, ()),
    "conv1d": (F.conv1d, _CONV),
    "conv2d": (F.conv2d, _CONV),
    "conv3d": (F.conv3d, _CONV),
    "conv_transpose1d": (F.conv_transpose1d, _TRANSPOSED),
    "conv_transpose2d": (F.conv_transpose2d, _TRANSPOSED),
    "conv_transpose3d": (F.conv_transpose3d, _TRANSPOSED),
}

# Relative difference of float64 outputs up to which two layers are held to compute the same: 4.5 million roundings of
# 2.2e-16 each.
TOLERANCE = 1e-9

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


@dataclass(frozen=True)
class Plain:
    """What a layer amounts to.

    Attributes:
        layer: a layer of torch, or one of ``SAME_CONVS``, with the same outputs in evaluation mode; the given module
            itself where that is one.
        computed_from: numbers in the parameters that its weight is computed from; 0 where it is a parameter.
        how: what computes the weight, in words.
    """

    layer: nn.Module
    computed_from: int = 0
    how: str = ""


def plain_layer(module: nn.Module) -> Plain | None:
    """The plain layer that ``module`` amounts to; None for other modules, or where trying does not show that it is one.

    A plain layer made here has the parameters of ``module`` where it applies them as they are, and copies of what it
    computes from others, and its mode; hooks stay where they are.
    """
    if layer_type_of(module) is not None and not _computes(module):
        return Plain(module)
    kind = next((name for name, cls in DENSE_CLASSES.items() if name in FUNCTIONS and isinstance(module, cls)), None)
    if kind is None:
        return None
    try:
        # whatever device is the default now: transformers builds nets without numbers, on ``meta``
        with same_random_state(module.parameters()), torch.random.fork_rng(devices=[]), torch.device("cpu"):
            torch.manual_seed(0)
            return _tried(module, kind)
    except Exception:  # whatever a forward pass raises: then it is no plain layer
        return None


def _computes(module: nn.Module) -> bool:
    """Whether the weight or the bias is no parameter of its own."""
    if parametrize.is_parametrized(module):  # reading its weight is not without effect
        return True
    return any(name not in module._parameters for name in ("weight", "bias") if hasattr(module, name))


def _tried(module: nn.Module, kind: str) -> Plain | None:
    trial = _without_hooks(copied(module))
    blank = next(trial.parameters()).is_meta
    trial = (trial.to_empty(device="cpu") if blank else trial.cpu()).double().eval()
    with torch.no_grad():
        for tensor in (*trial.parameters(), *(trial.buffers() if blank else ())):
            if tensor.is_floating_point():  # not the values it has, which may be all zero
                tensor.copy_(torch.randn_like(tensor))
    inputs = list(_probes(module, kind))
    # spectral_norm and its like are defined by what they give in evaluation mode
    tries = [(x, False) for x in inputs] + [(inputs[0], True)] * (not _computes(module))
    call = _call(trial, kind, inputs[0])
    for settings, cls in _candidates(module, kind, call):
        try:
            made = _build(cls, call, settings)
            same = all(_equal(made, trial.train(mode), x) for x, mode in tries)
        except Exception:  # settings that do not go together
            continue
        if same:
            return _of(module, kind, cls, settings)
    return None


def _candidates(module: nn.Module, kind: str, call: "_Call") -> Iterator[tuple[Settings, Callable[..., nn.Module]]]:
    """Settings and class of layers to try: its own, what it gave to torch's function, and "same" padding."""
    names, plain = FUNCTIONS[kind][1], DENSE_CLASSES[kind]
    if not names:
        yield {}, plain
        return
    yield {name: getattr(module, name) for name in (*names, "padding_mode")}, plain
    yield call.settings, plain
    if kind in SAME_CONVS:
        yield {name: value for name, value in call.settings.items() if name != "padding"}, SAME_CONVS[kind]


def _of(module: nn.Module, kind: str, cls: Callable[..., nn.Module], settings: Settings) -> Plain:
    """The plain layer with what ``module`` really applies."""
    source = _without_hooks(copied(module)).eval()
    x = next(_probes(module, kind))
    weight = next(source.parameters())
    call = _call(source, kind, x.to(weight.device, weight.dtype))
    own = {id(p): module._parameters[name] for name, p in source._parameters.items() if p is not None}
    made = _build(cls, call, settings, own).train(module.training)
    if id(call.weight) in own:
        return Plain(made)
    bias = 0 if call.bias is None else call.bias.numel()
    return Plain(made, sum(p.numel() for p in module.parameters()) - bias, _how(module))


def _how(module: nn.Module) -> str:
    """What computes the weight of a layer, in words."""
    if parametrize.is_parametrized(module):
        chain = cast(nn.ModuleDict, module.parametrizations).values()
        return ", ".join(type(one).__name__.strip("_") for each in chain for one in cast(nn.ModuleList, each))
    norms = [hook for hooks in HOOKS for hook in getattr(module, hooks).values() if _of_torch(hook)]
    return ", ".join(type(hook).__name__ for hook in norms) or type(module).__name__


# -- what a forward pass gives to torch's function ------------------------------------------------------------------


@dataclass(frozen=True)
class _Call:
    """The arguments of one call of torch's function."""

    weight: Tensor
    bias: Tensor | None
    settings: Settings


class _Seen(Exception):
    """The function that was waited for is called."""


class _Watch(TorchFunctionMode):
    """Stops at the first call of the function of a type of layer."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.function, self.names = FUNCTIONS[kind]

    def __torch_function__(
        self,
        func: Callable[..., object],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> object:
        if func is not self.function:
            return func(*args, **(kwargs or {}))
        given = dict(zip(("input", "weight", "bias", *self.names), args)) | dict(kwargs or {})
        settings = {name: given[name] for name in self.names if name in given}
        raise _Seen(_Call(given["weight"], given.get("bias"), settings))


def _call(module: nn.Module, kind: str, x: Tensor) -> _Call:
    """What a layer gives to torch's function for this input, which is not computed."""
    try:
        with _Watch(kind), torch.enable_grad():
            module(x)
    except _Seen as seen:
        return cast(_Call, seen.args[0])
    raise ValueError(f"{type(module).__name__} does not call torch's function of its base class")


def _build(
    cls: Callable[..., nn.Module], call: _Call, settings: Settings, own: Mapping[int, nn.Parameter | None] | None = None
) -> nn.Module:
    """A layer of ``cls`` with the weight and bias of a call: copies, or the parameters that ``own`` has for them."""
    first, second, *kernel = call.weight.shape
    second *= cast(int, settings.get("groups", 1))
    sizes = (first, second) if "output_padding" in settings else (second, first)
    made = cls(*sizes, *([tuple(kernel)] if kernel else []), bias=call.bias is not None, device="meta", **settings)
    for name, tensor in (("weight", call.weight), ("bias", call.bias)):
        if tensor is not None:
            mine = (own or {}).get(id(tensor))
            copy_of = nn.Parameter(tensor.detach().clone(), requires_grad=tensor.requires_grad)
            made._parameters[name] = copy_of if mine is None else mine
    return made


@torch.no_grad()
def _equal(made: nn.Module, trial: nn.Module, x: Tensor) -> bool:
    wanted, given = trial(x), made(x)
    return given.shape == wanted.shape and bool((given - wanted).norm() <= TOLERANCE * wanted.norm())


def _probes(module: nn.Module, kind: str) -> Iterator[Tensor]:
    """Inputs of different sizes, also such as no stride divides, float64."""
    if not FUNCTIONS[kind][1]:
        for rows in (3, 1):
            yield torch.randn(rows, cast(int, module.in_features), dtype=torch.float64)
        return
    conv = cast(nn.modules.conv._ConvNd, module)
    reach = [d * (k - 1) + 1 for d, k in zip(conv.dilation, conv.kernel_size, strict=True)]
    for more in (0, 1):
        sides = [r + 2 * s + more + axis for axis, (r, s) in enumerate(zip(reach, conv.stride, strict=True))]
        yield torch.randn(1, conv.in_channels, *sides, dtype=torch.float64)


# -- copies --------------------------------------------------------------------------------------------------------


def copied(module: nn.Module) -> nn.Module:
    """A deep copy, also of modules that torch's older ``weight_norm`` gave a weight with a history."""
    memo = {
        id(value): value.detach().clone().requires_grad_(value.requires_grad)
        for each in module.modules()
        for value in vars(each).values()
        if isinstance(value, Tensor) and not value.is_leaf
    }
    return copy.deepcopy(module, memo)


def _of_torch(hook: object) -> bool:
    """Whether a hook is one by which torch computes a weight: ``weight_norm``, ``spectral_norm``, pruning."""
    return type(hook).__module__.startswith("torch.nn.utils.")


def users(hooks: Mapping[int, object]) -> dict[int, object]:
    """The hooks that are not torch's for computing a weight."""
    return {key: hook for key, hook in hooks.items() if not _of_torch(hook)}


def _without_hooks(module: nn.Module) -> nn.Module:
    """``module`` itself, with those hooks only by which torch computes weights."""
    for hooks in HOOKS:
        held = getattr(module, hooks)
        for key in users(held):
            del held[key]
    return module
