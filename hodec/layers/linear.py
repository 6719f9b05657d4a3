"""FactorizedLinear: the settings of a linear layer, and its ops as torch runs them, for every format."""

from collections.abc import Sequence
from typing import Any, Unpack, cast

import torch.nn.functional as F
from torch import Tensor, nn

from hodec.formats.layer_types import LAYER_TYPES, LINEAR_IN_FIRST
from hodec.formats.ops import Op
from hodec.layers.base import FactorizedLayer, LayerOptions, added


class FactorizedLinear(FactorizedLayer):
    """Base of the factorized linear layers; input (.., I), output (.., O).

    Args:
        in_features, out_features: as in ``nn.Linear``.
        options: see ``LayerOptions``.
    """

    layer_type = LAYER_TYPES["linear"]
    settings = ("in_features", "out_features")

    def __init__(self, in_features: int, out_features: int, **options: Unpack[LayerOptions]) -> None:
        super().__init__((out_features, in_features), **options)
        self.in_features, self.out_features = in_features, out_features

    @classmethod
    def settings_of(cls, module: nn.Module) -> dict[str, Any]:
        """The settings of a linear layer of any layout, by its weight: not all have names for them."""
        out, inp = cls.layer_type.to_oihw(cast(Tensor, module.weight)).shape
        return {"in_features": inp, "out_features": out}

    def forward(self, x: Tensor) -> Tensor:
        """(.., I) -> (.., O)."""
        execution = self.running_execution()
        ops = self.ops[execution]
        if any(op.contracts for op in ops):
            return self._chain(x, ops)
        *first, last = self.op_kernels(execution)
        for kernel in first:
            x = F.linear(x, kernel)
        return F.linear(x, last, self.bias)

    def _chain(self, x: Tensor, ops: Sequence[Op]) -> Tensor:
        y = x.reshape(-1, 1, 1, *self.modes.inputs)  # n p r i1 .. id, with p outputs done, rank r
        for op, view in zip(ops, self.views(), strict=True):
            y = self.contract(y, op, view)
        return added(y.reshape(*x.shape[:-1], self.out_features), self.bias)


class InFirst(FactorizedLinear):
    """Stands in for a linear layer that stores (I, O), such as ``Conv1D`` of transformers."""

    layer_type = LINEAR_IN_FIRST

    def dense_settings(self) -> dict[str, Any]:
        return {"nf": self.out_features, "nx": self.in_features}

    @property
    def nx(self) -> int:
        """``in_features``."""
        return self.in_features

    @property
    def nf(self) -> int:
        """``out_features``."""
        return self.out_features
