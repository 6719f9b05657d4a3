"""ADMM with any optimizers and parameter groups, and what is measured of it in modules that people have."""

import logging
from functools import partial

import pytest
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from admm_fits import (
    BATCHES,
    LAYERS,
    Flat,
    Users,
    admm,
    batches,
    covered,
    distance,
    fit,
    new_net,
    plain_sgd,
    plan_of,
)
from pytorch_lightning.callbacks import BaseFinetuning
from torch.testing import assert_close

from hodec.admm.core import Admm
from hodec.errors import TrainingError
from hodec.ranks import make_plan

# -- optimizers and parameter groups -------------------------------------------------------------------------------


class TwoOptimizers(Flat):
    """As a GAN has them, or Muon for some layers and AdamW for others; ``split`` gives the parts."""

    automatic_optimization = False

    def __init__(self, net, *split):
        super().__init__(net)
        self.split = split

    def configure_optimizers(self):
        return [torch.optim.SGD([p for m in part for p in m.parameters()], lr=0.05) for part in self.split]

    def training_step(self, batch, index):
        for optimizer in self.optimizers():
            optimizer.zero_grad()
            self.manual_backward(super().training_step(batch, index))
            optimizer.step()


@pytest.mark.parametrize(
    "split",
    [
        lambda n: ([n.head], [n.conv1, n.conv2, n.fc1]),
        lambda n: ([n.conv1, n.conv2], [n.fc1, n.head]),
    ],
    ids=["one has all planned layers", "both have some"],
)
def test_the_optimizers_of_the_planned_layers_serve(split):
    net = new_net()
    callback = admm(net, pull=0.6)
    seen = covered(TwoOptimizers(net, *split(net)), callback, epochs=2)
    assert callback.admm.states.keys() == set(LAYERS)
    assert callback.admm.steps == 2 * BATCHES
    assert seen.shares[1] == pytest.approx(0.6, abs=0.05)
    assert seen.reported[1] == pytest.approx(0.6, abs=1e-6)


class Unfreeze(BaseFinetuning):
    def freeze_before_training(self, module):
        self.freeze([module.backbone.conv1])

    def finetune_function(self, module, epoch, optimizer):
        if epoch == 1:
            self.unfreeze_and_add_param_group([module.backbone.conv1], optimizer, lr=0.05, initial_denom_lr=1.0)


def only_trainable(module):
    return torch.optim.SGD([p for p in module.parameters() if p.requires_grad], lr=0.05)


def test_a_layer_unfrozen_later_is_pulled_from_then_on(caplog):
    caplog.set_level(logging.INFO, "hodec")
    net = new_net()
    before = net.conv1.weight.detach().clone()
    callback = admm(net, pull=0.9)
    fit(Flat(net, only_trainable), Unfreeze(), callback, epochs=6)
    assert callback.admm.states.keys() == set(LAYERS)
    assert "ADMM takes in conv1" in caplog.text
    layer = plan_of(new_net())["conv1"]
    near, far = (distance(layer.project(w.detach()), w) for w in (net.conv1.weight, before))
    assert near < 0.1 * far


def test_a_layer_frozen_for_a_while_goes_on_from_its_state():
    net = new_net()
    core = Admm(net, plan_of(net), plain_sgd(net), steps_per_epoch=BATCHES)

    def epoch():
        train(core, net)
        core.end_epoch()

    epoch()
    kept = core.states["conv2"]
    net.conv2.requires_grad_(False)
    epoch()
    assert core.states.keys() == {"conv1", "fc1"}
    again = Admm(net, plan_of(net), plain_sgd(net), steps_per_epoch=BATCHES)
    again.load_state_dict(core.state_dict())
    net.conv2.requires_grad_(True)
    core.before_step()
    again.before_step()
    for one in (core, again):
        assert torch.equal(one.states["conv2"].u, kept.u)
        assert torch.equal(one.states["conv2"].z, kept.z)


def test_of_layers_trained_in_turn_the_residuals_are_never_zero():
    net = new_net()
    net.conv1.requires_grad_(False)
    core = Admm(net, plan_of(net), plain_sgd(net), steps_per_epoch=BATCHES, update_every=2)
    for epoch in range(3):
        net.conv1.requires_grad_(epoch == 2)
        net.conv2.requires_grad_(epoch < 2)
        net.fc1.requires_grad_(epoch < 2)
        train(core, net)
        report = core.end_epoch()
        assert report["primal_residual"] > 0.01
    assert core.residuals.keys() == {"conv1"}


