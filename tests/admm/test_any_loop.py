"""ADMM in the loops and schedules that people have: the pull is the one asked for, and the one reported is measured."""

import logging

import pytest
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from admm_fits import BATCHES, LAYERS, Users, admm, batches, distance, fit, new_net, plan_of, sgd
from pytorch_lightning.callbacks import BaseFinetuning, StochasticWeightAveraging
from torch import nn
from torch.testing import assert_close

import hodec
from hodec.admm.core import Admm
from hodec.admm.updates import AdmmState, with_rho
from hodec.errors import TrainingError

QUIET = {"lr": 0.05}  # SGD without momentum: what it covers is exact


class Flat(Users):
    """Its loss has no say: what moves the weights is ADMM alone."""

    def training_step(self, batch, index):
        return 0 * super().training_step(batch, index)


class Covered(pl.Callback):
    """The share of its way to Z - U that each layer covers in each epoch; put it behind the ADMM callback."""

    def __init__(self, callback):
        self.callback, self.shares, self.reported = callback, [], []

    def on_train_epoch_start(self, trainer, module):
        admm = self.callback.admm
        self.start = {
            n: (w.detach().clone(), admm.states[n].z - admm.states[n].u)
            for n, w in admm.weights.items()
            if n in admm.states
        }

    def on_train_batch_end(self, trainer, module, *rest):
        """Behind the ADMM callback the Z-update is done already: the weights are those that it saw."""
        if trainer.is_last_batch:
            weights = self.callback.admm.weights
            ways = [
                1 - distance(weights[n], t) / distance(w, t)
                for n, (w, t) in self.start.items()
                if distance(w, t) > 0.01
            ]
            self.shares.append(min(ways) if ways else None)

    def on_train_epoch_end(self, trainer, module):
        self.reported.append(self.callback.latest.get("admm/pull"))


def covered(module, callback, **options):
    seen = Covered(callback)
    fit(module, callback, seen, **options)
    return seen


def plain_sgd(module):
    return torch.optim.SGD(module.parameters(), **QUIET)


# -- clipping ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options", [{}, {"gradient_clip_val": 0.01}, {"gradient_clip_val": 1e-4, "gradient_clip_algorithm": "value"}]
)
def test_clipping_leaves_the_pull_as_it_is(options):
    net = new_net()
    seen = covered(Flat(net, plain_sgd), admm(net, pull=0.8), epochs=1, **options)
    assert seen.shares[0] == pytest.approx(0.8, abs=0.08)  # in gradients SGD compounds in steps, not smoothly
    assert seen.reported[0] == pytest.approx(0.8, abs=1e-6)


class ClipsByHand(Flat):
    def on_before_optimizer_step(self, optimizer):
        nn.utils.clip_grad_norm_(self.parameters(), 1e-3)


def test_clipping_by_hand_is_noticed_and_then_has_no_say(caplog):
    caplog.set_level(logging.INFO, "hodec")
    net = new_net()
    seen = covered(ClipsByHand(net, plain_sgd), admm(net, pull=0.8), epochs=2)
    assert seen.reported[0] == pytest.approx(seen.shares[0], abs=0.1)
    assert seen.shares[1] == pytest.approx(0.8, abs=1e-3)
    assert seen.reported[1] == pytest.approx(0.8, abs=1e-3)
    assert sum("gradients are clipped" in line for line in caplog.messages) == 1


def test_a_rho_that_clipping_defeats_is_reported_as_it_is_and_clipping_named(caplog):
    net = new_net()
    seen = covered(ClipsByHand(net, plain_sgd), admm(net, 8.0), epochs=1)
    assert seen.reported[0] == pytest.approx(seen.shares[0], abs=0.05)
    (message,) = [line for line in caplog.messages if "clipping left" in line]
    assert "Use rho=auto" in message


# -- schedules -----------------------------------------------------------------------------------------------------


