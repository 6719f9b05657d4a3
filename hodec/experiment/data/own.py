"""Data sets of one's own: a LightningDataModule, or functions that return torch data sets.

What is taken of a data module is its data sets, batch sizes and workers; the order of the images is hodec's, so that a
run that was killed goes on with the batches that were left.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import cast

import torch
from torch import Tensor
from torch.utils.data import (
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    Subset,
    TensorDataset,
)

from hodec.errors import DataError, literal
from hodec.experiment.config.own import DataModule
from hodec.experiment.config.targets import load, maker
from hodec.experiment.data.images import ImageData, ItemSplit, training_and_validation
from hodec.experiment.data.options import Batches, Functions

log = logging.getLogger(__name__)

Items = Sequence[tuple[Tensor, int]]
Loader = DataLoader[tuple[Tensor, int]]


def functions(option: Functions) -> ImageData:
    """Images of functions: each returns a data set of pairs (float32 (C, H, W), label), or tensors of all of them.

    Raises:
        DataError: what a function returns is something else, or has fewer than two classes.
    """
    whole = _items(option.train)
    labels = _labels(whole, option.train)
    train, val = training_and_validation(labels, 0 if option.val else option.val_fraction, option.train_fraction)
    split = partial(ItemSplit, num_workers=option.num_workers)

    def part(indices: Tensor) -> ItemSplit:
        return split(cast(Items, Subset(cast(Dataset[tuple[Tensor, int]], whole), indices.tolist())), labels[indices])

    loads = {"train": lambda: part(train), "test": lambda: split(_items(option.test), torch.empty(0).long())}
    if option.val:
        loads["val"] = lambda: split(_items(str(option.val)), torch.empty(0).long())
    elif val is not None:
        loads["val"] = lambda: part(val)
    return _data(option, loads, classes=int(labels.max()) + 1, batches=option)


def datamodule(option: DataModule) -> ImageData:
    """Images of a LightningDataModule.

    Raises:
        DataError: it is none, has no number of classes, or a loader that is more than a data set in batches.
    """
    module, name = maker(option.node())(), option._target_
    if not all(hasattr(module, part) for part in ("setup", "train_dataloader", "test_dataloader")):
        raise DataError(f"data._target_: {name} makes a {type(module).__name__}; allowed: a LightningDataModule")
    module.prepare_data()
    for stage in ("fit", "validate", "test"):
        module.setup(stage)
    classes = option.classes or getattr(module, "num_classes", None)
    if not isinstance(classes, int) or classes < 2:
        raise DataError(f"{name} has no num_classes from 2; give them: data.classes=10")
    loaders = {split: _loader(module, split) for split in ("train", "val", "test")}
    found = {split: loader for split, loader in loaders.items() if loader is not None}
    if "train" not in found or "test" not in found:
        raise DataError(f"{name} has no loader of training images, or none of test images")
    sizes = {split: cast(int, loader.batch_size) for split, loader in found.items()}
    batches = _BatchSizes(batch_size=sizes["train"], eval_batch_size=sizes.get("val", sizes["test"]))
    words = (
        "%s: its data sets, batches of %d and %d, in hodec's own order; images that fill no whole batch are left out"
    )
    log.info(words, name, batches.batch_size, batches.eval_batch_size)
    loads = {split: partial(_split, loader) for split, loader in found.items()}
    return _data(option, loads, classes=classes, batches=batches)


class _BatchSizes(Batches):
    """Those of a data module."""


def _items(name: str) -> Items:
    """What a function of one's own returns, as items by index."""
    made = load(name)()
    if isinstance(made, tuple) and len(made) == 2 and all(isinstance(part, Tensor) for part in made):
        made = TensorDataset(*made)
    if not (hasattr(made, "__getitem__") and hasattr(made, "__len__")) or not len(made):
        raise DataError(
            f"{name} returns a {type(made).__name__}; allowed: a filled torch Dataset with a length, of pairs (image, "
            "label), or a pair of tensors, images (N, C, H, W) and labels (N,)"
        )
    return cast(Items, made)


def _labels(items: Items, name: str) -> Tensor:
    """Labels int64 (N,) of a data set: those that it lists, else read with the images."""
    if isinstance(items, TensorDataset):
        labels = items.tensors[1]
    else:
        listed = getattr(items, "targets", getattr(items, "labels", None))
        labels = torch.as_tensor([int(items[k][1]) for k in range(len(items))] if listed is None else listed)
    if labels.ndim != 1 or labels.is_floating_point() or len(labels) != len(items) or int(labels.min()) < 0:
        raise DataError(f"{name}: labels are whole numbers from 0, one for each image")
    if int(labels.max()) < 1:
        raise DataError(f"{name}: only one class; a second one is needed")
    return labels.long()


def _loader(module: object, split: str) -> Loader | None:
    """The loader of a split; None where the data module defines none."""
    method = getattr(module, f"{split}_dataloader")
    home = getattr(getattr(method, "__func__", None), "__module__", None) or ""
    if home.partition(".")[0] in ("lightning", "pytorch_lightning"):  # the one of Lightning's own class, which raises
        return None
    loader = method()
    if loader is None or (isinstance(loader, list) and not loader):
        return None
    plain = isinstance(loader, DataLoader) and not isinstance(loader.dataset, IterableDataset)
    if not plain or loader.batch_size is None or type(loader.sampler) not in (RandomSampler, SequentialSampler):
        raise DataError(
            f"{type(module).__name__}.{split}_dataloader: hodec takes a torch DataLoader of a data set with a length, "
            "with batch_size and without a sampler of its own; allowed: data=functions otherwise"
        )
    return cast(Loader, loader)


def _split(loader: Loader) -> ItemSplit:
    return ItemSplit(cast(Items, loader.dataset), torch.empty(0).long(), loader.num_workers, loader.collate_fn)


def _data(
    option: Functions | DataModule, loads: Mapping[str, Callable[[], ItemSplit]], *, classes: int, batches: Batches
) -> ImageData:
    """The data set, after a look at its first image."""
    with torch.random.fork_rng(devices=[]):
        image = loads["train"]().items[0][0]
    if not isinstance(image, Tensor) or image.ndim != 3 or not image.is_floating_point():
        given = f"{image.dtype} {tuple(image.shape)}" if isinstance(image, Tensor) else type(image).__name__
        raise DataError(f"data={option.name}: an image is {literal(given)}; allowed: a float tensor (C, H, W)")
    channels, height, width = image.shape
    names = tuple(map(str, range(classes)))
    return ImageData(option, (height, width), names, loads, channels=channels, batches=batches)
