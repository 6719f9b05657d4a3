import pickle
from urllib.error import URLError

import numpy as np
import pytest
import torch

import hodec.experiment.data as data
from hodec.errors import ConfigError, DataError


def test_digits_facts(make_cfg):
    digits = data.build_data(make_cfg())
    assert (digits.in_channels, digits.num_classes, digits.image_size) == (1, 10, (8, 8))
    assert digits.classes == tuple("0123456789")
    assert len(digits.train) + len(digits.val) + len(digits.test) == 1797
    assert digits.train.images.shape[1:] == (1, 8, 8)
    assert digits.train.images.dtype == torch.uint8
    assert digits.train.images.max() == 255


def test_digits_splits_are_stratified_and_share_no_picture(make_cfg):
    digits = data.build_data(make_cfg())
    assert abs(len(digits.test) - 0.2 * 1797) < 5
    assert abs(len(digits.val) - 0.1 * 0.8 * 1797) < 5
    for split in (digits.val, digits.test):
        counts = split.labels.bincount()
        assert counts.max() - counts.min() <= 2
    rows = torch.cat([s.images.flatten(1) for s in (digits.train, digits.val, digits.test)])
    assert len(rows.unique(dim=0)) == 1797  # no two digits are equal: none can stand in two splits


def test_digits_are_the_same_in_every_build_and_whatever_the_global_seed(make_cfg):
    torch.manual_seed(0)
    one = data.build_data(make_cfg())
    torch.manual_seed(1)
    other = data.build_data(make_cfg(val_fraction=0.3))
    assert torch.equal(one.test.images, other.test.images)
    assert len(other.val) > len(one.val)


def test_part_of_the_training_pictures_keeps_the_classes_and_the_other_splits(make_cfg):
    whole, part = data.build_data(make_cfg()), data.build_data(make_cfg(train_fraction=0.25))
    assert len(part.train) == pytest.approx(len(whole.train) / 4, abs=5)
    torch.testing.assert_close(part.train.labels.bincount() * 4, whole.train.labels.bincount(), atol=2, rtol=0)
    both = torch.cat([whole.train.images, part.train.images]).flatten(1)
    assert len(both.unique(dim=0)) == len(whole.train)  # it is a part
    assert torch.equal(part.val.images, whole.val.images)
    assert torch.equal(part.test.images, whole.test.images)


def test_digits_statistics_are_those_of_the_training_part(make_cfg):
    digits = data.build_data(make_cfg(val_fraction=0.0))
    pixels = digits.train.images.double() / 255
    torch.testing.assert_close(torch.tensor(digits.mean), pixels.mean().float().view(1), atol=1e-4, rtol=0)
    torch.testing.assert_close(torch.tensor(digits.std), pixels.std().float().view(1), atol=1e-4, rtol=0)
    x = torch.cat([x for x, _ in data.train_loader(digits, make_cfg(augment=False), seed=0)])
    assert abs(x.mean()) < 0.01
    assert abs(x.std() - 1) < 0.01


def test_image_size_scales_what_the_loader_yields(make_cfg):
    cfg = make_cfg(image_size=20)
    digits = data.build_data(cfg)
    assert digits.image_size == (20, 20)
    assert next(iter(data.train_loader(digits, cfg, seed=0)))[0].shape == (16, 1, 20, 20)
    assert next(iter(data.test_loader(digits, cfg)))[0].shape == (50, 1, 20, 20)


def test_statistics_can_be_set(make_cfg):
    fake = data.build_data(make_cfg(name="fake", mean=[0.1, 0.2, 0.3], std=[0.5]))
    assert fake.mean == (0.1, 0.2, 0.3)
    assert fake.std == (0.5, 0.5, 0.5)


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"mean": [0.1, 0.2]}, ["data.mean", "2 numbers", "3 channels"]),
        ({"std": [0.1, 0.0, 0.2]}, ["data.std", "above 0"]),
        ({"val_fraction": 1.0}, ["data.val_fraction=1.0", "[0, 1)"]),
        ({"val_fraction": -0.1}, ["data.val_fraction=-0.1"]),
        ({"train_fraction": 0.0}, ["data.train_fraction=0.0", "above 0"]),
        ({"train_fraction": 1.1}, ["data.train_fraction=1.1", "at most 1"]),
        ({"batch_size": 0, "num_workers": -1}, ["data.batch_size=0", "data.num_workers=-1"]),
        ({"image_size": 0}, ["data.image_size=0"]),
        ({"fake_classes": 1}, ["data.fake_classes=1", "2 classes"]),
        ({"fake_size": 7}, ["data.fake_size=7"]),
    ],
)
def test_settings_out_of_range(make_cfg, wrong, words):
    with pytest.raises(ConfigError) as error:
        data.build_data(make_cfg(name="fake", **wrong))
    for word in words:
        assert word in str(error.value)


