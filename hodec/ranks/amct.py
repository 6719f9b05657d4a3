"""Ranks as Ascend's toolkit would choose them for its spatial split: EVBMF inside a narrow band, multiples of 16."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from hodec.errors import PlanError, Use
from hodec.ranks.rule import Choice, RankRule

if TYPE_CHECKING:
    from torch import nn

    from hodec.ranks.context import LayerContext, NetContext


PLAIN = "it is not a plain 2-D convolution"


@dataclass(frozen=True)
class Amct(RankRule):
    """Ranks of Ascend AMCT's automatic decomposition, for ``method="spatial_svd"``; it has no settings.

    EVBMF's rank is clamped to between a seventh and a sixth of the full rank (a fifth and a fourth from 256 channels
    on) and rounded to a multiple of 16, so the weights hardly matter. Layers that the toolkit would not touch stay
    dense, each with its reason.

    Source: Ascend AMCT documentation, automatic tensor decomposition, and its published rank table.
    """

    name = "amct"
    reads_weights = True

    def choose_layer(self, layer: LayerContext, net: NetContext) -> Choice:
        """The rank of one layer, or why the toolkit leaves it alone.

        Raises:
            PlanError: another method than ``spatial_svd``.
        """
        from hodec.ranks.evbmf import weight_signals

        if layer.method != "spatial_svd":
            raise PlanError(
                "amct chooses ranks for {wanted} only, not for {given}",
                wanted=Use("method", "spatial_svd"),
                given=Use("method", layer.method),
            )
        flat = len(layer.site.shape) != 4
        reason = PLAIN if flat else _left_alone(net.module(layer.name), layer.site.shape)
        if reason:
            return Choice(None, reason=f"Ascend's decomposition leaves it alone: {reason}")
        (signals,) = weight_signals(layer)
        rank, note = banded_rank(signals, layer.site.shape)
        return Choice((rank,), notes=(note,))


def banded_rank(
    signals: int, shape: Sequence[int], *, multiple: int = 16, most_cut: float = 0.1, wide: int = 256
) -> tuple[int, str]:
    """The rank of the spatial split for EVBMF's rank, and how it came about. Defaults are those of the toolkit.

    Args:
        signals: EVBMF's rank, 0 for pure noise.
        shape: of the kernel, (out, in, height, width).
        most_cut: rounding to a multiple takes away no more than this share of the rank.
        wide: from so many channels on (the smaller side) the band ends at a fourth of the full rank, below at a sixth.
    """
    channels = min(shape[:2])
    full, divisor = min(shape[2:]) * channels, 4 if channels >= wide else 6
    low, high = full // (divisor + 1), full // divisor
    clamped = min(max(signals, low), high)
    nearest = (clamped + multiple // 2) // multiple * multiple
    if nearest < (1 - most_cut) * clamped:
        nearest += multiple
    rank = min(max(multiple, nearest), full)
    return rank, f"VBMF's rank {signals} became {rank}: band {low}..{high}, multiples of {multiple}"


def _left_alone(module: nn.Module, shape: Sequence[int]) -> str:
    """Why the toolkit does not touch a layer of kernel ``shape`` (out, in, height, width); empty where it does."""
    import torch
    from torch import nn

    if type(module) is not nn.Conv2d:
        return PLAIN
    channels, side = min(shape[:2]), min(shape[2:])
    conditions = (
        (module.groups != 1, "it is a grouped convolution"),
        (set(module.dilation) != {1}, "its dilation is not 1"),
        (max(module.stride) >= 3, "its stride is 3 or more"),
        (side < 3, "a side of its kernel is below 3"),
        (side * channels < 16, "kernel side times channels is below 16"),
        (channels < 64 and side < 7, "it has fewer than 64 channels"),
        (
            module.weight.dtype not in (torch.float16, torch.float32, torch.float64),
            "its weight is not float16, float32 or float64",
        ),
    )
    return next((reason for refused, reason in conditions if refused), "")
