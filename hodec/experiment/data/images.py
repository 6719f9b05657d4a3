"""What a data set is to the rest of the package: facts about its images, and three splits."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pkgutil import resolve_name

import torch
from torch import Tensor

from hodec.experiment.data.options import DataSet
from hodec.experiment.data.splits import FolderSplit, Size, Split


@dataclass(frozen=True, eq=False)
class ImageData:
    """A labelled set of images. Splits are read when first asked for, and then kept.

    Attributes:
        option: the settings it was made from, which loaders read as well.
        own_size: height and width in pixels of the images, where ``option.image_size`` does not change them.
        classes: names of the labels 0, 1, ..; two or more.
        loads: reads a split by its name: ``train`` (without the validation images), ``val``, if there is one,
            and ``test``.
    """

    option: DataSet
    own_size: Size
    classes: tuple[str, ...]
    loads: Mapping[str, Callable[[], Split]] = field(repr=False)

    @property
    def image_size(self) -> Size:
        """Height and width in pixels of the images as a loader yields them."""
        side = self.option.image_size
        return (side, side) if side else self.own_size

    @property
    def in_channels(self) -> int:
        """1 (grey) or 3 (RGB)."""
        return len(self.option.own_mean)

    @property
    def num_classes(self) -> int:
        """Number of labels."""
        return len(self.classes)

    @cached_property
    def train(self) -> Split:
        """The training set without the validation split."""
        return self.loads["train"]()

    @cached_property
    def val(self) -> Split | None:
        """The split on which choices are made; None when ``val_fraction`` is 0."""
        return self.loads["val"]() if "val" in self.loads else None

    @cached_property
    def test(self) -> Split:
        """The split of the final figures; not read before it is asked for."""
        return self.loads["test"]()

    def split_sizes(self) -> dict[str, int]:
        """Number of images of each split: ``train``, ``validation`` (0 without one) and ``test``."""
        return {"train": len(self.train), "validation": len(self.val or ()), "test": len(self.test)}

    def check(self) -> None:
        """Read every split once, so that a broken image stops a run at its start and not after hours.

        Raises:
            DataError: naming the first file that cannot be read.
        """
        for split in (self.train, self.val, self.test):
            if isinstance(split, FolderSplit):
                split.check()


def build_data(option: DataSet) -> ImageData:
    """The data set of an option; its files are looked for now, the images are read when first needed.

    Raises:
        DataError: if files are missing, or the folders do not make a data set.
    """
    data: ImageData = resolve_name(option.reader)(option)
    return data


def training_and_validation(labels: Tensor, val_fraction: float, train_fraction: float) -> tuple[Tensor, Tensor | None]:
    """Indices of what is trained on and of the validation split (None without one), the same in all runs.

    Args:
        labels: int64 (N,), of the training set.
        val_fraction: share that is put aside for validation, whatever ``train_fraction`` of the rest is used.
        train_fraction: share of the rest that is trained on.
    """
    rest, val = stratified_split(labels, val_fraction)
    used, _ = stratified_split(labels[rest], 1 - train_fraction)
    return rest[used], val if val_fraction else None


def stratified_split(labels: Tensor, fraction: float, *, seed: int = 0) -> tuple[Tensor, Tensor]:
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
    for label in sorted(set(labels.tolist())):
        members = torch.nonzero(labels == label).flatten()
        shuffled = members[torch.randperm(len(members), generator=generator)]
        count = round(fraction * len(members))
        if fraction > 0:
            count = min(max(count, 1), len(members) - 1)
        chosen[shuffled[:count]] = True
    return torch.nonzero(~chosen).flatten(), torch.nonzero(chosen).flatten()
