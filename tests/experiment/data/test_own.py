"""Images of one's own: what is taken of a data module and of functions, and what is refused."""

import pytest
import torch
from pytorch_lightning import LightningDataModule
from torch.utils.data import DataLoader, TensorDataset, WeightedRandomSampler

from hodec.errors import DataError
from hodec.experiment.config import trust
from hodec.experiment.config.own import DataModule
from hodec.experiment.data.images import build_data
from hodec.experiment.data.loaders import test_loader as evaluation_loader
from hodec.experiment.data.loaders import train_loader, val_loader
from hodec.experiment.data.options import Functions

HERE = __name__


def images(count=40, classes=4):
    labels = torch.arange(count) % classes
    return torch.arange(count * 2 * 6 * 5).view(count, 2, 6, 5).float(), labels


def others():
    return images(10)


class Jittered(TensorDataset):
    """A data set that draws by torch."""

    def __getitem__(self, index):
        x, y = super().__getitem__(index)
        return x + torch.rand(()), int(y)


def jittered():
    return Jittered(*images())


class Broken(TensorDataset):
    """A data set whose second image cannot be read."""

    def __getitem__(self, index):
        if index == 1:
            raise DataError("b.png: not readable as an image")
        x, y = super().__getitem__(index)
        return x, int(y)


def broken():
    return Broken(*images())


class Module(LightningDataModule):
    num_classes = 4
    sampler = None

    def train_dataloader(self):
        shuffle = self.sampler is None
        return DataLoader(TensorDataset(*images()), 8, shuffle=shuffle, sampler=self.sampler)

    def val_dataloader(self):
        return DataLoader(TensorDataset(*others()), 5)

    def test_dataloader(self):
        return DataLoader(TensorDataset(*images(12)), 5)


class Weighted(Module):
    sampler = WeightedRandomSampler([1.0] * 40, 40)


class NoValidation(Module):
    val_dataloader = LightningDataModule.val_dataloader


class Elsewhere(Module):
    """A data module of a package whose name has Lightning's in it."""

    def train_dataloader(self):
        return super().train_dataloader()


Elsewhere.train_dataloader.__module__ = "my_package.lightning_data"


def from_datasets():
    train, test = TensorDataset(*images()), TensorDataset(*images(12))
    return LightningDataModule.from_datasets(train, test_dataset=test, batch_size=8)


class NoClasses(Module):
    num_classes = None


@pytest.fixture(autouse=True)
def _trusted(monkeypatch):
    monkeypatch.setenv(trust.VARIABLE, trust.EVERYTHING)


def functions(**changes):
    given = {"train": f"{HERE}.images", "test": f"{HERE}.others", "batch_size": 8, "val_fraction": 0.2}
    return build_data(Functions(**{**given, **changes}))


def module(name="Module", **changes):
    return build_data(DataModule(_target_=f"{HERE}.{name}", **changes))


def test_functions_give_the_splits():
    data = functions()
    assert (data.in_channels, data.image_size, data.num_classes) == (2, (6, 5), 4)
    assert data.split_sizes() == {"train": 32, "validation": 8, "test": 10}
    x, y = next(iter(evaluation_loader(data)))
    torch.testing.assert_close(x, others()[0])
    torch.testing.assert_close(y, others()[1])
    seen = torch.cat([y for _, y in train_loader(data, seed=0)])
    assert sorted(seen.tolist()) == sorted([0, 1, 2, 3] * 8)
    assert functions(val=f"{HERE}.others").split_sizes() == {"train": 40, "validation": 10, "test": 10}
    assert functions(val_fraction=0).has_validation is False


def test_a_data_module_gives_its_data_sets_and_batch_sizes():
    data = module()
    assert data.split_sizes() == {"train": 40, "validation": 10, "test": 12}
    assert [len(y) for _, y in train_loader(data, seed=0)] == [8] * 5
    assert [len(y) for _, y in val_loader(data)] == [5, 5]
    assert module("NoValidation").has_validation is False
    assert module(classes=7).num_classes == 7
    assert module("Elsewhere").split_sizes() == data.split_sizes()
    assert module("from_datasets", classes=4).split_sizes() == {"train": 40, "validation": 0, "test": 12}


@pytest.mark.parametrize("workers", [0, 2])
def test_a_pass_goes_on_where_it_was_and_draws_the_same(workers):
    data = functions(train=f"{HERE}.jittered", num_workers=workers)
    loader = train_loader(data, seed=3)
    loader.set_epoch(2)
    whole = list(loader)
    again = train_loader(data, seed=3)
    again.set_epoch(2)
    rows = iter(again)
    for _ in range(2):
        next(rows)
    third = train_loader(data, seed=3)
    third.load_state_dict(again.state_dict())
    rest = list(third)
    assert len(rest) == len(whole) - 2
    for (x, y), (x2, y2) in zip(whole[2:], rest, strict=True):
        assert torch.equal(x, x2)
        assert torch.equal(y, y2)
    loader.set_epoch(3)
    assert not torch.equal(next(iter(loader))[0], whole[0][0])


def test_two_processes_share_the_images():
    data = functions(val_fraction=0)
    parts = [
        torch.cat([x.flatten(1)[:, 0] for x, _ in train_loader(data, seed=0, rank=rank, world_size=2)])
        for rank in (0, 1)
    ]
    assert len(set(parts[0].tolist()) & set(parts[1].tolist())) == 0
    assert len(torch.cat(parts)) == 32, "whole batches of 8 of 20 images each"


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: module("Weighted"), "without a sampler of its own"),
        (lambda: module("NoClasses"), "has no num_classes from 2; give them: data.classes=10"),
        (lambda: module("images"), "makes a tuple; allowed: a LightningDataModule"),
    ],
)
def test_what_does_not_fit_is_refused(make, text):
    with pytest.raises(DataError, match=text):
        make()


def test_one_class_is_none(monkeypatch):
    monkeypatch.setitem(globals(), "images", lambda: (torch.zeros(4, 1, 2, 2), torch.zeros(4).long()))
    with pytest.raises(DataError, match="only one class"):
        functions()


@pytest.mark.parametrize("workers", [0, 1])
def test_an_error_of_an_item_comes_out_of_its_worker_as_it_is(workers):
    data = functions(test=f"{HERE}.broken", num_workers=workers)
    with pytest.raises(DataError) as error:
        list(evaluation_loader(data))
    assert str(error.value) == "b.png: not readable as an image"
