import re
import warnings

import pytest
import torch
from torch import nn

from hodec.errors import ConfigError
from hodec.models import build_model, model_names


def build(name, **changes):
    return build_model(f"torchvision/{name}", **{"in_channels": 3, "num_classes": 10, **changes})


@pytest.mark.parametrize(
    ("name", "channels"),
    [("resnet18", 1), ("squeezenet1_1", 5), ("mobilenet_v2", 1), ("shufflenet_v2_x0_5", 5)],
)
def test_first_convolution_takes_the_channels(name, channels):
    model = build(name, in_channels=channels, num_classes=4, image_size=64).eval()
    assert model(torch.randn(2, channels, 64, 64)).shape == (2, 4)


def test_new_first_convolution_differs_in_channels_only():
    old, new = build("resnet18").conv1, build("resnet18", in_channels=1).conv1
    assert new.in_channels == 1
    for setting in ("out_channels", "kernel_size", "stride", "padding", "dilation", "groups", "padding_mode"):
        assert getattr(new, setting) == getattr(old, setting)
    assert (new.bias is None) == (old.bias is None)


@pytest.mark.parametrize("name", ["googlenet", "inception_v3"])
def test_auxiliary_heads_are_off_and_nothing_warns(name):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = build(name, image_size=75)
    out = model.train()(torch.randn(2, 3, 75, 75))
    assert isinstance(out, torch.Tensor)
    assert out.shape == (2, 10)


@pytest.mark.parametrize(
    ("name", "too_small", "fits"),
    [("alexnet", 32, 64), ("inception_v3", 64, 75), ("vit_b_32", 40, 64), ("maxvit_t", 32, 224)],
)
def test_too_small_image_names_a_size_that_fits(name, too_small, fits):
    with torch.device("meta"), pytest.raises(ConfigError) as error:  # without weights, as they are large
        build(name, image_size=too_small)
    assert f"{too_small}x{too_small}" in str(error.value)
    assert re.search(rf"set image_size={fits}\b", str(error.value))


def test_transformer_is_built_for_the_size_and_channels_of_the_data():
    with torch.device("meta"):
        model = build("vit_b_32", in_channels=1, image_size=64)
        assert model(torch.randn(1, 1, 64, 64)).shape == (1, 10)
    assert model.conv_proj.weight.shape == (768, 1, 32, 32)
    assert model.encoder.pos_embedding.shape == (1, 1 + 2 * 2, 768)


def test_probe_leaves_the_model_in_training_mode_and_on_its_device():
    model = build("resnet18", image_size=32)
    assert all(module.training for module in model.modules())
    assert {tensor.device.type for tensor in model.state_dict().values()} == {"cpu"}
    assert model.bn1.num_batches_tracked == 0


@pytest.mark.slow
@pytest.mark.parametrize("name", [n.removeprefix("torchvision/") for n in model_names() if "/" in n])
def test_every_net_is_built_for_grey_images(name):
    if re.search(r"vit_[hl]|regnet_._(32|128)gf|convnext_large|efficientnet_v2_l|vgg", name):
        pytest.skip("gigabytes of weights")
    model = build(name, in_channels=1, num_classes=7, image_size=224).eval()
    first = next(m for m in model.modules() if isinstance(m, nn.Conv2d))
    assert first.in_channels == 1
    with torch.no_grad():
        assert model(torch.randn(1, 1, 224, 224)).shape == (1, 7)
