"""Kinds of dense layers: how each stores its weight, and along which axes it moves."""

from dataclasses import dataclass

from torch import Tensor, nn


@dataclass(frozen=True)
class Kind:
    """A kind of dense layer.

    Formats see every weight as (O, I, K_1, .., K_dims), output channels first; a transposed convolution stores
    (I, O, ..) and an embedding (entries, width) stands for a linear map from entries to width.

    Attributes:
        dims: spatial axes of its kernel, 0 for linear layers and embeddings.
        swapped: whether the first two axes of the stored weight are (input, output).
        transposed: whether it is a transposed convolution.
        lookup: whether its weight is looked up and not multiplied by.
    """

    name: str
    dims: int
    swapped: bool = False
    transposed: bool = False
    lookup: bool = False

    def canonical(self, weight: Tensor) -> Tensor:
        """Stored weight -> (O, I, ..)."""
        return weight.transpose(0, 1) if self.swapped else weight

    def stored(self, weight: Tensor) -> Tensor:
        """(O, I, ..) -> the layer's own layout."""
        return weight.transpose(0, 1).contiguous() if self.swapped else weight


_TYPES: dict[type[nn.Module], Kind] = {
    nn.Linear: Kind("linear", 0),
    nn.Embedding: Kind("embedding", 0, swapped=True, lookup=True),
    nn.Conv1d: Kind("conv1d", 1),
    nn.Conv2d: Kind("conv2d", 2),
    nn.Conv3d: Kind("conv3d", 3),
    nn.ConvTranspose1d: Kind("conv_transpose1d", 1, swapped=True, transposed=True),
    nn.ConvTranspose2d: Kind("conv_transpose2d", 2, swapped=True, transposed=True),
    nn.ConvTranspose3d: Kind("conv_transpose3d", 3, swapped=True, transposed=True),
}

KINDS: dict[str, Kind] = {kind.name: kind for kind in _TYPES.values()}


def kind_of(module: nn.Module) -> Kind | None:
    """The kind of a layer; None for other modules, and for subclasses, which may use their weight differently."""
    return _TYPES.get(type(module))
