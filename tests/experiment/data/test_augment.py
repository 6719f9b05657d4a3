import pytest
import torch
import torch.nn.functional as F

from hodec.experiment.data.images import TensorSplit
from hodec.experiment.data.loaders import TensorLoader, crop, mirror, stream
from hodec.experiment.data.options import Digits


@pytest.fixture
def images():
    return torch.randint(0, 256, (7, 3, 5, 6), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def test_crop_is_the_window_at_its_shift(images):
    shifts = torch.tensor([[0, 0], [2, 2], [4, 4], [0, 4], [3, 1], [1, 2], [4, 0]])
    out = crop(images, shifts, 2)
    padded = F.pad(images, [2, 2, 2, 2])
    for index, (row, column) in enumerate(shifts.tolist()):
        expected = padded[index, :, row : row + 5, column : column + 6]
        torch.testing.assert_close(out[index], expected, rtol=0, atol=0)


def test_crop_in_the_middle_gives_the_image_back(images):
    torch.testing.assert_close(crop(images, torch.full((7, 2), 3), 3), images, rtol=0, atol=0)


def test_mirror_turns_the_marked_images(images):
    flips = torch.tensor([True, False, True, False, False, True, False])
    out = mirror(images, flips)
    torch.testing.assert_close(out[flips], images[flips].flip(-1), rtol=0, atol=0)
    torch.testing.assert_close(out[~flips], images[~flips], rtol=0, atol=0)


def test_streams_differ_by_seed_epoch_and_purpose():
    triples = [(0, 0, "order"), (0, 1, "order"), (1, 0, "order"), (0, 0, "crop"), (0, 11, "order"), (1, 1, "order")]
    firsts = {torch.randint(2**40, (), generator=stream(*triple)).item() for triple in triples}
    assert len(firsts) == len(triples)
    again = {torch.randint(2**40, (), generator=stream(*triple)).item() for triple in triples}
    assert firsts == again


def augmented(image, count, **changes):
    """Many copies of one image, each with an augmentation of its own."""
    split = TensorSplit(image.expand(count, 1, *image.shape), torch.zeros(count, dtype=torch.int64))
    option = Digits(batch_size=count, mean=[0.0], std=[1 / 255], augment=True, **changes)
    return next(iter(TensorLoader(split, option, seed=0, train=True)))[0].round()


def test_crops_cover_their_range_evenly():
    dot = torch.tensor([[0, 0, 0], [0, 1, 0], [0, 0, 0]], dtype=torch.uint8)
    counts = augmented(dot, 9000, crop_padding=1).sum((0, 1))
    assert counts.sum() == 9000
    assert counts.min() > 850
    assert counts.max() < 1150


def test_flips_are_fair():
    left = augmented(torch.tensor([[1, 0]], dtype=torch.uint8), 10_000, flip=True)[..., 0]
    assert left.mean().item() == pytest.approx(0.5, abs=0.02)
