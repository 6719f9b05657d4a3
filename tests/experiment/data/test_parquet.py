"""Folders as Hugging Face's datasets has them: split folders by its names, and parquet files."""

import io
import json
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from hodec.errors import DataError
from hodec.experiment.data.images import build_data
from hodec.experiment.data.loaders import train_loader


@pytest.fixture
def folder(option):
    return lambda root, **changes: option("image_folder", root=str(root), batch_size=4, **changes)


def test_split_folders_by_the_names_of_imagefolder(folder, image, tmp_path):
    for split in ("train", "validation", "test"):
        for name in ("cat", "dog"):
            for k in range(4):
                image(tmp_path / split / name / f"{k}.png", seed=k)
    data = build_data(folder(tmp_path))
    assert data.split_sizes() == {"train": 8, "validation": 8, "test": 8}
    (tmp_path / "dev").mkdir()
    with pytest.raises(DataError, match="validation and dev are both the split val; keep one"):
        build_data(folder(tmp_path))


def test_without_pyarrow_the_way_out_is_told(folder, tmp_path, monkeypatch):
    (tmp_path / "train-00000-of-00001.parquet").touch()
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(DataError, match="parquet files need pyarrow; pip install datasets"):
        build_data(folder(tmp_path))


def pixels(seed):
    return np.random.default_rng(seed).integers(0, 256, (8, 6, 3), dtype=np.uint8)


def write(path, labels, *, features=None, image=None):
    """A parquet file as ``datasets`` writes it."""
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    cells = []
    for seed in range(len(labels)):
        buffer = io.BytesIO()
        Image.fromarray(pixels(seed)).save(buffer, format="PNG")
        cells.append(image or {"bytes": buffer.getvalue(), "path": None})
    known = {"image": {"_type": "Image"}, "label": {"names": ["cat", "dog"], "_type": "ClassLabel"}}
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    table = pa.table({"image": pa.array(cells, kind), "label": pa.array(labels, pa.int64())})
    note = json.dumps({"info": {"features": known if features is None else features}})
    path.parent.mkdir(exist_ok=True, parents=True)
    pq.write_table(table.replace_schema_metadata({"huggingface": note}), path)


def test_parquet_files_are_read(folder, tmp_path):
    write(tmp_path / "data" / "train-00000-of-00002.parquet", [0, 1] * 4)
    write(tmp_path / "data" / "train-00001-of-00002.parquet", [1, 0])
    write(tmp_path / "data" / "test-00000-of-00001.parquet", [1, 0, 1])
    data = build_data(folder(tmp_path, val_fraction=0.0))
    assert (data.classes, data.image_size) == (("cat", "dog"), (8, 6))
    assert data.split_sizes() == {"train": 10, "validation": 0, "test": 3}
    assert torch.equal(data.train.images[8], torch.from_numpy(pixels(0)).permute(2, 0, 1))
    assert data.train.labels.tolist() == [0, 1] * 4 + [1, 0]
    on_disk = build_data(folder(tmp_path, in_memory=False, num_workers=0))
    on_disk.check()
    x, y = next(iter(train_loader(on_disk, seed=0)))
    assert (x.shape, y.shape) == ((4, 3, 8, 6), (4,))


@pytest.mark.parametrize(
    ("how", "text"),
    [
        ({"features": {"image": {"_type": "Image"}}}, "of classes: none; allowed: one of each"),
        ({"features": 3}, "its schema does not say what it holds"),
        ({"image": {"bytes": None, "path": "/etc/hostname"}}, "row 0: holds no image, but at most the name of one"),
        ({"image": {"bytes": b"no image", "path": None}}, "row 0: not readable as an image"),
    ],
)
def test_faulty_parquet_files_are_named(folder, tmp_path, how, text):
    write(tmp_path / "train.parquet", [0, 1], **how)
    write(tmp_path / "test.parquet", [0, 1], **how)
    with pytest.raises(DataError, match=rf"train.parquet.*{text}"):
        build_data(folder(tmp_path))


def test_labels_have_to_be_classes(folder, tmp_path):
    write(tmp_path / "train.parquet", [0, 2])
    with pytest.raises(DataError, match="labels from 0 to 2 of 2 classes"):
        build_data(folder(tmp_path))
