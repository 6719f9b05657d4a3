"""CIFAR ResNets made small without training, each way that hodec has, at 30, 50 and 70 % fewer multiply-adds.

    python experiments/no_training_cifar10_jpeg/run.py --images CIFAR10_JPEG --weights FOLDER [--rows ROWS.jsonl]

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
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

import hodec
from hodec.calibration.output_gradients import TwoSided
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
MIXED = (METHOD, "svd", "tucker")

Batches = Sequence[Tensor]
Roots = dict[str, Tensor]


def weights_only(net: nn.Module, plan: Plan, data: Batches, _roots: Roots) -> nn.Module:
    """Each weight truncated by itself."""
    return hodec.convert(net, plan)


def batchnorm_only(net: nn.Module, plan: Plan, data: Batches, _roots: Roots) -> nn.Module:
    """The same, then BatchNorm's statistics from the images."""
    small = hodec.convert(net, plan)
    reestimate_batchnorm(small, data)
    return small


def whitened(net: nn.Module, plan: Plan, data: Batches, _roots: Roots) -> nn.Module:
    """Each weight truncated in the covariance of its input in the dense net."""
    return hodec.convert(net, plan, covariances=hodec.collect_covariances(net, plan, data))


def whitened_batchnorm(net: nn.Module, plan: Plan, data: Batches, _roots: Roots) -> nn.Module:
    """The same, then BatchNorm's statistics from the images."""
    small = whitened(net, plan, data, _roots)
    reestimate_batchnorm(small, data)
    return small


@dataclass(frozen=True)
class Sequential:
    """One layer after the other, on what the net compressed so far gives it; the settings are ``fit_to_data``'s."""

    solver: str = "als"
    sums: bool = False
    turns: int = 0
    gradients: bool = False
    times: int = 1

    def __call__(self, net: nn.Module, plan: Plan, data: Batches, roots: Roots) -> nn.Module:
        """The small net."""
        near = hodec.fit_to_data(
            net,
            plan,
            augmented(data, self.times),
            solver=self.solver,
            sums=self.sums,
            turns=self.turns,
            output_roots=roots if self.gradients else None,
        )
        return hodec.convert(near, plan)


def augmented(data: Batches, times: int) -> list[Tensor]:
    """The images, and ``times`` - 1 copies: mirrored or not, moved by up to 4 pixels, as in the nets' training."""
    draw, shown = torch.Generator().manual_seed(0), list(data)
    for _ in range(times - 1):
        for x in data:
            padded = F.pad(torch.where(torch.rand(len(x), 1, 1, 1, generator=draw) < 0.5, x.flip(-1), x), (4, 4, 4, 4))
            places = torch.randint(0, 9, (len(x), 2), generator=draw).tolist()
            shown.append(torch.stack([one[:, i : i + 32, j : j + 32] for one, (i, j) in zip(padded, places)]))
    return shown


WAYS: dict[str, Callable[[nn.Module, Plan, Batches, Roots], nn.Module]] = {
    "weights only": weights_only,
    "BatchNorm only": batchnorm_only,
    "whitened": whitened,
    "whitened, BatchNorm": whitened_batchnorm,
    "whitened, sequential": Sequential("none"),
    "+ refit (ALS)": Sequential(),
    "+ refit (ADMM)": Sequential("admm"),
    "+ refit (ALS), ranks by data": Sequential(),
    "ALS, ranks by gradients": Sequential(),
    "+ sums": Sequential(sums=True),
    "+ ReLU": Sequential(sums=True, turns=3),
    "+ output gradients": Sequential(sums=True, turns=3, gradients=True),
    "+ images augmented to 1024": Sequential(sums=True, turns=3, gradients=True, times=4),
    "+ methods mixed": Sequential(sums=True, turns=3, gradients=True, times=4),
    "all with ADMM": Sequential("admm", sums=True, turns=3, gradients=True, times=4),
}
RANKS = dict.fromkeys(WAYS, "weights") | {"+ refit (ALS), ranks by data": "data"}
RANKS |= dict.fromkeys(list(WAYS)[8:], "gradients") | {"+ methods mixed": "mixed"}
DENSE = ("dense", "dense with BatchNorm from the images")


@dataclass(frozen=True)
class Images:
    """Images (N, 3, 32, 32), normalized, with their classes."""

    x: Tensor
    y: Tensor

    def scores(self, net: nn.Module, dense: nn.Module) -> dict[str, float]:
        """Per cent of right classes, and the mean Kullback-Leibler divergence from the dense net's, in nats."""
        with torch.no_grad():
            found, wanted = (torch.cat([one(x) for x in self.x.split(250)]) for one in (net, dense))
        divergence = F.kl_div(found.log_softmax(1), wanted.log_softmax(1), reduction="batchmean", log_target=True)
        right = 100 * float((found.argmax(1) == self.y).double().mean())
        return {"accuracy": round(right, 2), "divergence": round(float(divergence), 4)}


def read(folder: Path, count: int, *, skipped: int = 0) -> Images:
    """So many images of a folder of class folders, drawn with a fixed seed, behind the ``skipped`` first."""
    classes = sorted(one for one in folder.iterdir() if one.is_dir())
    files = [(file, k) for k, one in enumerate(classes) for file in sorted(one.glob("*.jpg"))]
    drawn = torch.randperm(len(files), generator=torch.Generator().manual_seed(0))[skipped : skipped + count].tolist()
    pixels = np.stack([np.asarray(Image.open(files[i][0]).convert("RGB")) for i in drawn])
    x = (torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255 - MEAN) / STD
    return Images(x, torch.tensor([files[i][1] for i in drawn]))


