"""What a linear layer's settings mean to a factorized one: kept in one place for every method."""

from collections.abc import Sequence
from typing import Any, Self

import torch
from torch import nn

from hodec.formats.layer_types import LAYER_TYPES
from hodec.formats.modes import Modes
from hodec.layers.base import FactorizedLayer


class FactorizedLinear(FactorizedLayer):
    """Base of the factorized linear layers; input (.., I), output (.., O).

    Args:
        in_features, out_features, bias: as in ``nn.Linear``.
        ranks: the format's ranks.
        modes: how the features split; by default evenly into two modes a side.
        execution: how inference runs, one of ``form.executions``; by default the first.
    """

    layer_type = LAYER_TYPES["linear"]

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        ranks: Sequence[int],
        modes: Modes | None = None,
        bias: bool = True,
        execution: str = "",
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__((out_features, in_features), ranks=ranks, modes=modes, execution=execution)
        self.in_features, self.out_features = in_features, out_features
        self.build_factors(device=device, dtype=dtype)
        self.bias = nn.Parameter(torch.zeros(out_features, device=device, dtype=dtype)) if bias else None
        self.reset_parameters()

    def build_factors(self, *, device: Any, dtype: Any) -> None:
        """Create the parameters that hold the factors, uninitialized."""
        raise NotImplementedError

    @classmethod
    def like(cls, module: Any, ranks: Sequence[int], *, modes: Modes | None = None, execution: str = "") -> Self:
        return cls(
            module.in_features,
            module.out_features,
            ranks=ranks,
            modes=modes,
            bias=module.bias is not None,
            execution=execution,
            device=module.weight.device,
            dtype=module.weight.dtype,
        )
