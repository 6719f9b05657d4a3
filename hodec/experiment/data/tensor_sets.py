"""Data sets that are held in memory from the start: digits, CIFAR, and made-up images."""

from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch import Tensor

from hodec.errors import DataError, Use, first_line, literal
from hodec.experiment.data.images import ImageData, TensorSplit, stratified_split, training_and_validation
from hodec.experiment.data.options import Cifar10, DataSet, Digits, Fake


def digits(option: Digits) -> ImageData:
    """Handwritten digits, grey (1, 8, 8); a fixed fifth of the 1,797 is the test split."""
    from sklearn.datasets import load_digits

    source = load_digits()
    images = torch.from_numpy(source.images * (255 / 16)).round().to(torch.uint8).unsqueeze(1)
    everything = TensorSplit(images, torch.from_numpy(source.target).long())
    train, test = stratified_split(everything.labels, 0.2)
    return _in_memory(option, map(str, source.target_names), everything.subset(train), lambda: everything.subset(test))


def cifar(option: Cifar10) -> ImageData:
    """CIFAR-10 or CIFAR-100, RGB (3, 32, 32); the training files are read now, those of the test when asked for.

    Raises:
        DataError: if files are missing or altered, or cannot be fetched.
    """
    train, classes = _read_cifar(option, train=True)
    return _in_memory(option, classes, train, lambda: _read_cifar(option, train=False)[0])


def _read_cifar(option: Cifar10, *, train: bool) -> tuple[TensorSplit, list[str]]:
    from torchvision import datasets

    kind = getattr(datasets, option.name.upper())
    root = Path(option.root).expanduser()
    try:
        source = kind(root, train=train, download=option.download)
    except (RuntimeError, OSError) as error:  # absent or altered files; no network
        remedy = "{download} fetches it, {root} names the folder that contains it"
        if option.download:
            remedy = (
                f"it could not be fetched ({literal(first_line(error))}). Unpack it there by hand, or give {{root}}"
            )
        raise DataError(
            f"{kind.__name__} is missing or not complete in {literal(root / kind.base_folder)}: {remedy}",
            download=Use("data.download", "true"),
            root=Use("data.root", "PATH"),
        ) from error
    images = torch.from_numpy(source.data).permute(0, 3, 1, 2).contiguous()  # (N, 32, 32, 3) in the files
    return TensorSplit(images, torch.tensor(source.targets, dtype=torch.int64)), source.classes


def fake(option: Fake) -> ImageData:
    """Noise on top of a faint pattern of its class, RGB: the same images in every run, learnable in seconds.

    There is one test image for four training images, and at least one of each class.
    """
    test_size = max(option.fake_classes, round(option.fake_size / 4))
    classes = (f"class{label}" for label in range(option.fake_classes))
    train = _fake_split(option, option.fake_size, seed=1)
    return _in_memory(option, classes, train, lambda: _fake_split(option, test_size, seed=2))


def _fake_split(option: Fake, count: int, *, seed: int, signal: int = 64) -> TensorSplit:
    """``signal`` grey levels, of 256, come from the pattern of 4 x 4 patches of the class; the rest is noise."""
    labels, side = torch.arange(count) % option.fake_classes, option.image_size
    patches = _noise(signal, (option.fake_classes, 3, 4, 4), seed=0)
    patterns = torch.nn.functional.interpolate(patches, size=(side, side), mode="nearest")
    return TensorSplit(_noise(256 - signal, (count, 3, side, side), seed=seed).add_(patterns[labels]), labels)


def _noise(levels: int, shape: tuple[int, ...], *, seed: int) -> Tensor:
    return torch.randint(levels, shape, generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


def _in_memory(
    option: DataSet, classes: Iterable[str], everything: TensorSplit, load_test: Callable[[], TensorSplit]
) -> ImageData:
    """A data set of images in memory: ``everything`` but the test split is cut in two, training and validation."""
    train, val = training_and_validation(everything.labels, option.val_fraction, option.train_fraction)
    loads = {"train": lambda: everything.subset(train), "test": load_test}
    if val is not None:
        loads["val"] = lambda: everything.subset(val)
    height, width = everything.images.shape[-2:]
    return ImageData(option, (height, width), tuple(classes), loads)
