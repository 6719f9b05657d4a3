"""Image data sets of Hugging Face in a local folder of parquet files, read by pyarrow, which ``datasets`` brings along.

A split's files begin with its name, ``train-00000-of-00002.parquet``, in the folder or in ``data/``. One column holds
encoded images, one the labels, with the names of the classes in the schema, as ``push_to_hub`` writes them. Nothing is
downloaded.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from hodec.errors import DataError
from hodec.experiment.data.images import Encoded, File

# Split of hodec -> beginnings of the names of its files.
PREFIXES = {"train": ("train",), "val": ("val", "dev"), "test": ("test", "eval")}


class Listing(NamedTuple):
    """The images of one split, encoded, their labels int64 (N,), and the names of the classes."""

    classes: list[str]
    files: Sequence[File]
    labels: Tensor

    def subset(self, indices: Tensor) -> "Listing":
        """The images at ``indices`` int64 (M,), in that order."""
        return Listing(self.classes, [self.files[index] for index in indices.tolist()], self.labels[indices])


def parquet_splits(root: Path) -> dict[str, Listing]:
    """The splits of a folder of parquet files; empty where it has none.

    Raises:
        DataError: pyarrow is not installed, a file cannot be read, or it has no column of images and one of labels.
    """
    files = sorted([*root.glob("*.parquet"), *root.glob("data/*.parquet")])
    found = {split: [path for path in files if path.name.startswith(prefixes)] for split, prefixes in PREFIXES.items()}
    return {split: _read(paths) for split, paths in found.items() if paths}


def _read(paths: Sequence[Path]) -> Listing:
    rows = [_rows(path) for path in paths]
    if len({tuple(one.classes) for one in rows}) > 1:
        raise DataError(f"{paths[0].parent}: the parquet files of a split name different classes")
    labels = torch.cat([one.labels for one in rows])
    return Listing(rows[0].classes, [file for one in rows for file in one.files], labels)


def _rows(path: Path) -> Listing:
    try:
        import pyarrow.parquet as pq
    except ModuleNotFoundError as error:
        raise DataError(f"{path}: parquet files need pyarrow; pip install datasets, which brings it along") from error
    try:
        schema = pq.read_schema(path)
        image, label, classes = _columns(path, schema.metadata or {})
        table = pq.read_table(path, columns=[image, label])
    except (OSError, ValueError) as error:  # those of pyarrow are such
        raise DataError(f"{path}: not readable as parquet ({error}); repair or remove the file") from error
    labels = torch.tensor(table[label].to_pylist(), dtype=torch.int64)
    if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < len(classes):
        raise DataError(f"{path}: labels from {int(labels.min())} to {int(labels.max())} of {len(classes)} classes")
    return Listing(classes, list(_encoded(path, table[image].to_pylist())), labels)


def _encoded(path: Path, cells: Sequence[Mapping[str, bytes | None] | None]) -> Iterator[Encoded]:
    for number, cell in enumerate(cells):
        data = (cell or {}).get("bytes")
        if data is None:
            raise DataError(
                f"{path}, row {number}: holds no image, but at most the name of one; store the images in it"
            )
        yield Encoded(f"{path}, row {number}", data)


def _columns(path: Path, metadata: Mapping[bytes, bytes]) -> tuple[str, str, list[str]]:
    """The columns of images and labels, and the names of the classes, as the schema's note for ``datasets`` names them.

    Raises:
        DataError: it names none, or several.
    """
    try:
        features = json.loads(metadata[b"huggingface"])["info"]["features"]
        kinds = {name: one.get("_type") for name, one in features.items()}
    except (KeyError, ValueError, TypeError, AttributeError) as error:
        raise DataError(f"{path}: its schema does not say what it holds, as files that datasets writes do") from error
    images, labels = ([name for name, kind in kinds.items() if kind == word] for word in ("Image", "ClassLabel"))
    if len(images) != 1 or len(labels) != 1:
        raise DataError(
            f"{path}: columns of images: {', '.join(images) or 'none'}; of classes: {', '.join(labels) or 'none'}; "
            "allowed: one of each"
        )
    return images[0], labels[0], list(map(str, features[labels[0]]["names"]))
