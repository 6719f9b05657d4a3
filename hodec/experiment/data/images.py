"""What a data set is to the rest of the package: facts about its images, and three splits."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from hodec.experiment.data.config import DataConfig
from hodec.experiment.data.decode import check_headers, check_size, open_rgb

SPLIT_SEED = 0  # of the test split of digits, of every validation split, and of the part that is trained on
EVAL_MARGIN = 0.875  # share of the shorter side which the middle cut keeps: 224 of 256, as ImageNet nets are tested


@dataclass(frozen=True, eq=False)
class TensorSplit:
    """Images held in memory: ``images`` uint8 (N, C, H, W), ``labels`` int64 (N,)."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def subset(self, indices: Tensor) -> "TensorSplit":
        """The images at ``indices`` int64 (M,), in that order."""
        return TensorSplit(self.images[indices], self.labels[indices])

    def check(self) -> None:
        """Nothing to do: what is in memory was read without an error."""


@dataclass(frozen=True, eq=False)
class FolderSplit(Dataset[tuple[Tensor, int]]):
    """Images read from their files each time; an item is (uint8 (3, H, W), label) as for evaluation.

    Attributes:
        files: paths of N images.
        labels: int64 (N,).
        size: height and width in pixels of the items.
        resize: scale and cut images to ``size``; else all must have it.
    """

    files: tuple[str, ...]
    labels: Tensor
    size: tuple[int, int]
    resize: bool

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.item(index, self.transform())

    def item(self, index: int, transform: Callable[[Image.Image], Tensor]) -> tuple[Tensor, int]:
        """Image and label number ``index``; ``transform`` is one that ``transform()`` gave.

        Raises:
            DataError: if the file cannot be read, or is not of the size that all must have.
        """
        image = open_rgb(self.files[index])
        if not self.resize:
            check_size(self.files[index], (image.height, image.width), self.size)
        return transform(image), int(self.labels[index])

    def transform(self, *, augment: bool = False, flip: bool = False) -> Callable[[Image.Image], Tensor]:
        """From a decoded image to uint8 (3, H, W).

        Args:
            augment: cut a random part (8 to 100 % of the area) and scale it to ``size``; draws from torch's
                global generator.
            flip: with ``augment``, mirror half of the images.
        """
        # torchvision takes over a second to import: data held in memory does without it
        from torchvision.transforms import v2

        steps: list[Any] = []
        if augment:
            steps += [v2.RandomResizedCrop(list(self.size), antialias=True)]
            steps += [v2.RandomHorizontalFlip()] if flip else []
        elif self.resize:
            steps += [v2.Resize(round(min(self.size) / EVAL_MARGIN), antialias=True), v2.CenterCrop(list(self.size))]
        return v2.Compose([*steps, v2.PILToTensor()])

    def check(self) -> None:
        """Open every file without decoding it.

        Raises:
            DataError: naming the first that is no image, or not of the size that all must have.
        """
        check_headers(self.files, None if self.resize else self.size)


Split = TensorSplit | FolderSplit
TrainAndVal = tuple[Split, Split | None]


@dataclass(frozen=True, eq=False)
class ImageData:
    """A labelled set of images. Splits are read when first asked for, and then kept.

    Attributes:
        name: key of ``hodec.experiment.data.DATASETS``.
        image_size: height and width in pixels of the images as a loader yields them.
        classes: names of the labels.
        mean: per channel, in units of the full range 0..1.
        std: per channel, > 0, in units of the full range 0..1.
        load_train: reads the training and the validation split.
        load_test: reads the test split.
    """

    name: str
    image_size: tuple[int, int]
    classes: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    load_train: Callable[[], TrainAndVal] = field(repr=False)
    load_test: Callable[[], Split] = field(repr=False)

    @property
    def in_channels(self) -> int:
        """1 (grey) or 3 (RGB)."""
        return len(self.mean)

    @property
    def num_classes(self) -> int:
        """Number of labels, >= 2; labels are 0..num_classes - 1."""
        return len(self.classes)

    @cached_property
    def _train_and_val(self) -> TrainAndVal:
        return self.load_train()

    @property
    def train(self) -> Split:
        """The training set without the validation split."""
        return self._train_and_val[0]

    @property
    def val(self) -> Split | None:
        """The split on which choices are made; None when ``data.val_fraction=0``."""
        return self._train_and_val[1]

    @cached_property
    def test(self) -> Split:
        """The split of the final figures; not read before it is asked for."""
        return self.load_test()

    def split_sizes(self) -> dict[str, int]:
        """Number of images of each split: ``train``, ``validation`` (0 without one) and ``test``."""
        return {"train": len(self.train), "validation": len(self.val or ()), "test": len(self.test)}

    def check(self) -> None:
        """Read every split once, so that a broken image stops a run at its start and not after hours.

        Raises:
            DataError: naming the first file that cannot be read.
        """
        for split in (self.train, self.val, self.test):
            if split is not None:
                split.check()


def training_and_validation(labels: Tensor, cfg: DataConfig) -> tuple[Tensor, Tensor | None]:
    """Indices of what is trained on and of the validation split (None without one), the same in all runs.

    Args:
        labels: int64 (N,), of the training set.
        cfg: ``val_fraction`` of it is the validation split, whatever ``train_fraction`` of the rest is used.
    """
    kept, put_aside = torch.arange(len(labels)), None
    if cfg.val_fraction:
        kept, put_aside = stratified_split(labels, cfg.val_fraction, seed=SPLIT_SEED)
    return kept[stratified_part(labels[kept], cfg.train_fraction)], put_aside


def stratified_part(labels: Tensor, fraction: float) -> Tensor:
    """Indices of ``fraction`` of the images, with the mix of classes that they have."""
    if fraction == 1:
        return torch.arange(len(labels))
    return stratified_split(labels, 1 - fraction, seed=SPLIT_SEED)[0]


def stratified_split(labels: Tensor, fraction: float, *, seed: int) -> tuple[Tensor, Tensor]:
    """Indices of two parts with the same mix of classes.

    Args:
        labels: int64 (N,).
        fraction: share of every class that goes to the second part, in [0, 1). Rounded per class; above 0,
            each part gets at least one image of a class that has two.
        seed: the draw depends on it and on ``labels`` alone.

    Returns:
        Two ascending int64 tensors, disjoint, together 0..N - 1.
    """
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.zeros(len(labels), dtype=torch.bool)
    for label in labels.unique():
        members = torch.nonzero(labels == label).flatten()
        shuffled = members[torch.randperm(len(members), generator=generator)]
        count = round(fraction * len(members))
        if fraction > 0:
            count = min(max(count, 1), len(members) - 1)
        chosen[shuffled[:count]] = True
    return torch.nonzero(~chosen).flatten(), torch.nonzero(chosen).flatten()
