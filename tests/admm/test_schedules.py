"""pull and update_every as {epoch: value}: from these epochs on, and what becomes of U there."""

import pytest
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from admm_fits import BATCHES, Probe, Users, batches, cosine, fit, gone_on, new_net, plan_of, sgd
from torch.testing import assert_close
from torch.utils.data import IterableDataset

from hodec.admm.core import Admm
from hodec.admm.lightning import AdmmCallback
from hodec.admm.options import AdmmOptions, AdmmProject, at_epoch
from hodec.errors import ConfigError, TrainingError, Use

EPOCHS = 4


def adamw(module):
    return torch.optim.AdamW(module.parameters(), lr=1e-3)


def scheduled(module):
    return cosine(sgd(module), EPOCHS * BATCHES)


def new_core(net, make_optimizer=sgd, *, known=True, **settings):
    settings = {"tolerance": 0.0, **settings} if settings.get("mode") != "project" else settings
    optimizer = make_optimizer(net)
    return Admm(net, plan_of(net), optimizer, steps_per_epoch=BATCHES if known else None, **settings)


def train(net, core, *, epochs=EPOCHS, done=0, until=None):
    """Yield core at each step after ``done``, before that; end an epoch unless ``until`` steps end there."""
    net.eval()
    for number in range(done, epochs * BATCHES):
        if number == until:
            return
        x, y = list(batches())[number % BATCHES]
        core.optimizer.zero_grad()
        F.cross_entropy(net(x), y).backward()
        core.before_step()
        yield core
        core.optimizer.step()
        core.after_step()
        if (number + 1) % BATCHES == 0 and number + 1 != until:
            core.end_epoch()


def test_what_holds_in_an_epoch():
    assert [at_epoch({10: "b", 0: "a"}, epoch) for epoch in (0, 9, 10, 99)] == ["a", "a", "b", "b"]
    assert at_epoch(0.5, 7) == 0.5
    options = AdmmOptions(update_every={0: 1, 3: "2epochs", 7: "50steps"})
    assert [options.interval(epoch) for epoch in (2, 3, 8)] == [(1, "epoch"), (2, "epoch"), (50, "step")]
    # counted from where the interval came to hold: 3 and 4 are the first two
    assert [epoch for epoch in range(9) if options.ends_with(epoch)] == [0, 1, 2, 4, 6]
    assert (options.needs_epochs, AdmmProject().needs_epochs) == (True, False)


@pytest.mark.parametrize("make_optimizer", [sgd, scheduled, adamw])
def test_the_pull_is_that_of_the_epoch(make_optimizer):
    net = new_net()
    callback = AdmmCallback(plan_of(net), pull={0: 0.3, 1: 0.9, 3: 0.5}, track_truncated=False, tolerance=0.0)
    probe = Probe(lambda trainer: callback.admm.pull)
    fit(Users(net, make_optimizer), callback, probe, epochs=EPOCHS)
    expected = [0.3] * BATCHES + [0.9] * 2 * BATCHES + [0.5] * BATCHES
    assert probe.seen == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("rho", ["auto", "balanced"])
@pytest.mark.parametrize("make_optimizer", [sgd, adamw])
def test_a_larger_pull_keeps_the_true_dual_and_a_smaller_one_keeps_u(rho, make_optimizer):
    """U holds residuals of a net that still moves: it would jump by the ratio of the rhos."""
    net = new_net()
    core = new_core(net, make_optimizer, rho=rho, pull={0: 0.5, 1: 0.9, 2: 0.3})
    for larger in (True, False):
        list(train(net, core, epochs=1))
        before = dict(core.states)
        next(train(net, core, epochs=1))  # the first step of the next epoch
        for name, state in core.states.items():
            old = before[name]
            assert (state.rho > old.rho) == larger
            assert_close(state.u, old.u * (old.rho / state.rho) if larger else old.u, rtol=1e-6, atol=0)
            assert old.u.abs().max() > 1e-3


def test_balanced_goes_on_from_the_pull_of_its_epoch():
    net = new_net()
    core = new_core(net, rho="balanced", pull={0: 0.5, 2: 0.9})
    seen = [core.pull for core in train(net, core, epochs=3)]
    assert seen[:BATCHES] == pytest.approx([0.5] * BATCHES)
    assert seen[2 * BATCHES :] == pytest.approx([0.9] * BATCHES)


def test_a_constant_rho_has_no_pull_to_follow():
    net = new_net()
    core = new_core(net, rho=0.1, pull={0: 0.5, 1: 0.9})
    assert {core.states["fc1"].rho for core in train(net, core)} == {0.1}


@pytest.mark.parametrize(
    ("every", "steps"),
    [
        ({0: 1, 2: "3steps"}, [4, 8, 11, 14]),
        ({0: "3steps", 2: 1}, [3, 6, 12, 16]),
        ({0: 1, 1: 2}, [4, 12]),
        ({0: "2epochs", 2: "1step"}, [8, 9, 10, 11, 12, 13, 14, 15, 16]),
    ],
)
@pytest.mark.parametrize("known", [True, False])
def test_updates_come_at_the_interval_of_the_epoch(every, steps, known):
    net = new_net()
    core = new_core(net, update_every=every, rho=0.3, known=known)
    updated = [core.updated_at for core in train(net, core)]
    assert sorted({*updated, core.updated_at} - {0}) == steps


