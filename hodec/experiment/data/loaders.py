"""Loaders: an order that is a function of seed and epoch, batches made on the device, and a place to go on from.

A loader is iterated like torch's own. ``loader.sampler.set_epoch(epoch)`` (which Lightning calls) chooses the
epoch; without it each pass repeats the same one. ``state_dict`` holds the epoch and the next batch; after
``load_state_dict`` the next pass yields exactly the batches that were left.
"""
# ruff: noqa: PT028  (test_loader is no test)

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property, partial
from typing import Generic, TypedDict, TypeVar, Unpack, cast

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate

from hodec.errors import CheckpointError, ConfigError, DataError, Use
from hodec.experiment.data.images import FolderSplit, ImageData, ItemSplit, Split, TensorSplit
from hodec.experiment.data.options import Batches, DataSet

Batch = tuple[Tensor, Tensor]
Images = TypeVar("Images", bound=Split)
Files = TypeVar("Files", FolderSplit, ItemSplit)


class Place(TypedDict, total=False):
    """Where batches are made, and for which process.

    Attributes:
        device: where batches are made, the CPU if not given; images held in memory move there once.
        rank: number of this process, 0..world_size - 1.
        world_size: number of processes that share the images.
        channels_last: memory format of the images.
    """

    device: str | torch.device
    rank: int
    world_size: int
    channels_last: bool


