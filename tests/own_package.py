"""A package of somebody's own, written into a folder: a net, data, a rule, a method, a callback, a logger."""

from pathlib import Path

CODE = """
import os
from dataclasses import dataclass
from os import system

import torch
from pytorch_lightning import Callback, LightningDataModule
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from hodec.methods import METHODS, Method
from hodec.options import setting
from hodec.ranks import Choice, RankRule


class Net(nn.Module):
    def __init__(self, in_channels, num_classes, width=8):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(in_channels, width, 3, padding=1), nn.Conv2d(width, width, 3, padding=1)
        self.fc = nn.Linear(width, num_classes)

    def forward(self, x):
        return self.fc(self.conv2(self.conv1(x).relu()).relu().mean((2, 3)))


class Flat(nn.Linear):
    def __init__(self):
        super().__init__(128, 1)

    def forward(self, x):
        return super().forward(x.flatten(1))


def images(seed=0, count=64):
    generator, labels = torch.Generator().manual_seed(seed), torch.arange(count) % 4
    return torch.randn(count, 2, 8, 8, generator=generator) + labels.view(-1, 1, 1, 1), labels


def test_images():
    return images(1, 32)


def pixels():
    return (images()[0] * 9).to(torch.uint8), images()[1]


class Images(LightningDataModule):
    num_classes = 4

    def __init__(self, batch_size=16):
        super().__init__()
        self.batch_size = batch_size

    def train_dataloader(self):
        return DataLoader(TensorDataset(*images()), self.batch_size, shuffle=True)

    def val_dataloader(self):
        return DataLoader(TensorDataset(*images(2, 32)), 32)

    def test_dataloader(self):
        return DataLoader(TensorDataset(*test_images()), 32)


class OnlyTraining(Images):
    test_dataloader = LightningDataModule.test_dataloader


@dataclass(frozen=True)
class Share(RankRule):
    name = "share"

    share: float = setting(0.5, "share of the full ranks", above=0, high=1)

    def choose_layer(self, layer, net):
        return Choice(layer.fit([max(1, round(self.share * rank)) for rank in layer.full_ranks]))


PLAIN = Method("plain", {"conv2d": METHODS["svd"].layers["conv2d"]}, "own_package")


class Count(Callback):
    epochs = 0

    def __init__(self, step):
        self.step = step

    def on_train_epoch_end(self, trainer, pl_module):
        Count.epochs += self.step


class Lines:
    def __init__(self, folder):
        self.path = os.path.join(folder, "lines.txt")

    def log_metrics(self, metrics, step):
        with open(self.path, "a") as f:
            f.write(f"{step}\\n")

    def finalize(self, status):
        with open(self.path, "a") as f:
            f.write(status)
"""


def write_package(folder: Path, name: str, **more: str) -> None:
    """Write the package; ``more`` are further modules, by name."""
    package = folder / name
    package.mkdir()
    for module, code in {"__init__": "", "code": CODE, **more}.items():
        (package / f"{module}.py").write_text(code)


def install(folder: Path, name: str) -> None:
    """Write the package and what an installer writes beside it: its entry points."""
    write_package(folder, name)
    info = folder / f"{name}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    points = {"models": "own_net", "data": "own_images", "rules": "share", "methods": "plain"}
    targets = {"models": "Net", "data": "Images", "rules": "Share", "methods": "PLAIN"}
    lines = [f"[hodec.{group}]\n{points[group]} = {name}.code:{target}\n" for group, target in targets.items()]
    (info / "entry_points.txt").write_text("\n".join(lines))
