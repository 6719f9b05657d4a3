"""BatchNorm's statistics in validation: those of the weights of now, without a change of the training."""

import pytest
import pytorch_lightning as pl
import torch
from admm_fits import BATCHES, Users, admm, batches, fit, samples
from torch import nn
from torch.testing import assert_close

import hodec
from hodec.errors import ConfigError


def normed():
    """Two convolutions with BatchNorm, one of which is planned; (N, 3, 8, 8) -> (N, 5)."""
    torch.manual_seed(0)
    first = [nn.Conv2d(3, 12, 3), nn.BatchNorm2d(12), nn.ReLU()]
    return nn.Sequential(*first, nn.Conv2d(12, 12, 3), nn.BatchNorm2d(12), nn.Flatten(), nn.Linear(192, 5))


class Statistics(pl.Callback):
    """Keeps a copy of the net at each validation; put it after the ADMM callback."""

    def __init__(self):
        self.seen = []

    def on_validation_start(self, trainer, module):
        self.seen.append({key: value.clone() for key, value in module.backbone.state_dict().items()})


def trained(bn_batches):
    net, statistics = normed(), Statistics()
    callback = admm(net, ranks={"3": 3}, bn_batches=bn_batches)
    fit(Users(net), callback, statistics, epochs=3, val=batches())
    return net, callback.admm.states["3"], statistics.seen


def test_validation_has_the_statistics_of_its_weights():
    (net, _, seen), x = trained(bn_batches=2), samples()[0]
    assert len(seen) == 3
    for state in seen:
        net.load_state_dict(state)
        hodec.reestimate_batchnorm(net, x[8 * (BATCHES - 2) :].split(8))
        assert_close(net[4].running_var, state["4.running_var"])
        assert_close(net[1].running_mean, state["1.running_mean"])


def test_the_training_does_not_notice():
    (lagging, before, old), (net, after, new) = trained(bn_batches=0), trained(bn_batches=BATCHES)
    for one, other in zip(lagging.parameters(), net.parameters(), strict=True):
        assert torch.equal(one, other)
    assert torch.equal(before.z, after.z)
    assert torch.equal(before.u, after.u)
    assert not torch.allclose(old[-1]["4.running_var"], new[-1]["4.running_var"], rtol=0.01)


def test_a_number_of_batches_below_0_is_refused():
    with pytest.raises(ConfigError, match="bn_batches: -1 given"):
        admm(normed(), ranks={"3": 3}, bn_batches=-1)
