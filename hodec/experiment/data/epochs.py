"""What all loaders share: an order that is a function of seed and epoch, and a place to go on from.

A loader is iterated like torch's own. ``loader.sampler.set_epoch(epoch)`` (which Lightning calls) chooses the
epoch; without it each pass repeats the same one. ``state_dict`` holds the epoch and the next batch; after
``load_state_dict`` the next pass yields exactly the batches that were left.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from hodec.errors import CheckpointError, DataError

Batch = tuple[Tensor, Tensor]


class EpochSampler:
    """Where a loader stands: its epoch, and the batch it yields next."""

    def __init__(self) -> None:
        self.epoch = 0
        self.next_batch = 0
        self._resume_at = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch of the next pass; another one than before starts at its first batch."""
        if epoch != self.epoch:
            self.epoch, self.next_batch, self._resume_at = epoch, 0, 0

    def restore(self, epoch: int, next_batch: int) -> None:
        """Let the next pass, and only that one, start at a batch within an epoch."""
        self.epoch, self.next_batch, self._resume_at = epoch, next_batch, next_batch

    def begin(self) -> tuple[int, int]:
        """Epoch and first batch of a pass that starts now."""
        start, self._resume_at = self._resume_at, 0
        return self.epoch, start


class EpochLoader(ABC):
    """Shares images out into batches, and remembers how far it came.

    Training: the epoch's permutation is dealt out to the processes one image at a time, so ``world_size``
    processes see together, step by step, the images one process with a batch ``world_size`` times as large
    would see. Images that fill no whole batch are left out, unless there is but one batch. Evaluation: every
    image once, in order; all processes yield the same number of batches, for they must meet at each.

    Args:
        size: number of images, all processes together.
        batch_size: images per batch and process, >= 1.
        seed: of order and augmentation.
        train: training or evaluation, as above.
        rank: number of this process, 0..world_size - 1.
        world_size: number of processes that share the images.

    Raises:
        DataError: if there are fewer images than processes (or batches to be filled).
    """

    def __init__(
        self, size: int, *, batch_size: int, seed: int, train: bool, rank: int = 0, world_size: int = 1
    ) -> None:
        if size < world_size:
            raise DataError(f"a split of {size} images cannot be shared by {world_size} processes")
        self.size, self.batch_size, self.seed, self.train = size, batch_size, seed, train
        self.rank, self.world_size = rank, world_size
        self.sampler = EpochSampler()
        self.batch_sampler = None  # Lightning asks for one wherever there is a sampler
        # positions within the epoch's order, one tensor per batch; the same in every epoch
        self.positions = self._deal()

    def _deal(self) -> tuple[Tensor, ...]:
        """Positions in the epoch's order which make up each batch of this process."""
        if self.train:
            share = torch.arange(self.rank, self.size - self.size % self.world_size, self.world_size)
            whole = len(share) // self.batch_size * self.batch_size
            return (share[:whole] if whole else share).split(self.batch_size)
        share = torch.arange(self.rank, self.size, self.world_size)
        if self.world_size == 1:
            return share.split(self.batch_size)
        largest = -(-self.size // self.world_size)
        batches = -(-largest // self.batch_size)
        if self.size // self.world_size < batches:
            raise DataError(f"{self.size} images do not fill {batches} batches in {self.world_size} processes")
        return share.tensor_split(batches)

    def __len__(self) -> int:
        return len(self.positions)

    def __iter__(self) -> Iterator[Batch]:
        # a generator looks at the epoch when its first batch is asked for, not when it is made: Lightning makes
        # the first one before it restores the state and sets the epoch
        epoch, start = self.sampler.begin()
        for number, batch in enumerate(self._batches(epoch, start), start + 1):
            self.sampler.next_batch = number
            yield batch

    @abstractmethod
    def _batches(self, epoch: int, start: int) -> Iterator[Batch]:
        """The batches of an epoch from number ``start`` on."""

    def state_dict(self) -> dict[str, int]:
        """Epoch, next batch, and what gives them their meaning."""
        return {"epoch": self.sampler.epoch, "batch": self.sampler.next_batch, **self._identity()}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on where ``state`` was taken.

        Raises:
            CheckpointError: if that was in mid-epoch, and this loader has other batches.
        """
        batch, mine = state["batch"], self._identity()
        differ = [f"{key} {state.get(key)} (now {value})" for key, value in mine.items() if state.get(key) != value]
        if differ:
            if 0 < batch < state["batches"]:
                raise CheckpointError(
                    f"the checkpoint was taken within epoch {state['epoch']}, with other batches: "
                    f"{', '.join(differ)}; resume with the same data, seed and batch size, or from the end of an epoch"
                )
            batch = len(self) if batch else 0
        self.sampler.restore(state["epoch"], batch)

    def _identity(self) -> dict[str, int]:
        keys = ("seed", "size", "batch_size", "world_size")
        return {"batches": len(self), **{key: getattr(self, key) for key in keys}}


class Normalise:
    """From stored pixels to network input: scale to ``size``, subtract the mean, divide by the deviation.

    Args:
        mean: per channel, in units of the full range 0..1.
        std: per channel, > 0.
        size: height and width in pixels to scale to; None leaves the images as they are.
        channels_last: memory format of the result.
        device: where the images are.
    """

    def __init__(
        self,
        mean: Sequence[float],
        std: Sequence[float],
        *,
        size: tuple[int, int] | None,
        channels_last: bool,
        device: torch.device,
    ) -> None:
        deviation = torch.tensor(std, dtype=torch.float64).view(-1, 1, 1)
        self.scale = (1 / (255 * deviation)).float().to(device)
        self.shift = (-torch.tensor(mean, dtype=torch.float64).view(-1, 1, 1) / deviation).float().to(device)
        self.size = size
        self.memory_format = torch.channels_last if channels_last else torch.contiguous_format

    def __call__(self, images: Tensor) -> Tensor:
        """uint8 (N, C, H, W) -> float32 (N, C, *size)."""
        x = images.to(torch.float32, memory_format=self.memory_format)
        if self.size is not None and self.size != tuple(x.shape[-2:]):
            x = F.interpolate(x, size=self.size, mode="bilinear", antialias=True)
        return torch.addcmul(self.shift, x, self.scale).contiguous(memory_format=self.memory_format)
