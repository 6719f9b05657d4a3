import pytest
import torch
import torch.nn.functional as F

from hodec.experiment.data.augment import Augment, crop, draw_flips, draw_shifts, epoch_order, mirror, stream


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


def test_crop_in_the_middle_gives_the_picture_back(images):
    torch.testing.assert_close(crop(images, torch.full((7, 2), 3), 3), images, rtol=0, atol=0)


def test_mirror_turns_the_marked_pictures(images):
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


def test_order_is_a_permutation():
    order = epoch_order(50, seed=1, epoch=2)
    assert torch.equal(order.sort().values, torch.arange(50))
    assert not torch.equal(order, torch.arange(50))


def test_shifts_cover_their_range_evenly_and_flips_are_fair():
    shifts = draw_shifts(9000, Augment(crop_padding=1), seed=0, epoch=0)
    counts = (shifts[:, 0] * 3 + shifts[:, 1]).bincount(minlength=9)
    assert counts.min() > 850
    assert counts.max() < 1150
    assert draw_flips(10_000, seed=0, epoch=0).float().mean().item() == pytest.approx(0.5, abs=0.02)
