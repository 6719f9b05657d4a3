"""mode="project" with falling_epochs: the ranks that are projected onto fall from the full ones to the planned ones."""

import logging

import pytest
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from admm_fits import BATCHES, Users, batches, fit, gone_on, new_net, plan_of, samples, sgd
from torch.testing import assert_close

from hodec.admm.core import Admm
from hodec.admm.lightning import AdmmCallback
from hodec.admm.projection import Projection, falling_plan
from hodec.errors import ConfigError
from hodec.experiment.data.images import TensorSplit
from hodec.experiment.data.loaders import TensorLoader
from hodec.experiment.data.options import Cifar10

METHODS = ["tt", "tt_classical", "tucker", "cp", "cp3", "svd", "weight_svd", "spatial_svd"]


@pytest.fixture
def falls(monkeypatch):
    """What each Z-update was told of how far the ranks have fallen."""
    seen, real = [], Projection.update

    def spy(self, *given, fallen=1.0):
        seen.append(fallen)
        return real(self, *given, fallen=fallen)

    monkeypatch.setattr(Projection, "update", spy)
    return seen


def new_core(net, *, method="tucker", known=True, **settings):
    steps = BATCHES if known else None
    settings = {"mode": "project", "update_every": "2steps", "falling_epochs": 2, **settings}
    ranks = {"conv1": 3} if method == "cp" else 3  # its iterations at high ranks are slow
    return Admm(net, plan_of(net, ranks, method=method), sgd(net), steps_per_epoch=steps, **settings)


def train(net, core, *, epochs=3, done=0, until=None):
    """Go on after ``done`` steps, up to ``until``, and the end of its epoch only where that has more steps."""
    net.eval()  # no dropout: what is left is the order of the data
    for number in range(done, epochs * BATCHES):
        if number == until:
            return core
        x, y = list(batches())[number % BATCHES]
        core.optimizer.zero_grad()
        F.cross_entropy(net(x), y).backward()
        core.before_step()
        core.optimizer.step()
        core.after_step()
        if (number + 1) % BATCHES == 0 and number + 1 != until:
            core.end_epoch()
    return core


@pytest.mark.parametrize("method", METHODS)
def test_ranks_fall_from_the_full_ones_to_the_planned_ones(method):
    given = {"conv*": 3} if method == "tt_classical" else 3
    plan = plan_of(new_net(), given, method=method, n_modes=2 if method in ("tt", "tt_classical") else 1)
    plans = [falling_plan(plan, fallen) for fallen in (0.0, 0.1, 0.25, 0.5, 0.75, 0.95, 1.0)]
    assert plans[-1] == plan
    for name, layer in plan.items():
        ranks = [one[name].ranks for one in plans]
        assert ranks[0] == layer.format.max_ranks(layer.shape, layer.modes)
        assert ranks[0] > layer.ranks
        for earlier, later in zip(ranks, ranks[1:], strict=False):
            assert all(a >= b for a, b in zip(earlier, later, strict=True))


def test_a_rank_falls_linearly():
    plan = plan_of(new_net(), method="svd")  # fc1 has 12 outputs, and rank 3
    ranks = [falling_plan(plan, fallen)["fc1"].ranks for fallen in (0, 1 / 9, 1 / 3, 2 / 3, 8 / 9, 1)]
    assert ranks == [(12,), (11,), (9,), (6,), (4,), (3,)]


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, [0, 0.25, 0.5, 0.75, 1, 1, 1]),
        ({"update_every": "3steps"}, [0, 0.375, 0.5, 0.875, 1, 1, 1]),
        ({"falling_epochs": 1}, [0, 0.5, 1, 1, 1, 1, 1]),
        # the steps of the first epoch are not known before its end, which is one more projection
        ({"known": False}, [0, 0, 0, 0.5, 0.75, 1, 1, 1]),
        ({"update_every": 1, "known": False}, [0, 0.5, 1, 1]),
        ({"falling_epochs": 0}, [1] * 7),
    ],
)
def test_ranks_fall_by_steps_and_end_with_the_epochs(falls, settings, expected):
    net = new_net()
    train(net, new_core(net, **settings))
    assert falls == expected


def test_a_projection_has_the_ranks_of_its_time():
    net = new_net()
    core = train(net, new_core(net, method="weight_svd"), until=2)
    before = falling_plan(core.start_plan, 0.25)
    for name, layer in before.items():
        values = layer.format.spectra(core.weights[name].detach(), layer.modes)[0][1]
        assert int((values > 1e-5 * values[0]).sum()) == layer.ranks[0] > core.start_plan[name].ranks[0]


def test_full_ranks_leave_the_weights_alone():
    """CP at its full rank is found by iteration, too, and misses the weight."""
    net, other = new_net(), new_net()
    train(net, new_core(net, method="cp", known=False), until=3)
    optimizer, plain = sgd(other), other.eval()
    for _, (x, y) in zip(range(3), batches(), strict=False):
        optimizer.zero_grad()
        F.cross_entropy(plain(x), y).backward()
        optimizer.step()
    assert_close(net.state_dict(), other.state_dict(), rtol=0, atol=0)


