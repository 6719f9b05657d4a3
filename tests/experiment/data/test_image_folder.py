import os
import shutil
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from hodec.errors import ConfigError, DataError
from hodec.experiment.data.images import FolderSplit, TensorSplit, build_data
from hodec.experiment.data.loaders import train_loader


@pytest.fixture
def folder(option):
    """The option of a folder of images."""
    return lambda root, **changes: option("image_folder", root=str(root), batch_size=4, **changes)


def decode(*files, size=(12, 10)):
    labels = torch.zeros(len(files), dtype=torch.int64)
    return FolderSplit([str(file) for file in files], labels, size, resize=False).decoded().images


def test_facts(folder, make_tree):
    images = build_data(folder(make_tree()))
    assert (images.in_channels, images.num_classes, images.image_size) == (3, 3, (12, 10))
    assert images.classes == ("cat", "dog", "eel")
    assert images.option.channel_statistics() == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def test_pixels_and_labels_are_those_of_the_files(folder, make_tree):
    root = make_tree()
    images = build_data(folder(root, val_fraction=0.0))
    files = sorted(root.glob("train/*/*.png"))
    expected = np.stack([np.asarray(Image.open(file)) for file in files]).transpose(0, 3, 1, 2)
    assert torch.equal(images.train.images, torch.from_numpy(expected))
    assert images.train.labels.tolist() == [0] * 6 + [1] * 6 + [2] * 6


def test_validation_is_cut_off_the_training_folder(folder, make_tree):
    root = make_tree(splits=("train", "test"))
    whole = build_data(folder(root, val_fraction=0.0))
    cut = build_data(folder(root, val_fraction=1 / 3))
    assert (len(cut.train), len(cut.val), len(cut.test)) == (12, 6, 18)
    assert cut.val.labels.bincount().tolist() == [2, 2, 2]
    rows = torch.cat([cut.train.images, cut.val.images]).flatten(1)
    assert torch.equal(rows.unique(dim=0), whole.train.images.flatten(1).unique(dim=0))