def plan_of(net: nn.Module, cut: float, data: Batches, ranks: str) -> tuple[Plan, Roots]:
    """Ranks of all layers but the stem within a budget: by the weights, by what is lost of each layer's outputs
    (``data``), or of the net's (``gradients``, whose roots come along; ``mixed``: the method of each layer too).
    """
    settings: dict[str, Any] = {"method": METHOD, "example_input": torch.zeros(1, 3, 32, 32), "exclude": "conv1"}
    if ranks == "weights":
        return hodec.make_plan(net, Budget(macs=1 - cut), **settings), {}
    every = hodec.make_plan(net, 1, allow_larger=True, **settings)
    covariances = hodec.collect_covariances(net, every, data)
    if ranks == "data":
        return hodec.make_plan(net, Budget(macs=1 - cut, covariances=covariances), **settings), {}
    gradients = hodec.collect_output_gradients(net, every, data)
    weights = {name: one.importance for name, one in gradients.items()}
    by_method = {METHOD: covariances}
    for method in MIXED[1:] if ranks == "mixed" else ():
        every = hodec.make_plan(net, 1, allow_larger=True, **{**settings, "method": method})
        by_method[method] = hodec.collect_covariances(net, every, data)
    both: dict[str, Any] = {}
    for name, one in gradients.items():
        both[name] = {method: TwoSided(found[name], one) for method, found in by_method.items()}
    if ranks == "mixed":
        rule = Budget(macs=1 - cut, methods=list(MIXED), covariances=both, weights=weights)
    else:
        rule = Budget(macs=1 - cut, covariances={name: one[METHOD] for name, one in both.items()}, weights=weights)
    return hodec.make_plan(net, rule, **settings), {name: one.root for name, one in gradients.items()}


def rows_of(  # noqa: PLR0913
    name: str,
    net: nn.Module,
    data: Batches,
    test: Images,
    *,
    cuts: Sequence[float],
    ways: Sequence[str],
    done: set[tuple[str, Any, str]],
) -> Iterator[dict[str, Any]]:
    """A row for the dense net, and one for each way and cut; seconds are those of planning and making the net."""
    for way in DENSE:
        if (name, 0, way) not in done:
            dense = copy.deepcopy(net)
            if way != "dense":
                reestimate_batchnorm(dense, data)
            yield {"net": name, "cut": 0, "way": way, **test.scores(dense, net), "seconds": 0}
    for cut in cuts:
        for way in ways:
            make = WAYS[way]
            if (name, cut, way) in done:
                continue
            start = time.perf_counter()
            plan, roots = plan_of(net, cut, data, RANKS[way])
            small = make(net, plan, data, roots)
            seconds = round(time.perf_counter() - start, 1)
            share = small.hodec_plan.macs_after / small.hodec_plan.macs_before
            yield {
                "net": name, "cut": cut, "way": way, **test.scores(small, net), "seconds": seconds,
                "macs": round(share, 4),
            }  # fmt: skip


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The rows as Markdown: a line for each net and way, accuracy (divergence) for each cut, and the most seconds."""
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
            cells = ["" if row is None else _cell(row) for row in mine]
            times = [row["seconds"] for row in mine if row is not None]
            if times:
                lines.append(f"| | {way} | {' | '.join(cells)} | {max(times):.0f} |")
    return "\n".join(lines)


def _cell(row: dict[str, Any]) -> str:
    return f"{row['accuracy']:.2f}" + (f" ({row['divergence']:.3f})" if "divergence" in row else "")


def main(arguments: Sequence[str] | None = None) -> None:
    """Do what has no row yet, then print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, required=True)
    parser.add_argument("--weights", type=Path, required=True)
    parser.add_argument("--rows", type=Path, default=Path(__file__).with_name("rows.jsonl"))
    parser.add_argument("--test", type=int, default=2000, help="images of the test set")
    parser.add_argument("--nets", nargs="+", choices=NETS, default=NETS)
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=WAYS, metavar="WAY")
    parser.add_argument("--held-out", action="store_true", help="score 2,000 training images that are no data instead")
    parser.add_argument("--cuts", nargs="+", type=float, choices=CUTS, default=CUTS)
    given = parser.parse_args(arguments)
    rows = [json.loads(line) for line in given.rows.read_text().splitlines()] if given.rows.exists() else []
    data = list(read(given.images / "train", CALIBRATION).x.split(BATCH))
    test = (
        read(given.images / "train", 2000, skipped=CALIBRATION)
        if given.held_out
        else read(given.images / "test", given.test)
    )
    for name in given.nets:
        net = CifarResNet(DEPTHS[name]).eval()
        load_weights(net, given.weights / f"{name}-cifar10.safetensors")
        done = {(row["net"], row["cut"], row["way"]) for row in rows}
        for row in rows_of(name, net, data, test, cuts=given.cuts, ways=given.ways, done=done):
            rows.append(row)
            with given.rows.open("a") as file:
                file.write(json.dumps(row) + "\n")
    sys.stdout.write(table(rows) + "\n")


if __name__ == "__main__":
    main()
