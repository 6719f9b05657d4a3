"""conf/experiment: each file's plan reaches the cuts in its name, and its whole recipe runs on a few images."""

import json
import re
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from PIL import Image

from hodec.experiment import pipeline
from hodec.experiment.config.overrides import plain
from hodec.experiment.config.schema import Config, config_of
from hodec.models import build_model
from hodec.ranks import Manual, make_plan

CONF = Path(__file__).resolve().parents[2] / "conf"
EXPERIMENTS = sorted(path.stem for path in (CONF / "experiment").glob("*.yaml"))
# of a file's name: what it says of its cuts in % -> what they are cuts of
PROMISES = {r"_cifar10_(\d\d)_(\d\d)$": ("params", "macs"), r"_imagenet_(\d\d)$": ("macs",)}
CLASSES = {"cifar10": (10, 32), "imagenet": (1000, 224)}


def promised(name: str) -> dict[str, int]:
    for pattern, metrics in PROMISES.items():
        if found := re.search(pattern, name):
            return dict(zip(metrics, map(int, found.groups()), strict=True))
    return {}


def composed(*overrides: str) -> Config:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return config_of(plain(compose("config", overrides=list(overrides))))


@pytest.mark.parametrize("name", [name for name in EXPERIMENTS if promised(name)])
def test_a_plan_reaches_the_cuts_of_its_name(name: str):
    config = composed(f"experiment={name}", "data.root=images")
    classes, side = next(sizes for word, sizes in CLASSES.items() if word in name)
    prefix = "torchvision/" if config.model.source == "torchvision" else ""
    model = build_model(prefix + config.model.name.removeprefix("torchvision/"), in_channels=3, num_classes=classes)
    plan = make_plan(
        model,
        Manual(config.tt_ranks),
        method=config.method.name,
        n_modes=config.method.n_modes,
        example_input=torch.zeros(1, 3, side, side),
        exclude=list(config.exclude or []) or None,
    )
    for metric, percent in promised(name).items():
        # a whole percent, rounded to the nearest: what the published tables give
        assert 100 * plan.reduction[metric] >= percent - 0.5, metric
        assert 100 * plan.reduction[metric] <= percent + 5, metric


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """ROOT/train|test/<class>/*.png of noise."""
    torch.manual_seed(0)
    for split, count in (("train", 10), ("test", 4)):
        for label in ("cat", "dog"):
            folder = tmp_path / "images" / split / label
            folder.mkdir(parents=True)
            for k in range(count):
                Image.fromarray(torch.randint(0, 256, (48, 40, 3), dtype=torch.uint8).numpy()).save(folder / f"{k}.png")
    return tmp_path / "images"


@pytest.mark.slow
@pytest.mark.parametrize("name", EXPERIMENTS)
def test_a_recipe_runs_from_its_first_phase_to_its_last(name: str, images: Path, tmp_path: Path):
    """One epoch of each phase; what is not a matter of length is as in the file."""
    short = [f"{phase}_epochs=1" for phase in ("pretrain", "dense", "retrain")]
    small = ["data=image_folder", f"data.root={images}", "data.batch_size=4", "data.num_workers=0", "trainer=default"]
    sizes = ["data.eval_batch_size=4", "data.val_fraction=0.2", "data.image_size=64", "bn_batches=2"]
    sizes.append("data.epoch_batches=null")
    config = composed(f"experiment={name}", *small, *sizes, *short, "trainer.accelerator=cpu", "report=false")
    metrics = pipeline.run(config, tmp_path / "run")
    phases = [json.loads(line)["phase"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert list(dict.fromkeys(phases)) == ["pretrain", "admm" if config.uses_admm else "dense", "retrain"]
    assert metrics["reduction"]["macs"] > 0.4
    for metric in ("macs", "params") if config.ranks.name == "budget" else ():
        assert metrics["reduction"][metric] >= 1 - getattr(config.ranks, metric)
    assert 0 <= metrics["compressed"]["test_accuracy"] <= 1
