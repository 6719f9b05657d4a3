"""Data sets that are held in memory from the start: digits, CIFAR, and made-up images."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hodec.errors import ConfigError, DataError
from hodec.experiment.data.config import DataConfig, channel_statistics
from hodec.experiment.data.images import (
    SPLIT_SEED,
    ImageData,
    TensorSplit,
    TrainAndVal,
    stratified_split,
    training_and_validation,
)

DIGITS_TEST_FRACTION = 0.2
DIGITS_STATISTICS = ((0.3060,), (0.3763,))  # of the training part
CIFAR_STATISTICS = ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616))
FAKE_STATISTICS = ((0.5, 0.5, 0.5), (0.23, 0.23, 0.23))
FAKE_IMAGE_SIZE = 32
FAKE_SIGNAL = 64  # grey levels, of 256, that the class decides; the rest is noise
FAKE_TEST_FRACTION = 0.25  # test images for each training image


def digits(cfg: DataConfig) -> ImageData:
    """1,797 grey 8x8 images of handwritten digits that come with scikit-learn; a fixed fifth is the test."""
    from sklearn.datasets import load_digits

    source = load_digits()
    images = torch.from_numpy(source.images * (255 / 16)).round().to(torch.uint8).unsqueeze(1)
    everything = TensorSplit(images, torch.from_numpy(source.target).long())
    train, test = stratified_split(everything.labels, DIGITS_TEST_FRACTION, seed=SPLIT_SEED)
    names = tuple(str(name) for name in source.target_names)
    mean, std = channel_statistics(cfg, *DIGITS_STATISTICS)
    return ImageData(
        name="digits",
        image_size=_square(cfg, everything.images),
        classes=names,
        mean=mean,
        std=std,
        load_train=lambda: with_validation(everything.subset(train), cfg),
        load_test=lambda: everything.subset(test),
    )


def cifar10(cfg: DataConfig) -> ImageData:
    """50,000 + 10,000 RGB 32x32 images of 10 classes."""
    from torchvision.datasets import CIFAR10

    return _cifar(CIFAR10, cfg)


def cifar100(cfg: DataConfig) -> ImageData:
    """50,000 + 10,000 RGB 32x32 images of 100 classes."""
    from torchvision.datasets import CIFAR100

    return _cifar(CIFAR100, cfg)


def _cifar(kind: Any, cfg: DataConfig) -> ImageData:
    name = kind.__name__.lower()
    source = _read_cifar(kind, cfg, train=True)
    train = _cifar_split(source)
    mean, std = channel_statistics(cfg, *CIFAR_STATISTICS)
    return ImageData(
        name=name,
        image_size=_square(cfg, train.images),
        classes=tuple(source.classes),
        mean=mean,
        std=std,
        load_train=lambda: with_validation(train, cfg),
        load_test=lambda: _cifar_split(_read_cifar(kind, cfg, train=False)),
    )


def _read_cifar(kind: Any, cfg: DataConfig, *, train: bool) -> Any:
    root = Path(cfg.root or "data").expanduser()
    folder = root / kind.base_folder
    try:
        return kind(root, train=train, download=cfg.download)
    except (RuntimeError, OSError) as error:  # absent or altered files; no network
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        if cfg.download:
            remedy = f"it could not be fetched ({reason}). Unpack it there by hand, or set data.root=..."
        else:
            remedy = "set data.download=true to fetch it, or data.root=... to the folder that contains it"
        raise DataError(f"{kind.__name__} is not (or not whole) in {folder}: {remedy}") from error


def _cifar_split(source: Any) -> TensorSplit:
    images = torch.from_numpy(source.data).permute(0, 3, 1, 2).contiguous()  # (N, 32, 32, 3) in the files
    return TensorSplit(images, torch.tensor(source.targets, dtype=torch.int64))


def fake(cfg: DataConfig) -> ImageData:
    """Noise on top of a faint pattern of its class: the same images in every run, learnable in seconds."""
    if cfg.fake_classes < 2 or cfg.fake_size < 2 * cfg.fake_classes:
        raise ConfigError(
            f"data.fake_classes={cfg.fake_classes} with data.fake_size={cfg.fake_size}: there must be 2 classes "
            f"or more, and 2 images or more of each"
        )
    side = cfg.image_size or FAKE_IMAGE_SIZE
    test_size = max(cfg.fake_classes, round(cfg.fake_size * FAKE_TEST_FRACTION))
    mean, std = channel_statistics(cfg, *FAKE_STATISTICS)
    return ImageData(
        name="fake",
        image_size=(side, side),
        classes=tuple(f"class{label}" for label in range(cfg.fake_classes)),
        mean=mean,
        std=std,
        load_train=lambda: with_validation(_fake_split(cfg, side, cfg.fake_size, seed=1), cfg),
        load_test=lambda: _fake_split(cfg, side, test_size, seed=2),
    )


def _fake_split(cfg: DataConfig, side: int, count: int, *, seed: int) -> TensorSplit:
    patterns = _fake_patterns(cfg.fake_classes, side)
    labels = torch.arange(count) % cfg.fake_classes
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randint(256 - FAKE_SIGNAL, (count, 3, side, side), generator=generator, dtype=torch.uint8)
    return TensorSplit(noise.add_(patterns[labels]), labels)


def _fake_patterns(classes: int, side: int) -> Tensor:
    """One pattern of 4x4 patches per class: uint8 (classes, 3, side, side) below FAKE_SIGNAL."""
    generator = torch.Generator().manual_seed(0)
    patches = torch.randint(FAKE_SIGNAL, (classes, 3, 4, 4), generator=generator, dtype=torch.uint8)
    return torch.nn.functional.interpolate(patches, size=(side, side), mode="nearest")


def with_validation(everything: TensorSplit, cfg: DataConfig) -> TrainAndVal:
    """The training set, cut in two: what is trained on, and the validation split (None for ``val_fraction=0``)."""
    train, val = training_and_validation(everything.labels, cfg)
    return everything.subset(train), None if val is None else everything.subset(val)


def _square(cfg: DataConfig, images: Tensor) -> tuple[int, int]:
    height, width = images.shape[-2:]
    return (cfg.image_size, cfg.image_size) if cfg.image_size else (height, width)
