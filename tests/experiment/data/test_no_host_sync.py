"""A training batch made on the device waits for nothing: no number of it is looked at by the host."""

import pytest
import torch

from hodec.experiment.data.images import TensorSplit
from hodec.experiment.data.loaders import TensorLoader
from hodec.experiment.data.options import Cifar10

from host_looks import HostLooks  # isort: skip


def loader(*, train=True, place=None, **changes):
    images = torch.randint(0, 256, (40, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    option = Cifar10(**({"batch_size": 8, "eval_batch_size": 8, "crop_padding": 2} | changes))
    return TensorLoader(TensorSplit(images, torch.arange(40)), option, seed=0, train=train, **(place or {}))


@pytest.mark.parametrize("changes", [
    {}, {"augment": False}, {"place": {"channels_last": True}}, {"image_size": 12}, {"train": False},
    {"place": {"rank": 1, "world_size": 2}},
])  # fmt: skip
def test_no_batch_is_looked_at_by_the_host(changes):
    batches = iter(loader(**changes))
    with HostLooks() as first:  # an epoch's order is drawn with its first batch
        next(batches)
    with HostLooks() as others:
        rest = list(batches)
    assert rest
    assert first.found == []
    assert others.found == []


def test_the_number_of_operations_of_a_batch_does_not_grow_with_it():
    counts = []
    for size in (4, 20):
        batches = iter(loader(batch_size=size))
        next(batches)
        with HostLooks() as looked:
            next(batches)
        counts.append(looked.operations)
    assert counts[0] == counts[1] > 5


def test_images_are_kept_in_one_byte_a_value_on_the_device():
    subject = loader(place={"device": "meta"})
    images, labels = subject.data.images, subject.data.labels
    assert images.dtype == torch.uint8
    assert {t.device.type for t in (images, labels, *subject.positions)} == {"meta"}


@pytest.mark.parametrize("changes", [{}, {"augment": False}, {"channels_last": True}, {"train": False}])
def test_a_whole_epoch_is_made_on_a_device_whose_numbers_cannot_be_read(changes):
    """Tensors of the meta device have no values: whatever looked at one, or mixed in one of the host, would raise."""
    place = {"device": "meta", "channels_last": changes.pop("channels_last", False)}
    batches = list(loader(place=place, **changes))
    assert len(batches) == 5
    assert all(part.device.type == "meta" for batch in batches for part in batch)


def test_the_watch_itself_sees_a_look():
    for look in (lambda t: t.item(), lambda t: bool(t), lambda t: t.tolist(), lambda t: int(t), lambda t: t.nonzero(),
                 lambda t: t[t > 0]):  # fmt: skip
        with HostLooks() as looked:
            look(torch.ones(1)[0])
        assert looked.found, look
