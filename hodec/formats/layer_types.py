"""Types of dense layers: how each stores its weight, and along which axes it moves."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any, cast

import torch
from torch import Tensor, nn

from hodec.formats.same_padding import SAME_CONVS


@dataclass(frozen=True)
class LayerType:
    """A type of dense layer.

    Formats see every weight as (O, I, K_1, .., K_dims), output channels first; a transposed convolution stores
    (I, O, ..) and an embedding (entries, width) stands for a linear map from entries to width.

    Attributes:
        dims: spatial axes of its kernel, 0 for linear layers and embeddings.
        in_first: whether the first two axes of the stored weight are (input, output).
        transposed: whether it is a transposed convolution.
        is_embedding: whether its weight is looked up and not multiplied by.
        stacked: whether it is E linear maps (E, O, I), which formats see as (O, I, E).
    """

    name: str
    dims: int
    in_first: bool = False
    transposed: bool = False
    is_embedding: bool = False
    stacked: bool = False

    def stored_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        """Shape (O, I, ..) -> that of the layer's own layout."""
        out, inp, *kernel = shape
        if self.stacked:
            return (*kernel, out, inp)
        return (inp, out, *kernel) if self.in_first else (out, inp, *kernel)

    def to_oihw(self, weight: Tensor) -> Tensor:
        """Stored weight -> (O, I, ..)."""
        if self.stacked:
            return weight.movedim(0, -1)
        return weight.transpose(0, 1) if self.in_first else weight

    def from_oihw(self, weight: Tensor) -> Tensor:
        """(O, I, ..) -> the layer's own layout."""
        if self.stacked:
            return weight.movedim(-1, 0).contiguous()
        return weight.transpose(0, 1).contiguous() if self.in_first else weight


class DenseExperts(nn.Module):
    """E linear maps without biases, each with a batch of its own; input (E, .., I), output (E, .., O)."""

    def __init__(self, experts: int, out_features: int, in_features: int, **settings: Any) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(experts, out_features, in_features, **settings) / in_features**0.5)
        self.bias = None
        self.experts, self.out_features, self.in_features = experts, out_features, in_features

    def forward(self, x: Tensor) -> Tensor:
        """(E, .., I) -> (E, .., O)."""
        return torch.einsum("e...i,eoi->e...o", x, self.weight)


_TYPES: dict[type[nn.Module], LayerType] = {
    nn.Linear: LayerType("linear", 0),
    nn.Embedding: LayerType("embedding", 0, in_first=True, is_embedding=True),
    nn.Conv1d: LayerType("conv1d", 1),
    nn.Conv2d: LayerType("conv2d", 2),
    nn.Conv3d: LayerType("conv3d", 3),
    nn.ConvTranspose1d: LayerType("conv_transpose1d", 1, in_first=True, transposed=True),
    nn.ConvTranspose2d: LayerType("conv_transpose2d", 2, in_first=True, transposed=True),
    nn.ConvTranspose3d: LayerType("conv_transpose3d", 3, in_first=True, transposed=True),
}

EXPERTS = LayerType("experts", 0, stacked=True)
LINEAR_IN_FIRST = LayerType("linear_in_first", 0, in_first=True)

# Classes of packages that hodec does not import.
_BY_NAME: dict[str, LayerType] = {"transformers.pytorch_utils.Conv1D": LINEAR_IN_FIRST}

LAYER_TYPES: dict[str, LayerType] = {
    layer_type.name: layer_type for layer_type in (*_TYPES.values(), *_BY_NAME.values(), EXPERTS)
}

# Classes of hodec's own.
_OTHERS: dict[type[nn.Module], LayerType] = {cls: LAYER_TYPES[name] for name, cls in SAME_CONVS.items()}

# Name of a layer type -> torch's class of its dense layers.
DENSE_CLASSES: dict[str, type[nn.Module]] = {layer_type.name: cls for cls, layer_type in _TYPES.items()}


def layer_type_of(module: nn.Module) -> LayerType | None:
    """The type of a layer; None for other modules, and for subclasses that may use their weight differently."""
    cls = type(module)
    base = next((one for one in _TYPES if issubclass(cls, one) and _same_forward(cls, one)), None)
    return _TYPES[base] if base else _OTHERS.get(cls) or _BY_NAME.get(f"{cls.__module__}.{cls.__qualname__}")


def _same_forward(cls: type[nn.Module], base: type[nn.Module]) -> bool:
    """Whether a subclass computes what ``base`` does: no method that a call runs is its own, nor is ``weight``."""
    names = ("__call__", "__getattr__", "forward", "_conv_forward", "_output_padding", "weight", "bias")
    return all(getattr(cls, name, None) is getattr(base, name, None) for name in names)


def dense_class(layer_type: LayerType) -> Callable[..., nn.Module]:
    """The class of the dense layers of a type, imported where it is of another package."""
    if layer_type.name in DENSE_CLASSES:
        return DENSE_CLASSES[layer_type.name]
    home, _, name = next(path for path, one in _BY_NAME.items() if one == layer_type).rpartition(".")
    return cast(Callable[..., nn.Module], getattr(import_module(home), name))
