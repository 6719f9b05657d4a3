"""What comes behind a layer, read off one pass."""

import pytest
import torch
import torch.nn.functional as F
from small_nets import SmallResNet
from swaps import planned
from torch import Tensor, nn

from hodec.calibration.sites import back, sites_of, survey
from hodec.layers.plain import copied


def seen(net: nn.Module, *, sums: bool = True) -> list[list[tuple[str, bool, bool]]]:
    """The stops: name, summed and rectified of the layers of each."""
    net.eval()
    x = torch.randn(2, 6, 12, 12)
    plan, near = planned(net, 2, x[:1], method="svd", allow_larger=True), copied(net)
    with torch.no_grad():
        stops = survey(sites_of(net, near, plan), net, near, lambda: net(x), sums=sums)
    return [[(site.name, site.summed, site.rectified) for site in stop.sites] for stop in stops]


class Block(nn.Module):
    """Two layers, where ``end`` says what becomes of the second one's output and the input."""

    def __init__(self, end, norm: bool = True) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(6, 6, 3, padding=1), nn.Conv2d(6, 6, 3, padding=1)
        self.norm = nn.BatchNorm2d(6) if norm else nn.Identity()
        self.relu, self.end = nn.ReLU(inplace=True), end

    def forward(self, x: Tensor) -> Tensor:
        return self.end(self.norm(self.two(self.relu(self.one(x)))), x)


def added_in_place(y: Tensor, x: Tensor) -> Tensor:
    y += x
    return F.relu(y, inplace=True)


ENDS = {
    "sum and ReLU": (lambda y, x: F.relu(y + x), True, True),
    "the same from the other side": (lambda y, x: torch.relu(x + y), True, True),
    "all in place": (added_in_place, True, True),
    "a sum alone": (lambda y, x: y + x, True, False),
    "ReLU alone": (lambda y, x: F.relu(y), False, True),
    "ReLU, then a sum": (lambda y, x: F.relu(y) + x, False, True),
    "nothing": (lambda y, x: y, False, False),
    "the sum is used again": (lambda y, x: F.relu(s := y + x) + s, True, False),
    "the output is used again": (lambda y, x: F.relu(y + x) * y, False, False),
    "a sum with itself": (lambda y, x: F.relu(y + y), False, False),
    "a weighted sum": (lambda y, x: torch.relu(torch.add(y, x, alpha=2)), False, False),
    "a sum with less": (lambda y, x: F.relu(y + x[:1]), False, False),
    "a number is added": (lambda y, x: F.relu(y + 1), False, False),
}


@pytest.mark.parametrize("norm", [True, False], ids=["BatchNorm", "no BatchNorm"])
@pytest.mark.parametrize("end", ENDS)
def test_sums_and_rectifiers(end: str, norm: bool):
    act, summed, rectified = ENDS[end]
    assert seen(Block(act, norm)) == [[("one", False, True)], [("two", summed, rectified)]]


def test_two_layers_of_one_sum_stop_there_together():
    found = seen(SmallResNet())
    pair = [("layer1.conv2", True, True), ("layer1.shortcut", True, True)]
    assert found == [[("conv1", False, True)], [("layer1.conv1", False, True)], pair, [("fc", False, False)]]
    assert all(len(stop) == 1 and not stop[0][1] for stop in seen(SmallResNet(), sums=False))


def test_a_stop_lies_where_the_sum_is_and_not_where_its_first_layer_is():
    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.left, self.right, self.more = (nn.Conv2d(6, 6, 1) for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            left = self.left(x)
            return left + self.more(F.relu(self.right(x)))

    found = seen(Branches())
    assert found == [[("right", False, True)], [("left", True, False), ("more", True, False)]]


def test_a_channel_that_is_switched_off_asks_for_nothing():
    scale = torch.tensor([1.0, 2.0, 0.0])
    found = back(scale)
    assert torch.allclose(found[:2], 1 / scale[:2], rtol=1e-2)
    assert found[2] == 0
    assert back(torch.zeros(3)).isfinite().all()
