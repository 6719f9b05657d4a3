"""How good a net is beside the dense one: 1 where it gives the same, 0 where nothing agrees."""

import pytest
import torch
from torch import Tensor, nn

from hodec.calibration.quality import Agreement


class Scaled(nn.Module):
    def __init__(self, scale: float) -> None:
        super().__init__()
        self.scale = scale

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * x


@pytest.mark.parametrize("shape", [(4, 3), (4, 3, 2)], ids=["classes", "other outputs"])
def test_the_score_reaches_from_none_to_all(shape: tuple[int, ...], generator):
    agreement, data = Agreement(Scaled(1)), [torch.randn(shape, generator=generator) for _ in range(2)]
    assert agreement(Scaled(1), data) == 1
    assert agreement(Scaled(-1), data) <= 0  # each largest entry is another one
    zeros = [torch.zeros_like(x) for x in data]
    assert agreement(Scaled(1), zeros) == 1