@pytest.mark.parametrize(("splits", "kept"), [(("train", "test"), 6), (("train", "val", "test"), 9)])
def test_part_of_the_training_folder(folder, make_tree, splits, kept):
    root = make_tree(splits=splits)
    part = build_data(folder(root, val_fraction=1 / 3, train_fraction=0.5))
    assert part.train.labels.bincount().tolist() == [kept // 3] * 3
    assert torch.equal(part.val.images, build_data(folder(root, val_fraction=1 / 3)).val.images)


def test_val_folder_is_validation_beside_a_test_folder(folder, make_tree):
    images = build_data(folder(make_tree(splits=("train", "val", "test")), val_fraction=0.5))
    assert (len(images.train), len(images.val), len(images.test)) == (18, 18, 18)
    assert not torch.equal(images.val.images, images.test.images)


def test_val_folder_alone_is_the_test_split(folder, make_tree):
    root = make_tree(splits=("train", "val"))
    images = build_data(folder(root, val_fraction=1 / 3))
    assert (len(images.train), len(images.val), len(images.test)) == (12, 6, 18)
    first = np.asarray(Image.open(root / "val" / "cat" / "000.png")).transpose(2, 0, 1)
    assert torch.equal(images.test.images[0], torch.from_numpy(first.copy()))


def test_images_are_found_below_class_folders_and_other_files_are_not(folder, make_tree, image):
    root = make_tree()
    image(root / "train" / "cat" / "more" / "DEEP.PNG")
    (root / "train" / "cat" / "notes.txt").write_text("x")
    (root / "train" / ".cache").mkdir()
    assert len(build_data(folder(root, val_fraction=0.0)).train) == 19


@pytest.mark.parametrize("mode", ["L", "1", "P", "RGBA", "CMYK", "LA"])
def test_every_kind_of_image_becomes_rgb(tmp_path, image, mode):
    file = tmp_path / ("x.tif" if mode == "CMYK" else "x.png")
    image(tmp_path / "rgb.png")
    Image.open(tmp_path / "rgb.png").convert(mode).save(file)
    images = decode(file)
    expected = np.asarray(Image.open(file).convert("RGB")).transpose(2, 0, 1)
    assert torch.equal(images[0], torch.from_numpy(expected.copy()))


def test_palette_with_transparency_does_not_warn(tmp_path):
    image = Image.new("P", (4, 4), 1)
    image.putpalette([0, 0, 0, 10, 20, 30])
    image.save(tmp_path / "x.png", transparency=bytes([0, 128]))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        images = decode(tmp_path / "x.png", size=(4, 4))
    assert images[0, :, 0, 0].tolist() == [10, 20, 30]


def test_sixteen_bits_are_refused_not_clipped(folder, make_tree):
    root = make_tree()
    file = root / "train" / "cat" / "000.png"
    Image.fromarray(np.full((12, 10), 60_000, dtype=np.uint16)).save(file)
    with pytest.raises(DataError, match=rf"{file}.*8 bits"):
        _ = build_data(folder(root)).train


def test_result_does_not_depend_on_the_number_of_threads(tmp_path, image, monkeypatch):
    for seed in range(5):
        image(tmp_path / f"{seed}.png", seed=seed)
    files = [tmp_path / f"{i % 5}.png" for i in range(515)]  # three chunks
    monkeypatch.setattr(os, "cpu_count", lambda: 1)
    one = decode(*files)
    monkeypatch.setattr(os, "cpu_count", lambda: 7)
    assert torch.equal(one, decode(*files))


def test_image_size_scales_and_cuts_the_middle_square(folder, tmp_path):
    pixels = np.zeros((8, 24, 3), dtype=np.uint8)
    pixels[:, 8:16] = 200
    for split, label in (("train", "a"), ("train", "b"), ("test", "a"), ("test", "b")):
        (tmp_path / split / label).mkdir(parents=True)
        for k in range(2):
            Image.fromarray(pixels).save(tmp_path / split / label / f"{k}.png")
    images = build_data(folder(tmp_path, image_size=4, val_fraction=0.5))
    assert images.image_size == (4, 4)
    assert images.train.images.shape == (2, 3, 4, 4)
    assert images.train.images.float().mean() > 180  # the dark sides are gone


def test_other_size_names_the_file_and_the_setting(folder, make_tree, image):
    root = make_tree()
    image(root / "train" / "dog" / "odd.png", size=(9, 9))
    for in_memory in (True, False):
        with pytest.raises(DataError) as error:
            build_data(folder(root, in_memory=in_memory)).check()
        for word in (str(root / "train" / "dog" / "odd.png"), "9x9", "12x10", "set image_size=10"):
            assert word in str(error.value)
    build_data(folder(root, image_size=8)).check()


def test_in_memory_by_size_and_by_setting(folder, make_tree, monkeypatch, caplog):
    caplog.set_level("INFO")
    root = make_tree()
    assert isinstance(build_data(folder(root)).train, TensorSplit)
    assert "crop_padding" not in caplog.text
    assert isinstance(build_data(folder(root, in_memory=False, augment=True, crop_padding=3)).train, FolderSplit)
    assert "data.crop_padding=3 is not read" in caplog.text
    monkeypatch.setattr("hodec.experiment.data.folder.MEMORY_LIMIT", 36 * 3 * 12 * 10 - 1)
    assert isinstance(build_data(folder(root)).train, FolderSplit)
    assert isinstance(build_data(folder(root, in_memory=True)).train, TensorSplit)
    monkeypatch.setattr("hodec.experiment.data.folder.MEMORY_LIMIT", 36 * 3 * 12 * 10)
    assert isinstance(build_data(folder(root)).train, TensorSplit)


def test_test_images_are_not_opened_before_they_are_asked_for(folder, make_tree):
    root = make_tree()
    broken = root / "test" / "dog" / "003.png"
    broken.write_bytes(b"")
    images = build_data(folder(root))
    assert len(images.train) == 15
    with pytest.raises(DataError, match=str(broken)):
        _ = images.test
    with pytest.raises(DataError, match=str(broken)):
        images.check()


@pytest.mark.parametrize("in_memory", [True, False])
@pytest.mark.parametrize("content", [b"", b"no image", None])
def test_row_24_corrupt_image_is_named_by_check(folder, make_tree, image, in_memory, content):
    root = make_tree()
    broken = root / "train" / "eel" / "002.png"
    broken.write_bytes(broken.read_bytes()[:20] if content is None else content)
    with pytest.raises(DataError, match=rf"{broken}.*(repair or remove|remove the file)"):
        build_data(folder(root, in_memory=in_memory)).check()


def test_truncated_image_is_named_when_decoded(folder, make_tree):
    root = make_tree()
    broken = root / "train" / "eel" / "002.png"
    broken.write_bytes(broken.read_bytes()[:-100])
    with pytest.raises(DataError, match=str(broken)):
        build_data(folder(root)).check()
    on_disk = folder(root, in_memory=False, val_fraction=0.0, augment=False, num_workers=0)
    loader = train_loader(build_data(on_disk), seed=0)
    with pytest.raises(DataError, match=str(broken)) as error:
        list(loader)
    assert "\n" not in str(error.value)


def test_root_not_given(option):
    with pytest.raises(ConfigError, match=r"^root: missing.*root=PATH"):
        option("image_folder")


def test_row_24_root_missing_suggests_its_neighbours(folder, tmp_path):
    (tmp_path / "images").mkdir()
    with pytest.raises(DataError, match=r"no such folder. Did you mean: images\?.*root=FOLDER"):
        build_data(folder(tmp_path / "imagse"))
    with pytest.raises(DataError, match="no such folder"):
        build_data(folder(tmp_path / "a" / "b"))


@pytest.mark.parametrize(
    ("broken", "words"),
    [
        (lambda root: shutil.rmtree(root / "train"), ["no train/", "but: test"]),
        (lambda root: shutil.rmtree(root / "test"), ["no test/", "but: train"]),
        (lambda root: [shutil.rmtree(root / s) for s in ("train", "test")], ["no train/", "nothing"]),
        (lambda root: [shutil.rmtree(f) for f in (root / "train").iterdir()], ["train", "no class folder"]),
        (lambda root: [f.unlink() for f in (root / "train" / "dog").iterdir()], ["train/dog", "no image", ".png"]),
        (lambda root: shutil.rmtree(root / "test" / "dog"), ["test", "lacks dog"]),
        (lambda root: (root / "test" / "dog").rename(root / "test" / "emu"), ["lacks dog and has emu besides"]),
        (lambda root: [shutil.rmtree(root / "train" / c) for c in ("dog", "eel")], ["only one class, cat"]),
    ],
)
def test_tree_that_is_no_data_set(folder, make_tree, broken, words):
    root = make_tree()
    broken(root)
    with pytest.raises(DataError) as error:
        build_data(folder(root))
    for word in (str(root), *words):
        assert word in str(error.value), str(error.value)


@pytest.mark.skipif("HODEC_DATA" not in os.environ, reason="HODEC_DATA is not set: no CIFAR-10 (JPEG) at hand")
def test_ten_thousand_jpegs_are_decoded_in_seconds(folder):
    root = Path(os.environ["HODEC_DATA"]) / "cifar10-jpeg"
    if not root.is_dir():
        pytest.skip("no cifar10-jpeg in HODEC_DATA")
    images = build_data(folder(root))
    start = time.perf_counter()
    assert images.test.images.shape == (10_000, 3, 32, 32)
    assert time.perf_counter() - start < 8  # a fifth of 40 s
    assert images.test.labels.bincount().tolist() == [1000] * 10
