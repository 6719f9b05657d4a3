"""Factorized stacks of linear maps: the weights of a layer's experts, which share their ranks."""

from collections.abc import Callable
from typing import ClassVar, Unpack

import torch
from torch import Tensor, nn

from hodec.formats.layer_types import LAYER_TYPES
from hodec.formats.stacked import Stacked
from hodec.layers.base import FactorizedLayer, LayerOptions
from hodec.layers.linear import FactorizedLinear
from hodec.layers.made import Made, once


class FactorizedExperts(Made, FactorizedLayer):
    """E linear maps without biases, each with factors of its own; input (E, .., I), output (E, .., O).

    Args:
        experts, out_features, in_features: E, O and I.
        options: see ``LayerOptions``; there is no bias.
    """

    layer_type = LAYER_TYPES["experts"]
    settings = ("experts", "out_features", "in_features")
    linear: ClassVar[type[FactorizedLinear]]

    def __init__(self, experts: int, out_features: int, in_features: int, **options: Unpack[LayerOptions]) -> None:
        options["bias"] = False
        super().__init__((out_features, in_features, experts), **options)

    def build_factors(self, zeros: Callable[..., nn.Parameter]) -> None:
        out, inp, experts = self.shape
        one = self.linear(inp, out, ranks=self.ranks, modes=self.modes, bias=False, initialize=False, device="meta")
        self.stacks = nn.ParameterList(zeros(experts, *factor.shape) for factor in one.factors())

    def views(self) -> list[Tensor]:
        return list(self.stacks)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        super().reset_parameters()  # which takes the experts for inputs too
        self.load_factors([f * self.shape[2] ** (0.5 / len(self.stacks)) for f in self.factors()])

    def forward(self, x: Tensor) -> Tensor:
        """(E, .., I) -> (E, .., O)."""
        return torch.einsum("e...i,eoi->e...o", x, self.weight_in_whole())


@once
def experts_class(linear: type[FactorizedLinear]) -> type[FactorizedExperts]:
    """The layer whose experts are each factorized as ``linear`` does it; made once."""
    words = f"Experts that are each a ``{linear.__name__}``; see ``FactorizedExperts``."
    names = {"linear": linear, "format": Stacked(linear.format), "__doc__": words, "__module__": __name__}
    return type(f"{linear.__name__}Experts", (FactorizedExperts,), {**names, "made_by": (experts_class, linear)})
