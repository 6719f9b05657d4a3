import pickle
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from urllib.error import URLError

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf

from hodec.errors import ConfigError, DataError, Use
from hodec.experiment.data.images import ImageData, TensorSplit, build_data
from hodec.experiment.data.loaders import test_loader as make_test_loader
from hodec.experiment.data.loaders import train_loader, val_loader
from hodec.experiment.data.options import DATA_SETS, DataSet
from hodec.options import setting, settings_of

CONF = Path(__file__).parents[3] / "conf" / "data"


def test_digits_facts(option):
    digits = build_data(option())
    assert (digits.in_channels, digits.num_classes, digits.image_size) == (1, 10, (8, 8))
    assert digits.classes == tuple("0123456789")
    assert len(digits.train) + len(digits.val) + len(digits.test) == 1797
    assert digits.train.images.shape[1:] == (1, 8, 8)
    assert digits.train.images.dtype == torch.uint8
    assert digits.train.images.max() == 255


def test_digits_splits_are_stratified_and_share_no_image(option):
    digits = build_data(option())
    assert abs(len(digits.test) - 0.2 * 1797) < 5
    assert abs(len(digits.val) - 0.1 * 0.8 * 1797) < 5
    for split in (digits.val, digits.test):
        counts = split.labels.bincount()
        assert counts.max() - counts.min() <= 2
    rows = torch.cat([s.images.flatten(1) for s in (digits.train, digits.val, digits.test)])
    assert len(rows.unique(dim=0)) == 1797  # no two digits are equal: none can stand in two splits


def test_digits_are_the_same_in_every_build_and_whatever_the_global_seed(option):
    torch.manual_seed(0)
    one = build_data(option())
    torch.manual_seed(1)
    other = build_data(option(val_fraction=0.3))
    assert torch.equal(one.test.images, other.test.images)
    assert len(other.val) > len(one.val)


def test_part_of_the_training_images_keeps_the_classes_and_the_other_splits(option):
    whole, part = build_data(option()), build_data(option(train_fraction=0.25))
    assert len(part.train) == pytest.approx(len(whole.train) / 4, abs=5)
    torch.testing.assert_close(part.train.labels.bincount() * 4, whole.train.labels.bincount(), atol=2, rtol=0)
    both = torch.cat([whole.train.images, part.train.images]).flatten(1)
    assert len(both.unique(dim=0)) == len(whole.train)  # it is a part
    assert torch.equal(part.val.images, whole.val.images)
    assert torch.equal(part.test.images, whole.test.images)


def test_digits_statistics_are_those_of_the_training_part(option):
    digits = build_data(option(val_fraction=0.0))
    pixels = digits.train.images.double() / 255
    torch.testing.assert_close(torch.tensor(digits.option.own_mean), pixels.mean().float().view(1), atol=1e-4, rtol=0)
    torch.testing.assert_close(torch.tensor(digits.option.own_std), pixels.std().float().view(1), atol=1e-4, rtol=0)
    x = torch.cat([x for x, _ in train_loader(build_data(option(augment=False, val_fraction=0.0)), seed=0)])
    assert abs(x.mean()) < 0.01
    assert abs(x.std() - 1) < 0.01


def test_image_size_scales_what_the_loader_yields(option):
    digits = build_data(option(image_size=20))
    assert digits.image_size == (20, 20)
    assert next(iter(train_loader(digits, seed=0)))[0].shape == (16, 1, 20, 20)
    assert next(iter(make_test_loader(digits)))[0].shape == (50, 1, 20, 20)


