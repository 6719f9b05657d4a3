import pytest
import torch

from hodec.errors import DataError
from hodec.experiment.data.images import build_data
from hodec.experiment.data.loaders import stream, train_loader
from hodec.experiment.data.loaders import test_loader as make_test_loader


@pytest.fixture
def folder(option):
    """A folder of images that are read from their files."""
    settings = {"batch_size": 4, "in_memory": False, "image_size": 8, "val_fraction": 0.0, "num_workers": 0}
    return lambda root, **changes: build_data(option("image_folder", root=str(root), **(settings | changes)))


@pytest.fixture
def loader(folder, make_tree):
    root = make_tree()

    def make(*, seed=0, rank=0, world_size=1, **changes):
        return train_loader(folder(root, **changes), seed=seed, rank=rank, world_size=world_size)

    return make


def assert_same_batches(left, right):
    torch.testing.assert_close(list(left), list(right), rtol=0, atol=0)


def test_batches_are_a_function_of_seed_and_epoch(loader):
    torch.manual_seed(0)
    one = loader()
    one.sampler.set_epoch(1)
    first = list(one)
    torch.manual_seed(1)
    other = loader()
    assert not torch.equal(next(iter(other))[0], first[0][0])
    other.sampler.set_epoch(1)
    assert_same_batches(other, first)
    assert not torch.equal(next(iter(loader(seed=1)))[0], first[0][0])


def test_number_of_workers_changes_no_batch(loader):
    alone, many = loader(), loader(num_workers=2)
    for epoch in (0, 1):
        alone.sampler.set_epoch(epoch)
        many.sampler.set_epoch(epoch)
        assert_same_batches(alone, many)


@pytest.mark.parametrize("workers", [0, 1])
def test_restored_loader_yields_exactly_the_batches_that_were_left(loader, workers):
    whole = loader(num_workers=workers)
    whole.sampler.set_epoch(3)
    running = iter(whole)
    for _ in range(2):
        next(running)
    state = whole.state_dict()  # workers have read ahead: the state counts what was handed out
    restored = loader(num_workers=workers)
    restored.load_state_dict(state)
    rest = list(restored)
    assert len(rest) == 2
    assert_same_batches(rest, running)
    restored.sampler.set_epoch(4)
    assert len(list(restored)) == len(restored) == 4


def test_pass_broken_off_does_not_disturb_the_next(loader):
    subject = loader(num_workers=1)
    running = iter(subject)
    next(running)
    assert_same_batches(subject, loader())


def test_global_generator_is_left_alone(loader):
    subject = loader()
    before = torch.get_rng_state()
    list(subject)
    assert torch.equal(before, torch.get_rng_state())


def test_processes_share_the_epoch(loader):
    alone = {y.item() for batch in loader(augment=False) for y in batch[0].sum((1, 2, 3))}
    shares = [loader(augment=False, rank=rank, world_size=2) for rank in range(2)]
    seen = [{y.item() for batch in share for y in batch[0].sum((1, 2, 3))} for share in shares]
    assert not seen[0] & seen[1]
    assert all(len(part) == 8 for part in seen)
    assert len(alone) == 16


def statistics(images):
    return [torch.tensor(values).view(3, 1, 1) for values in images.option.channel_statistics()]


def test_evaluation_reads_every_image_in_order(folder, make_tree):
    images = folder(make_tree(), eval_batch_size=5)
    batches = list(make_test_loader(images))
    assert [len(y) for _, y in batches] == [5, 5, 5, 3]
    assert torch.equal(torch.cat([y for _, y in batches]), images.test.labels)
    mean, std = statistics(images)
    first = images.test.transform()(images.test.image(0))
    assert (first.shape, first.dtype) == ((3, 8, 8), torch.uint8)
    torch.testing.assert_close(batches[0][0][0], (first / 255 - mean) / std, rtol=1e-5, atol=1e-5)


def test_without_augmentation_training_sees_the_middle_like_evaluation(loader, folder, make_tree):
    subject = loader(augment=False)
    x, y = next(iter(subject))
    images = folder(make_tree())
    known = torch.stack([images.train.transform()(images.train.image(i)) for i in range(18)])
    mean, std = statistics(images)
    back = ((x * std + mean) * 255).round().to(torch.uint8)
    for image, label in zip(back, y.tolist(), strict=True):
        at = [i for i in range(18) if torch.equal(known[i], image)]
        assert len(at) == 1
        assert at[0] // 6 == label


def test_random_cuts_differ_between_epochs_and_obey_the_size(loader):
    subject = loader()
    sums = []
    for epoch in range(3):
        subject.sampler.set_epoch(epoch)
        batches = list(subject)
        assert {tuple(x.shape) for x, _ in batches} == {(4, 3, 8, 8)}
        sums.append(sum(x.sum().item() for x, _ in batches))
    assert len(set(sums)) == 3


def test_channels_last(folder, make_tree):
    subject = train_loader(folder(make_tree()), seed=0, channels_last=True)
    assert next(iter(subject))[0].is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("workers", [0, 1])
def test_corrupt_image_is_named_without_a_traceback(folder, make_tree, workers):
    root = make_tree()
    subject = train_loader(folder(root, num_workers=workers), seed=0)
    broken = root / "train" / "dog" / "001.png"
    broken.write_bytes(b"gone")
    orders = (torch.randperm(18, generator=stream(0, epoch, "order"))[:16] for epoch in range(9))
    subject.sampler.set_epoch(next(epoch for epoch, order in enumerate(orders) if 7 in order))
    with pytest.raises(DataError) as error:
        list(subject)
    assert str(error.value).startswith(str(broken))
    assert "\n" not in str(error.value)
