"""Layers of timm that pad, scale or standardize, and its grouped convolutions, at full ranks."""

import pytest
import torch
from swaps import planned

from hodec.conversion.swap import convert

pytestmark = pytest.mark.slow

NETS = {  # least share of the multiply-adds that is planned; depthwise convolutions stay dense
    "tf_efficientnetv2_b0": 0.9,
    "resnetv2_50x1_bit": 0.99,
    "nf_resnet50": 0.99,
    "nf_regnet_b0": 0.99,
    "resnext26ts": 0.99,
    "regnety_002": 0.99,
}


@pytest.mark.parametrize("name", NETS)
def test_a_net_of_timm_is_equal_at_full_ranks(name: str):
    timm = pytest.importorskip("timm", reason="timm is not installed: uv run --with timm pytest -m slow")
    torch.manual_seed(0)
    model, x = timm.create_model(name).eval(), torch.randn(2, 3, 64, 64)
    plan = planned(model, 10**6, x, method="svd", allow_larger=True)
    assert plan.coverage["macs"] >= NETS[name]
    assert all("depthwise" in reason for reason in plan.skipped.values())
    small = convert(model, plan)
    assert sum(p.numel() for p in small.parameters()) == plan.params_after
    with torch.no_grad():
        wanted = model(x)
        assert (small(x) - wanted).norm() <= 1e-4 * wanted.norm()
