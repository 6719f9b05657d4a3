"""The settings this package reads, and the check that they make sense."""

from collections.abc import Sequence
from typing import Any, Protocol

from hodec.errors import ConfigError


class DataConfig(Protocol):
    """The ``data`` group of the configuration; any object with these attributes will do."""

    @property
    def name(self) -> str:
        """Key of ``hodec.experiment.data.DATASETS``."""

    @property
    def root(self) -> str | None:
        """Folder of the files; None is ``data`` below the working folder for sets that can be fetched."""

    @property
    def batch_size(self) -> int:
        """Training images per step and process."""

    @property
    def eval_batch_size(self) -> int:
        """Images per step and process of validation and test."""

    @property
    def val_fraction(self) -> float:
        """Share of the training set put aside for validation, in [0, 1)."""

    @property
    def train_fraction(self) -> float:
        """Share of the training images that are used, the validation split apart, above 0, at most 1."""

    @property
    def augment(self) -> bool:
        """Whether training images are cropped and flipped at random."""

    @property
    def crop_padding(self) -> int:
        """Width in pixels of the black border out of which images in memory are cropped to their size."""

    @property
    def flip(self) -> bool:
        """Whether half of the augmented images are mirrored left to right."""

    @property
    def num_workers(self) -> int:
        """Processes that read images not held in memory; 0 reads them in the main process."""

    @property
    def download(self) -> bool:
        """Whether a missing data set is fetched."""

    @property
    def image_size(self) -> int | None:
        """Side in pixels of the square images the network gets; None keeps the data's own size."""

    @property
    def in_memory(self) -> bool | None:
        """Whether a folder is decoded once and held; None decides by size (2 GiB)."""

    @property
    def mean(self) -> Sequence[float] | None:
        """One number per channel, or one for all, in units of the full range 0..1; None: the data set's."""

    @property
    def std(self) -> Sequence[float] | None:
        """As ``mean``, above 0."""

    @property
    def fake_size(self) -> int:
        """Training images of ``fake``."""

    @property
    def fake_classes(self) -> int:
        """Classes of ``fake``."""


SMALLEST = {"batch_size": 1, "eval_batch_size": 1, "crop_padding": 0, "num_workers": 0, "image_size": 1}


def check_config(cfg: DataConfig) -> None:
    """Raise one ``ConfigError`` that names every setting out of range."""
    problems = [
        f"data.{key}={value} must be {least} or more"
        for key, least in SMALLEST.items()
        if (value := getattr(cfg, key, None)) is not None and value < least
    ]
    if not 0 <= cfg.val_fraction < 1:
        problems.append(f"data.val_fraction={cfg.val_fraction} must be in [0, 1); 0.1 is the usual choice")
    if not 0 < cfg.train_fraction <= 1:
        problems.append(f"data.train_fraction={cfg.train_fraction} must be above 0 and at most 1, which is all")
    if problems:
        raise ConfigError("; ".join(problems))


def channel_statistics(
    cfg: DataConfig, mean: Sequence[float], std: Sequence[float]
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation per channel: the settings where given, else those of the data set.

    Raises:
        ConfigError: if there is neither one number nor one per channel, or a deviation is not above 0.
    """
    own_mean = _per_channel("mean", mean if cfg.mean is None else cfg.mean, len(mean))
    own_std = _per_channel("std", std if cfg.std is None else cfg.std, len(std))
    if min(own_std) <= 0:
        raise ConfigError(f"data.std={list(own_std)} must be above 0; data.std=null takes the data set's own")
    return own_mean, own_std


def _per_channel(key: str, given: Any, channels: int) -> tuple[float, ...]:
    values = tuple(float(value) for value in given)
    if len(values) not in (1, channels):
        raise ConfigError(
            f"data.{key} has {len(values)} numbers, the images {channels} channels: give 1 or {channels}, "
            f"or data.{key}=null for the data set's own"
        )
    return values * (channels // len(values))