def test_plan_and_report_are_those_of_the_planned_ranks():
    net = new_net()
    core = train(net, new_core(net, method="svd", falling_epochs=20), epochs=2)
    assert core.final_plan() == plan_of(new_net(), method="svd")
    report = core.report(lambda: float(torch.linalg.matrix_rank(net.fc1.weight.detach(), rtol=1e-4)))
    assert report["truncated_accuracy"] == 3.0
    assert report["truncation_error"] > 0.1
    near = core.projection.truncate(core.own)
    x = torch.randn(5, 3, 8, 8)
    small = core.convert().eval()
    for name, w in core.own.items():
        w.data.copy_(near[name])
    assert_close(small(x), net(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize(("method", "until"), [*(("tucker", n) for n in (1, 3, 4, 6, 7, 9)), ("cp", 3), ("cp", 4)])
def test_it_goes_on_exactly_in_the_middle_of_the_fall(method, known, until):
    whole = new_net()
    settings = {"method": method, "known": known, "share": 0.7}
    core = train(whole, new_core(whole, **settings))
    net = new_net()
    stopped = train(net, new_core(net, **settings), until=until)
    again, resumed = gone_on(stopped, net, lambda one: new_core(one, **settings), until=until)
    train(again, resumed, done=until)
    assert_close(again.state_dict(), whole.state_dict(), rtol=0, atol=0)
    assert resumed.primal == core.primal


@pytest.mark.parametrize("method", ["tucker", "cp"])
def test_converting_within_the_fall_cuts_off_the_rest(method):
    """Factors of CP that have other ranks than the plan are of no use to it."""
    net = new_net()
    core = train(net, new_core(net, method=method, falling_epochs=9), epochs=2)
    assert core.projection.factors == {}
    small = core.convert()
    planned = {name: layer.ranks for name, layer in core.start_plan.items()}
    assert {name: small.get_submodule(name).ranks for name in planned} == planned


def test_training_that_ends_within_the_fall_is_warned_about(caplog):
    net = new_net()
    core = train(net, new_core(net, falling_epochs=6))
    with caplog.at_level(logging.WARNING):
        core.finish()
    assert "the ranks have fallen 0.50 of their way to the planned ones when training ends" in caplog.text
    caplog.clear()
    net = new_net()
    train(net, new_core(net, falling_epochs=3)).finish()
    assert "fallen" not in caplog.text


# -- Lightning ---------------------------------------------------------------------------------------------------


def ordered_batches():
    """Batches that know where they are: a resume within an epoch goes on with the next one."""
    x, y = samples()
    images = ((x - x.min()) / (x.max() - x.min()) * 255).to(torch.uint8)
    option = Cifar10(batch_size=8, augment=False, mean=[0.5], std=[0.25])
    return TensorLoader(TensorSplit(images, y), option, seed=0, train=True)


def fitted(folder=None, *, data=None, resume=None, val=None, falling=2, **when):
    net = new_net()
    net.dropout.p = 0.0
    settings = {"update_every": "2steps", "falling_epochs": falling, "track_truncated": False}
    callback = AdmmCallback(plan_of(net, method="tucker"), mode="project", **settings)
    kept = []
    if folder:
        names = {"filename": "{step}", "auto_insert_metric_name": False}
        kept = [pl.callbacks.ModelCheckpoint(dirpath=folder, save_top_k=-1, **names, **when)]
    data = batches() if data is None else data
    fit(Users(net), callback, *kept, epochs=3, data=data, val=val, resume=resume, enable_checkpointing=bool(folder))
    return net, callback.admm


def test_the_callback_does_the_same_in_lightning(falls):
    net, _ = fitted()
    assert falls == [0, 0.25, 0.5, 0.75, 1, 1, 1]
    alone = new_net()
    train(alone, new_core(alone))
    assert_close(net.state_dict(), alone.state_dict(), rtol=0, atol=0)


@pytest.mark.parametrize("step", [1, 3, 4, 6, 8])
def test_lightning_goes_on_exactly_within_an_epoch_and_at_its_last_batch(tmp_path, step):
    whole, core = fitted(tmp_path / "whole", data=ordered_batches(), every_n_train_steps=1)
    path = tmp_path / f"whole/{step}.ckpt"
    again, resumed = fitted(tmp_path / "again", data=ordered_batches(), resume=path, every_n_train_steps=1)
    assert_close(again.state_dict(), whole.state_dict(), rtol=0, atol=0)
    assert resumed.primal == core.primal


@pytest.mark.parametrize("step", [4, 8])
@pytest.mark.parametrize("at_end", [True, False])
def test_lightning_goes_on_exactly_from_an_epochs_end(tmp_path, step, at_end):
    when = {"every_n_epochs": 1, "save_on_train_epoch_end": at_end, "val": batches()}
    whole, core = fitted(tmp_path / "whole", **when)
    again, resumed = fitted(tmp_path / "again", resume=tmp_path / f"whole/{step}.ckpt", **when)
    assert_close(again.state_dict(), whole.state_dict(), rtol=0, atol=0)
    assert resumed.primal == core.primal


def test_lightning_warns_where_training_ends_within_the_fall(caplog):
    fitted(falling=4)
    assert "the ranks have fallen 0.75 of their way" in caplog.text


@pytest.mark.parametrize("epochs", [-1, 1.5, "2", None, True])
def test_what_is_no_number_of_epochs_is_refused(epochs):
    net = new_net()
    words = "falling_epochs: .* given; allowed: a whole number at least 0"
    with pytest.raises(ConfigError, match=words):
        AdmmCallback(plan_of(net), mode="project", falling_epochs=epochs)
    with pytest.raises(ConfigError, match=words):
        new_core(net, falling_epochs=epochs)
