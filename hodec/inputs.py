"""ModelInput: what a model is called with, made from tensors, lists, dicts and batches of loaders."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from hodec.errors import PlanError

T = TypeVar("T")
Sizes = tuple[tuple[tuple[int, ...], str], ...]
"""Shape and type of each tensor: ``(((1, 3, 32, 32), 'float32'),)``."""


@dataclass(frozen=True)
class ModelInput:
    """The arguments of one call of a model; tensors may be nested in lists, tuples and dicts, among other values."""

    args: tuple[object, ...] = ()
    kwargs: Mapping[str, object] = field(default_factory=dict)

    def run(self, model: Callable[..., T]) -> T:
        """What the model gives for this input."""
        return model(*self.args, **self.kwargs)

    @property
    def tensors(self) -> list[Tensor]:
        """All tensors, in the order of the arguments."""
        return [leaf for leaf in tree_leaves((self.args, dict(self.kwargs))) if isinstance(leaf, Tensor)]

    @property
    def batch(self) -> int:
        """How many images it holds: the length of the first tensor, or that of a list of images."""
        return self._listed or next((len(x) for x in self.tensors if x.ndim), 1)

    @property
    def _listed(self) -> int:
        """Length of its first argument where that is a list of images, three axes each, as detectors take; else 0."""
        first = next(iter((*self.args, *self.kwargs.values())), None)
        if isinstance(first, list | tuple) and all(isinstance(x, Tensor) and x.ndim == 3 for x in first):
            return len(first)
        return 0

    def map(self, change: Callable[[Tensor], Tensor]) -> "ModelInput":
        """The same input with every tensor changed."""
        args, kwargs = tree_map(
            lambda leaf: change(leaf) if isinstance(leaf, Tensor) else leaf, (self.args, dict(self.kwargs))
        )
        return ModelInput(args, kwargs)

    def to(self, device: torch.device, dtype: torch.dtype | None = None) -> "ModelInput":
        """The same input elsewhere; floating-point tensors in another type where one is given."""
        return self.map(lambda x: x.to(device, dtype if dtype is not None and x.is_floating_point() else x.dtype))

    def with_batch(self, size: int) -> "ModelInput":
        """The given images again and again; tensors without its axis and images in a list stay as they are."""
        if self._listed:
            return self
        batch = self.batch
        return self.map(lambda x: x[torch.arange(size, device=x.device) % batch] if x.ndim and len(x) == batch else x)

    @property
    def sizes(self) -> Sizes:
        """Shape and type of every tensor."""
        return tuple((tuple(x.shape), str(x.dtype).removeprefix("torch.")) for x in self.tensors)

    def __str__(self) -> str:
        named = [*map(_described, self.args), *(f"{key}={_described(one)}" for key, one in self.kwargs.items())]
        return ", ".join(named)


Inputs = Tensor | Sequence[object] | Mapping[str, object] | ModelInput
"""A tensor, the arguments in a tuple or list, keyword arguments in a dict, or a batch of a loader."""


def as_input(given: Inputs, model: nn.Module | None = None, *, most: int | None = None) -> ModelInput:
    """What the model is called with.

    Args:
        given: a tensor; arguments in a tuple or list, where those that ``forward`` cannot take (labels behind the
            inputs in a loader's batch) are left out; keyword arguments in a dict, alone or with labels behind it, where
            those that ``forward`` does not take are left out. A dict of which it takes none is one argument.
        model: None takes all as it is given.
        most: how many arguments of a tuple or list are inputs; None: as many as ``forward`` can take.

    Raises:
        PlanError: no tensor with a batch as its first axis, or arguments that ``forward`` cannot be called with.
    """
    if isinstance(given, ModelInput):
        return given
    parameters = _parameters(model)
    if isinstance(given, Tensor):
        made = ModelInput((given,))
    elif isinstance(given, Mapping):
        made = _keywords(given, parameters)
    elif isinstance(given, Sequence) and not isinstance(given, str):
        args = tuple(given)[: _positions(parameters) if most is None else most]
        first = _keywords(args[0], parameters) if args and isinstance(args[0], Mapping) else ModelInput()
        made = first if first.kwargs else ModelInput(args)
    else:
        made = ModelInput((given,))
    if not any(x.ndim and len(x) for x in made.tensors) or any(x.ndim == 0 for x in made.args if isinstance(x, Tensor)):
        raise PlanError(
            f"example_input must be a tensor, or several in a tuple, list or dict, with the batch as its first axis; "
            f"{_described(given)} given{takes(model)}"
        )
    _check_complete(made, parameters, model)
    return made


def required(model: nn.Module) -> int:
    """How many positional arguments ``forward`` cannot do without, at least 1."""
    parameters = _parameters(model) or {}
    return max(1, sum(p.kind in POSITIONAL and p.default is p.empty for p in parameters.values()))


def takes(model: nn.Module | None) -> str:
    """What a model's ``forward`` takes, as the end of a message."""
    parameters = _parameters(model)
    if model is None or parameters is None:
        return ""
    names = [f"{p}".partition(":")[0].partition("=")[0].strip() for p in parameters.values()]
    optional = [p.default is not p.empty for p in parameters.values()]
    words = ", ".join(f"[{name}]" if free else name for name, free in zip(names, optional, strict=True))
    return f"; the forward of {type(model).__name__} takes ({words})"


POSITIONAL = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)

