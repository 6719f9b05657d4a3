"""Batches of images too many to hold: worker processes read and cut them, the device normalises them."""

from collections.abc import Callable, Iterator, Sequence

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from hodec.errors import DataError
from hodec.experiment.data.augment import epoch_order, stream
from hodec.experiment.data.epochs import Batch, EpochLoader, Normalise
from hodec.experiment.data.images import FolderSplit

Key = tuple[int, int]  # which image, and the seed of its random cut
Item = tuple[Tensor, int] | DataError


class _Reader(Dataset[Item]):
    """Images of a split by key."""

    def __init__(self, split: FolderSplit, transform: Callable[[Image.Image], Tensor]) -> None:
        self.split, self.transform = split, transform

    def __getitem__(self, key: Key) -> Item:
        index, seed = key
        try:
            # torchvision draws from the global generator: seeded for this image, its cut depends on no worker
            with torch.random.fork_rng(devices=[]):
                torch.default_generator.manual_seed(seed)
                return self.split.item(index, self.transform)
        except DataError as error:
            return error  # as a value: raised in a worker, its message would drown in a traceback


def _collate(items: list[Item]) -> Batch | DataError:
    pairs: list[tuple[Tensor, int]] = []
    for item in items:
        if isinstance(item, DataError):
            return item
        pairs.append(item)
    return torch.stack([image for image, _ in pairs]), torch.tensor([label for _, label in pairs])


class _Keys:
    """The batches of keys which the workers are to read; filled anew before every pass."""

    def __init__(self) -> None:
        self.batches: list[list[Key]] = []

    def __iter__(self) -> Iterator[list[Key]]:
        return iter(self.batches)

    def __len__(self) -> int:
        return len(self.batches)


class WorkerLoader(EpochLoader):
    """Batches read by worker processes: order and random cuts are functions of (seed, epoch).

    Neither the number of workers nor a restart in mid-epoch changes a batch.

    Args:
        split: images on disk.
        batch_size, seed, train, rank, world_size: as for ``EpochLoader``.
        mean, std, channels_last: as for ``Normalise``.
        augment: with ``train``, random part of the image; else the middle.
        flip: with ``train`` and ``augment``, mirror half of the images.
        num_workers: processes; 0 reads in this one.
        device: where the batches are normalised and yielded.

    Raises:
        DataError: on iteration, naming a image that cannot be read.
    """

    def __init__(
        self,
        split: FolderSplit,
        *,
        batch_size: int,
        mean: Sequence[float],
        std: Sequence[float],
        seed: int,
        train: bool,
        augment: bool = False,
        flip: bool = False,
        num_workers: int = 0,
        device: str | torch.device = "cpu",
        rank: int = 0,
        world_size: int = 1,
        channels_last: bool = False,
    ) -> None:
        super().__init__(len(split), batch_size=batch_size, seed=seed, train=train, rank=rank, world_size=world_size)
        self.device = torch.device(device)
        self.normalise = Normalise(mean, std, size=None, channels_last=channels_last, device=self.device)
        self._keys = _Keys()
        self._reader = DataLoader(
            _Reader(split, split.transform(augment=train and augment, flip=flip)),
            batch_sampler=self._keys,  # type: ignore[arg-type]  # torch asks for ints, keys are pairs
            collate_fn=_collate,
            num_workers=num_workers,
            pin_memory=self.device.type == "cuda",
            persistent_workers=num_workers > 0,
            generator=torch.Generator().manual_seed(seed),  # else each pass would draw from the global one
        )

    def _batches(self, epoch: int, start: int) -> Iterator[Batch]:
        order = torch.arange(self.size)
        if self.train:
            order = epoch_order(self.size, seed=self.seed, epoch=epoch)
        seeds = torch.randint(2**31, (self.size,), generator=stream(self.seed, epoch, "cut"))
        self._keys.batches = [
            list(zip(order[positions].tolist(), seeds[positions].tolist(), strict=True))
            for positions in self.positions[start:]
        ]
        for batch in self._reader:
            if isinstance(batch, DataError):
                raise batch
            images, labels = (part.to(self.device, non_blocking=True) for part in batch)
            yield self.normalise(images), labels
