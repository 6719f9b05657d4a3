"""A folder of images, ``train|val|test/<class>/*``: found, checked, and decoded or left on disk."""

import logging
import os
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from hodec.errors import ConfigError, DataError, near_matches
from hodec.experiment.data.config import DataConfig, channel_statistics
from hodec.experiment.data.decode import decode_all, header_size
from hodec.experiment.data.images import (
    FolderSplit,
    ImageData,
    Split,
    TensorSplit,
    TrainAndVal,
    stratified_part,
    training_and_validation,
)

log = logging.getLogger(__name__)

PICTURES = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".ppm", ".pgm", ".tif", ".tiff", ".webp")
MEMORY_LIMIT = 2 * 2**30  # bytes of decoded images that are held without being asked to
IMAGENET_STATISTICS = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
TREE = "train/<class>/, test/<class>/ and, if there is one, val/<class>/"


@dataclass(frozen=True)
class _Listing:
    """The files of one of the three folders, class by class."""

    classes: tuple[str, ...]
    files: tuple[str, ...]
    labels: Tensor

    def subset(self, indices: Tensor) -> "_Listing":
        files = tuple(self.files[index] for index in indices.tolist())
        return _Listing(self.classes, files, self.labels[indices])


def image_folder(cfg: DataConfig) -> ImageData:
    """RGB images in one folder per class.

    With ``val/`` and ``test/`` both there, they are the validation and the test split. With only one of
    them, it is the test split, and the validation split is cut off ``train/`` as ``data.val_fraction`` says;
    of what is left in ``train/``, ``data.train_fraction`` is trained on.

    Images are decoded once and held when they fit into 2 GiB (``data.in_memory`` decides otherwise): their
    middle square is scaled to ``data.image_size``. Else workers read them each time.

    Raises:
        ConfigError: if ``data.root`` is not given.
        DataError: if a folder is missing or empty, the classes of the splits differ, or the first image
            cannot be read.
    """
    root = _root(cfg)
    listings = {name: _list(root / name) for name in ("train", "val", "test") if (root / name).is_dir()}
    train, val, test = _assign(listings, cfg, root)
    size = (cfg.image_size, cfg.image_size) if cfg.image_size else header_size(train.files[0])
    count = sum(len(listing.files) for listing in listings.values())
    held = _held_in_memory(cfg, count, size)
    resize = cfg.image_size is not None

    def load(listing: _Listing) -> Split:
        if not held:
            return FolderSplit(listing.files, listing.labels, size, resize)
        return TensorSplit(decode_all(listing.files, size, resize=resize), listing.labels)

    def load_train() -> TrainAndVal:
        return load(train), None if val is None else load(val)

    mean, std = channel_statistics(cfg, *IMAGENET_STATISTICS)
    return ImageData(
        name="image_folder",
        image_size=size,
        classes=train.classes,
        mean=mean,
        std=std,
        load_train=load_train,
        load_test=lambda: load(test),
    )


def _root(cfg: DataConfig) -> Path:
    if cfg.root is None:
        raise ConfigError(f"data=image_folder needs data.root=FOLDER with {TREE}")
    root = Path(cfg.root).expanduser()
    if not root.is_dir():
        beside = [path.name for path in root.parent.iterdir()] if root.parent.is_dir() else []
        close = near_matches(root.name, beside)
        raise DataError(f"data.root={root}: no such folder.{close} Set data.root=FOLDER with {TREE}")
    return root


def _list(folder: Path) -> _Listing:
    names = sorted(path.name for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    if not names:
        raise DataError(f"{folder}: no class folder in it; data.root must contain {TREE}")
    files: list[str] = []
    counts: list[int] = []
    for name in names:
        found = _pictures(folder / name)
        if not found:
            kinds = " ".join(PICTURES)
            raise DataError(f"{folder / name}: no image in it ({kinds}); add some, or remove the folder")
        files += found
        counts.append(len(found))
    labels = torch.repeat_interleave(torch.arange(len(names)), torch.tensor(counts))
    return _Listing(tuple(names), tuple(files), labels)


def _pictures(folder: Path) -> list[str]:
    return sorted(
        os.path.join(path, name)
        for path, _, names in os.walk(folder, followlinks=True)
        for name in names
        if name.lower().endswith(PICTURES)
    )


def _assign(listings: dict[str, _Listing], cfg: DataConfig, root: Path) -> tuple[_Listing, _Listing | None, _Listing]:
    """Training, validation and test files out of those of train/, val/ and test/."""
    if "train" not in listings or len(listings) < 2:
        there = ", ".join(sorted(path.name for path in root.iterdir())[:5]) or "nothing"
        missing = "test/" if "train" in listings else "train/"
        raise DataError(f"data.root={root}: no {missing} in it (but: {there}); it must contain {TREE}")
    train = listings["train"]
    if len(train.classes) < 2:
        raise DataError(f"{root / 'train'}: only one class, {train.classes[0]}; a second class folder is needed")
    for name, listing in listings.items():
        _same_classes(train, listing, root / name)
    if len(listings) == 3:
        log.info("%s: validation on its val/ folder; data.val_fraction is not used", root)
        return train.subset(stratified_part(train.labels, cfg.train_fraction)), listings["val"], listings["test"]
    test = listings.get("test") or listings["val"]
    kept, val = training_and_validation(train.labels, cfg)
    return train.subset(kept), None if val is None else train.subset(val), test


def _same_classes(train: _Listing, other: _Listing, folder: Path) -> None:
    lacking = sorted(set(train.classes) - set(other.classes))
    extra = sorted(set(other.classes) - set(train.classes))
    if lacking or extra:
        parts = [f"lacks {', '.join(lacking[:5])}"] if lacking else []
        parts += [f"has {', '.join(extra[:5])} besides"] if extra else []
        raise DataError(f"{folder}: {' and '.join(parts)}; its class folders must be those of train/")


def _held_in_memory(cfg: DataConfig, count: int, size: tuple[int, int]) -> bool:
    if cfg.in_memory is not None:
        return cfg.in_memory
    held = count * 3 * size[0] * size[1] <= MEMORY_LIMIT
    if not held:
        log.info("%d images of %dx%d stay on disk; data.in_memory=true holds them decoded", count, *size)
    return held
