"""A folder of images, ``train|val|test/<class>/*`` or parquet files: found, checked, and decoded or left on disk."""

import logging
import os
from functools import partial
from pathlib import Path

import torch

from hodec.errors import DataError, Use, literal, near_matches
from hodec.experiment.data.images import FolderSplit, ImageData, Size, Split, header_size, training_and_validation
from hodec.experiment.data.options import ImageFolder
from hodec.experiment.data.parquet import Listing, parquet_splits

log = logging.getLogger(__name__)

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".ppm", ".pgm", ".tif", ".tiff", ".webp")
# Bytes of decoded images that are held where in_memory is not set, as its text says: 14,266 of 3 x 224 x 224.
MEMORY_LIMIT = 2 * 2**30
TREE = "train/<class>/, test/<class>/ and, if there is one, val/<class>/"
# Folder of a split -> other names that it has, as Hugging Face's imagefolder does.
NAMES = {"train": ("train",), "val": ("val", "validation", "valid", "dev"), "test": ("test",)}


def image_folder(option: ImageFolder) -> ImageData:
    """RGB images in one folder per class.

    With ``val/`` and ``test/`` both there, they are the validation and the test split. With only one of
    them, it is the test split, and the validation split is cut off ``train/`` as ``val_fraction`` says;
    of what is left in ``train/``, ``train_fraction`` is trained on.

    A folder without such folders may hold parquet files, see ``parquet``; their images are held encoded.

    Images are decoded once and held when they fit into 2 GiB (``in_memory`` decides otherwise): their
    middle square is scaled to ``image_size``. Else workers read them each time.

    Raises:
        DataError: if a folder is missing or empty, the classes of the splits differ, or the first image
            cannot be read.
    """
    root = _root(option)
    listings = _folders(root) or parquet_splits(root)
    splits = _assign(listings, option, root)
    side = option.image_size
    size = (side, side) if side else header_size(splits["train"].files[0])
    held = _held_in_memory(option, sum(len(listing.files) for listing in listings.values()), size)

    def load(listing: Listing) -> Split:
        split = FolderSplit(listing.files, listing.labels, size, bool(side), option.num_workers)
        return split.decoded() if held else split

    loads = {name: partial(load, listing) for name, listing in splits.items()}
    return ImageData(option, size, tuple(splits["train"].classes), loads)


def _root(option: ImageFolder) -> Path:
    root = Path(option.root or "").expanduser()
    if not root.is_dir():
        beside = [path.name for path in root.parent.iterdir()] if root.parent.is_dir() else []
        close = literal(near_matches(root.name, beside))
        text = f"{literal(root)}: no such folder.{close} Give one with {TREE}: {{folder}}"
        raise DataError(text, folder=Use("data.root", "FOLDER"))
    return root


def _folders(root: Path) -> dict[str, Listing]:
    """The splits that are folders.

    Raises:
        DataError: a split has two folders.
    """
    found = {split: [root / name for name in names if (root / name).is_dir()] for split, names in NAMES.items()}
    for split, folders in found.items():
        if len(folders) > 1:
            raise DataError(
                f"{root}: {' and '.join(path.name for path in folders)} are both the split {split}; keep one"
            )
    return {split: _list(folders[0]) for split, folders in found.items() if folders}


def _list(folder: Path) -> Listing:
    names = sorted(path.name for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    if not names:
        raise DataError(f"{folder}: no class folder in it; the folder above must contain {TREE}")
    files = [_images(folder / name) for name in names]
    labels = torch.repeat_interleave(torch.arange(len(names)), torch.tensor(list(map(len, files))))
    return Listing(names, [file for of_class in files for file in of_class], labels)


def _images(folder: Path) -> list[str]:
    files = sorted(
        os.path.join(path, name)
        for path, _, names in os.walk(folder, followlinks=True)
        for name in names
        if name.lower().endswith(SUFFIXES)
    )
    if not files:
        raise DataError(f"{folder}: no image in it ({' '.join(SUFFIXES)}); add some, or remove the folder")
    return files


def _assign(listings: dict[str, Listing], option: ImageFolder, root: Path) -> dict[str, Listing]:
    """The splits by name, out of the listings of the folders train/, val/ and test/."""
    if "train" not in listings or len(listings) < 2:
        there = ", ".join(sorted(path.name for path in root.iterdir())[:5]) or "nothing"
        missing = "test/" if "train" in listings else "train/"
        raise DataError(f"{root}: no {missing} in it (but: {there}); it must contain {TREE}")
    train = listings["train"]
    if len(train.classes) < 2:
        raise DataError(f"{root / 'train'}: only one class, {train.classes[0]}; a second class folder is needed")
    for name, listing in listings.items():
        lacking = ", ".join(sorted(set(train.classes) - set(listing.classes))[:5])
        extra = ", ".join(sorted(set(listing.classes) - set(train.classes))[:5])
        if lacking or extra:
            found = " and ".join([f"lacks {lacking}"] * bool(lacking) + [f"has {extra} besides"] * bool(extra))
            raise DataError(f"{root / name}: {found}; its class folders must be those of train/")
    own_val = len(listings) == 3
    if own_val:
        log.info("%s: validation on its val/ folder; data.val_fraction is not used", root)
    used, val = training_and_validation(train.labels, 0 if own_val else option.val_fraction, option.train_fraction)
    splits = listings if own_val else {"test": listings.get("test") or listings["val"]}
    if val is not None:
        splits["val"] = train.subset(val)
    return {**splits, "train": train.subset(used)}


def _held_in_memory(option: ImageFolder, count: int, size: Size) -> bool:
    held = count * 3 * size[0] * size[1] <= MEMORY_LIMIT if option.in_memory is None else option.in_memory
    if not held and option.in_memory is None:
        log.info("%d images of %dx%d stay on disk; data.in_memory=true holds them decoded", count, *size)
    if not held and option.augment and option.crop_padding:
        words = "data.crop_padding=%d is not read: images on disk are cut at random places and sizes instead"
        log.info(words, option.crop_padding)
    return held
