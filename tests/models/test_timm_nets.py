"""Nets of timm by name. Those that build one are slow and need the package: pip install timm."""

import sys

import pytest
import torch

from hodec.errors import ConfigError
from hodec.models import build_model


def build(name, **changes):
    return build_model(f"timm/{name}", **{"in_channels": 3, "num_classes": 7, "image_size": 64, **changes})


def test_without_timm_the_way_out_is_told(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ConfigError, match="needs timm, which is not installed: pip install timm"):
        build("resnet18")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "changes"),
    [("resnet18", {"in_channels": 1}), ("vit_tiny_patch16_224", {}), ("mobilenetv3_small_100", {"image_size": None})],
)
def test_nets_take_the_images_they_are_built_for(name, changes):
    pytest.importorskip("timm")
    net = build(name, **changes)
    assert net.training
    side = changes.get("image_size", 64) or 224
    assert net.eval()(torch.zeros(2, changes.get("in_channels", 3), side, side)).shape == (2, 7)


@pytest.mark.slow
def test_names_and_sizes_that_do_not_fit():
    pytest.importorskip("timm")
    with pytest.raises(ConfigError, match=r"timm/resnet81 is unknown to timm .*Did you mean: .*resnet18"):
        build("resnet81")
    with pytest.raises(ConfigError, match="does not take images of 33x33"):
        build("levit_128", image_size=33)


@pytest.mark.slow
def test_a_run_of_a_timm_net(tmp_path):
    pytest.importorskip("timm")
    from hydra import compose, initialize_config_dir

    from hodec.experiment import pipeline
    from hodec.experiment.config.groups import CONF
    from hodec.experiment.config.overrides import check_overrides, plain
    from hodec.experiment.config.schema import config_of
    from hodec.export import checkpoint

    argv = [
        "model=timm", "model.name=resnet18", "data=fake", "data.fake_size=64", "data.image_size=32",
        "data.batch_size=16", "tt_ranks=8", "dense_epochs=1", "retrain_epochs=0", "bn_batches=1",
        "trainer.accelerator=cpu", "trainer.threads=1", "report=false",
    ]  # fmt: skip
    check_overrides(argv, CONF)
    with initialize_config_dir(str(CONF), version_base="1.3"):
        config = config_of(plain(compose("config", overrides=argv)))
    assert config.model.name == "timm/resnet18"
    metrics = pipeline.run(config, tmp_path / "run")
    assert metrics["compressed"]["params"] < metrics["dense"]["params"]
    small = checkpoint.load(tmp_path / "run" / "compressed.safetensors")
    assert small(torch.zeros(2, 3, 32, 32)).shape == (2, 10)
