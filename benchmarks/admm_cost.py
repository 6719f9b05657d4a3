"""What ADMM costs beside a training step: ``python -m benchmarks.admm_cost [resnet32] [batch]``, one thread.

Prints the median milliseconds of a plain step, of the penalty that each step gains, and of one Z- and U-update of all
layers, and the last two as shares of the step.
"""

import os
import statistics
import sys
import time
from collections.abc import Callable

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
import torch.nn.functional as F

from hodec.admm.updates import project_layers, start, step
from hodec.models import build_model
from hodec.ranks import Manual, make_plan


def median_ms(work: Callable[[], object], rounds: int = 9) -> float:
    """Median milliseconds of ``work`` after two warm-up calls."""
    times = []
    for k in range(rounds + 2):
        began = time.perf_counter()
        work()
        if k >= 2:
            times.append(1e3 * (time.perf_counter() - began))
    return statistics.median(times)


def main(name: str = "resnet32", batch: int = 128) -> None:
    """Measure and print one table."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    net = build_model(name, in_channels=3, num_classes=10)
    optimizer = torch.optim.SGD(net.parameters(), lr=1e-4, momentum=0.9)
    x, y = torch.randn(batch, 3, 32, 32), torch.randint(0, 10, (batch,))
    print(f"{name}, batch {batch}, float32, threads {torch.get_num_threads()}, torch {torch.__version__}")

    def train() -> None:
        optimizer.zero_grad()
        F.cross_entropy(net(x), y).backward()
        optimizer.step()

    plain = median_ms(train)
    print("| modes a side | step, ms | penalty, ms | share | Z- and U-update, ms | share |")
    print("|---|---|---|---|---|---|")
    for n_modes in (1, 2):
        plan = make_plan(net, Manual(16), example_input=x[:1], n_modes=n_modes, exclude=["linear"])
        weights = {layer: net.get_parameter(f"{layer}.weight") for layer in plan}

        def project(tensors: dict[str, torch.Tensor], plan: object = plan) -> dict[str, torch.Tensor]:
            return project_layers(plan, tensors)  # type: ignore[arg-type]

        states = start(weights, dict.fromkeys(weights, 1e-3), project)
        values = [w.detach() for w in weights.values()]
        grads = [torch.zeros_like(w) for w in values]
        targets = [s.z - s.u for s in states.values()]

        def penalty(values: list = values, targets: list = targets, grads: list = grads) -> None:
            offsets = torch._foreach_sub(values, targets)
            torch._foreach_mul_(offsets, 1e-3)
            torch._foreach_add_(grads, offsets)

        def update(weights: dict = weights, states: dict = states, project: object = project) -> object:
            return step(weights, states, project)  # type: ignore[arg-type]

        pull, z = median_ms(penalty, 50), median_ms(update)
        print(f"| {n_modes} | {plain:.0f} | {pull:.2f} | {pull / plain:.1%} | {z:.1f} | {z / plain:.1%} |")


if __name__ == "__main__":
    main(*sys.argv[1:2], *map(int, sys.argv[2:3]))
