"""ADMM under eight schedules of the learning rate, beside the same training without it.

    python experiments/schedules_digits/run.py [--seeds 0 1 2 3 4]

A small CNN on scikit-learn's digits, every planned layer at Tucker rank 8 of 16 and 32 channels, SGD at 0.05 with
momentum 0.9, 32 steps an epoch, 16 epochs. It appends a row per schedule, seed and arm to rows.jsonl beside itself;
rows that are there are not run again. Then it prints the table of the page.
"""

import argparse
import copy
import json
from collections.abc import Callable
from itertools import permutations
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.optim.lr_scheduler import (
    CosineAnnealingLR,
    CosineAnnealingWarmRestarts,
    CyclicLR,
    LambdaLR,
    LRScheduler,
    OneCycleLR,
    StepLR,
)

import hodec

ROWS = Path(__file__).with_name("rows.jsonl")
EPOCHS, STEPS, BATCH, RATE = 16, 32, 45, 0.05
HELD_OUT = 357  # images, the last ones: the others fill 32 batches of 45
FIRST = 3  # the epochs before it do not count
FRESH = 10  # batches: BatchNorm's statistics are measured again on the last ones of the epoch

Schedule = Callable[[torch.optim.Optimizer], LRScheduler]
SCHEDULES: dict[str, Schedule] = {
    "constant": lambda sgd: LambdaLR(sgd, lambda _: 1.0),
    "cosine to 0": lambda sgd: CosineAnnealingLR(sgd, EPOCHS * STEPS),
    "steps of 0.1": lambda sgd: StepLR(sgd, 6 * STEPS),
    "cosine, restarted every 3 epochs": lambda sgd: CosineAnnealingWarmRestarts(sgd, 3 * STEPS),
    "cosine, restarted every 4 epochs": lambda sgd: CosineAnnealingWarmRestarts(sgd, 4 * STEPS),
    "cyclic, 0.0005 to 0.05 in 2 epochs": lambda sgd: CyclicLR(sgd, 0.0005, RATE, STEPS, cycle_momentum=False),
    "one cycle to 0.1": lambda sgd: OneCycleLR(sgd, 0.1, total_steps=EPOCHS * STEPS, cycle_momentum=False),
    "warm-up from 0 over 6 epochs": lambda sgd: LambdaLR(sgd, lambda step: min(1.0, step / (6 * STEPS))),
}


def images() -> tuple[Tensor, Tensor]:
    """All digits in one random order, (1797, 1, 8, 8) in 0..1, and their classes."""
    digits, order = load_digits(), torch.randperm(1797, generator=torch.Generator().manual_seed(0))
    return torch.tensor(digits.images[:, None] / 16, dtype=torch.float32)[order], torch.tensor(digits.target)[order]


def small_cnn() -> nn.Module:
    """Three convolutions with BatchNorm, for images of 8x8."""

    def block(i: int, o: int) -> list[nn.Module]:
        return [nn.Conv2d(i, o, 3, padding=1), nn.BatchNorm2d(o), nn.ReLU()]

    layers = [*block(1, 16), *block(16, 32), *block(32, 32), nn.AdaptiveAvgPool2d(2), nn.Flatten()]
    return nn.Sequential(*layers, nn.Linear(128, 10))