def test_rho_is_that_of_the_interval_and_the_pull_stays():
    net = new_net()
    core = new_core(net, adamw, update_every={0: "2steps", 2: 1}, pull=0.6)
    seen = [(core.pull, core.states["fc1"].rho) for core in train(net, core)]
    assert [pull for pull, _ in seen] == pytest.approx([0.6] * EPOCHS * BATCHES)
    assert seen[-1][1] < 0.6 * seen[0][1]


def test_projections_come_at_the_interval_of_the_epoch():
    net = new_net()
    core = new_core(net, mode="project", update_every={0: 1, 1: "3steps"})
    updated = [core.updated_at for core in train(net, core, epochs=3)]
    assert sorted({*updated, core.updated_at} - {0}) == [4, 7, 8, 11, 12]


SETTINGS = [
    {"pull": {0: 0.3, 1: 0.9, 2: 0.5}, "update_every": {0: "3steps", 2: 1}},
    {"pull": {0: 0.3, 1: 0.9, 2: 0.5}, "rho": "balanced"},
    {"mode": "project", "update_every": {0: "3steps", 2: "2steps"}, "falling_epochs": 3},
]


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("until", [3, 4, 5, 8, 9])
def test_a_loop_goes_on_exactly(settings, until):
    whole, net = new_net(), new_net()
    core = new_core(whole, **settings)
    list(train(whole, core))
    stopped = new_core(net, **settings)
    list(train(net, stopped, until=until))
    again, resumed = gone_on(stopped, net, lambda one: new_core(one, **settings), until=until)
    list(train(again, resumed, done=until))
    assert_close(again.state_dict(), whole.state_dict(), rtol=0, atol=0)
    assert {n: s.rho for n, s in resumed.states.items()} == {n: s.rho for n, s in core.states.items()}


@pytest.mark.parametrize("settings", SETTINGS)
def test_the_callback_does_what_a_loop_does_and_goes_on_exactly(tmp_path, settings):
    def fitted(folder, resume=None):
        net = new_net()
        net.dropout.p = 0.0
        own = {"track_truncated": False, **({} if "mode" in settings else {"tolerance": 0.0})}
        names = {"filename": "{step}", "auto_insert_metric_name": False, "save_on_train_epoch_end": True}
        kept = pl.callbacks.ModelCheckpoint(dirpath=folder, save_top_k=-1, **names)
        callback = AdmmCallback(plan_of(net), **settings, **own)
        fit(Users(net), callback, kept, epochs=EPOCHS, resume=resume, enable_checkpointing=True)
        return net.state_dict()

    alone = new_net()
    list(train(alone, new_core(alone, **settings)))
    whole = fitted(tmp_path / "whole")
    assert_close(whole, alone.state_dict(), rtol=0, atol=0)
    for step in (4, 8):
        again = fitted(tmp_path / f"from{step}", resume=tmp_path / f"whole/{step}.ckpt")
        assert_close(again, whole, rtol=0, atol=0)


def test_one_value_for_all_epochs_is_the_value():
    one, other = new_net(), new_net()
    list(train(one, new_core(one, scheduled_alone, pull=0.7, update_every="3steps")))
    list(train(other, new_core(other, scheduled_alone, pull={0: 0.7, 2: 0.7}, update_every={0: "3steps", 1: "3steps"})))
    assert_close(one.state_dict(), other.state_dict(), rtol=0, atol=0)


def scheduled_alone(module):
    return scheduled(module)["optimizer"]


class Endless(IterableDataset):
    def __iter__(self):
        while True:
            yield torch.randn(3, 8, 8), 0


def test_data_without_an_end_has_no_interval_in_epochs_at_any_time():
    net = new_net()
    callback = AdmmCallback(plan_of(net), update_every={0: "2steps", 5: 1}, track_truncated=False)
    data = torch.utils.data.DataLoader(Endless(), batch_size=4)
    with pytest.raises(TrainingError, match="does not say how many batches an epoch has: give the interval in steps"):
        fit(Users(net), callback, data=data, max_steps=3)


BAD_PULL = [
    {}, {5: 0.5}, {0: 1}, {0: 0.5, -1: 0.5}, {0: 0.5, "a": 0.5}, {True: 0.5}, {0: "x"}, {0: 0.5, 3: None}, "0.5", [0.5],
]  # fmt: skip


@pytest.mark.parametrize("pull", BAD_PULL)
def test_what_is_no_pull_is_refused(pull):
    with pytest.raises(ConfigError, match=r"^pull.* given; allowed: a number above 0 and below 1 \| \{0: ") as error:
        AdmmOptions(pull=pull)
    assert error.value.told(Use.in_hydra).startswith("admm.pull")
    with pytest.raises(ConfigError, match="^pull"):
        AdmmCallback(plan_of(new_net()), pull=pull)


@pytest.mark.parametrize("every", [{}, {2: 1}, {0: 0}, {0: 1, 3: "x"}, {0: 1, "a": 1}, {0: 1, 2: {0: 1}}])
@pytest.mark.parametrize("option", [AdmmOptions, AdmmProject])
def test_what_is_no_interval_is_refused(option, every):
    with pytest.raises(ConfigError, match=r"^update_every.* given; allowed: whole epochs from 1, or .* \| \{0: interv"):
        option(update_every=every)


def test_a_bad_entry_is_named():
    with pytest.raises(ConfigError, match=r"^pull\[10\]: 1.5 given"):
        AdmmOptions(pull={0: 0.5, 10: 1.5})


def test_the_callback_of_transformers_takes_schedules():
    pytest.importorskip("transformers")
    from hodec.admm.transformers import AdmmTrainerCallback

    AdmmTrainerCallback(plan_of(new_net()), pull={0: 0.5, 10: 0.9}, update_every={0: 1, 10: "50steps"})
