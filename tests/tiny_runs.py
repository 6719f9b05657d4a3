"""Whole runs of the pipeline that take a second: resnet20 on 64 made-up images of 8 x 8."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from hodec.experiment.config.groups import default_option, kinds_of
from hodec.experiment.config.options import SgdSettings, TrainerSettings, method_settings
from hodec.experiment.config.options_of_data import Fake
from hodec.experiment.config.schema import Config
from hodec.options import Settings

DATA = Fake(fake_size=64, fake_classes=4, image_size=8, batch_size=16, val_fraction=0.25, augment=True, crop_padding=1)


def tiny(**changes: Any) -> Config:
    """Settings of a tiny run, some changed.

    A dict changes some of a group, ``admm={"pull": 0.5}``, or chooses its option, ``ranks={"name": "energy"}``.
    """
    config: dict[str, Any] = {
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


def files_of(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, byte for byte."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}
