import pytest
import torch

from hodec.experiment.data.images import ImageData, TensorSplit, stratified_split
from hodec.experiment.data.options import Digits


@pytest.mark.parametrize("fraction", [0.1, 0.25, 0.5])
@pytest.mark.parametrize("seed", [0, 1])
def test_parts_are_disjoint_exhaustive_and_of_the_same_mix(fraction, seed):
    labels = torch.randint(5, (700,), generator=torch.Generator().manual_seed(9))
    first, second = stratified_split(labels, fraction, seed=seed)
    assert torch.equal(torch.cat([first, second]).sort().values, torch.arange(700))
    counts, chosen = labels.bincount(), labels[second].bincount()
    assert (chosen - fraction * counts).abs().max() <= 0.5


def test_draw_depends_on_the_seed_alone():
    labels = torch.arange(100) % 4
    torch.manual_seed(0)
    once = stratified_split(labels, 0.2, seed=3)[1]
    torch.manual_seed(1)
    assert torch.equal(once, stratified_split(labels, 0.2, seed=3)[1])
    assert not torch.equal(once, stratified_split(labels, 0.2, seed=4)[1])


def test_fraction_zero_takes_nothing():
    first, second = stratified_split(torch.zeros(8, dtype=torch.int64), 0.0, seed=0)
    assert (len(first), len(second)) == (8, 0)


@pytest.mark.parametrize("fraction", [0.001, 0.999])
def test_no_part_loses_a_class(fraction):
    labels = torch.tensor([0, 0, 1, 1, 2])
    first, second = stratified_split(labels, fraction, seed=0)
    assert sorted(labels[first].tolist()) == [0, 1, 2]
    assert sorted(labels[second].tolist()) == [0, 1]


def test_splits_are_read_when_asked_for_and_once():
    read = []
    split = TensorSplit(torch.zeros(4, 1, 2, 2, dtype=torch.uint8), torch.zeros(4, dtype=torch.int64))

    def load(name):
        read.append(name)
        return split

    data = ImageData(Digits(), (2, 2), ("a", "b"), {"train": lambda: load("train"), "test": lambda: load("test")})
    assert (data.in_channels, data.num_classes, read) == (1, 2, [])
    assert data.train is data.train
    assert data.val is None
    assert read == ["train"]
    data.check()
    assert data.test is data.test
    assert read == ["train", "test"]
    assert data.split_sizes() == {"train": 4, "validation": 0, "test": 4}