def train(core, net):
    for x, y in batches():
        core.optimizer.zero_grad()
        F.cross_entropy(net(x), y).backward()
        core.before_step()
        core.optimizer.step()
        core.after_step()


# -- what is measured ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", [partial(torch.optim.AdamW, eps=1e-4), torch.optim.SGD], ids=["AdamW", "SGD"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_of_few_bits_are_pulled_as_far_as_is_reported(optimizer, dtype):
    """Each step asks for less than half of the last bit."""
    net, steps = torch.nn.Sequential(torch.nn.Linear(32, 32, bias=False)), 800
    plan = make_plan(net, 4, method="svd", example_input=torch.zeros(1, 32))
    net.to(dtype)
    trainer = optimizer(net.parameters(), lr=1e-3, weight_decay=0.0)
    core = Admm(net, plan, trainer, steps_per_epoch=steps, pull=0.8)
    core.start()
    before, z = net[0].weight.detach().clone(), core.states["0"].z
    for step in range(steps):
        if step == steps // 2:
            again = Admm(net, plan, trainer, steps_per_epoch=steps, pull=0.8)
            again.load_state_dict(core.state_dict())
            core = again
        net[0].weight.grad = torch.zeros_like(net[0].weight)
        core.before_step()
        trainer.step()
        core.after_step()
    left = distance(net[0].weight.detach().float(), z) / distance(before.float(), z)
    assert left == pytest.approx(0.2, abs=0.02)
    assert core.end_epoch()["pull"] == pytest.approx(0.8, abs=0.02)


def test_a_given_rho_tells_no_pull_of_weights_of_few_bits():
    net = new_net().bfloat16()
    core = Admm(net, plan_of(new_net()), plain_sgd(net), steps_per_epoch=BATCHES, rho=0.1)
    core.start()
    assert "pull" not in core.report()


def test_the_truncated_net_is_that_of_the_averaged_weights():
    averaging = pytest.importorskip("pytorch_lightning.callbacks.weight_averaging")
    net, seen = new_net(), []
    callback = admm(
        net, track_truncated=True, evaluate=lambda m: seen.append(m.backbone.conv2.weight.detach().clone()) or 0.5
    )
    ema = averaging.EMAWeightAveraging(decay=0.5)
    fit(Users(net), callback, ema, epochs=3)
    expected = plan_of(new_net())["conv2"].project(net.conv2.weight.detach())  # the fit ends with the averaged weights
    assert_close(seen[-1], expected)


class NoForward(Users):
    forward = pl.LightningModule.forward

    def training_step(self, batch, index):
        return F.cross_entropy(self.backbone(batch[0]), batch[1])

    def validation_step(self, batch, index):
        pass


def test_a_module_without_forward_trains_and_is_told_what_is_not_measured(caplog):
    net = new_net()
    callback = admm(net, track_truncated=True)
    fit(NoForward(net), callback, epochs=2, val=batches())
    assert len(callback.admm.primal) == 2
    assert "admm/truncated_accuracy" not in callback.latest
    assert sum("has no forward; give evaluate=" in line for line in caplog.messages) == 1


class OtherForward(NoForward):
    def forward(self, x, mask):
        return self.backbone(x) * mask


def test_a_forward_that_takes_more_than_images_is_no_end_of_the_fit(caplog):
    net = new_net()
    callback = admm(net, track_truncated=True)
    fit(OtherForward(net), callback, epochs=2, val=batches())
    assert len(callback.admm.primal) == 2
    assert sum("module(x) raised TypeError" in line for line in caplog.messages) == 1


def test_adam_under_a_constant_rho_is_given_no_pull_that_nobody_knows():
    net = new_net()
    callback = admm(net, 1e-3)
    fit(Users(net, lambda m: torch.optim.Adam(m.parameters(), lr=1e-3)), callback)
    assert "admm/pull" not in callback.latest


def test_weight_decay_that_outdoes_the_pull_is_named(caplog):
    net = new_net()
    fit(Users(net, lambda m: torch.optim.SGD(m.parameters(), lr=0.01, weight_decay=100.0)), admm(net, pull=0.3))
    assert any("weight_decay=100 draws" in line for line in caplog.messages)


def test_two_owners_with_a_given_rho_are_refused():
    net = new_net()
    parts = [torch.optim.SGD(m.parameters(), lr=0.05) for m in (net.conv1, net.fc1)]
    with pytest.raises(TrainingError, match="2 optimizers train the planned layers"):
        Admm(net, plan_of(net), parts, rho=1e-3)