Parameters = Mapping[str, inspect.Parameter]


def _parameters(model: nn.Module | None) -> Parameters | None:
    """The parameters of ``forward``; None where it does not say."""
    try:
        return None if model is None else inspect.signature(model.forward).parameters
    except (TypeError, ValueError):  # a compiled forward
        return None


def _positions(parameters: Parameters | None) -> int | None:
    if parameters is None or any(p.kind is p.VAR_POSITIONAL for p in parameters.values()):
        return None
    return sum(p.kind in POSITIONAL for p in parameters.values())


def _keywords(given: Mapping[str, object], parameters: Parameters | None) -> ModelInput:
    """Keyword arguments in the order of ``forward``."""
    if parameters is None:
        return ModelInput((), dict(given))
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    taken = {name: given[name] for name, p in parameters.items() if name in given and p.kind in kinds}
    if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        taken |= {name: one for name, one in given.items() if name not in taken}
    return ModelInput((), taken) if taken else ModelInput((dict(given),))


def _check_complete(made: ModelInput, parameters: Parameters | None, model: nn.Module | None) -> None:
    try:
        inspect.Signature(list((parameters or {}).values())).bind(*made.args, **made.kwargs) if parameters else None
    except TypeError as error:
        raise PlanError(f"example_input ({made}) does not fit: {error}{takes(model)}") from error


def _described(value: object) -> str:
    """A value by its type and size, in words."""
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} {'x'.join(map(str, value.shape)) or 'number'}"
    if isinstance(value, Mapping):
        return f"{{{', '.join(f'{key}: {_described(one)}' for key, one in value.items())}}}"
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_described, value))}]"
    return repr(value) if value is None or isinstance(value, bool | int | float | str) else type(value).__name__


# -- as JSON ---------------------------------------------------------------------------------------------------------


def form_of(given: ModelInput) -> object:
    """How the tensors of an input hang together, as JSON; each tensor is ``{"tensor": its number}``.

    None where all arguments are tensors in their order, each with the batch as its first axis, and for values that
    JSON does not have.
    """
    batched = all(x.ndim and len(x) == given.batch for x in given.tensors)
    if batched and not given.kwargs and all(isinstance(one, Tensor) for one in given.args):
        return None
    numbers = {id(x): k for k, x in reversed(list(enumerate(given.tensors)))}
    try:
        args = [_to_json(one, numbers) for one in given.args]
        return {"args": args, "kwargs": {key: _to_json(one, numbers) for key, one in given.kwargs.items()}}
    except TypeError:
        return None


def _to_json(value: object, numbers: Mapping[int, int]) -> object:
    if isinstance(value, Tensor):
        return {"tensor": numbers[id(value)]}
    if isinstance(value, dict) and all(isinstance(key, str) for key in value):
        return {"dict": {key: _to_json(one, numbers) for key, one in value.items()}}
    if type(value) in (list, tuple):
        return {type(value).__name__: [_to_json(one, numbers) for one in value]}  # type: ignore[attr-defined]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError(type(value).__name__)


def from_form(form: object, tensors: Sequence[Tensor]) -> ModelInput:
    """Inverse of ``form_of``.

    Raises:
        PlanError: it is no such form.
    """
    if form is None:
        return ModelInput(tuple(tensors))
    try:
        args, kwargs = form["args"], form["kwargs"]  # type: ignore[index]
        return ModelInput(
            tuple(_from_json(one, tensors) for one in args),
            {key: _from_json(one, tensors) for key, one in kwargs.items()},
        )
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        raise PlanError(f"the form of the plan's inputs is not readable: {error!r}") from error


def _from_json(value: object, tensors: Sequence[Tensor]) -> object:
    if not isinstance(value, dict):
        if isinstance(value, list):
            raise ValueError(value)
        return value
    ((kind, inner),) = value.items()
    if kind == "tensor":
        if type(inner) is not int or inner < 0:
            raise ValueError(inner)
        return tensors[inner]
    if kind == "dict":
        return {key: _from_json(one, tensors) for key, one in inner.items()}
    return {"list": list, "tuple": tuple}[kind](_from_json(one, tensors) for one in inner)
