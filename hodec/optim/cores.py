"""The factors of a layer as one chain of cores, and what the rest of the chain makes of each.

A weight is linear in each of its factors, so a change dF of one changes the weight by a map that the others make:
|dW|^2 = <dF, L dF R> with the Gram matrices L and R of what stands to its left and right in the chain. They are what
plain gradient descent on factors is badly conditioned by.

Source: Tong, Ma, Chi, Accelerating Ill-Conditioned Low-Rank Matrix Estimation via Scaled Gradient Descent, JMLR 22,
2021 (two factors); Tong, Ma, Prater-Bennette, Tripp, Chi, Scaling and Scalability, JMLR 23, 2022 (Tucker).
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from hodec.formats.base import Core
from hodec.layers.base import FactorizedLayer


class Grams(NamedTuple):
    """What the cores to the left and right of one make of it: (B, r, r) and (B, s, s), float32 or float64.

    For a depthwise core, whose one rank both sides share, ``right`` is None.
    """

    left: Tensor
    right: Tensor | None


@torch.no_grad()
def cores_of(layer: FactorizedLayer, values: Mapping[nn.Parameter, Tensor] | None = None) -> list[Core]:
    """The layer's cores as views of its parameters, or of tensors of their shapes that stand in for them."""
    held = {parameter: parameter.data for parameter in (values or ())}
    try:
        for parameter, value in (values or {}).items():
            parameter.data = value
        views = [view.detach() for view in layer.views()]
    finally:
        for parameter, data in held.items():
            parameter.data = data
    return layer.format.cores(views)


@torch.no_grad()
def grams(cores: Sequence[Core]) -> list[Grams]:
    """The Gram matrices of each core of a chain."""
    flat = [_flat(core) for core in cores]
    one = flat[0].new_ones(len(flat[0]), 1, 1)
    lefts, rights = [one], [one]
    for core, x in zip(cores[:-1], flat, strict=False):
        lefts.append(_gram(core, x, lefts[-1], ahead=True))
    for core, x in zip(cores[:0:-1], flat[:0:-1], strict=True):
        rights.insert(0, _gram(core, x, rights[0], ahead=False))
    return [
        Grams(left * right, None) if core.depthwise else Grams(left, right)
        for core, left, right in zip(cores, lefts, rights, strict=True)
    ]


def _flat(core: Core) -> Tensor:
    """(B, r, n.., s) -> (B, r, n, s), or (B, R, n..) -> (B, R, n), in float32 at least."""
    x = core.values
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    return x.flatten(2) if core.depthwise else x.reshape(*x.shape[:2], -1, x.shape[-1])


def _gram(core: Core, x: Tensor, gram: Tensor, *, ahead: bool) -> Tensor:
    """The Gram matrix behind a core from that before it, or the other way round."""
    if core.depthwise:
        return gram * (x @ x.mT)
    if ahead:
        y = x.flatten(1, 2)  # (r n, s)
        return y.mT @ (gram @ x.flatten(2)).view_as(x).flatten(1, 2)
    return (x @ gram.unsqueeze(1)).flatten(2) @ x.flatten(2).mT


@torch.no_grad()
def through(core: Core, left: Tensor, right: Tensor | None) -> Tensor:
    """L X R of a core's values, (B, r, n, s) or (B, R, n)."""
    x = _flat(core)
    y = (left @ x.flatten(2)).view_as(x)
    return y if right is None else y @ right.unsqueeze(1)


def as_matrix(core: Core) -> Tensor:
    """The core as matrices (B, rows, cols): (r n, s), and (r, n) where the chain ends behind it or it is depthwise."""
    x = _flat(core)
    if core.depthwise:
        return x
    return x.flatten(2) if x.shape[-1] == 1 else x.flatten(1, 2)
