"""What the parent of a layer reads of it beside its output, answered by what stands in for the layer in a fused net."""

from typing import cast

import torch
from torch import Tensor, nn

from hodec.errors import ConvertError
from hodec.layers.base import FactorizedLayer
from hodec.layers.dense_weight import DenseWeight

# Beside the settings that a factorized layer takes over.
OTHERS = ("groups", "nx", "nf")


class Answers(nn.Module):
    """A stand-in made of several modules; ``answer_for`` gives it the settings of the layer that it stands for."""

    weight_shape: tuple[int, ...]
    in_first: bool

    @property
    def weight(self) -> Tensor:
        """The dense weight of the layer: its type, device and shape at once, its values where they are asked for.

        Raises:
            ConvertError: the values of a convolution's weight are asked for.
        """
        return DenseWeight.of(self._values, self.weight_shape, next(self.parameters()))

    @torch.no_grad()
    def _values(self) -> Tensor:
        if len(self.weight_shape) > 2:
            raise ConvertError(
                "the values of a convolution's weight are read, which a fused net no longer has in one piece: leave "
                "that layer out of the plan, or serve the net that is not fused"
            )
        like = next(self.parameters())
        one = torch.eye(self.weight_shape[0 if self.in_first else 1], dtype=like.dtype, device=like.device)
        made = self(one) - self(torch.zeros_like(one))
        return cast(Tensor, made if self.in_first else made.mT)


class Row(Answers, nn.Sequential):
    """torch's own layers one after another, in place of one layer."""


def answer_for(made: nn.Module, layer: FactorizedLayer) -> nn.Module:
    """``made``, answering what the layer that it stands in for would: ``stride``, ``in_features``, ``weight``, .."""
    if isinstance(made, Answers):
        made.weight_shape = layer.layer_type.stored_shape(layer.shape)
        made.in_first = layer.layer_type.in_first
        for name in (*layer.settings, *OTHERS):
            if hasattr(layer, name):
                setattr(made, name, getattr(layer, name))
    return made
