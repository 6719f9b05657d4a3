"""How far one gradient step moves the weights of the dense net, and of the factorized net with the same weights.

    python experiments/resnet20_cifar10_jpeg/step_sizes.py DENSE.safetensors DATA [PLAN.json]

Both nets hold the truncated weights and see the same 512 training images; the step is plain gradient descent at the
same learning rate, small enough to be linear. For the factorized layers the step of their product is measured.
"""

import copy
import statistics
import sys
from pathlib import Path

import torch
from torch import Tensor, nn

from hodec import Plan, convert
from hodec.experiment.config.schema import DataConfig
from hodec.experiment.data.images import build_data
from hodec.experiment.data.loaders import train_loader
from hodec.models import build_model, load_weights

LEARNING_RATE = 1e-3
MEAN, STD = [0.4914, 0.4822, 0.4465], [0.2470, 0.2435, 0.2616]


def dense_weights(net: nn.Module, plan: Plan) -> dict[str, Tensor]:
    """The weights of the planned layers, multiplied out where they are factorized."""
    layers = {name: net.get_submodule(name) for name in plan}
    return {name: (m.weight if isinstance(m, nn.Conv2d) else m.dense_weight()).detach() for name, m in layers.items()}


def step_sizes(net: nn.Module, plan: Plan, images: Tensor, labels: Tensor) -> dict[str, float]:
    """norm of what one step adds to each planned weight."""
    net = copy.deepcopy(net).train()
    before = {name: w.clone() for name, w in dense_weights(net, plan).items()}
    nn.functional.cross_entropy(net(images), labels).backward()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter -= LEARNING_RATE * parameter.grad
    return {name: float((w - before[name]).norm()) for name, w in dense_weights(net, plan).items()}


def main() -> None:
    """Print the ratio per layer and its median."""
    torch.set_num_threads(1)
    plan = Plan.load(sys.argv[3] if len(sys.argv) > 3 else Path(__file__).parent / "plan.json")
    dense = build_model("resnet20", in_channels=3, num_classes=10, image_size=32)
    load_weights(dense, sys.argv[1])
    small = convert(dense, plan)
    truncated = copy.deepcopy(dense)
    for name, weight in dense_weights(small, plan).items():
        truncated.get_submodule(name).weight.data.copy_(weight)
    settings = DataConfig(name="image_folder", root=sys.argv[2], batch_size=512, mean=MEAN, std=STD)
    images, labels = next(iter(train_loader(build_data(settings), seed=0)))
    slow, fast = (step_sizes(net, plan, images, labels) for net in (truncated, small))
    ratios = {name: fast[name] / slow[name] for name in plan}
    lines = [f"{name:20} {ratio:.2f}" for name, ratio in ratios.items()]
    values = ratios.values()
    lines.append(f"median {statistics.median(values):.2f}, {min(values):.2f} to {max(values):.2f}")
    sys.stdout.write("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
