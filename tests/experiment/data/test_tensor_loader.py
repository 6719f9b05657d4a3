import itertools

import pytest
import torch
import torch.nn.functional as F

from hodec.errors import CheckpointError, DataError
from hodec.experiment.data.images import TensorSplit
from hodec.experiment.data.loaders import TensorLoader
from hodec.experiment.data.options import Cifar10

MEAN, STD = [0.2, 0.4, 0.6], [0.5, 0.25, 0.125]
PLACE = {"seed", "train", "rank", "world_size", "channels_last"}
AUGMENT = {"augment": True, "crop_padding": 2, "flip": True}


def images(count=50, size=(6, 6)):
    generator = torch.Generator().manual_seed(count)
    return torch.randint(0, 256, (count, 3, *size), dtype=torch.uint8, generator=generator)


def loader(count=50, **changes):
    """A training loader whose labels are the numbers of the images."""
    place = {"seed": 0, "train": True} | {key: changes.pop(key) for key in PLACE & changes.keys()}
    size = changes.pop("batch_size", 8)
    settings = {"batch_size": size, "eval_batch_size": size, "mean": MEAN, "std": STD, "augment": False} | changes
    return TensorLoader(TensorSplit(images(count), torch.arange(count)), Cifar10(**settings), **place)


def pixels(x):
    """Undo the normalisation: back to 0..255."""
    std, mean = torch.tensor(STD).view(-1, 1, 1), torch.tensor(MEAN).view(-1, 1, 1)
    return ((x * std + mean) * 255).round().to(torch.uint8)


def order(loader, epoch=None):
    if epoch is not None:
        loader.sampler.set_epoch(epoch)
    return [labels.tolist() for _, labels in loader]


def flat(batches):
    return list(itertools.chain.from_iterable(batches))


