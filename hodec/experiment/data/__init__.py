"""Data sets by name, and the loaders that make batches of them.

``build_data(cfg)`` gives an ``ImageData``; ``train_loader``, ``val_loader`` and ``test_loader`` take it and the
same configuration. Nothing here depends on a training framework.
"""

from collections.abc import Callable

from hodec.errors import ConfigError, near_matches
from hodec.experiment.data.augment import Augment
from hodec.experiment.data.config import DataConfig, check_config
from hodec.experiment.data.epochs import EpochLoader
from hodec.experiment.data.folder import image_folder
from hodec.experiment.data.images import FolderSplit, ImageData, TensorSplit, stratified_split
from hodec.experiment.data.loaders import TensorLoader, test_loader, train_loader, val_loader
from hodec.experiment.data.tensor_sets import cifar10, cifar100, digits, fake
from hodec.experiment.data.workers import WorkerLoader

__all__ = [
    "DATASETS",
    "Augment",
    "DataConfig",
    "EpochLoader",
    "FolderSplit",
    "ImageData",
    "TensorLoader",
    "TensorSplit",
    "WorkerLoader",
    "build_data",
    "stratified_split",
    "test_loader",
    "train_loader",
    "val_loader",
]

DATASETS: dict[str, Callable[[DataConfig], ImageData]] = {
    "digits": digits,
    "cifar10": cifar10,
    "cifar100": cifar100,
    "image_folder": image_folder,
    "fake": fake,
}


def build_data(cfg: DataConfig) -> ImageData:
    """The data set ``cfg.name``; its files are looked for now, the images are read when first needed.

    Raises:
        ConfigError: if the name is unknown or a setting is out of range.
        DataError: if files are missing, or the folders do not make a data set.
    """
    if cfg.name not in DATASETS:
        close = near_matches(cfg.name, list(DATASETS))
        raise ConfigError(f"data={cfg.name!r} is unknown.{close} Choose data=... from {', '.join(DATASETS)}")
    check_config(cfg)
    return DATASETS[cfg.name](cfg)
