import subprocess
import sys

import pytest
import torch

from hodec.errors import ConfigError
from hodec.models import build_model, model_names


def build(name, **changes):
    return build_model(name, **{"in_channels": 3, "num_classes": 10, **changes})


def test_every_listed_name_is_prefixed_or_a_cifar_net():
    names = model_names()
    assert {"resnet20", "resnet110", "torchvision/resnet18", "torchvision/mobilenet_v2"} <= set(names)
    assert len(names) == len(set(names))
    assert not [name for name in names if "segmentation" in name or "quantized" in name or "rcnn" in name]


def test_bare_torchvision_name_is_the_same_net():
    torch.manual_seed(0)
    bare = build("resnet18").state_dict()
    torch.manual_seed(0)
    prefixed = build("torchvision/resnet18").state_dict()
    torch.testing.assert_close(bare, prefixed, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("given", "suggested"),
    [("resnet21", "resnet20"), ("torchvision/resnet19", "resnet18"), ("mobilnet_v2", "mobilenet_v2")],
)
def test_unknown_name_suggests_near_ones(given, suggested):
    with pytest.raises(ConfigError) as error:
        build(given)
    assert suggested in str(error.value)
    assert str(error.value).startswith("model: ")


@pytest.mark.parametrize(
    "wrong", [{"in_channels": 0}, {"num_classes": -1}, {"image_size": 0}], ids=lambda w: next(iter(w))
)
def test_numbers_below_one_are_refused(wrong):
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        build("resnet20", **wrong)


def test_cifar_nets_do_without_torchvision():
    code = (
        "import sys; from hodec.models import build_model; "
        "build_model('resnet20', in_channels=1, num_classes=2); sys.exit('torchvision' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
