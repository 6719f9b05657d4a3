"""What choosing all ranks together saves: Budget against ranks scaled alike in every layer, at the same cost.

    python -m benchmarks.budget_vs_uniform [--resnet20 WEIGHTS] [--resnet32 WEIGHTS] [--resnet56 WEIGHTS]

For each net and target, the sum over layers of the squared relative error of the truncated weight (measured
on the weights; a layer left dense has none), once for each way to choose the ranks. Uniform ranks are the
largest share of full ranks, the same in every layer, that is within the target; layers that would cost more
stay dense. As uniform ranks seldom use up two targets, Budget is also given what they cost, in MACs and in
parameters: ``same`` is its error there. Nets without given weights are untrained, seeded. One thread; the
table is Markdown.
"""

import argparse
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hodec.errors import PlanError
from hodec.models import build_model, load_weights
from hodec.plan.plan import Plan
from hodec.ranks import Budget, Choice, LayerContext, NetContext, RankRule, make_plan

HALVINGS = 24
WAYS = ("uniform", "budget", "same")


@dataclass(frozen=True)
class Case:
    """A net and the shares of its cost to keep."""

    net: str
    image: int
    classes: int
    targets: Mapping[str, float]


CASES = (
    Case("torchvision/resnet18", 224, 1000, {"macs": 0.32}),
    Case("torchvision/resnet50", 224, 1000, {"macs": 0.37}),
    Case("resnet20", 32, 10, {"macs": 0.28}),
    Case("resnet32", 32, 10, {"macs": 0.40, "params": 0.35}),
    Case("resnet32", 32, 10, {"macs": 0.28, "params": 0.20}),
    Case("resnet56", 32, 10, {"macs": 0.38, "params": 0.33}),
)


@dataclass(frozen=True)
class Uniform(RankRule):
    """The same share of full ranks in every layer."""

    name = "uniform"

    share: float

    def choose_layer(self, layer: LayerContext, net: NetContext) -> Choice:
        """The scaled ranks of one layer."""
        return Choice(layer.fit([max(1, int(self.share * rank)) for rank in layer.full_ranks]))


def uniform_plan(model: nn.Module, targets: Mapping[str, float], settings: Mapping[str, Any]) -> Plan:
    """The plan of the largest uniform share that is within the targets."""
    low, high, best = 0.0, 1.0, None
    for _ in range(HALVINGS):
        share = (low + high) / 2
        try:
            plan = make_plan(model, Uniform(share), **settings)
        except PlanError:  # no layer is left: the share is so large that none saves anything
            high = share
            continue
        if all(1 - plan.reduction[key] <= target for key, target in targets.items()):
            low, best = share, plan
        else:
            high = share
    if best is None:
        raise PlanError(f"no uniform share meets {dict(targets)}")
    return best


@torch.no_grad()
def squared_errors(model: nn.Module, plan: Plan) -> float:
    """Sum over the planned layers of |W - truncated W|^2 / |W|^2."""
    weights: dict[str, Tensor] = dict(model.named_parameters())
    total = 0.0
    for name, layer in plan.items():
        weight = weights[f"{name}.weight"]
        total += float((layer.project(weight) - weight).square().sum() / weight.square().sum())
    return total


def ratios(plan: Plan) -> dict[str, float]:
    """Shares of the dense cost."""
    return {key: 1 - plan.reduction[key] for key in ("macs", "params")}


def row(case: Case, model: nn.Module, trained: bool, settings: Mapping[str, Any]) -> str:
    """One line of the table."""
    started = time.perf_counter()
    ours = make_plan(model, Budget(case.targets.get("macs"), case.targets.get("params")), **settings)
    seconds = time.perf_counter() - started
    uniform = uniform_plan(model, case.targets, settings)
    cost = ratios(uniform)
    same = make_plan(model, Budget(cost["macs"], cost["params"]), **settings)
    errors = [squared_errors(model, plan) for plan in (uniform, ours, same)]
    cells = [
        case.net.removeprefix("torchvision/") + ("" if trained else " (untrained)"),
        ", ".join(f"{key} {value:.2f}" for key, value in case.targets.items()),
        *(" / ".join(f"{share:.4f}" for share in ratios(plan).values()) for plan in (uniform, ours, same)),
        *(f"{error:.3f}" for error in errors),
        *(f"{error / errors[0]:.2f}" for error in errors[1:]),
        f"{seconds:.1f}",
    ]
    return "| " + " | ".join(cells) + " |"


def build(case: Case, weights: str | None) -> nn.Module:
    torch.manual_seed(0)
    model = build_model(case.net, in_channels=3, num_classes=case.classes)
    if weights is not None:
        load_weights(model, weights)
    return model


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for net in dict.fromkeys(case.net for case in CASES if "/" not in case.net):
        parser.add_argument(f"--{net}", help="file of trained weights")
    parser.add_argument("--method", default="tt")
    parser.add_argument("--n-modes", type=int, default=1)
    given = parser.parse_args()
    torch.set_num_threads(1)
    threads = torch.get_num_threads()
    print(f"torch {torch.__version__}, threads: {threads}; method {given.method}, n_modes {given.n_modes}\n")
    heads = ["net", "keep", *(f"{who} macs / params" for who in WAYS), *(f"{who} error" for who in WAYS)]
    heads += ["budget / uniform", "same / uniform", "seconds to plan"]
    print("| " + " | ".join(heads) + " |\n" + "|---" * len(heads) + "|")
    for case in CASES:
        weights = getattr(given, case.net, None)
        x = torch.randn(1, 3, case.image, case.image, generator=torch.Generator().manual_seed(0))
        settings = {"method": given.method, "n_modes": given.n_modes, "example_input": x}
        print(row(case, build(case, weights), weights is not None, settings), flush=True)


if __name__ == "__main__":
    main()
