"""The dense weight of a layer that has none: read by parents for its type, device and shape, rarely for its values."""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_map

from hodec.errors import ConvertError

# What is known without the values.
KNOWN: frozenset[Callable[..., object]] = frozenset(
    {
        Tensor.size, Tensor.dim, Tensor.numel, Tensor.nelement, Tensor.ndimension, Tensor.is_floating_point,
        Tensor.is_complex, Tensor.element_size, torch.is_floating_point, torch.is_complex, torch.numel,
        *(getattr(Tensor, name).__get__ for name in ("shape", "dtype", "ndim", "layout", "grad", "is_sparse")),
    }
)  # fmt: skip

DEVICE, DATA = Tensor.device.__get__, Tensor.data.__get__  # type: ignore[attr-defined]


class DenseWeight(Tensor):
    """A weight that is rebuilt from factors by ``rebuild`` for each function that needs its values.

    Gradients reach the factors. It is no parameter, and cannot be written to.
    """

    rebuild: Callable[[], Tensor]
    place: torch.device
    _is_hf_initialized = True  # by which transformers leaves it as it is when it fills in a model

    @classmethod
    def of(cls, rebuild: Callable[[], Tensor], shape: Sequence[int], like: Tensor) -> "DenseWeight":
        """A weight of this shape, with the type and device of ``like``; nothing is computed yet."""
        with _disable_current_modes():  # torch.export's would make a fake tensor, which cannot be of this class
            made = torch.empty(tuple(shape), dtype=like.dtype, device="meta").as_subclass(cls)
        made.rebuild, made.place = rebuild, like.device
        return made

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., object],
        types: Sequence[type],
        args: Sequence[object] = (),
        kwargs: Mapping[str, object] | None = None,
    ) -> object:
        """What ``func`` gives for the values.

        Raises:
            ConvertError: it would write to them.
        """
        if func in KNOWN:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **(kwargs or {}))
        first = next(iter((*args, *(kwargs or {}).values())))
        if isinstance(first, DenseWeight):
            if func == DEVICE:
                return first.place
            if func == DATA:  # as a copy it would take what is written to it, and nobody would see it
                return DenseWeight.of(lambda: first.rebuild().detach(), first.shape, first)
            name = getattr(func, "__name__", "")
            if (name.endswith("_") and not name.endswith("__")) or name in ("__setitem__", "__set__"):
                raise ConvertError(
                    f"{name}: the weight of a factorized layer is computed from its factors and cannot be written to; "
                    "write to its parameters (layer.load_factors), or factorize after the weights are in place"
                )
        return func(*tree_map(_values, tuple(args)), **tree_map(_values, dict(kwargs or {})))


def _values(one: object) -> object:
    return one.rebuild() if isinstance(one, DenseWeight) else one
