"""Layers to choose ranks for, made straight from weights, and rules asked about them without a net."""

import torch
from torch import Tensor, nn

from hodec.conversion.eligibility import LayerSite
from hodec.cost.count import Cost
from hodec.formats.calls import CallSites
from hodec.formats.modes import Modes
from hodec.methods import METHODS
from hodec.ranks import Choice, LayerContext, NetContext, RankRule

# Every method with a convolution, and how many ranks it has there (two modes a side for tensor trains).
CONV_METHODS = [name for name, method in METHODS.items() if "conv2d" in method.layers]

# A net that is known by its cost alone, as that of a model file.
NO_MODEL = NetContext(Cost(10**6, 10**9), lambda name: nn.Identity())


def context(weight: Tensor, method: str = "svd", *, layer_type: str = "", size: int = 8) -> LayerContext:
    """The context of a weight (O, I) or (O, I, H, W) that runs once, stride 1, at ``size`` positions a side."""
    layer_type = layer_type or ("linear" if weight.ndim == 2 else f"conv{weight.ndim - 2}d")
    fmt = METHODS[method].format(layer_type)
    place = (size,) * max(1, weight.ndim - 2)
    modes = Modes.split(weight.shape[1], weight.shape[0], 2 if fmt.uses_modes else 1)
    return LayerContext("layer", method, LayerSite(layer_type, weight, CallSites.once(place, place)), fmt, modes)


def chosen(rule: RankRule, layer: LayerContext) -> Choice:
    """The choice of a rule for one layer."""
    return rule.choose({"layer": layer}, NO_MODEL)["layer"]


def conv_weight(out: int = 24, inp: int = 12, *, seed: int = 0) -> Tensor:
    """A random 3x3 kernel."""
    return torch.randn(out, inp, 3, 3, generator=torch.Generator().manual_seed(seed))


def with_singular_values(values: Tensor, rows: int, cols: int, *, seed: int = 0) -> Tensor:
    """A float64 matrix (rows, cols) with exactly these singular values."""
    generator = torch.Generator().manual_seed(seed)
    left = torch.linalg.qr(torch.randn(rows, len(values), generator=generator, dtype=torch.float64))[0]
    right = torch.linalg.qr(torch.randn(cols, len(values), generator=generator, dtype=torch.float64))[0]
    return (left * values) @ right.T