def test_u_never_grows_because_the_rate_rises():
    state = AdmmState(torch.zeros(3), torch.ones(3), rho=2.0)
    assert torch.equal(with_rho(state, 0.02, follows_rate=True).u, state.u)
    assert_close(with_rho(state, 200.0, follows_rate=True).u, state.u / 100)
    assert_close(with_rho(state, 0.02).u, 100 * state.u)


def light(module):
    """A momentum that forgets within the four steps of an epoch."""
    return torch.optim.SGD(module.parameters(), lr=0.05, momentum=0.5)


def restarts(module):
    optimizer = light(module)
    schedule = torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(optimizer, 3 * BATCHES)
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def one_cycle(module):
    optimizer = light(module)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=9 * BATCHES, cycle_momentum=False)
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def cyclic(module):
    optimizer = light(module)
    schedule = torch.optim.lr_scheduler.CyclicLR(optimizer, 5e-4, 0.1, 2 * BATCHES, cycle_momentum=False)
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def warm_up(module):
    optimizer = light(module)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, step / (5 * BATCHES)))
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class Sizes(pl.Callback):
    def __init__(self, callback):
        self.callback, self.ratios, self.moves, self.before = callback, [], [], None

    def on_train_batch_end(self, trainer, module, *rest):
        admm = self.callback.admm
        self.ratios += [float(s.u.norm() / admm.weights[n].detach().norm()) for n, s in admm.states.items()]
        now = {n: w.detach().clone() for n, w in admm.weights.items()}
        if self.before:
            self.moves += [distance(w, self.before[n]) / float(self.before[n].norm()) for n, w in now.items()]
        self.before = now


@pytest.mark.parametrize("schedule", [restarts, one_cycle, cyclic, warm_up])
def test_no_schedule_throws_the_weights_about(schedule):
    net = new_net()
    callback = admm(net)
    sizes = Sizes(callback)
    fit(Users(net, schedule), callback, sizes, epochs=9)
    assert max(sizes.ratios) < 3
    assert max(sizes.moves) < 0.6, "no step moves a weight by more than this share of its norm"


# -- which steps count ---------------------------------------------------------------------------------------------


class Manual(Flat):
    """Three optimizer steps a batch, by hand."""

    automatic_optimization = False

    def training_step(self, batch, index):
        for _ in range(3):
            self.optimizers().zero_grad()
            self.manual_backward(super().training_step(batch, index))
            self.optimizers().step()


def test_manual_optimization_counts_its_own_steps(caplog):
    net = new_net()
    callback = admm(net, pull=0.5)
    seen = covered(Manual(net, plain_sgd), callback, epochs=2)
    assert "trained without ADMM" in caplog.text
    assert callback.admm.steps == 2 * 3 * BATCHES
    assert callback.admm.steps_per_epoch == 3 * BATCHES
    assert seen.shares[1] == pytest.approx(0.5, abs=0.05)
    assert seen.reported[1] == pytest.approx(0.5, abs=1e-6)


class ByHand(Flat):
    """Gradients of four batches make a step."""

    def optimizer_step(self, epoch, batch_idx, optimizer, optimizer_closure=None):
        if (batch_idx + 1) % 4:
            optimizer_closure()
        else:
            optimizer.step(closure=optimizer_closure)

    def optimizer_zero_grad(self, epoch, batch_idx, optimizer):
        if batch_idx % 4 == 0:
            optimizer.zero_grad()


def test_accumulation_by_hand_is_reported_and_then_allowed_for(caplog):
    net = new_net()
    data = batches(batch_size=4)  # 8 batches, 2 steps
    seen = covered(ByHand(net, plain_sgd), admm(net, pull=0.8), epochs=2, data=data)
    assert seen.reported[0] == pytest.approx(seen.shares[0], abs=0.05)
    assert seen.reported[0] == pytest.approx(1 - 0.2 ** (2 / 8), abs=1e-6)
    assert seen.reported[1] == pytest.approx(0.8, abs=1e-6)
    assert "2 optimizer steps, not steps_per_epoch=8" in caplog.text


