"""What a data set is to the rest of the package: facts about its images, and three splits, in memory or in files.

Every error of a file names it.
"""

import io
import os
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pkgutil import resolve_name

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from hodec.errors import DataError, Use, literal
from hodec.experiment.data.options import Batches, DataOption
from hodec.io.tensors import digest

Size = tuple[int, int]  # height and width in pixels
READ_ERRORS = (OSError, SyntaxError, ValueError, EOFError, struct.error, Image.DecompressionBombError)


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


@dataclass(frozen=True)
class Encoded:
    """An encoded image that is a part of a file; ``name`` says which."""

    name: str
    data: bytes

    def __str__(self) -> str:
        return self.name


File = str | Encoded


@dataclass(frozen=True, eq=False)
class FolderSplit:
    """Images read from their files each time.

    Attributes:
        files: paths of N images, or the encoded images themselves.
        labels: int64 (N,).
        size: height and width in pixels that a loader yields.
        resize: scale and cut images to ``size``; else all must have it.
        num_workers: processes that read them for a loader; 0 reads in the loader's own.
    """

    files: Sequence[File]
    labels: Tensor
    size: Size
    resize: bool
    num_workers: int = 0

    def __len__(self) -> int:
        return len(self.files)

    def image(self, index: int) -> Image.Image:
        """Image number ``index`` in RGB, as it is in its file.

        Raises:
            DataError: if the file cannot be read, or is not of the size that all must have.
        """
        image = open_rgb(self.files[index])
        if not self.resize:
            check_size(self.files[index], (image.height, image.width), self.size)
        return image

    def transform(self, *, augment: bool = False, flip: bool = False) -> Callable[[Image.Image], Tensor]:
        """From a decoded image to uint8 (3, H, W).

        Args:
            augment: cut a random part (8 to 100 % of the area) and scale it to ``size``; draws from torch's
                global generator.
            flip: with ``augment``, mirror half of the images.
        """
        # torchvision takes over a second to import: data held in memory does without it
        from torchvision.transforms import v2

        steps: list[torch.nn.Module] = []
        if augment:
            steps += [v2.RandomResizedCrop(list(self.size), antialias=True)]
            steps += [v2.RandomHorizontalFlip()] if flip else []
        elif self.resize:  # the middle 224 of 256 pixels of the shorter side, as ImageNet nets are tested
            steps += [v2.Resize(round(min(self.size) * 256 / 224), antialias=True), v2.CenterCrop(list(self.size))]
        transform: Callable[[Image.Image], Tensor] = v2.Compose([*steps, v2.PILToTensor()])
        return transform

    def decoded(self) -> TensorSplit:
        """The images decoded on all cores, whatever their number; the middle of each is scaled to ``size``.

        Raises:
            DataError: for the first file that cannot be read, or is not of the size that all must have.
        """
        images = torch.empty(len(self), 3, *self.size, dtype=torch.uint8)
        pixels = images.numpy()

        def fill(index: int) -> None:
            image = self.image(index)
            if self.resize:
                image = ImageOps.fit(image, self.size[::-1], method=Image.Resampling.BILINEAR)
            pixels[index] = np.asarray(image).transpose(2, 0, 1)

        _in_threads(fill, len(self))
        return TensorSplit(images, self.labels)

    def check(self) -> None:
        """Open every file without decoding it.

        Raises:
            DataError: naming the first that is no image, or not of the size that all must have.
        """

        def look(index: int) -> None:
            size = header_size(self.files[index])
            check_size(self.files[index], size, size if self.resize else self.size)

        _in_threads(look, len(self))


@dataclass(frozen=True, eq=False)
class ItemSplit:
    """Images of one's own, made one by one.

    Attributes:
        items: pairs of a float32 tensor (C, H, W), as the net takes it, and a label; by index.
        labels: int64 (N,), or of no element where nobody has asked for them.
        num_workers: processes that read them for a loader; 0 reads in the loader's own.
        collate: puts items into a batch; None as torch does.
    """

    items: Sequence[tuple[Tensor, int]]
    labels: Tensor
    num_workers: int = 0
    collate: Callable[..., object] | None = None

    def __len__(self) -> int:
        return len(self.items)