def assert_same_batches(left, right):
    left, right = list(left), list(right)
    assert len(left) == len(right)
    for one, other in zip(left, right, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


def test_order_is_a_function_of_seed_and_epoch():
    torch.manual_seed(0)
    first = order(loader(), 3)
    torch.manual_seed(1)
    other = loader()
    order(other, 0)
    assert order(other, 3) == first
    assert order(other, 4) != first
    assert order(loader(seed=1), 3) != first


def test_neighbouring_seeds_and_epochs_do_not_share_an_order():
    assert order(loader(seed=1), 0) != order(loader(seed=0), 1)


def test_global_generator_is_left_alone():
    torch.manual_seed(5)
    before = torch.get_rng_state()
    list(loader(**AUGMENT))
    assert torch.equal(before, torch.get_rng_state())


def test_training_leaves_out_the_incomplete_batch_and_evaluation_does_not():
    train, evaluation = loader(count=50), loader(count=50, train=False)
    assert (len(train), [len(b) for b in order(train)]) == (6, [8] * 6)
    assert (len(evaluation), flat(order(evaluation))) == (7, list(range(50)))
    assert len(set(flat(order(train)))) == 48


def test_a_single_incomplete_batch_is_kept():
    assert [len(b) for b in order(loader(count=5))] == [5]
    assert [len(b) for b in order(loader(count=8))] == [8]
    assert [len(b) for b in order(loader(count=9))] == [8]


def test_evaluation_normalises_and_nothing_else():
    source = images()
    x = torch.cat([images for images, _ in loader(train=False, **AUGMENT)])
    mean, std = torch.tensor(MEAN).view(-1, 1, 1), torch.tensor(STD).view(-1, 1, 1)
    torch.testing.assert_close(x, (source / 255 - mean) / std, rtol=1e-5, atol=1e-5)


def test_types_and_memory_format():
    x, y = next(iter(loader(channels_last=True, **AUGMENT)))
    assert (x.dtype, y.dtype) == (torch.float32, torch.int64)
    assert x.is_contiguous(memory_format=torch.channels_last)
    assert next(iter(loader(**AUGMENT)))[0].is_contiguous()


def test_training_without_augmentation_gives_the_images():
    source = images()
    for x, y in loader():
        torch.testing.assert_close(pixels(x), source[y], rtol=0, atol=0)


def test_augmented_image_is_one_of_its_crops_mirrored_or_not():
    padded = F.pad(images(), [2, 2, 2, 2])
    seen = set()
    for x, y in loader(**AUGMENT):
        for image, label in zip(pixels(x), y.tolist(), strict=True):
            found = [
                (row, column, flip)
                for row, column, flip in itertools.product(range(5), range(5), (False, True))
                if torch.equal(
                    image.flip(-1) if flip else image,
                    padded[label, :, row : row + 6, column : column + 6],
                )
            ]
            assert len(found) == 1, f"image {label} is none of its crops, or several"
            seen.update(found)
    assert len(seen) > 20  # of 50: the 48 images are not all treated alike
    assert {flip for *_, flip in seen} == {False, True}


def test_augmentation_is_a_function_of_seed_and_epoch():
    one, other = loader(**AUGMENT), loader(**AUGMENT)
    list(other)
    assert_same_batches(one, other)
    other.sampler.set_epoch(1)
    assert not torch.equal(next(iter(one))[0], next(iter(other))[0])


@pytest.mark.parametrize("augment", [{}, {"crop_padding": 1, "flip": False}, {"crop_padding": 0, "flip": True}])
def test_order_does_not_depend_on_the_augmentation(augment):
    assert order(loader(**{**augment, "augment": bool(augment)}), 2) == order(loader(**AUGMENT), 2)


@pytest.mark.parametrize("done", range(7))
def test_restored_loader_yields_exactly_the_batches_that_were_left(done):
    whole = loader(**AUGMENT)
    whole.sampler.set_epoch(2)
    running = iter(whole)
    for _ in range(done):
        next(running)
    state = whole.state_dict()
    rest = list(running)

    restored = loader(**AUGMENT)
    iter(restored)  # one made and dropped before the state arrives, as Lightning does
    restored.load_state_dict(state)
    passes = iter(restored)
    restored.sampler.set_epoch(2)
    assert len(rest) == 6 - done
    assert_same_batches(passes, rest)
    assert len(list(restored)) == 6  # the next pass is whole again
    assert len(restored) == 6


def test_state_says_epoch_and_next_batch_in_plain_numbers():
    subject = loader()
    subject.sampler.set_epoch(4)
    running = iter(subject)
    assert (subject.state_dict()["epoch"], subject.state_dict()["batch"]) == (4, 0)
    next(running)
    next(running)
    assert (subject.state_dict()["epoch"], subject.state_dict()["batch"]) == (4, 2)
    assert {type(value) for value in subject.state_dict().values()} == {int}
    restored = loader()
    restored.load_state_dict(subject.state_dict())
    assert restored.state_dict() == subject.state_dict()


def test_another_epoch_than_the_restored_one_starts_at_its_first_batch():
    restored = loader()
    restored.load_state_dict(restored.state_dict() | {"epoch": 2, "batch": 6})
    assert order(restored, 3) == order(loader(), 3)


def test_pass_broken_off_does_not_shorten_the_next():
    subject = loader()
    next(iter(subject))
    assert order(subject) == order(loader())


@pytest.mark.parametrize("change", [{"seed": 1}, {"batch_size": 10}, {"count": 60}])
def test_state_of_other_batches_is_refused_within_an_epoch_only(change):
    state = loader().state_dict()
    with pytest.raises(CheckpointError, match=rf"{next(iter(change)).replace('count', 'size')} \d+ \(now"):
        loader(**change).load_state_dict(state | {"batch": 3})
    other = loader(**change)
    other.load_state_dict(state | {"epoch": 1, "batch": 6})
    assert order(other, 1) == []
    assert len(order(other, 2)) == len(other)


@pytest.mark.parametrize("world_size", [2, 3])
def test_processes_see_together_what_one_large_batch_holds(world_size):
    count = 50 - 50 % (world_size * 8)
    alone = loader(count=count, batch_size=8 * world_size, **AUGMENT)
    shares = [list(loader(count=count, rank=rank, world_size=world_size, **AUGMENT)) for rank in range(world_size)]
    for number, (x, y) in enumerate(alone):
        sort = y.sort()
        parts = [share[number] for share in shares]
        both = torch.cat([labels for _, labels in parts]).sort()
        torch.testing.assert_close(both.values, sort.values, rtol=0, atol=0)
        together = torch.cat([images for images, _ in parts])[both.indices]
        torch.testing.assert_close(together, x[sort.indices], rtol=0, atol=0)


def test_training_shares_are_equal_and_disjoint():
    shares = [order(loader(count=53, batch_size=5, rank=rank, world_size=3), 1) for rank in range(3)]
    assert {len(share) for share in shares} == {3}
    assert len(set(flat(flat(shares)))) == 45


@pytest.mark.parametrize(("count", "batch_size"), [(50, 8), (49, 8), (48, 8), (10, 5), (7, 3), (4, 1)])
@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_evaluation_shares_have_as_many_batches_and_each_image_once(count, batch_size, world_size):
    def share(rank):
        return order(loader(count, train=False, batch_size=batch_size, rank=rank, world_size=world_size))

    if count % world_size and batch_size == 1:
        with pytest.raises(DataError, match="do not fill"):
            share(0)
        return
    shares = [share(rank) for rank in range(world_size)]
    assert len({len(batches) for batches in shares}) == 1
    assert sorted(flat(flat(shares))) == list(range(count))
    assert all(0 < len(batch) <= batch_size for batches in shares for batch in batches)


def test_fewer_images_than_processes():
    with pytest.raises(DataError, match="2 images cannot be shared by 3 processes"):
        loader(count=2, rank=0, world_size=3)


def test_no_images():
    with pytest.raises(DataError, match="0 images"):
        loader(count=0)


def test_images_are_scaled_to_the_size_of_the_network():
    flat_grey = torch.full((4, 3, 8, 8), 51, dtype=torch.uint8)
    for augment in (False, True):
        option = Cifar10(batch_size=4, mean=[0.0], std=[1.0], augment=augment, crop_padding=0, image_size=20)
        subject = TensorLoader(TensorSplit(flat_grey, torch.arange(4)), option, seed=0, train=True)
        x, _ = next(iter(subject))
        torch.testing.assert_close(x, torch.full((4, 3, 20, 20), 0.2))


def test_epochs_of_so_many_steps_go_on_through_the_set():
    short, whole = loader(epoch_batches=3), loader()
    for epoch in (0, 1):
        assert order(short, epoch) == order(whole, epoch)[:3]
    assert len(short) == 3
    assert order(short, 0) != order(short, 1)
    short.load_state_dict(short.state_dict())
    assert order(short, 2) == order(whole, 2)[:3]
