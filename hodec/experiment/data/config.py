"""The settings this package reads, and the check that they make sense."""

from collections.abc import Sequence
from typing import Any

from hodec.errors import ConfigError

DataConfig = Any  # an option of the group ``data``

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