Split = TensorSplit | FolderSplit | ItemSplit


@dataclass(frozen=True, eq=False)
class ImageData:
    """A labelled set of images. Splits are read when first asked for, and then kept.

    Attributes:
        option: the settings it was made from, which loaders read as well.
        own_size: height and width in pixels of the images, where ``option.image_size`` does not change them.
        classes: names of the labels 0, 1, ..; two or more.
        channels: of an image; by default as many as the option has means.
        batches: sizes of batches; by default those of the option.
        loads: reads a split by its name: ``train`` (without the validation images), ``val``, if there is one,
            and ``test``.
    """

    option: DataOption
    own_size: Size
    classes: tuple[str, ...]
    loads: Mapping[str, Callable[[], Split]] = field(repr=False)
    channels: int | None = None
    batches: Batches | None = None

    @property
    def image_size(self) -> Size:
        """Height and width in pixels of the images as a loader yields them."""
        side = self.option.image_size
        return (side, side) if side else self.own_size

    @property
    def in_channels(self) -> int:
        """1 (grey) or 3 (RGB); of images of one's own, as many as they have."""
        return self.channels or len(self.option.own_mean)

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

    @property
    def has_validation(self) -> bool:
        """Whether there is a validation split; nothing is read for it."""
        return "val" in self.loads

    def split_sizes(self) -> dict[str, int]:
        """Number of images of each split: ``train``, ``validation`` (0 without one) and ``test``."""
        return {"train": len(self.train), "validation": len(self.val or ()), "test": len(self.test)}

    def identity(self) -> str:
        """What tells one way to split the images from another: their numbers, and a digest of their labels in order."""
        splits = [split for split in (self.train, self.val) if split is not None]
        return f"{' + '.join(str(len(split)) for split in splits)} images, {digest(*(s.labels for s in splits))[:16]}"

    def check(self) -> None:
        """Read every split once, so that a broken image stops a run at its start and not after hours.

        Raises:
            DataError: naming the first file that cannot be read.
        """
        for split in (self.train, self.val, self.test):
            if isinstance(split, FolderSplit):
                split.check()


def build_data(option: DataOption) -> ImageData:
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


def _in_threads(work: Callable[[int], None], count: int, *, chunk: int = 256) -> None:
    """Call ``work`` with 0..count - 1, each thread with ``chunk`` in a row; of several errors the first is raised."""

    def run(start: int) -> None:
        for index in range(start, min(start + chunk, count)):
            work(index)

    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        list(pool.map(run, range(0, count, chunk)))


@contextmanager
def _opened(file: File) -> Iterator[Image.Image]:
    try:
        with Image.open(file if isinstance(file, str) else io.BytesIO(file.data)) as image:
            yield image
    except READ_ERRORS as error:
        raise DataError(f"{file}: not readable as an image ({error}); repair or remove the file") from error


def open_rgb(file: File) -> Image.Image:
    """A decoded image in RGB.

    Raises:
        DataError: if the file is missing, truncated, no image, or has more than 8 bits per channel.
    """
    with _opened(file) as image:
        if image.mode[0] in "IF":  # Pillow would clip them
            raise DataError(f"{file}: more than 8 bits per channel ({image.mode}); save it with 8 bits")
        # by way of RGBA, since Pillow warns about palettes with transparent entries
        clear = image.convert("RGBA") if "transparency" in image.info else image
        return clear.convert("RGB")


def header_size(file: File) -> Size:
    """Height and width in pixels, read without decoding."""
    with _opened(file) as image:
        return image.height, image.width


def check_size(file: File, size: Size, expected: Size) -> None:
    """Raise ``DataError`` when the image has not the (height, width) that the others have."""
    if size != expected:
        raise DataError(
            f"{literal(file)}: {size[0]}x{size[1]} pixels (height x width) where the first image has "
            f"{expected[0]}x{expected[1]}; set {{image_size}} to bring all to one size",
            image_size=Use("data.image_size", min(expected)),
        )