def train(schedule: Schedule, seed: int, *, admm: bool) -> dict[str, Any]:
    """Validation accuracy after each epoch, %, with BatchNorm's running statistics and with fresh ones.

    And the largest norm(U) / norm(W), 0 without ADMM.
    """
    torch.manual_seed(seed)
    net, (x, y) = small_cnn(), images()
    sgd = torch.optim.SGD(net.parameters(), RATE, 0.9)
    rates = schedule(sgd)
    plan = hodec.make_plan(net, hodec.ranks.Manual({"3": 8, "6": 8}), method="tucker", example_input=x[:1])
    core = hodec.Admm(net, plan, sgd, steps_per_epoch=STEPS) if admm else None
    order, accuracy, fresh, dual = torch.Generator().manual_seed(100 + seed), [], [], 0.0
    for _ in range(EPOCHS):
        net.train()
        batches = torch.randperm(len(x) - HELD_OUT, generator=order)[: STEPS * BATCH].split(BATCH)
        for batch in batches:
            sgd.zero_grad()
            F.cross_entropy(net(x[batch]), y[batch]).backward()
            if core:
                core.before_step()
            sgd.step()
            rates.step()
            if core:
                core.after_step()
        if core:
            core.end_epoch()
            dual = max(dual, *(float(core.states[n].u.norm() / w.detach().norm()) for n, w in core.weights.items()))
        accuracy.append(accuracy_of(net, x, y))
        twin = copy.deepcopy(net)
        hodec.reestimate_batchnorm(twin, [x[batch] for batch in batches[-FRESH:]])
        fresh.append(accuracy_of(twin, x, y))
    return {"accuracy": accuracy, "fresh": fresh, "dual": dual}


@torch.no_grad()
def accuracy_of(net: nn.Module, x: Tensor, y: Tensor) -> float:
    """Accuracy on the images held out, %."""
    return 100 * float((net.eval()(x[-HELD_OUT:]).argmax(1) == y[-HELD_OUT:]).float().mean())


def rows(seeds: list[int]) -> list[dict[str, Any]]:
    """All rows, those of the file and what it lacks."""
    done = [json.loads(line) for line in ROWS.read_text().splitlines()] if ROWS.exists() else []
    have = {(row["schedule"], row["seed"], row["admm"]) for row in done}
    with ROWS.open("a") as file:
        for name, schedule in SCHEDULES.items():
            for seed in seeds:
                for admm in (False, True):
                    if (name, seed, admm) not in have:
                        row = {"schedule": name, "seed": seed, "admm": admm} | train(schedule, seed, admm=admm)
                        print(json.dumps(row), file=file, flush=True)
                        done.append(row)
    return done


def table(done: list[dict[str, Any]]) -> str:
    """Points of accuracy lost to ADMM at the worst epoch, in the mean of the seeds and in the worst one."""
    head = "| schedule | mean | worst seed | mean, fresh BatchNorm | worst seed | another seed | norm(U) / norm(W) |"
    lines = [head, "|---" * 7 + "|"]
    for name in SCHEDULES:
        without, under = (sorted_runs(done, name, admm=admm) for admm in (False, True))
        cells = [points for key in ("accuracy", "fresh") for points in losses(without, under, key)]
        seeds = [worst([a], [b], "accuracy") for a, b in permutations(without, 2)]
        cells.append(sum(seeds) / max(1, len(seeds)))
        dual = max(run["dual"] for run in under)
        lines.append(f"| {name} | " + " | ".join(f"{cell:.1f}" for cell in cells) + f" | {dual:.2f} |")
    return "\n".join(lines)


def sorted_runs(done: list[dict[str, Any]], schedule: str, *, admm: bool) -> list[dict[str, Any]]:
    """The runs of one arm, by seed."""
    return sorted((r for r in done if (r["schedule"], r["admm"]) == (schedule, admm)), key=lambda run: run["seed"])


def losses(without: list[dict[str, Any]], under: list[dict[str, Any]], key: str) -> tuple[float, float]:
    """Of the mean over the seeds, and of the worst seed."""
    return worst(without, under, key), max(worst([a], [b], key) for a, b in zip(without, under, strict=True))


def worst(before: list[dict[str, Any]], after: list[dict[str, Any]], key: str) -> float:
    """How many points the mean of some runs lies below that of others, at the worst epoch."""
    means = [
        [sum(at) / len(at) for at in zip(*(run[key][FIRST:] for run in runs), strict=True)] for runs in (before, after)
    ]
    return max(a - b for a, b in zip(*means, strict=True))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    torch.set_num_threads(1)
    print(table(rows(parser.parse_args().seeds)))  # noqa: T201
