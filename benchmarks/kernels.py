"""Kernels to decompose, and how far a decomposition is from its kernel."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from hodec.formats import tt
from hodec.formats.modes import Modes
from hodec.plan.plan import Plan
from hodec.ranks import Manual, make_plan


def kernel(out: int, inp: int, side: int) -> Tensor:
    """(out, inp, side, side), float32, seeded: Gaussian, channels of sizes that fall as a power law, shuffled."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(out, inp, side, side, generator=generator)
    for axis, channels in enumerate((out, inp)):
        sizes = torch.arange(1, channels + 1).rsqrt()[torch.randperm(channels, generator=generator)]
        weight.mul_(sizes.reshape(-1, 1, 1, 1) if axis == 0 else sizes.reshape(1, -1, 1, 1))
    return weight


def half_ranks(shape: tuple[int, ...], share: float = 0.5) -> tuple[Modes, tuple[int, ...]]:
    """Two modes a side and tensor-train ranks: ``share`` of the channels in the middle, 15/16 of the outer modes."""
    out, inp = shape[:2]
    modes = Modes.split(inp, out, 2)
    first, last = modes.inputs[0], modes.outputs[-1]
    middle = (max(1, int(inp * share)), max(1, int(out * share)))
    return modes, tt.CONV.fit_ranks(shape, modes, (first - first // 16, *middle, last - last // 16))


def train_plan(
    net: nn.Module, x: Tensor, share: float, chosen: Callable[[nn.Conv2d], bool], *, execution: str = "auto"
) -> Plan:
    """Tensor trains for the 3x3 convolutions that are chosen, at the ranks of ``half_ranks``; ``x`` is any batch."""
    ranks = {
        name: list(half_ranks(tuple(module.weight.shape), share)[1])
        for name, module in net.named_modules()
        if isinstance(module, nn.Conv2d) and module.kernel_size == (3, 3) and chosen(module)
    }
    how: dict[str, Any] = {"include": list(ranks), "allow_larger": True, "execution": execution, "n_modes": 2}
    return make_plan(net, Manual(ranks), example_input=x[:1], **how)


def distance(made: Tensor, wanted: Tensor) -> float:
    """Relative error, summed in float64."""
    return float(torch.linalg.vector_norm((made - wanted).double()) / torch.linalg.vector_norm(wanted.double()))
