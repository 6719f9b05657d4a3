"""A run that goes wrong is stopped or named, and what is reported is true."""

import logging
from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch
from admm_fits import BATCHES, LAYERS, SGD, Users, admm, batches, distance, fit, new_net, plan_of, samples
from torch.nn.functional import cross_entropy
from torch.testing import assert_close

from hodec.admm.core import Admm
from hodec.admm.lightning import AdmmCallback
from hodec.admm.stopping import Status
from hodec.errors import PlanError, TrainingError
from hodec.plan.plan import Plan


class Break(pl.Callback):
    """Writes a number into a weight after some step, as a broken training would."""

    def __init__(self, value, *, after):
        self.value, self.after = value, after

    def on_train_batch_start(self, trainer, module, *rest):
        if trainer.global_step == self.after:
            module.backbone.conv2.weight.data[0, 0, 0, 0] = self.value


class Numb(Users):
    """Its loss never sees what is wrong with the weights."""

    def training_step(self, batch, index):
        return sum(p.sum() for p in self.backbone.head.parameters()) + 0 * self.backbone.conv2.weight[1].sum()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_weight_that_is_not_finite_stops_the_fit(value):
    net = new_net()
    with pytest.raises(TrainingError, match=r"layer conv2, epoch 1, step 8: 1 of 1296 weights are NaN or Inf.*lower"):
        fit(Numb(net), Break(value, after=5), admm(net), epochs=3)


def test_row_3_a_net_that_starts_broken_is_refused_at_once():
    net = new_net()
    plan = plan_of(net)
    net.fc1.weight.data[0, 0] = float("nan")
    with pytest.raises(TrainingError, match="layer fc1: 1 of 576"):
        fit(Users(net), AdmmCallback(plan))


def messages(caplog, word):
    return [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING and word in r.getMessage()]


def test_row_40_a_rising_residual_is_called_divergence(caplog):
    """rho so small that W never follows: U winds up until Z is what was cut off."""
    net = new_net()
    callback = admm(net, 1e-9, ranks=1, update_every="1steps")
    fit(Users(net), callback, epochs=5)
    assert callback.admm.primal[-1] > callback.admm.primal[0]
    assert callback.admm.status is Status.DIVERGED
    (message,) = messages(caplog, "diverges")
    assert f"rose from {callback.admm.primal[0]:.3g}" in message
    assert "raise pull" in message


def test_row_40_a_weak_pull_is_warned_about_before_it_does_harm(caplog):
    net = new_net()
    fit(Users(net), admm(net, 1e-3), epochs=2)
    (message,) = messages(caplog, "pulls W only")
    assert "0.00 of its way" in message
    assert "Use rho=auto" in message


@pytest.mark.parametrize("rho", ["auto", 2.0])
def test_a_good_pull_is_not_warned_about(caplog, rho):
    net = new_net()
    fit(Users(net), admm(net, rho, pull=0.6), epochs=2)
    assert not messages(caplog, "pull")


def test_adam_is_not_told_that_its_pull_is_weak(caplog):
    """What a constant rho pulls, Adam's normalized steps do not tell."""
    net = new_net()
    fit(Users(net, lambda m: torch.optim.Adam(m.parameters(), lr=1e-3)), admm(net, 1e-3))
    assert not messages(caplog, "pulls W only")


def test_with_a_strong_pull_the_residual_falls_and_the_fit_stops():
    net = new_net()
    callback = admm(net, pull=0.5, tolerance=0.02)
    trainer = fit(Users(net, lambda m: torch.optim.SGD(m.parameters(), lr=1e-4)), callback, epochs=30)
    assert callback.admm.status is Status.CONVERGED
    assert trainer.current_epoch < 30
    assert callback.admm.primal[-1] <= 0.02 < callback.admm.primal[0]
    assert callback.admm.dual[-1] <= 0.02


def test_convergence_need_not_end_the_fit():
    net = new_net()
    callback = admm(net, tolerance=10.0, stop_when_converged=False)
    assert fit(Users(net), callback, epochs=3).current_epoch == 3
    assert callback.admm.status is Status.CONVERGED


def test_after_convergence_truncation_costs_nothing():
    """What ADMM is for: the trained weights have the planned ranks, so cutting them changes nothing."""
    net = new_net()
    callback = admm(net, pull=0.999, tolerance=0.0)
    fit(Users(net, lambda m: torch.optim.SGD(m.parameters(), lr=1e-4)), callback, epochs=10)
    for name, layer in plan_of(net).items():
        w = net.get_submodule(name).weight.detach()
        assert distance(layer.project(w), w) < 0.02 * float(w.norm())