def test_statistics_can_be_set(option):
    fake = build_data(option("fake", mean=[0.1, 0.2, 0.3], std=[0.5]))
    assert fake.option.channel_statistics() == ((0.1, 0.2, 0.3), (0.5, 0.5, 0.5))


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"mean": [0.1, 0.2]}, "mean: 2 numbers given for images of 3 channels; allowed: 1 or 3"),
        ({"mean": []}, "mean: [] given"),
        ({"std": [0.1, 0.0, 0.2]}, "std: [0.1, 0.0, 0.2] given; allowed: null or a list of numbers above 0"),
        ({"val_fraction": 1.0}, "val_fraction: 1.0 given; allowed: a number at least 0 and below 1"),
        ({"val_fraction": -0.1}, "val_fraction: -0.1 given"),
        ({"train_fraction": 0.0}, "train_fraction: 0.0 given; allowed: a number above 0 and at most 1"),
        ({"train_fraction": 1.1}, "train_fraction: 1.1 given"),
        ({"batch_size": 0}, "batch_size: 0 given; allowed: a whole number at least 1"),
        ({"eval_batch_size": 0}, "eval_batch_size: 0 given"),
        ({"crop_padding": -1}, "crop_padding: -1 given"),
        ({"image_size": 0}, "image_size: 0 given"),
        ({"fake_classes": 1}, "fake_classes: 1 given"),
        (
            {"fake_size": 7, "fake_classes": 4},
            "fake_size=7 given with fake_classes=4; allowed: 2 or more of each class",
        ),
    ],
)
def test_settings_out_of_range(option, wrong, words):
    with pytest.raises(ConfigError, match=f"^{re.escape(words)}"):
        option("fake", **wrong)


@pytest.mark.parametrize("kind", DATA_SETS.values())
def test_defaults_are_those_of_the_settings_folder(kind):
    """And a data set has no setting of another."""
    stored = OmegaConf.to_container(OmegaConf.load(CONF / f"{kind.name}.yaml"))
    assert stored["name"] == kind.name
    defaults = {key: one.default for key, one in settings_of(kind).items()}
    assert defaults == {key: stored[key] for key in defaults}
    assert ("download" in defaults) == kind.name.startswith("cifar")
    assert ("fake_size" in defaults) == (kind.name == "fake")
    assert ("num_workers" in defaults) == (kind.name in ("image_folder", "functions"))


def test_settings_of_data_sets_do_without_torch():
    code = "import sys, hodec.experiment.data.options; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@dataclass(frozen=True, kw_only=True)
class Stripes(DataSet):
    """A data set of somebody else."""

    name = "stripes"
    reader = f"{__name__}:read_stripes"
    own_mean, own_std = (0.5,), (0.5,)
    count: int = setting(12, "images of each split", low=4)


def read_stripes(option):
    images = torch.zeros(option.count, 1, 2, 2, dtype=torch.uint8)
    split = TensorSplit(images, torch.arange(option.count) % 2)
    return ImageData(option, (2, 2), ("even", "odd"), {"train": lambda: split, "test": lambda: split})


def test_data_set_of_somebody_else_needs_one_class_and_one_function():
    stripes = build_data(Stripes(batch_size=4, image_size=3))
    assert (stripes.image_size, stripes.num_classes, stripes.val) == ((3, 3), 2, None)
    batches = list(train_loader(stripes, seed=0))
    assert [tuple(x.shape) for x, _ in batches] == [(4, 1, 3, 3)] * 3
    with pytest.raises(ConfigError, match="count: 3 given; allowed: a whole number at least 4"):
        Stripes(count=3)


def test_fake_images_are_the_same_each_time_and_carry_their_class(option):
    made = option("fake", fake_size=400, fake_classes=5, val_fraction=0.0, image_size=32)
    fake, again = build_data(made), build_data(made)
    assert torch.equal(fake.train.images, again.train.images)
    assert (len(fake.train), len(fake.test), fake.image_size, fake.num_classes) == (400, 100, (32, 32), 5)
    assert not torch.equal(fake.train.images[:100], fake.test.images)

    def flat(split):
        x = torch.nn.functional.avg_pool2d(split.images.float(), 8).flatten(1)
        return x - x.mean(0)

    means = torch.stack([flat(fake.train)[fake.train.labels == label].mean(0) for label in range(5)])
    guess = (flat(fake.test) @ means.T - 0.5 * means.square().sum(1)).argmax(1)
    assert (guess == fake.test.labels).float().mean() > 0.9


def test_fake_images_have_the_size_asked_for(option):
    assert build_data(option("fake", image_size=10)).train.images.shape[1:] == (3, 10, 10)


