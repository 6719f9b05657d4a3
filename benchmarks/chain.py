"""The chain of a tensor-train convolution beside its merged form: multiply-adds per second of one over the other.

    python -m benchmarks.chain

``execution="auto"`` takes the chain where it saves more multiply-adds than ``hodec.formats.ops.CHAIN_RATE`` makes up
for, which stands for these rows. Layers of C to C channels, 3x3, two modes a side, ranks up to C / 4, in inference.
"""

from collections.abc import Iterator

import torch
from torch import nn

from benchmarks.rows import Row
from benchmarks.settings import Settings, standalone
from benchmarks.timing import in_turns
from hodec.formats.calls import CallSites
from hodec.formats.modes import Modes
from hodec.formats.ops import CHAIN_RATE
from hodec.layers.base import FactorizedLayer
from hodec.methods import METHODS

GROUP = "chain"
LAYERS = ((64, 56), (128, 28), (256, 14), (512, 7))  # channels and positions a side, as in a ResNet
BATCH = 8


def rows(settings: Settings) -> Iterator[Row]:
    """One row a layer."""
    for channels, side in LAYERS[:1] if settings.quick else LAYERS:
        yield compare(channels, side, settings)


@torch.no_grad()
def compare(channels: int, side: int, settings: Settings) -> Row:
    """Both executions of one layer in turns; seconds are those of a call."""
    torch.manual_seed(0)
    dense, x = nn.Conv2d(channels, channels, 3, padding=1), torch.randn(BATCH, channels, side, side)
    layers = {name: _layer(dense, name).eval() for name in ("chain", "merged")}
    times = in_turns(
        {name: lambda layer=layer: layer(x) for name, layer in layers.items()},
        seconds=settings.seconds(2),
        rounds=settings.rounds(9, 100),
    )
    macs = {name: _macs(layer, side) for name, layer in layers.items()}
    return Row(
        GROUP,
        f"chain of {channels} channels, {side} x {side}",
        "merged",
        ours=times.median("chain"),
        theirs=times.median("merged"),
        figure=times.ratio("merged", "chain") * macs["chain"] / macs["merged"],
        spread=times.spread("merged", "chain"),
        note=f"the chain has {macs['chain'] / macs['merged']:.2f}x the multiply-adds; CHAIN_RATE is {CHAIN_RATE}",
    )


def _layer(dense: nn.Conv2d, execution: str) -> FactorizedLayer:
    kind, channels = METHODS["tt"].layers["conv2d"], dense.in_channels
    shape, modes = tuple(dense.weight.shape), Modes.split(channels, channels, 2)
    ranks = kind.format.fit_ranks(shape, modes, [channels // 4] * 4)
    return kind.from_dense(dense, ranks, modes=modes, execution=execution)


def _macs(layer: FactorizedLayer, side: int) -> float:
    calls = CallSites.once((side, side), (side, side))
    return layer.format.macs(layer.shape, layer.ranks, layer.modes, call_sites=calls, execution=layer.execution)


if __name__ == "__main__":
    standalone(rows)
