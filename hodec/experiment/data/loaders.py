"""Loaders for the splits of a data set: held in memory, or read by workers."""
# ruff: noqa: PT028  (test_loader is no test)

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from hodec.errors import ConfigError
from hodec.experiment.data.augment import NO_AUGMENT, Augment, crop, draw_flips, draw_shifts, epoch_order, mirror
from hodec.experiment.data.config import DataConfig
from hodec.experiment.data.epochs import Batch, EpochLoader, Normalise
from hodec.experiment.data.images import ImageData, Split, TensorSplit
from hodec.experiment.data.workers import WorkerLoader


class TensorLoader(EpochLoader):
    """Batches of images held on the device that trains on them; no worker, no copy from host to device.

    The crop and the flip of a image are functions of (seed, epoch, its place in the epoch's order), whatever
    the number of processes.

    Args:
        images: uint8 (N, C, H, W); moved to ``device`` once, here.
        labels: int64 (N,).
        batch_size, seed, train, rank, world_size: as for ``EpochLoader``.
        mean, std, channels_last: as for ``Normalise``.
        augment: applied when ``train``.
        device: where batches are made.
        image_size: height and width the images are scaled to, after the crop; None leaves them.
    """

    def __init__(
        self,
        images: Tensor,
        labels: Tensor,
        *,
        batch_size: int,
        mean: Sequence[float],
        std: Sequence[float],
        seed: int,
        train: bool,
        augment: Augment = NO_AUGMENT,
        device: str | torch.device = "cpu",
        rank: int = 0,
        world_size: int = 1,
        channels_last: bool = False,
        image_size: tuple[int, int] | None = None,
    ) -> None:
        super().__init__(len(images), batch_size=batch_size, seed=seed, train=train, rank=rank, world_size=world_size)
        self.device = torch.device(device)
        self.images, self.labels = images.to(self.device), labels.to(self.device)
        self.positions = tuple(positions.to(self.device) for positions in self.positions)
        self.augment = augment if train else NO_AUGMENT
        self.normalise = Normalise(mean, std, size=image_size, channels_last=channels_last, device=self.device)

    def _batches(self, epoch: int, start: int) -> Iterator[Batch]:
        # all numbers of an epoch go to the device at once: no batch has to wait for the host, nor the host for them
        order, shifts, flips = (self._sent(drawn) for drawn in self._draws(epoch))
        for positions in self.positions[start:]:
            chosen = order[positions]
            images = self.images[chosen]
            if self.augment.crop_padding:
                images = crop(images, shifts[positions], self.augment.crop_padding)
            if self.augment.flip:
                images = mirror(images, flips[positions])
            yield self.normalise(images), self.labels[chosen]

    def _sent(self, drawn: Tensor) -> Tensor:
        pinned = drawn.pin_memory() if self.device.type == "cuda" else drawn
        return pinned.to(self.device, non_blocking=True)

    def _draws(self, epoch: int) -> tuple[Tensor, Tensor, Tensor]:
        order = torch.arange(self.size)
        if self.train:
            order = epoch_order(self.size, seed=self.seed, epoch=epoch)
        shifts = draw_shifts(self.size, self.augment, seed=self.seed, epoch=epoch)
        return order, shifts, draw_flips(self.size, seed=self.seed, epoch=epoch)


def train_loader(
    data: ImageData,
    cfg: DataConfig,
    *,
    seed: int,
    device: str | torch.device = "cpu",
    rank: int = 0,
    world_size: int = 1,
    channels_last: bool = False,
) -> EpochLoader:
    """Training batches: float32 (cfg.batch_size, C, H, W) and int64 (cfg.batch_size,), on ``device``.

    Args:
        data: what ``build_data(cfg)`` gave.
        cfg: batch size, augmentation and workers are read from it.
        seed: of order and augmentation.
        device: where the batches are made; images held in memory move there.
        rank: number of this process, 0..world_size - 1.
        world_size: number of processes that share the images.
        channels_last: memory format of the images.

    Raises:
        ConfigError: if a batch is larger than the share of one process.
    """
    share = len(data.train) // world_size
    if cfg.batch_size > share:
        whose = f" in each of {world_size} processes" if world_size > 1 else ""
        raise ConfigError(
            f"data.batch_size={cfg.batch_size} is larger than the training split of {data.name}, "
            f"{share} images{whose}; set data.batch_size={max(share, 1)} or less"
        )
    place = {"device": device, "rank": rank, "world_size": world_size, "channels_last": channels_last}
    return _make(data, data.train, cfg, train=True, seed=seed, **place)


def val_loader(
    data: ImageData,
    cfg: DataConfig,
    *,
    device: str | torch.device = "cpu",
    rank: int = 0,
    world_size: int = 1,
    channels_last: bool = False,
) -> EpochLoader | None:
    """Validation batches in order, each image once; None without a validation split (val_fraction 0).

    Arguments as for ``train_loader``.
    """
    if data.val is None:
        return None
    place = {"device": device, "rank": rank, "world_size": world_size, "channels_last": channels_last}
    return _make(data, data.val, cfg, train=False, seed=0, **place)


def test_loader(
    data: ImageData,
    cfg: DataConfig,
    *,
    device: str | torch.device = "cpu",
    rank: int = 0,
    world_size: int = 1,
    channels_last: bool = False,
) -> EpochLoader:
    """Test batches in order, each image once; reads the test split. Arguments as for ``train_loader``."""
    place = {"device": device, "rank": rank, "world_size": world_size, "channels_last": channels_last}
    return _make(data, data.test, cfg, train=False, seed=0, **place)


def _make(data: ImageData, split: Split, cfg: DataConfig, *, train: bool, seed: int, **place: Any) -> EpochLoader:
    """The loader for this kind of split; ``place`` is device, rank, world_size, channels_last."""
    common: dict[str, Any] = {
        "batch_size": cfg.batch_size if train else cfg.eval_batch_size,
        "mean": data.mean,
        "std": data.std,
        "seed": seed,
        "train": train,
        **place,
    }
    if isinstance(split, TensorSplit):
        augment = Augment(cfg.crop_padding, cfg.flip) if cfg.augment else NO_AUGMENT
        return TensorLoader(split.images, split.labels, augment=augment, image_size=data.image_size, **common)
    return WorkerLoader(split, augment=cfg.augment, flip=cfg.flip, num_workers=cfg.num_workers, **common)