def test_validation_can_be_left_out(option):
    digits = build_data(option(val_fraction=0.0))
    assert digits.val is None
    assert val_loader(digits) is None


def test_loaders_obey_the_settings(option):
    digits = build_data(option(augment=False, eval_batch_size=30))
    train, val, test = train_loader(digits, seed=3), val_loader(digits), make_test_loader(digits)
    assert (train.batch_size, val.batch_size, test.batch_size) == (16, 30, 30)
    assert (train.train, val.train, test.train) == (True, False, False)
    assert not train.augment
    assert train_loader(build_data(option()), seed=3).augment
    assert torch.equal(torch.cat([y for _, y in test]), digits.test.labels)


@pytest.mark.parametrize("world_size", [1, 4])
def test_row_41_batch_larger_than_the_training_split(option, world_size):
    digits = build_data(option())
    part = len(digits.train) // world_size
    train_loader(build_data(option(batch_size=part)), seed=0, world_size=world_size)
    with pytest.raises(ConfigError, match=f"set batch_size={part} or less") as error:
        train_loader(build_data(option(batch_size=part + 1)), seed=0, world_size=world_size)
    assert f"data.batch_size={part} or less" in error.value.told(Use.in_hydra)


@pytest.mark.parametrize(("name", "folder"), [("cifar10", "cifar-10-batches-py"), ("cifar100", "cifar-100-python")])
def test_absent_cifar_names_folder_and_switch(option, tmp_path, name, folder):
    with pytest.raises(DataError) as error:
        build_data(option(name=name, root=str(tmp_path)))
    assert str(tmp_path / folder) in str(error.value)
    assert "data.download=true" in error.value.told(Use.in_hydra)


def test_cifar_without_network(option, tmp_path, monkeypatch):
    def refuse(*args, **kwargs):
        raise URLError("no network")

    monkeypatch.setattr("torchvision.datasets.cifar.download_and_extract_archive", refuse)
    with pytest.raises(DataError, match=r"cifar-10-batches-py.*no network.*by hand"):
        build_data(option(name="cifar10", root=str(tmp_path), download=True))


@pytest.fixture
def small_cifar(tmp_path, monkeypatch):
    """CIFAR-10's files with 4 images each, taken for whole."""
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for name in [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]:
        pixels = rng.integers(0, 256, (4, 3072), dtype=np.uint8)
        (folder / name).write_bytes(pickle.dumps({"data": pixels, "labels": [0, 1, 0, 1]}))
    names = [f"c{i}" for i in range(10)]
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": names}))
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda path, md5=None: True)
    return tmp_path


def test_cifar_images_and_lazy_test(option, small_cifar):
    cifar = build_data(option(name="cifar10", root=str(small_cifar), val_fraction=0.2))
    assert (cifar.option.name, cifar.num_classes, cifar.image_size) == ("cifar10", 10, (32, 32))
    assert (len(cifar.train), len(cifar.val)) == (16, 4)
    assert cifar.val.labels.bincount().tolist() == [2, 2]
    first = pickle.loads((small_cifar / "cifar-10-batches-py" / "test_batch").read_bytes())
    expected = torch.from_numpy(first["data"]).view(4, 3, 32, 32)
    assert torch.equal(cifar.test.images, expected)
    assert cifar.option.channel_statistics()[0] == (0.4914, 0.4822, 0.4465)


def test_cifar_test_file_is_not_opened_before_it_is_asked_for(option, small_cifar):
    (small_cifar / "cifar-10-batches-py" / "test_batch").unlink()
    cifar = build_data(option(name="cifar10", root=str(small_cifar)))
    assert len(cifar.train) == 18
    with pytest.raises(DataError, match="CIFAR10"):
        _ = cifar.test


def test_an_epoch_of_more_steps_than_there_are_batches_is_refused(option):
    data = build_data(option("fake", fake_size=64, val_fraction=0, epoch_batches=4))
    assert len(train_loader(data, seed=0)) == 4
    data = build_data(option("fake", fake_size=64, val_fraction=0, epoch_batches=5))
    with pytest.raises(ConfigError, match="epoch_batches=5 of 16 images are more than the 64 there are; at most 4"):
        train_loader(data, seed=0)
