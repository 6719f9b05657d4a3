"""CIFAR ResNets made small without training, each way that hodec has, at 30, 50 and 70 % fewer multiply-adds.

    python experiments/no_training_cifar10_jpeg/run.py --pictures CIFAR10_JPEG --weights FOLDER [--rows ROWS.jsonl]

CIFAR10_JPEG has train/<class>/*.jpg and test/<class>/*.jpg, FOLDER has resnet20-cifar10.safetensors and the like. A net
that has its row is not done again. README.md has the table and what it says.
"""

import argparse
import copy
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

import hodec
from hodec.conversion.batchnorm import reestimate_batchnorm
from hodec.models.resnet_cifar import DEPTHS, CifarResNet
from hodec.models.weights import load_weights
from hodec.plan.plan import Plan
from hodec.ranks import Budget

NETS = ("resnet20", "resnet32", "resnet56")
CUTS = (0.3, 0.5, 0.7)
CALIBRATION, BATCH = 256, 64
MEAN, STD = (torch.tensor(values)[:, None, None] for values in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
METHOD = "spatial_svd"

Batches = Sequence[Tensor]


def weights_only(net: nn.Module, plan: Plan, data: Batches) -> nn.Module:
    """Each weight truncated by itself."""
    return hodec.convert(net, plan)


def batchnorm_only(net: nn.Module, plan: Plan, data: Batches) -> nn.Module:
    """The same, then BatchNorm's statistics from the pictures."""
    small = hodec.convert(net, plan)
    reestimate_batchnorm(small, data)
    return small


def whitened(net: nn.Module, plan: Plan, data: Batches) -> nn.Module:
    """Each weight truncated in the covariance of its input in the dense net."""
    return hodec.convert(net, plan, covariances=hodec.collect_covariances(net, plan, data))


def whitened_batchnorm(net: nn.Module, plan: Plan, data: Batches) -> nn.Module:
    """The same, then BatchNorm's statistics from the pictures."""
    small = whitened(net, plan, data)
    reestimate_batchnorm(small, data)
    return small


def sequential(solver: str) -> Callable[[nn.Module, Plan, Batches], nn.Module]:
    """One layer after the other, on what the net compressed so far gives it."""
    return lambda net, plan, data: hodec.convert(hodec.fit_to_data(net, plan, data, solver=solver), plan)


WAYS: dict[str, Callable[[nn.Module, Plan, Batches], nn.Module]] = {
    "weights only": weights_only,
    "BatchNorm only": batchnorm_only,
    "whitened": whitened,
    "whitened, BatchNorm": whitened_batchnorm,
    "whitened, sequential": sequential("none"),
    "+ refit (ALS)": sequential("als"),
    "+ refit (ADMM)": sequential("admm"),
    "+ refit (ALS), ranks by data": sequential("als"),
}
BY_DATA = "ranks by data"
DENSE = ("dense", "dense with BatchNorm from the pictures")


@dataclass(frozen=True)
class Pictures:
    """Pictures (N, 3, 32, 32), normalized, with their classes."""

    x: Tensor
    y: Tensor

    def accuracy(self, net: nn.Module) -> float:
        """Per cent of right classes."""
        with torch.no_grad():
            right = sum(int((net(x).argmax(1) == y).sum()) for x, y in zip(self.x.split(250), self.y.split(250)))
        return 100 * right / len(self.x)


def read(folder: Path, count: int) -> Pictures:
    """So many pictures of a folder of class folders, drawn with a fixed seed."""
    classes = sorted(one for one in folder.iterdir() if one.is_dir())
    files = [(file, k) for k, one in enumerate(classes) for file in sorted(one.glob("*.jpg"))]
    drawn = torch.randperm(len(files), generator=torch.Generator().manual_seed(0))[:count].tolist()
    pixels = np.stack([np.asarray(Image.open(files[i][0]).convert("RGB")) for i in drawn])
    x = (torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255 - MEAN) / STD
    return Pictures(x, torch.tensor([files[i][1] for i in drawn]))


def plan_of(net: nn.Module, cut: float, data: Batches | None) -> Plan:
    """Ranks of all layers but the stem within a budget; with data by what is lost of the outputs."""
    settings: dict[str, Any] = {"method": METHOD, "example_input": torch.zeros(1, 3, 32, 32), "exclude": "conv1"}
    covariances = None
    if data is not None:
        every = hodec.make_plan(net, 1, allow_larger=True, **settings)
        covariances = hodec.collect_covariances(net, every, data)
    return hodec.make_plan(net, Budget(macs=1 - cut, covariances=covariances), **settings)


def rows_of(  # noqa: PLR0913
    name: str,
    net: nn.Module,
    data: Batches,
    test: Pictures,
    *,
    cuts: Sequence[float],
    done: set[tuple[str, Any, str]],
) -> Iterator[dict[str, Any]]:
    """A row for the dense net, and one for each way and cut; seconds are those of planning and making the net."""
    for way in DENSE:
        if (name, 0, way) not in done:
            dense = copy.deepcopy(net)
            if way != "dense":
                reestimate_batchnorm(dense, data)
            yield {"net": name, "cut": 0, "way": way, "accuracy": test.accuracy(dense), "seconds": 0}
    for cut in cuts:
        for way, make in WAYS.items():
            if (name, cut, way) in done:
                continue
            start = time.perf_counter()
            small = make(net, plan_of(net, cut, data if BY_DATA in way else None), data)
            seconds = round(time.perf_counter() - start, 1)
            share = small.hodec_plan.macs_after / small.hodec_plan.macs_before
            yield {
                "net": name, "cut": cut, "way": way, "accuracy": test.accuracy(small), "seconds": seconds,
                "macs": round(share, 4),
            }  # fmt: skip


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The rows as Markdown: a line for each net and way, accuracy and seconds for each cut."""
    found = {(row["net"], row["cut"], row["way"]): row for row in rows}
    lines = [
        "| net | way | " + " | ".join(f"{100 * cut:.0f} % fewer" for cut in CUTS) + " | seconds |",
        "|---|---|" + "---|" * (len(CUTS) + 1),
    ]
    for net in NETS:
        dense = [f"{way}: {found[net, 0, way]['accuracy']:.2f}" for way in DENSE if (net, 0, way) in found]
        if not dense:
            continue
        lines.append(f"| {net} | {', '.join(dense)} |" + " |" * (len(CUTS) + 1))
        for way in WAYS:
            mine = [found.get((net, cut, way)) for cut in CUTS]
            cells = ["" if row is None else f"{row['accuracy']:.2f}" for row in mine]
            times = [row["seconds"] for row in mine if row is not None]
            if times:
                lines.append(f"| | {way} | {' | '.join(cells)} | {max(times):.0f} |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """Do what has no row yet, then print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=Path, required=True)
    parser.add_argument("--weights", type=Path, required=True)
    parser.add_argument("--rows", type=Path, default=Path(__file__).with_name("rows.jsonl"))
    parser.add_argument("--test", type=int, default=2000, help="pictures of the test set")
    parser.add_argument("--nets", nargs="+", choices=NETS, default=NETS)
    parser.add_argument("--cuts", nargs="+", type=float, choices=CUTS, default=CUTS)
    given = parser.parse_args(arguments)
    rows = [json.loads(line) for line in given.rows.read_text().splitlines()] if given.rows.exists() else []
    data = list(read(given.pictures / "train", CALIBRATION).x.split(BATCH))
    test = read(given.pictures / "test", given.test)
    for name in given.nets:
        net = CifarResNet(DEPTHS[name]).eval()
        load_weights(net, given.weights / f"{name}-cifar10.safetensors")
        done = {(row["net"], row["cut"], row["way"]) for row in rows}
        for row in rows_of(name, net, data, test, cuts=given.cuts, done=done):
            rows.append(row)
            with given.rows.open("a") as file:
                file.write(json.dumps(row) + "\n")
    sys.stdout.write(table(rows) + "\n")


if __name__ == "__main__":
    main()
