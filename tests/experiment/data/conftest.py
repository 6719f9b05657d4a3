from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

SETTINGS = {
    "name": "digits",
    "root": None,
    "batch_size": 16,
    "eval_batch_size": 50,
    "val_fraction": 0.1,
    "train_fraction": 1.0,
    "augment": True,
    "crop_padding": 2,
    "flip": True,
    "num_workers": 0,
    "download": False,
    "image_size": None,
    "in_memory": None,
    "mean": None,
    "std": None,
    "fake_size": 64,
    "fake_classes": 4,
}


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)


@pytest.fixture
def make_cfg():
    """A configuration with some settings changed."""
    return lambda **changes: SimpleNamespace(**{**SETTINGS, **changes})


def save_picture(path, *, size=(12, 10), mode="RGB", seed=0):
    """Write a random image of ``size`` (height, width)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    bands = len(Image.new(mode, (1, 1)).getbands())
    shape = (*size, bands) if bands > 1 else size
    pixels = np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)
    Image.fromarray(pixels).convert(mode).save(path)


@pytest.fixture
def image():
    return save_picture


@pytest.fixture
def make_tree(tmp_path):
    """A folder of PNG images, ``count`` in each class of each split."""

    def make(*, splits=("train", "test"), classes=("cat", "dog", "eel"), count=6, size=(12, 10)):
        for i, split in enumerate(splits):
            for j, label in enumerate(classes):
                for k in range(count):
                    path = tmp_path / split / label / f"{k:03d}.png"
                    save_picture(path, size=size, seed=hash((i, j, k)) % 2**31)
        return tmp_path

    return make
