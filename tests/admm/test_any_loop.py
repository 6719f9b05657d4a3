"""ADMM in the loops and schedules that people have: the pull is the one asked for, and the one reported is measured."""

import logging
import math

import pytest
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from admm_fits import BATCHES, Flat, Users, admm, batches, covered, distance, fit, new_net, plain_sgd, plan_of, sgd
from pytorch_lightning.callbacks import StochasticWeightAveraging
from torch import nn
from torch.testing import assert_close

import hodec
from hodec.admm.core import Admm
from hodec.admm.updates import AdmmState, with_rho
from hodec.errors import TrainingError

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


@pytest.mark.parametrize("set_to_none", [True, False])
def test_a_skipped_step_of_a_loss_scaler_is_none(set_to_none: bool):
    net, pulled = new_net(), []
    optimizer = sgd(net)
    core = Admm(net, plan_of(net), optimizer, steps_per_epoch=BATCHES, rho=2.0)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    for number, (x, y) in enumerate(batches()):
        optimizer.zero_grad(set_to_none=set_to_none)
        scaler.scale(F.cross_entropy(net(x), y)).backward()
        if number == 1:
            net.conv1.weight.grad[0, 0, 0, 0] = float("inf")
        scaler.unscale_(optimizer)
        before = net.conv2.weight.grad.clone()
        core.before_step()
        pulled.append(not torch.equal(net.conv2.weight.grad, before))
        scaler.step(optimizer)
        scaler.update()
        core.after_step()
    assert core.steps == BATCHES - 1
    assert all(pulled)


def test_an_epoch_whose_steps_a_loss_scaler_skips_is_said_and_survived(caplog):
    net = new_net()
    optimizer, scaler = sgd(net), torch.amp.GradScaler("cpu")
    core = Admm(net, plan_of(net), optimizer, steps_per_epoch=1)
    x, y = next(iter(batches()))
    for scale in (math.inf, 1.0):
        optimizer.zero_grad()
        scaler.scale(F.cross_entropy(net(x), y) * scale).backward()
        scaler.unscale_(optimizer)
        core.before_step()
        scaler.step(optimizer)
        scaler.update()
        core.after_step()
        core.end_epoch()
    assert core.steps == 1
    assert "a loss scaler skipped all of them" in caplog.text
    with pytest.raises(TrainingError, match="an epoch ends without a step: call before_step and after_step"):
        core.end_epoch()


def test_the_pull_is_added_once_to_gradients_that_still_accumulate():
    grads = []
    for calls in (0, 1, 3):
        net = new_net()
        net.dropout.p = 0.0
        core = Admm(net, plan_of(net), sgd(net), steps_per_epoch=BATCHES, rho=2.0)
        x, y = next(iter(batches()))
        F.cross_entropy(net(x), y).backward()
        for _ in range(calls):
            core.before_step()
        grads.append(net.conv2.weight.grad)
    assert not torch.equal(grads[0], grads[1])
    assert torch.equal(grads[1], grads[2])


def test_an_optimizer_that_climbs_is_pulled_the_same_way():
    net = new_net()
    seen = covered(Flat(net, lambda m: torch.optim.SGD(m.parameters(), lr=0.05, maximize=True)), admm(net), epochs=1)
    assert seen.shares[0] == pytest.approx(0.8, abs=0.08)