def test_what_is_reported():
    net = new_net()
    callback = admm(net, 0.5, track_truncated=True)
    rows = []

    class Rows(pl.Callback):
        def on_train_epoch_end(self, trainer, module):
            covariances = trainer.callback_metrics
            rows.append(({k: float(v) for k, v in covariances.items() if k.startswith("admm/")}, callback.latest))

    fit(Users(net), callback, Rows(), epochs=2, val=batches())
    for number, (logged, latest) in enumerate(rows):
        assert logged.keys() == {
            "admm/rho", "admm/pull", "admm/primal_residual", "admm/dual_residual", "admm/truncation_error",
            "admm/truncated_accuracy",
        }  # fmt: skip
        assert logged["admm/rho"] == 0.5
        assert logged["admm/primal_residual"] == pytest.approx(callback.admm.primal[number])
        assert logged["admm/dual_residual"] == pytest.approx(callback.admm.dual[number])
        assert latest["admm/layers"].keys() == set(LAYERS)
        assert latest["admm/layers"]["fc1"].keys() == {"rho", "primal_residual", "dual_residual", "pull"}
    plan, cut, size = plan_of(net), 0.0, 0.0
    for name in LAYERS:
        w = net.get_submodule(name).weight.detach()
        cut, size = cut + distance(plan[name].project(w), w) ** 2, size + float(w.norm()) ** 2
        assert latest["admm/layers"][name]["primal_residual"] == pytest.approx(
            distance(w, callback.admm.states[name].z) / float(w.norm()), rel=1e-4
        )
    assert logged["admm/truncation_error"] == pytest.approx((cut / size) ** 0.5, rel=1e-4)


def test_before_the_first_update_the_residual_is_measured_not_zero():
    net = new_net()
    callback = admm(net, update_every=3)
    fit(Users(net), callback, epochs=1)
    assert not callback.admm.primal
    assert callback.latest["admm/primal_residual"] > 0.05
    assert callback.latest["admm/layers"].keys() == set(LAYERS)


def test_per_layer_values_reach_the_users_logger(tmp_path):
    net = new_net()
    logger = pl.loggers.CSVLogger(tmp_path)
    fit(Users(net), admm(net), logger=logger, epochs=2)
    text = (Path(logger.log_dir) / "metrics.csv").read_text()
    for name in LAYERS:
        assert f"admm/primal_residual/{name}" in text.splitlines()[0]


def test_an_empty_plan_is_refused():
    net = new_net()
    with pytest.raises(PlanError, match="no layers"):
        fit(Users(net), AdmmCallback(Plan({}, {}, "manual", 1, 1)))


def test_one_batch_per_epoch_is_enough():
    net = new_net()
    callback = admm(net)
    fit(Users(net, lambda m: torch.optim.SGD(m.parameters(), **SGD)), callback, data=batches(batch_size=8 * BATCHES))
    assert len(callback.admm.primal) == 1
    assert_close(callback.admm.pull, 0.8)


def test_row_40_updates_that_come_faster_than_momentum_forgets_are_warned_about(caplog):
    fit(Users(new_net()), admm(new_net(), 2.0, update_every="19steps"))
    (message,) = messages(caplog, "every 19 optimizer steps")
    assert "update_every=20steps" in message


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_row_40_updates_that_come_faster_than_momentum_forgets_end_finite(steps, caplog):
    """In the gradients, this pull drove weights to NaN after 30 to 96 epochs, at each of these intervals."""
    net = new_net()
    net.dropout.p = 0.0
    optimizer = torch.optim.SGD(net.parameters(), lr=0.2, momentum=0.95, nesterov=True)
    loop = Admm(net, plan_of(net, 1), optimizer, steps_per_epoch=steps)
    x, y = samples(16 * steps)
    for _ in range(110):
        for images, labels in zip(x.split(16), y.split(16), strict=True):
            optimizer.zero_grad()
            cross_entropy(net(images), labels).backward()
            loop.before_step()
            optimizer.step()
            loop.after_step()
        loop.end_epoch()
    assert all(bool(w.isfinite().all()) for w in loop.weights.values())
    assert not messages(caplog, "still on its way")


def test_updates_that_come_slowly_enough_are_not_warned_about(caplog):
    fit(Users(new_net()), admm(new_net(), 2.0, update_every="20steps"))
    assert not messages(caplog, "still on its way")
