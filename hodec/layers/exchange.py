"""tensorly in and out: the factors of a layer as a tensorly tensor, and a layer from a tensorly tensor.

tensorly's backend is read and never changed: tensors go out as those of the backend that is active, and come in from
any backend. tensorly is imported when it is asked for, and nowhere else.
"""

from collections.abc import Callable, Iterable, Sequence
from types import ModuleType
from typing import Protocol, cast

import numpy as np
import torch
from torch import Tensor

from hodec.errors import ConvertError
from hodec.formats.base import Format
from hodec.formats.modes import Modes
from hodec.formats.ops import Shape


class TensorlyTensor(Protocol):
    """A ``TTTensor``, ``TuckerTensor`` or ``CPTensor`` of tensorly."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    def to_tensor(self) -> object: ...


def to_tensorly(fmt: Format, factors: Sequence[Tensor], shape: Shape) -> TensorlyTensor:
    """Factors as the tensorly tensor of their format.

    Raises:
        ConvertError: tensorly is not installed or has no type for this format.
    """
    tl, make = _tensorly(), _maker(fmt)
    first, rest = fmt.to_tensorly(factors, shape)
    convert = _converter(tl)
    parts = [convert(part) for part in rest]
    return make(parts) if first is None else make((convert(first), parts))


def from_tensorly(fmt: Format, tensor: object, shape: Shape, *, modes: Modes | None) -> tuple[list[Tensor], Modes]:
    """The factors of a format, and its modes, from a tensorly tensor of the weight (O, I, K_1, ..).

    Args:
        modes: how channels split; by default evenly, into as many modes as the tensor has.

    Raises:
        ConvertError: tensorly is not installed, it has no type for this format, or the tensor is of another type or
            shape.
    """
    tl, make = _tensorly(), _maker(fmt)
    kind = getattr(make, "__name__", "")
    if type(tensor).__name__ != kind:
        raise ConvertError(f"from_tensorly: a {type(tensor).__name__} was given; {type(fmt).__name__} takes a {kind}")
    parts = list(cast(Iterable[object], tensor))
    first, parts = (None, parts) if fmt.tensorly_type == "tt" else (parts[0], cast(list[object], parts[1]))
    factors = [_as_torch(tl, part) for part in parts]
    given = tuple(factor.shape[1 if factor.ndim == 3 else 0] for factor in factors)
    for split in [modes] if modes else _splits(fmt, shape, len(factors)):
        if fmt.tensorly_shape(shape, split) == given:
            return fmt.from_tensorly(None if first is None else _as_torch(tl, first), factors, shape), split
    expected = fmt.tensorly_shape(shape, modes or _splits(fmt, shape, len(factors))[-1])
    raise ConvertError(
        f"from_tensorly: the tensor has shape {given}; a weight {tuple(shape)} is a {kind} of shape {expected}"
        + ("; give modes=Modes(inputs, outputs) if its channels split in another way" if fmt.uses_modes else "")
    )


def _splits(fmt: Format, shape: Shape, count: int) -> list[Modes]:
    counts = range(fmt.min_modes, max(fmt.min_modes, count) + 1) if fmt.uses_modes else (1,)
    return [Modes.split(shape[1], shape[0], n) for n in counts]


def _tensorly() -> ModuleType:
    try:
        import tensorly
    except ImportError as error:
        raise ConvertError("tensorly is not installed: pip install 'hodec[tensorly]'") from error
    return tensorly  # type: ignore[no-any-return]


def _maker(fmt: Format) -> Callable[[object], TensorlyTensor]:
    from tensorly.cp_tensor import CPTensor
    from tensorly.tt_tensor import TTTensor
    from tensorly.tucker_tensor import TuckerTensor

    makers: dict[str, Callable[[object], TensorlyTensor]] = {"cp": CPTensor, "tt": TTTensor, "tucker": TuckerTensor}
    if fmt.tensorly_type not in makers:
        raise ConvertError(
            f"tensorly has no type for the factors of {type(fmt).__name__}; those of tt, tt_classical, tucker and cp "
            "layers have one"
        )
    return makers[fmt.tensorly_type]


def _converter(tl: ModuleType) -> Callable[[Tensor], object]:
    """From torch to the active backend; torch and numpy share the memory of factors on the CPU."""
    backend = tl.get_backend()
    if backend == "pytorch":
        return lambda tensor: tensor
    return _as_numpy if backend == "numpy" else lambda tensor: tl.tensor(_as_numpy(tensor))


def _as_numpy(tensor: Tensor) -> np.ndarray:
    """The numbers of a tensor; numpy has no bfloat16, whose numbers float32 holds exactly."""
    return (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).detach().cpu().numpy()


def _as_torch(tl: ModuleType, part: object) -> Tensor:
    if isinstance(part, Tensor):
        return part.detach()
    return torch.from_numpy(np.array(part if isinstance(part, np.ndarray) else tl.to_numpy(part)))