def test_unknown_name_suggests_near_ones(make_cfg):
    with pytest.raises(ConfigError, match=r"cifar1O.*Did you mean: cifar10.*data="):
        data.build_data(make_cfg(name="cifar1O"))


def test_fake_pictures_are_the_same_each_time_and_carry_their_class(make_cfg):
    cfg = make_cfg(name="fake", fake_size=400, fake_classes=5, val_fraction=0.0)
    fake = data.build_data(cfg)
    again = data.build_data(cfg)
    assert torch.equal(fake.train.images, again.train.images)
    assert (len(fake.train), len(fake.test), fake.image_size, fake.num_classes) == (400, 100, (32, 32), 5)
    assert not torch.equal(fake.train.images[:100], fake.test.images)

    def flat(split):
        x = torch.nn.functional.avg_pool2d(split.images.float(), 8).flatten(1)
        return x - x.mean(0)

    means = torch.stack([flat(fake.train)[fake.train.labels == label].mean(0) for label in range(5)])
    guess = (flat(fake.test) @ means.T - 0.5 * means.square().sum(1)).argmax(1)
    assert (guess == fake.test.labels).float().mean() > 0.9


def test_fake_pictures_have_the_size_asked_for(make_cfg):
    assert data.build_data(make_cfg(name="fake", image_size=10)).train.images.shape[1:] == (3, 10, 10)


def test_validation_can_be_left_out(make_cfg):
    cfg = make_cfg(val_fraction=0.0)
    digits = data.build_data(cfg)
    assert digits.val is None
    assert data.val_loader(digits, cfg) is None


def test_loaders_obey_the_settings(make_cfg):
    cfg = make_cfg(augment=False, eval_batch_size=30)
    digits = data.build_data(cfg)
    train, val, test = (
        data.train_loader(digits, cfg, seed=3),
        data.val_loader(digits, cfg),
        data.test_loader(digits, cfg),
    )
    assert (train.batch_size, val.batch_size, test.batch_size) == (16, 30, 30)
    assert (train.train, val.train, test.train) == (True, False, False)
    assert train.augment == data.Augment()
    assert data.train_loader(digits, make_cfg(), seed=3).augment == data.Augment(2, True)
    assert torch.equal(torch.cat([y for _, y in test]), digits.test.labels)


@pytest.mark.parametrize("world_size", [1, 4])
def test_row_41_batch_larger_than_the_training_split(make_cfg, world_size):
    digits = data.build_data(make_cfg())
    share = len(digits.train) // world_size
    data.train_loader(digits, make_cfg(batch_size=share), seed=0, world_size=world_size)
    with pytest.raises(ConfigError, match=f"data.batch_size={share} or less"):
        data.train_loader(digits, make_cfg(batch_size=share + 1), seed=0, world_size=world_size)


@pytest.mark.parametrize(("name", "folder"), [("cifar10", "cifar-10-batches-py"), ("cifar100", "cifar-100-python")])
def test_absent_cifar_names_folder_and_switch(make_cfg, tmp_path, name, folder):
    with pytest.raises(DataError) as error:
        data.build_data(make_cfg(name=name, root=str(tmp_path)))
    assert str(tmp_path / folder) in str(error.value)
    assert "data.download=true" in str(error.value)


def test_cifar_without_network(make_cfg, tmp_path, monkeypatch):
    def refuse(*args, **kwargs):
        raise URLError("no network")

    monkeypatch.setattr("torchvision.datasets.cifar.download_and_extract_archive", refuse)
    with pytest.raises(DataError, match=r"cifar-10-batches-py.*no network.*by hand"):
        data.build_data(make_cfg(name="cifar10", root=str(tmp_path), download=True))


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


def test_cifar_pictures_and_lazy_test(make_cfg, small_cifar):
    cifar = data.build_data(make_cfg(name="cifar10", root=str(small_cifar), val_fraction=0.2))
    assert (cifar.name, cifar.num_classes, cifar.image_size) == ("cifar10", 10, (32, 32))
    assert (len(cifar.train), len(cifar.val)) == (16, 4)
    assert cifar.val.labels.bincount().tolist() == [2, 2]
    first = pickle.loads((small_cifar / "cifar-10-batches-py" / "test_batch").read_bytes())
    expected = torch.from_numpy(first["data"]).view(4, 3, 32, 32)
    assert torch.equal(cifar.test.images, expected)
    assert cifar.mean == (0.4914, 0.4822, 0.4465)


def test_cifar_test_file_is_not_opened_before_it_is_asked_for(make_cfg, small_cifar):
    (small_cifar / "cifar-10-batches-py" / "test_batch").unlink()
    cifar = data.build_data(make_cfg(name="cifar10", root=str(small_cifar)))
    assert len(cifar.train) == 18
    with pytest.raises(DataError, match="CIFAR10"):
        _ = cifar.test
