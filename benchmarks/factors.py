"""Optimizer steps made for factors, beside plain SGD: a whole training step of ResNet-20 at batch 128.

Stage ranks (7, 12, 20), channels last in memory. The figure is the step with FactorSGD over that with torch's SGD.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F

import hodec
from benchmarks.rows import Row, Target
from benchmarks.settings import Settings
from benchmarks.timing import Work, in_turns
from hodec.models import build_model
from hodec.optim.factor_sgd import FactorSGD

GROUP = "factors"
RANKS = {"layer1.*": 7, "layer2.*": 12, "layer3.*": 20}
METHODS = {"tt, 1 mode a side": ("tt", 1), "tt, 2 modes a side": ("tt", 2), "tucker": ("tucker", 1), "cp3": ("cp3", 1)}
METHODS |= {"svd": ("svd", 1), "spatial_svd": ("spatial_svd", 1)}
UPDATES = ("muon", "scaled_gd")
MOST = Target("<=", 1.15)
SGD = {"lr": 1e-4, "momentum": 0.9, "nesterov": True, "weight_decay": 5e-4}


def rows(settings: Settings) -> Iterator[Row]:
    """Seconds of a step, by method."""
    torch.manual_seed(0)
    batch = 8 if settings.quick else 128
    x, y = torch.randn(batch, 3, 32, 32), torch.randint(0, 10, (batch,))
    for words, (method, n_modes) in METHODS.items():
        works = {name: _stepper(method, n_modes, x, y, factors=name) for name in ("", *UPDATES)}
        times = in_turns(works, seconds=settings.seconds(20), rounds=settings.rounds(5, 15))
        for name in UPDATES:
            what = f"training step of resnet20, {words}, batch {batch}, factors by {name}"
            yield Row(GROUP, what, "torch's SGD", **times.beside(name, "", inverse=True), target=MOST)


def _stepper(method: str, n_modes: int, x: torch.Tensor, y: torch.Tensor, *, factors: str) -> Work:
    """One training step of its own net, by torch's SGD where ``factors`` is empty."""
    net = build_model("resnet20", in_channels=3, num_classes=10)
    plan = hodec.make_plan(net, RANKS, method=method, n_modes=n_modes, example_input=x[:1], allow_larger=True)
    small = hodec.convert(net, plan).train().to(memory_format=torch.channels_last)
    x = x.to(memory_format=torch.channels_last)
    optimizer = FactorSGD(small, factors=factors, **SGD) if factors else torch.optim.SGD(small.parameters(), **SGD)

    def step() -> None:
        optimizer.zero_grad()
        F.cross_entropy(small(x), y).backward()
        optimizer.step()

    return step
