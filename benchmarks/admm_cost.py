"""What ADMM costs beside a training step, and beside projections by tensorly.

    python -m benchmarks.admm_cost [resnet32] [batch]

All 3x3 convolutions are projected onto tensor trains of HODEC's order at half ranks. A step is forward, backward and
SGD with momentum, float32; a Z-update happens once an epoch unless asked for oftener, so its share of a step is the
worst case. tensorly's loop projects the same tensors onto the same ranks; the distances |Z - W| / |W| of both must
agree.
"""

import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from math import prod

import torch
from torch import Tensor, nn

from benchmarks import work
from benchmarks.admm_epoch import epochs
from benchmarks.kernels import train_plan
from benchmarks.rows import Row, Target
from benchmarks.settings import Settings, standalone
from benchmarks.timing import Times, Work, in_turns
from benchmarks.training import stepper
from hodec.admm.updates import project_layers, start, step
from hodec.formats import tt
from hodec.models import build_model
from hodec.plan.plan import Plan

GROUP = "admm"
# 1e-4 is the most that the distances of two exact methods may differ by.
SAME_DISTANCE = 1.0001
# What a step's own time varies by: less cannot be seen.
PENALTY = Target("<=", 0.02, "%")


@dataclass(frozen=True)
class Case:
    """A net, its batch of images, and the most that a Z-update may take of a step."""

    net: str
    batch: int
    size: int
    share: float | None = None
    rounds: int = 7

    def __str__(self) -> str:
        return f"{self.net.removeprefix('torchvision/')} (batch {self.batch}, {self.size}x{self.size})"


CASES = (Case("resnet32", 128, 32, 0.03), Case("torchvision/resnet50", 32, 224, 0.08, rounds=2))
QUICK = (Case("resnet20", 8, 32, 0.03),)


def rows(settings: Settings) -> Iterator[Row]:
    """Steps, penalty, projections; then whole epochs."""
    for case in QUICK if settings.quick else CASES:
        yield from measure(case, settings)
    yield epochs(GROUP, settings)


@dataclass(frozen=True)
class Bench:
    """A net with its planned layers, and copies of their weights that no step changes."""

    net: nn.Module
    plan: Plan
    x: Tensor
    y: Tensor
    weights: Mapping[str, Tensor]

    @classmethod
    def of(cls, case: Case) -> "Bench":
        """Random weights and images, seeded."""
        torch.manual_seed(0)
        net = build_model(case.net, in_channels=3, num_classes=10)
        x, y = torch.randn(case.batch, 3, case.size, case.size), torch.randint(0, 10, (case.batch,))
        plan = train_plan(net, x, 0.5, lambda conv: conv.in_channels > 3)
        return cls(net, plan, x, y, {name: net.get_parameter(f"{name}.weight").detach().clone() for name in plan})

    def project(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return project_layers(self.plan, tensors)

    def works(self) -> dict[str, Work]:
        """A training step, and what ADMM adds to it: each apart."""
        states = start(self.weights, dict.fromkeys(self.weights, 1e-3), self.project)
        values, targets = list(self.weights.values()), [state.z - state.u for state in states.values()]
        grads = [torch.zeros_like(w) for w in values]

        def penalty() -> None:
            offsets = torch._foreach_sub(values, targets)
            torch._foreach_mul_(offsets, 1e-3)
            torch._foreach_add_(grads, offsets)

        return {
            "step": stepper(self.net, self.x, self.y, last=False),
            "penalty": penalty,
            "update": lambda: step(self.weights, states, self.project),
            "ours": lambda: self.project(self.weights),
            "tensorly": lambda: by_tensorly(self.plan, self.weights),
        }


def measure(case: Case, settings: Settings) -> Iterator[Row]:
    """The rows of one net."""
    bench = Bench.of(case)
    times = in_turns(bench.works(), seconds=settings.seconds(15), rounds=settings.rounds(case.rounds, 15))
    update = Target("<=", case.share, "%") if case.share else None
    limit = _limit(bench.plan, times.median("update"), settings)
    yield _share(f"Z- and U-update of {case}, every step", "update", update, times, limit)
    yield _share(f"penalty of {case}, added to the gradients", "penalty", PENALTY, times)
    made = [project(bench.weights) for project in (bench.project, lambda tensors: by_tensorly(bench.plan, tensors))]
    distances = [_distance(one, bench.weights) for one in made]
    yield Row(
        GROUP,
        f"projection of {case}: {len(bench.plan)} layers",
        "tensorly loop",
        **times.beside("ours", "tensorly"),
        target=Target(">=", 3),
        error=distances[0] / distances[1],
        allowed_error=SAME_DISTANCE,
        limit=_limit(bench.plan, times.median("ours"), settings),
        note=f"distances {distances[0]:.6f} and {distances[1]:.6f}",
    )


def _share(what: str, name: str, target: Target | None, times: Times, limit: str = "") -> Row:
    """One piece of work as a share of a training step."""
    figures = times.beside(name, "step", inverse=True)
    return Row(GROUP, what, "training step", **figures, figure_unit="%", target=target, limit=limit)


def _limit(plan: Plan, seconds: float, settings: Settings) -> str:
    """Of projecting all layers: truncations, and multiplying the cores out."""
    total = work.Work()
    for layer in plan.values():
        shape = tt.CONV.tensor_shape(layer.shape, layer.modes)
        total += work.tensor_train(shape, layer.ranks) + work.rebuilt_train(shape, layer.ranks)
        total += work.Work(nbytes=2.0 * work.FLOAT * prod(layer.shape))
    return settings.ceilings.limit(seconds, flops=total.flops, nbytes=total.nbytes)


@torch.no_grad()
def by_tensorly(plan: Plan, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Each tensor projected by tensorly onto the ranks of the plan."""
    import tensorly as tl
    from tensorly.decomposition import tensor_train

    made = {}
    with tl.backend_context("pytorch"):
        for name, layer in plan.items():
            x = tt.CONV.tensorize(tensors[name][None], layer.modes)[0]
            dense = tl.tt_to_tensor(tensor_train(x, [1, *layer.ranks, 1]))
            made[name] = tt.CONV.to_weight(dense[None], layer.shape, layer.modes)[0]
    return made


def _distance(made: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> float:
    """|Z - W| / |W| over all layers."""
    gap = sum(float((made[name] - w).double().square().sum()) for name, w in values.items())
    return (gap / sum(float(w.double().square().sum()) for w in values.values())) ** 0.5


def main(net: str = "resnet32", batch: int = 128) -> None:
    """One net's table."""
    case = next((case for case in CASES if case.net == net), Case(net, batch, 32))
    standalone(lambda settings: measure(replace(case, batch=batch), settings))


if __name__ == "__main__":
    main(*sys.argv[1:2], *map(int, sys.argv[2:3]))