class Sometimes(Users):
    def training_step(self, batch, index):
        return None if index % 2 else super().training_step(batch, index)


def test_a_batch_without_a_loss_is_no_step_and_no_layers_fault(caplog):
    net = new_net()
    callback = admm(net, update_every="2steps")
    fit(Sometimes(net), callback, epochs=2)
    assert callback.admm.steps == 4
    assert len(callback.admm.primal) == 2
    assert "does not reach" not in caplog.text


def test_the_epoch_that_only_measures_batchnorm_updates_nothing(caplog):
    net = nn.Sequential(nn.Conv2d(3, 12, 3, padding=1), nn.BatchNorm2d(12), nn.ReLU(), nn.Flatten(), nn.Linear(768, 5))
    plan = hodec.make_plan(net, hodec.ranks.Manual(3), example_input=torch.zeros(1, 3, 8, 8), include=["0"])
    callback = hodec.AdmmCallback(plan, track_truncated=False)
    fit(Users(net), callback, StochasticWeightAveraging(0.01, swa_epoch_start=2), epochs=4)
    assert callback.admm.steps == 4 * BATCHES
    assert len(callback.admm.primal) == 4
    assert "does not reach" not in caplog.text


def test_a_skipped_step_of_a_loss_scaler_is_none():
    net = new_net()
    optimizer = sgd(net)
    core = Admm(net, plan_of(net), optimizer, steps_per_epoch=BATCHES)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    for number, (x, y) in enumerate(batches()):
        optimizer.zero_grad()
        scaler.scale(F.cross_entropy(net(x), y)).backward()
        if number == 1:
            net.conv1.weight.grad[0, 0, 0, 0] = float("inf")
        scaler.unscale_(optimizer)
        core.before_step()
        scaler.step(optimizer)
        scaler.update()
        core.after_step()
    assert core.steps == BATCHES - 1


def test_the_pull_is_added_once_to_gradients_that_still_accumulate():
    grads = []
    for calls in (1, 3):
        net = new_net()
        core = Admm(net, plan_of(net), sgd(net), steps_per_epoch=BATCHES)
        F.cross_entropy(net(batches().dataset.tensors[0][:8]), batches().dataset.tensors[1][:8]).backward()
        torch.manual_seed(0)
        for _ in range(calls):
            core.before_step()
        grads.append(net.conv2.weight.grad)
    assert_close(grads[0], grads[1], rtol=0.2, atol=1e-2)  # dropout draws anew


def test_an_optimizer_that_climbs_is_pulled_the_same_way():
    net = new_net()
    seen = covered(Flat(net, lambda m: torch.optim.SGD(m.parameters(), lr=0.05, maximize=True)), admm(net), epochs=1)
    assert seen.shares[0] == pytest.approx(0.8, abs=0.08)


# -- optimizers and parameter groups -------------------------------------------------------------------------------


class TwoOptimizers(Flat):
    """As a GAN has them, or Muon for some layers and AdamW for others; ``split`` gives the parts."""

    automatic_optimization = False

    def __init__(self, net, *split):
        super().__init__(net)
        self.split = split

    def configure_optimizers(self):
        return [torch.optim.SGD([p for m in part for p in m.parameters()], **QUIET) for part in self.split]

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
    return torch.optim.SGD([p for p in module.parameters() if p.requires_grad], **QUIET)


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
        for x, y in batches():
            core.optimizer.zero_grad()
            F.cross_entropy(net(x), y).backward()
            core.before_step()
            core.optimizer.step()
            core.after_step()
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


# -- what is measured ----------------------------------------------------------------------------------------------


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
    parts = [torch.optim.SGD(m.parameters(), **QUIET) for m in (net.conv1, net.fc1)]
    with pytest.raises(TrainingError, match="2 optimizers train the planned layers"):
        Admm(net, plan_of(net), parts, rho=1e-3)
