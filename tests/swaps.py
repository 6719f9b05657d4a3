"""What tests of planning and converting do over and over."""

import torch
from torch import nn

from hodec.layers.base import FactorizedLayer
from hodec.plan.plan import Plan
from hodec.ranks import Manual, make_plan

X = torch.randn(2, 16, 8, 8, generator=torch.Generator().manual_seed(0))


def planned(model: nn.Module, ranks: object = 4, x: object = X, **settings: object) -> Plan:
    """A plan by hand for inputs like ``X``."""
    return make_plan(model, Manual(ranks), example_input=x, **settings)


def conv(**settings: object) -> nn.Conv2d:
    """A layer that takes ``X`` and can be applied again."""
    return nn.Conv2d(16, 16, 3, padding=1, **settings)


def factorized(model: nn.Module) -> dict[str, FactorizedLayer]:
    """The swapped layers by name."""
    return {name: m for name, m in model.named_modules() if isinstance(m, FactorizedLayer)}
