import pytest
import torch
from torch import nn

from hodec.models import build_model, load_weights
from hodec.models.resnet_cifar import DEPTHS, PadShortcut


def cifar(name, **changes):
    return build_model(name, **{"in_channels": 3, "num_classes": 10, **changes})


@pytest.mark.parametrize(
    ("name", "params"),
    [
        ("resnet20", 269_722),
        ("resnet32", 464_154),
        ("resnet44", 658_586),
        ("resnet56", 853_018),
        ("resnet110", 1_727_962),
    ],
)
def test_parameters_are_as_many_as_published_and_the_name_counts_the_layers(name, params):
    model = cifar(name)
    assert sum(p.numel() for p in model.parameters()) == params
    assert name == f"resnet{sum(isinstance(m, nn.Conv2d | nn.Linear) for m in model.modules())}"


def test_every_depth_is_published():
    assert set(DEPTHS) - {"resnet8"} == {  # which other tests add
        "resnet20",
        "resnet32",
        "resnet44",
        "resnet56",
        "resnet110",
    }


@pytest.mark.parametrize("size", [(8, 8), (9, 13), (32, 32), (50, 40)])
@pytest.mark.parametrize("channels", [1, 3])
def test_any_image_from_8x8_gives_logits(size, channels):
    model = cifar("resnet20", in_channels=channels, num_classes=7)
    assert model(torch.randn(2, channels, *size)).shape == (2, 7)


def test_module_names():
    names = dict(cifar("resnet20").named_modules())
    for name in ("conv1", "bn1", "layer1.0.conv1", "layer2.0.bn2", "layer3.2.conv2", "linear"):
        assert name in names


def test_shortcut_takes_every_second_pixel_between_zero_channels():
    x = torch.randn(2, 4, 5, 6)
    out = PadShortcut(4, 8, 2)(x)
    torch.testing.assert_close(out[:, 2:6], x[:, :, ::2, ::2], rtol=0, atol=0)
    assert out[:, :2].eq(0).all()
    assert out[:, 6:].eq(0).all()


def test_convolutions_keep_the_variance_of_relu_features():
    weight = cifar("resnet20").layer3[2].conv1.weight
    expected = (2 / (64 * 9)) ** 0.5
    assert weight.std().item() == pytest.approx(expected, rel=0.02)


def test_weights_come_from_the_global_seed():
    def first():
        torch.manual_seed(3)
        return cifar("resnet20").linear.weight

    torch.testing.assert_close(first(), first(), rtol=0, atol=0)


@pytest.mark.parametrize("name", ["resnet20", "resnet32", "resnet56"])
def test_published_weights_fit(name, trained_weights):
    from safetensors.torch import load_file

    path = trained_weights(f"{name}-cifar10.safetensors")
    model = cifar(name)
    model.load_state_dict(load_file(path), strict=True)
    again = cifar(name)
    load_weights(again, path)
    x = torch.randn(4, 3, 32, 32)
    torch.testing.assert_close(model.eval()(x), again.eval()(x), rtol=0, atol=0)
    assert again(x).softmax(1).max() > 0.3  # a trained net has an opinion
