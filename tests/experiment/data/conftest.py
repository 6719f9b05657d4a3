import numpy as np
import pytest
import torch
from PIL import Image

from hodec.experiment.data.options import DATA_SETS

SETTINGS = {"batch_size": 16, "eval_batch_size": 50, "augment": True, "crop_padding": 2, "flip": True}


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)


@pytest.fixture
def option():
    """The option of a data set with some settings changed."""
    return lambda name="digits", **changes: DATA_SETS[name](**{**SETTINGS, **changes})


def save_image(path, *, size=(12, 10), mode="RGB", seed=0):
    """Write a random image of ``size`` (height, width)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    bands = len(Image.new(mode, (1, 1)).getbands())
    shape = (*size, bands) if bands > 1 else size
    pixels = np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)
    Image.fromarray(pixels).convert(mode).save(path)


@pytest.fixture
def image():
    return save_image


@pytest.fixture
def make_tree(tmp_path):
    """A folder of PNG images, ``count`` in each class of each split."""

    def make(*, splits=("train", "test"), classes=("cat", "dog", "eel"), count=6, size=(12, 10)):
        for i, split in enumerate(splits):
            for j, label in enumerate(classes):
                for k in range(count):
                    path = tmp_path / split / label / f"{k:03d}.png"
                    save_image(path, size=size, seed=hash((i, j, k)) % 2**31)
        return tmp_path

    return make
