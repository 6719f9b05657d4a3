"""Whole runs of the pipeline that take a second: resnet20 on 64 made-up images of 8 x 8."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from hodec.experiment.config.schema import AdmmConfig, Config, DataConfig, MethodConfig, OptimizerConfig, TrainerConfig

DATA = DataConfig(
    name="fake",
    fake_size=64,
    fake_classes=4,
    image_size=8,
    batch_size=16,
    val_fraction=0.25,
    augment=True,
    crop_padding=1,
)


def tiny(**changes: Any) -> Config:
    """Settings of a tiny run, some changed; a dict changes some of a group: ``admm={"enabled": False}``."""
    config = Config(
        data=DATA,
        dense_epochs=2,
        retrain_epochs=2,
        tt_ranks=4,
        method=MethodConfig(n_modes=1),
        admm=AdmmConfig(),
        optimizer=OptimizerConfig(lr=0.05),
        trainer=TrainerConfig(threads=1, accelerator="cpu"),
        bn_batches=2,
        report=False,
    )
    groups = {key: replace(getattr(config, key), **value) for key, value in changes.items() if isinstance(value, dict)}
    return replace(config, **{**changes, **groups})


def files_of(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, byte for byte."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}