class EpochLoader(ABC, Generic[Images]):
    """Shares images out into batches, and remembers how far it came.

    Training: the epoch's permutation is dealt out to the processes one image at a time, so ``world_size``
    processes see together, step by step, the images one process with a batch ``world_size`` times as large
    would see. Images that fill no whole batch are left out, unless there is but one batch. Evaluation: every
    image once, in order; all processes yield the same number of batches, for they must meet at each.

    Args:
        split: the images, of all processes together.
        option: batch sizes are read from it.
        seed: of order and augmentation.
        train: training or evaluation, as above.
        place: see ``Place``.

    Raises:
        DataError: if there are fewer images than processes (or batches to be filled).
    """

    def __init__(self, split: Images, option: Batches, *, seed: int, train: bool, **place: Unpack[Place]) -> None:
        self.split: Images = split
        self.size, self.seed, self.train = len(split), seed, train
        self.rank, self.world_size = place.get("rank", 0), place.get("world_size", 1)
        if self.size < self.world_size:
            raise DataError(f"a split of {self.size} images cannot be shared by {self.world_size} processes")
        self.batch_size = option.batch_size if train else option.eval_batch_size
        self.device = torch.device(place.get("device", "cpu"))
        self.memory_format = torch.channels_last if place.get("channels_last") else torch.contiguous_format
        # positions within the epoch's order, one tensor per batch; the same in every epoch
        self.positions = self._deal(option.epoch_batches)
        self.epoch, self.next_batch, self._resume_at = 0, 0, 0
        self.batch_sampler = None  # Lightning asks for one wherever there is a sampler

    @property
    def sampler(self) -> "EpochLoader[Images]":
        """The loader itself: Lightning calls ``loader.sampler.set_epoch``."""
        return self

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch of the next pass; another one than before starts at its first batch."""
        if epoch != self.epoch:
            self.epoch, self.next_batch, self._resume_at = epoch, 0, 0

    def _deal(self, most: int | None) -> tuple[Tensor, ...]:
        """Positions in the epoch's order which make up each batch of this process."""
        if self.train:
            own = torch.arange(self.rank, self.size - self.size % self.world_size, self.world_size)
            full = len(own) // self.batch_size * self.batch_size
            return torch.split(own[:full] if full else own, self.batch_size)[:most]
        own = torch.arange(self.rank, self.size, self.world_size)
        if self.world_size == 1:
            return torch.split(own, self.batch_size)
        largest = -(-self.size // self.world_size)
        batches = -(-largest // self.batch_size)
        if self.size // self.world_size < batches:
            raise DataError(f"{self.size} images do not fill {batches} batches in {self.world_size} processes")
        return own.tensor_split(batches)

    def __len__(self) -> int:
        return len(self.positions)

    def __iter__(self) -> Iterator[Batch]:
        # a generator looks at the epoch when its first batch is asked for, not when it is made: Lightning makes
        # the first one before it restores the state and sets the epoch
        epoch, start, self._resume_at = self.epoch, self._resume_at, 0
        order = torch.arange(self.size)
        if self.train:
            order = torch.randperm(self.size, generator=stream(self.seed, epoch, "order"))
        for number, (images, labels) in enumerate(self._batches(epoch, order, self.positions[start:]), start + 1):
            self.next_batch = number
            yield self._normalised(images), labels

    @abstractmethod
    def _batches(self, epoch: int, order: Tensor, batches: Sequence[Tensor]) -> Iterator[Batch]:
        """Images (B, C, H, W), as ``_normalised`` takes them, and labels int64 (B,) on the device.

        Args:
            epoch: chooses the random numbers of the augmentation.
            order: the epoch's order of the images, int64 (size,) on the CPU.
            batches: positions in that order, int64 (B,) for each batch.
        """

    @abstractmethod
    def _normalised(self, images: Tensor) -> Tensor:
        """Network input, float32 (B, C, H, W), of the images of a batch."""

    def state_dict(self) -> dict[str, int]:
        """Epoch, next batch, and what gives them their meaning."""
        return {"epoch": self.epoch, "batch": self.next_batch, **self._identity()}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Let the next pass, and only that one, go on where ``state`` was taken.

        Raises:
            CheckpointError: if that was in mid-epoch, and this loader has other batches.
        """
        batch, own = state["batch"], self._identity()
        differ = [f"{key} {state.get(key)} (now {value})" for key, value in own.items() if state.get(key) != value]
        shared = [int(one.get("batch_size", 0)) * int(one.get("world_size", 0)) for one in (state, own)]
        if shared[0] == shared[1]:  # other processes, which see together the same images at each step
            differ = [words for words in differ if words.split()[0] not in ("batch_size", "world_size")]
        if differ:
            if 0 < batch < state["batches"]:
                raise CheckpointError(
                    f"the checkpoint was taken within epoch {state['epoch']}, with other batches: "
                    f"{', '.join(differ)}; resume with the same data, seed and batch size, or from the end of an epoch"
                )
            batch = len(self) if batch else 0
        self.epoch, self.next_batch, self._resume_at = state["epoch"], batch, batch

    def _identity(self) -> dict[str, int]:
        keys = ("seed", "size", "batch_size", "world_size")
        return {"batches": len(self), **{key: getattr(self, key) for key in keys}}


class PixelLoader(EpochLoader[Images]):
    """Batches of stored pixels, which the device normalises: uint8 (B, C, H, W) from ``_batches``.

    Args:
        option: normalisation and augmentation are read from it too.
    """

    def __init__(self, split: Images, option: DataSet, *, seed: int, train: bool, **place: Unpack[Place]) -> None:
        super().__init__(split, option, seed=seed, train=train, **place)
        self.option, self.augment = option, train and option.augment
        mean, std = (torch.tensor(x, dtype=torch.float64).view(-1, 1, 1) for x in option.channel_statistics())
        self.scale, self.shift = (1 / (255 * std)).float().to(self.device), (-mean / std).float().to(self.device)

    def _normalised(self, images: Tensor) -> Tensor:
        """Network input of stored pixels: uint8 (B, C, H, W) -> float32 (B, C, image_size, image_size)."""
        x = images.to(torch.float32, memory_format=self.memory_format)
        side = self.option.image_size
        if side is not None and (side, side) != tuple(x.shape[-2:]):
            x = F.interpolate(x, size=(side, side), mode="bilinear", antialias=True)
        return torch.addcmul(self.shift, x, self.scale).contiguous(memory_format=self.memory_format)


class TensorLoader(PixelLoader[TensorSplit]):
    """Batches of images held on the device that trains on them; no worker, no copy from host to device.

    The crop and the flip of an image are functions of (seed, epoch, its place in the epoch's order), whatever
    the number of processes.
    """

    @cached_property
    def data(self) -> TensorSplit:
        """The split on the device, where it moves once."""
        return TensorSplit(self.split.images.to(self.device), self.split.labels.to(self.device))

    def _deal(self, most: int | None) -> tuple[Tensor, ...]:
        return tuple(positions.to(self.device) for positions in super()._deal(most))

    def _batches(self, epoch: int, order: Tensor, batches: Sequence[Tensor]) -> Iterator[Batch]:
        padding, flip = self.option.crop_padding * self.augment, self.option.flip and self.augment
        shifts = torch.randint(2 * padding + 1, (self.size, 2), generator=stream(self.seed, epoch, "crop"))
        flips = torch.randint(2, (self.size,), generator=stream(self.seed, epoch, "flip")).bool()
        # all numbers of an epoch go to the device at once: no batch has to wait for the host, nor the host for them
        order, shifts, flips = self._sent(order), self._sent(shifts), self._sent(flips)
        for positions in batches:
            chosen = order[positions]
            images = self.data.images[chosen]
            if padding:
                images = crop(images, shifts[positions], padding)
            if flip:
                images = mirror(images, flips[positions])
            yield images, self.data.labels[chosen]

    def _sent(self, drawn: Tensor) -> Tensor:
        pinned = drawn.pin_memory() if self.device.type == "cuda" else drawn
        return pinned.to(self.device, non_blocking=True)


Key = tuple[int, int]  # which image, and the seed of its random cut
Item = tuple[Tensor, int] | DataError


class _Reader(Dataset[Item]):
    """Items by key, or the error of the file; ``read`` may be called in any process."""

    def __init__(self, read: Callable[[int], tuple[Tensor, int]]) -> None:
        self.read = read

    def __getitem__(self, key: Key) -> Item:
        index, seed = key
        try:
            # torchvision draws from the global generator: seeded for this item, its cut depends on no worker
            with torch.random.fork_rng(devices=[]):
                torch.default_generator.manual_seed(seed)
                return self.read(index)
        except DataError as error:
            return error  # as a value: raised in a worker, its message would drown in a traceback


def _collate(collate: Callable[[list[Item]], Batch], items: list[Item]) -> Batch | DataError:
    return next((item for item in items if isinstance(item, DataError)), None) or collate(items)


class ReadLoader(EpochLoader[Files]):
    """Batches of items that worker processes read one by one.

    Order, and what reading an item draws by torch, are functions of (seed, epoch): neither the number of workers nor a
    restart in mid-epoch changes a batch.

    Raises:
        DataError: on iteration, naming an image that cannot be read.
    """

    @abstractmethod
    def _read(self) -> Callable[[int], tuple[Tensor, int]]:
        """What reads one item."""

    @cached_property
    def _keys(self) -> list[list[Key]]:
        """The batches which the workers are to read, filled anew before every pass."""
        return []

    @cached_property
    def _reader(self) -> DataLoader[Item]:
        return DataLoader(
            _Reader(self._read()),
            batch_sampler=self._keys,
            collate_fn=partial(_collate, getattr(self.split, "collate", None) or default_collate),
            num_workers=self.split.num_workers,
            pin_memory=self.device.type == "cuda",
            persistent_workers=self.split.num_workers > 0,
            generator=torch.Generator().manual_seed(self.seed),  # else each pass would draw from the global one
        )

    def _batches(self, epoch: int, order: Tensor, batches: Sequence[Tensor]) -> Iterator[Batch]:
        seeds = torch.randint(2**31, (self.size,), generator=stream(self.seed, epoch, "cut"))
        keys = (zip(order[positions].tolist(), seeds[positions].tolist(), strict=True) for positions in batches)
        self._keys[:] = map(list, keys)
        for batch in self._reader:
            if isinstance(batch, DataError):
                raise batch
            images, labels = (part.to(self.device, non_blocking=True) for part in batch)
            yield images, labels


class WorkerLoader(ReadLoader[FolderSplit], PixelLoader[FolderSplit]):
    """Batches of images too many to hold, which workers read and cut and the device normalises."""

    def _read(self) -> Callable[[int], tuple[Tensor, int]]:
        return partial(_cut, self.split, self.split.transform(augment=self.augment, flip=self.option.flip))


def _cut(split: FolderSplit, transform: Callable[[Image.Image], Tensor], index: int) -> tuple[Tensor, int]:
    return transform(split.image(index)), int(split.labels[index])


class ItemLoader(ReadLoader[ItemSplit]):
    """Batches of images of one's own."""

    def _read(self) -> Callable[[int], tuple[Tensor, int]]:
        return self.split.items.__getitem__

    def _normalised(self, images: Tensor) -> Tensor:
        return images.contiguous(memory_format=self.memory_format)


AnyLoader = TensorLoader | WorkerLoader | ItemLoader


def train_loader(data: ImageData, *, seed: int, **place: Unpack[Place]) -> AnyLoader:
    """Training batches: float32 (batch_size, C, H, W) and int64 (batch_size,), on the device.

    Args:
        data: the result of ``build_data``; batch size and augmentation are those of its option.
        seed: of order and augmentation.
        place: device, rank, world_size and channels_last, see ``Place``.

    Raises:
        ConfigError: if a batch is larger than the part of one process.
    """
    option, world_size = batches_of(data), place.get("world_size", 1)
    size, steps = option.batch_size, option.epoch_batches or 1
    part = len(data.train) // world_size
    if size > part:
        whose = f" in each of {world_size} processes" if world_size > 1 else ""
        raise ConfigError(
            f"{{size}} is larger than the training split of {data.option.name}, {part} images{whose}; "
            "set {allowed} or less",
            size=Use("data.batch_size", size),
            allowed=Use("data.batch_size", max(part, 1)),
        )
    if steps * size > part:
        text = f"{{steps}} of {size} images are more than the {part} there are; at most {part // size}"
        raise ConfigError(text, steps=Use("data.epoch_batches", steps))
    return _loader(data, data.train, seed=seed, train=True, **place)


def val_loader(data: ImageData, **place: Unpack[Place]) -> AnyLoader | None:
    """Validation batches in order, each image once, see ``train_loader``; None without a validation split."""
    return None if data.val is None else _loader(data, data.val, seed=0, train=False, **place)


def test_loader(data: ImageData, **place: Unpack[Place]) -> AnyLoader:
    """Test batches in order, each image once, see ``train_loader``; reads the test split."""
    return _loader(data, data.test, seed=0, train=False, **place)


def _loader(data: ImageData, split: Split, *, seed: int, train: bool, **place: Unpack[Place]) -> AnyLoader:
    if isinstance(split, ItemSplit):
        return ItemLoader(split, batches_of(data), seed=seed, train=train, **place)
    option = cast(DataSet, data.option)
    if isinstance(split, TensorSplit):
        return TensorLoader(split, option, seed=seed, train=train, **place)
    return WorkerLoader(split, option, seed=seed, train=train, **place)


def batches_of(data: ImageData) -> Batches:
    """The batch sizes of a data set."""
    return data.batches or cast(Batches, data.option)


def stream(seed: int, epoch: int, purpose: str) -> torch.Generator:
    """A generator on the CPU whose numbers depend on these three alone, and differ between any two triples."""
    digest = hashlib.blake2b(f"{seed}/{epoch}/{purpose}".encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)


def crop(images: Tensor, shifts: Tensor, padding: int) -> Tensor:
    """Cut each image out of itself with a black border.

    Args:
        images: (N, C, H, W), any type.
        shifts: int64 (N, 2), rows and columns in 0..2 * padding; ``padding`` itself gives the image back.
        padding: width of the border in pixels.
    """
    height, width = images.shape[-2:]
    padded = F.pad(images, [padding] * 4)
    windows = padded.unfold(2, height, 1).unfold(3, width, 1)  # (N, C, 2p + 1, 2p + 1, H, W), a view
    which = torch.arange(len(images), device=images.device)
    return windows[which, :, shifts[:, 0], shifts[:, 1]]


def mirror(images: Tensor, flips: Tensor) -> Tensor:
    """Mirror the images of (N, C, H, W) marked in ``flips`` bool (N,) left to right."""
    return torch.where(flips.view(-1, 1, 1, 1), images.flip(-1), images)
