"""Train ResNet-20 on digits with and without ADMM and keep one layer's singular values, epoch by epoch.

``python docs/figures/train_spectrum.py`` writes ``spectrum.json`` beside it in half a minute on one core;
``python docs/figures/draw.py`` draws it.
"""

import argparse
import json
from pathlib import Path

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

import hodec
from hodec.models import build_model

HERE = Path(__file__).parent
LAYER = "layer3.0.conv2"  # 64 to 64 channels, 3x3: of the widest stage
RANKS = 16  # of at most 64; what the plan is made with
BATCH = 64  # images a step, as in the default run
TEST = 360  # images that nothing is trained on: the last fifth, as scikit-learn orders them


def digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Training images (N, 1, 8, 8) in 0..1 and labels, then those of the test."""
    data = load_digits()
    x = torch.tensor(data.images, dtype=torch.float32).div(16).unsqueeze(1)
    y = torch.tensor(data.target)
    return x[:-TEST], y[:-TEST], x[-TEST:], y[-TEST:]


def spectrum(net: nn.Module) -> list[float]:
    """Singular values of the layer's weight as a matrix (O, I K), over the largest one, in falling order."""
    weight = net.get_submodule(LAYER).weight.detach().double().flatten(1)
    values = torch.linalg.svdvals(weight)
    return [round(float(value), 6) for value in values / values[0]]


@torch.no_grad()
def accuracy(net: nn.Module, x: Tensor, y: Tensor) -> float:
    """Share of the images that are told right, 0 to 1."""
    net.eval()
    right = (net(x).argmax(1) == y).float().mean().item()
    net.train()
    return round(right, 4)


def train(epochs: int, *, admm: bool) -> dict[str, object]:
    """The spectra before training and after each epoch, and the accuracy of the net before and after truncation."""
    torch.manual_seed(0)
    x, y, x_test, y_test = digits()
    net = build_model("resnet20", in_channels=1, num_classes=10)
    plan = hodec.make_plan(net, RANKS, method="tt", n_modes=1, example_input=x[:1])
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9, nesterov=True, weight_decay=5e-4)
    steps = len(x) // BATCH
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * steps)
    pulled = hodec.Admm(net, plan, optimizer, steps_per_epoch=steps) if admm else None
    spectra = [spectrum(net)]
    for _ in range(epochs):
        for chosen in torch.randperm(len(x)).split(BATCH)[:steps]:
            optimizer.zero_grad()
            F.cross_entropy(net(x[chosen]), y[chosen]).backward()
            if pulled:
                pulled.before_step()
            optimizer.step()
            schedule.step()
            if pulled:
                pulled.after_step()
        if pulled:
            pulled.end_epoch()
        spectra.append(spectrum(net))
    small = pulled.convert() if pulled else hodec.convert(net, plan)
    return {
        "spectra": spectra,
        "rank": plan[LAYER].ranks[1],
        "dense": accuracy(net, x_test, y_test),
        "truncated": accuracy(small, x_test, y_test),
    }


def main() -> None:
    """Write spectrum.json."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=15)
    parser.add_argument("--out", type=Path, default=HERE / "spectrum.json")
    options = parser.parse_args()
    torch.set_num_threads(1)  # sums depend on it
    runs = {name: train(options.epochs, admm=name == "admm") for name in ("admm", "plain")}
    options.out.write_text(json.dumps({"layer": LAYER, **runs}) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
