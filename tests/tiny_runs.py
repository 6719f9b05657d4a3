"""Whole runs of the pipeline that take half a second: a net of 8 layers on 64 made-up images of 8 x 8."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from hodec.experiment.config.groups import default_option, kinds_of
from hodec.experiment.config.options import ModelSettings, SgdSettings, TrainerSettings, method_settings
from hodec.experiment.config.schema import Config
from hodec.experiment.data.options import Fake
from hodec.models import build_model, resnet_cifar
from hodec.options import Settings

# The smallest of the CIFAR family, of one block a stage: less than half the time of resnet20.
resnet_cifar.DEPTHS["resnet8"] = 1

DATA = Fake(fake_size=64, fake_classes=4, image_size=8, batch_size=16, val_fraction=0.25, augment=True, crop_padding=1)


def tiny(**changes: Any) -> Config:
    """Settings of a tiny run, some changed.

    A dict changes some of a group, ``admm={"pull": 0.5}``, or chooses its option, ``ranks={"name": "energy"}``.
    """
    config: dict[str, Any] = {
        "model": ModelSettings(name="resnet8"),
        "data": DATA,
        "dense_epochs": 2,
        "retrain_epochs": 2,
        "tt_ranks": 4,
        "method": method_settings("tt", uses_modes=True)(n_modes=1),
        "optimizer": SgdSettings(lr=0.05),
        "trainer": TrainerSettings(threads=1, accelerator="cpu"),
        "bn_batches": 2,
        "report": False,
    }
    for key, value in changes.items():
        config[key] = _option(key, config.get(key), value) if isinstance(value, dict) and key != "tt_ranks" else value
    return Config(**config)


def _option(group: str, present: Settings | None, values: dict[str, Any]) -> Settings:
    kinds = kinds_of(group)
    if "" not in kinds and "name" in values:
        return kinds[values["name"]](**{key: value for key, value in values.items() if key != "name"})
    return replace(present or default_option(group), **values)


# Of the run that the fixture ``finished`` makes, which has every phase.
FINISHED: dict[str, Any] = {"pretrain_epochs": 1, "distill": {"weight": 0.5}}


def dense_net() -> nn.Module:
    """The dense net of tiny runs, with random weights."""
    return build_model("resnet8", in_channels=3, num_classes=4)


def stopped_before(phase: str, finished: Path, folder: Path) -> Path:
    """A copy of a finished run as it was when it was killed at the end of ``phase``, before that was noted."""
    shutil.copytree(finished, folder)
    for name in (
        "compressed.safetensors",
        "compressed.json",
        "spectra.json",
        "metrics.json",
        "report.html",
        "report.md",
    ):
        (folder / name).unlink(missing_ok=True)
    state = json.loads((folder / "run.json").read_text())["phases"]
    done = list(state)[: list(state).index(phase)]
    (folder / "run.json").write_text(json.dumps({"phases": {name: state[name] for name in done}}))
    for path in (folder / "phases").iterdir():
        if path.stem.removesuffix("_factors") not in done:
            path.unlink()
    trained = {*done, phase}
    for path in (folder / "checkpoints").iterdir():
        if path.name.partition(".")[0] not in trained:
            path.unlink()
    lines = (folder / "metrics.jsonl").read_text().splitlines(keepends=True)
    (folder / "metrics.jsonl").write_text("".join(line for line in lines if json.loads(line)["phase"] in trained))
    return folder


class Killed(BaseException):
    """Not an Exception: nothing may catch it and go on."""


def killed_at(config: Config, folder: Path, write: int, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Run until a file is about to be put in its place for the ``write``-th time; False if there was no such time."""
    from hodec.experiment import pipeline

    count, real = 0, Path.replace

    def put(path: Path, target: Path) -> Path:
        nonlocal count
        count += 1
        if count == write:
            raise Killed
        return real(path, target)

    with monkeypatch.context() as patched:
        patched.setattr(Path, "replace", put)
        try:
            pipeline.run(config, folder)
        except Killed:
            return True
    return False


def files_of(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, byte for byte."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}
