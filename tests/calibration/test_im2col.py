"""Patches are what the weight is multiplied by: together they give the layer's own output, for every setting."""

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from hodec.calibration.im2col import Draw, patches, token_counts
from hodec.formats.layer_types import LAYER_TYPES, layer_type_of

LAYERS = [
    nn.Conv1d(3, 4, 5, stride=2, padding=3, dilation=2),
    nn.Conv2d(3, 4, 3),
    nn.Conv2d(3, 4, 1, stride=2),
    nn.Conv2d(3, 4, (3, 2), stride=(1, 2), padding=(2, 0), dilation=(2, 1)),
    nn.Conv2d(3, 4, (2, 3), padding="same", dilation=(1, 2)),
    nn.Conv2d(3, 4, 3, padding="valid"),
    nn.Conv2d(3, 4, (3, 4), padding="same", padding_mode="reflect"),
    nn.Conv2d(3, 4, 3, padding=(1, 2), stride=2, padding_mode="circular"),
    nn.Conv2d(3, 4, 3, padding=2, padding_mode="replicate"),
    nn.Conv3d(3, 4, (3, 2, 1), stride=(1, 2, 1), padding=(1, 0, 2)),
    nn.ConvTranspose1d(3, 4, 4, stride=3, padding=2, output_padding=1),
    nn.ConvTranspose2d(3, 4, 1, stride=2),
    nn.ConvTranspose2d(3, 4, (2, 3), stride=(2, 1), padding=(0, 2), dilation=(3, 1)),
    nn.ConvTranspose2d(3, 4, 3, stride=(2, 3), padding=3, output_padding=(1, 2), dilation=(1, 2)),
    nn.ConvTranspose3d(3, 4, 2, stride=2, padding=1),
    nn.Linear(3, 4),
]
SIDES = (7, 9, 6)


def name(layer: nn.Module) -> str:
    return str(layer).replace(" ", "")


def given(layer: nn.Module, generator: torch.Generator) -> torch.Tensor:
    dims = layer_type_of(layer).dims
    shape = (2, 3, *SIDES[:dims]) if dims else (2, 5, 3)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths:UserWarning")
@pytest.mark.parametrize("layer", LAYERS, ids=name)
def test_weight_times_patches_is_the_output(layer: nn.Module, generator):
    layer, layer_type = layer.double(), layer_type_of(layer)
    x = given(layer, generator)
    weight = layer_type.to_oihw(layer.weight.detach())
    seen = torch.cat(list(patches(layer, layer_type, x)))
    assert seen.shape[1:] == weight.shape[1:]
    output = layer(x).detach()
    rows = output.movedim(1, -1).reshape(-1, 4) if layer_type.dims else output.reshape(-1, 4)
    assert_close(seen.flatten(1) @ weight.flatten(1).mT + layer.bias.detach(), rows)


def test_an_image_without_a_batch_axis(generator):
    layer = nn.Conv2d(3, 4, 3)
    x = torch.randn(3, 8, 8, generator=generator)
    (one,), (batch,) = (list(patches(layer, LAYER_TYPES["conv2d"], given)) for given in (x, x[None]))
    assert_close(one, batch, rtol=0, atol=0)


def test_large_inputs_come_in_chunks_of_whole_images(generator, monkeypatch):
    layer, x = nn.Conv2d(3, 4, 3), torch.randn(5, 3, 8, 8, generator=generator)
    (whole,) = patches(layer, LAYER_TYPES["conv2d"], x)
    monkeypatch.setattr("hodec.calibration.im2col.CHUNK", 2 * 3 * 64 * 9)
    chunks = list(patches(layer, LAYER_TYPES["conv2d"], x))
    assert [len(chunk) for chunk in chunks] == [72, 72, 36]
    assert_close(torch.cat(chunks), whole, rtol=0, atol=0)


@pytest.mark.parametrize("layer", [nn.Conv2d(3, 4, 3, padding=1), nn.ConvTranspose2d(3, 4, 3, stride=2)], ids=name)
def test_drawn_positions_stand_for_all(layer: nn.Module, generator):
    layer_type = layer_type_of(layer)
    x = torch.randn(2, 3, 8, 8, generator=generator, dtype=torch.float64)
    (whole,) = patches(layer, layer_type, x)
    draws = [Draw(32, torch.Generator().manual_seed(seed)) for seed in (0, 0, *range(1, 200))]
    drawn = [next(patches(layer, layer_type, x, draw)) for draw in draws]
    assert {len(some) for some in drawn} == {2 * 32}
    assert_close(drawn[0], drawn[1], rtol=0, atol=0)
    mean = sum(some.square().sum() for some in drawn) / len(drawn)
    assert_close(mean, whole.square().sum(), rtol=0.03, atol=0)
    every = Draw(10**6, torch.Generator())
    assert_close(next(patches(layer, layer_type, x, every)), whole, rtol=0, atol=0)


def test_tokens_are_counted():
    layer = nn.Embedding(5, 2)
    assert token_counts(layer, torch.tensor([[0, 3], [3, 3]])).tolist() == [1, 0, 0, 3, 0]
