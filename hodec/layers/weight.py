"""Weights of modules that hold several: each is replaced by a factorized layer that the module reads as a tensor.

The module keeps its class's forward pass and becomes an instance of a subclass in place, so that whatever else refers
to it goes on doing so. Its factorized weights stand under ``factorized``: ``rnn.factorized.weight_hh_l0``.
"""

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hodec.formats.roles import REBUILT
from hodec.layers.base import FactorizedLayer, added

# The attribute of a module that holds its factorized weights by name.
HOLDER = "factorized"


def holder_name(parameter: str) -> str:
    """The factorized layer in place of a weight: ``rnn.weight_hh_l0`` -> ``rnn.factorized.weight_hh_l0``."""
    owner, _, leaf = parameter.rpartition(".")
    return f"{owner}.{HOLDER}.{leaf}" if owner else f"{HOLDER}.{leaf}"


def weight_path(name: str) -> str:
    """Inverse of ``holder_name``; other names are as they were."""
    before, holder, leaf = name.rpartition(f"{HOLDER}.")
    return before + leaf if holder and (not before or before.endswith(".")) and "." not in leaf else name


class FactorizedWeights(nn.Module):
    """Put before the class of a module some of whose parameters are factorized.

    Reading such a parameter gives the dense weight: in training it is multiplied out once a call, and gradients reach
    the factors; in inference it is remembered until the factors change.

    Attributes:
        factorized: name of the parameter -> its factorized layer, whose ``execution`` says how it is run.
    """

    dense_class: type[nn.Module]
    mixin: type["FactorizedWeights"]

    def __getattr__(self, name: str) -> Any:
        layer = self._factorized(name)
        if layer is None:
            return super().__getattr__(name)
        seen = self.__dict__.get("_seen")
        if seen is None:
            return _whole(layer)
        if name not in seen:
            seen[name] = _whole(layer)
        return seen[name]

    def _factorized(self, name: str) -> nn.Module | None:
        holder = cast(nn.ModuleDict | None, self.__dict__["_modules"].get(HOLDER))
        return None if holder is None or name not in holder else holder[name]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            return self.dense_class.__call__(self, *args, **kwargs)
        self.__dict__["_seen"] = {}  # a module that picks one expert after another reads its weight often
        try:
            return self.dense_class.__call__(self, *args, **kwargs)
        finally:
            self.__dict__["_seen"] = None

    def runs_factors(self, name: str) -> bool:
        """Whether the product with this weight runs by its factors."""
        layer = self._factorized(name)
        return layer is not None and getattr(layer, "execution", "") != REBUILT  # a fused one has no execution

    def product(self, name: str, x: Tensor) -> Tensor:
        """x W^T for the weight W of this name, factorized or not; (.., I) -> (.., O)."""
        layer = self._factorized(name)
        if layer is not None and self.runs_factors(name):
            return cast(Tensor, layer(x))
        return F.linear(x, getattr(self, name))

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Copies and pickles name the dense class: this one is made when it is first needed."""
        _, _, *rest = cast(tuple[Any, ...], super().__reduce_ex__(protocol))
        return (_blank, (self.mixin, self.dense_class), *rest)


class FactorizedProjection(FactorizedWeights):
    """A linear layer that its parent calls or whose weight it reads; input (.., I), output (.., O)."""

    def forward(self, x: Tensor) -> Tensor:
        """(.., I) -> (.., O)."""
        return added(self.product("weight", x), cast(Tensor | None, self.bias))


def _whole(layer: nn.Module) -> Tensor:
    """The dense weight of a factorized layer, or of the plain one that fusing put in its place."""
    return cast(Tensor, layer.weight_in_whole() if isinstance(layer, FactorizedLayer) else layer.weight)


_classes: dict[tuple[type[FactorizedWeights], type[nn.Module]], type[FactorizedWeights]] = {}


def factorized_class(first: type[FactorizedWeights], dense: type[nn.Module]) -> type[FactorizedWeights]:
    """The subclass of ``dense`` whose parameters may be factorized, with ``first`` before it; made once."""
    if (first, dense) not in _classes:
        words = f"``{dense.__name__}`` with factorized weights; see ``{first.__name__}``."
        names = {"dense_class": dense, "mixin": first, "__doc__": words, "__module__": first.__module__}
        _classes[first, dense] = type(f"Factorized{dense.__name__}", (first, dense), names)
    return _classes[first, dense]


def _blank(first: type[FactorizedWeights], dense: type[nn.Module]) -> nn.Module:
    made = factorized_class(first, dense)
    return made.__new__(made)
