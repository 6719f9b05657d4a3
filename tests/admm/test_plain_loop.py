"""Admm in a loop of one's own: the weights are those of the Lightning callback, and its state is whole."""

import re
import sys
from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from admm_fits import BATCHES, LAYERS, Users, admm, batches, cosine, fit, new_net, plan_of, samples, sgd
from torch import nn
from torch.testing import assert_close

import hodec
from hodec.admm.core import Admm
from hodec.admm.lightning import AdmmCallback
from hodec.admm.stopping import Status
from hodec.errors import CheckpointError, ConfigError, TrainingError, Use
from hodec.ranks import Learned, Manual, make_plan

EPOCHS = 4


def adamw(module):
    return torch.optim.AdamW(module.parameters(), lr=1e-3)


def scheduled(module):
    """A dict as Lightning takes it, a schedule that moves at each step."""
    return cosine(sgd(module), EPOCHS * BATCHES)


def parts(net, make_optimizer):
    """The optimizer and its schedule, if it has one."""
    made = make_optimizer(net)
    return (made["optimizer"], made["lr_scheduler"]["scheduler"]) if isinstance(made, dict) else (made, None)


def loop(net, core, scheduler=None, *, epochs=range(EPOCHS), first=0):
    """A training loop that knows nothing of Lightning; from batch ``first`` of the first epoch on."""
    net.train()
    for epoch in epochs:
        for number, (x, y) in enumerate(batches()):
            if epoch == epochs[0] and number < first:
                continue
            torch.manual_seed(1000 * epoch + number)  # dropout's draws
            core.optimizer.zero_grad()
            F.cross_entropy(net(x), y).backward()
            core.before_step()
            core.optimizer.step()
            if scheduler:
                scheduler.step()
            core.after_step()
            yield epoch, number
        core.end_epoch()


def trained(make_optimizer, *, plan=None, **settings):
    """A net and its Admm after a plain loop."""
    net = new_net()
    optimizer, scheduler = parts(net, make_optimizer)
    settings = {"steps_per_epoch": BATCHES, "tolerance": 0.0, **settings}
    core = Admm(net, plan or plan_of(net), optimizer, **settings)
    list(loop(net, core, scheduler))
    core.finish()
    return net, core


class Draws(pl.Callback):
    """Dropout's draws as in ``loop``."""

    def on_train_batch_start(self, trainer, module, batch, index):
        torch.manual_seed(1000 * trainer.current_epoch + index)


def fitted(make_optimizer, *, plan=None, **settings):
    """The same with the callback."""
    net = new_net()
    callback = AdmmCallback(plan or plan_of(net), track_truncated=False, tolerance=0.0, **settings)
    fit(Users(net, make_optimizer), Draws(), callback, epochs=EPOCHS)
    return net, callback.admm


def assert_same(one, other):
    """Nets and all that ADMM holds of them, bit for bit."""
    (net, core), (net2, core2) = one, other
    assert_close(net2.state_dict(), net.state_dict(), rtol=0, atol=0)
    state, state2 = core.state_dict(), core2.state_dict()
    for key in ("epoch", "epoch_began"):  # Lightning counts these itself
        del state[key], state2[key]
    assert_close(state2.pop("layers"), state.pop("layers"), rtol=0, atol=0)
    assert_close(state2.pop("projection"), state.pop("projection"), rtol=0, atol=0)
    assert state2 == state


@pytest.mark.parametrize("settings", [{}, {"update_every": "3steps"}, {"rho": 0.3, "update_every": 2}], ids=str)
@pytest.mark.parametrize("make_optimizer", [sgd, adamw, scheduled])
def test_the_weights_are_those_of_the_callback(make_optimizer, settings):
    one = trained(make_optimizer, **settings)
    assert one[1].primal
    assert_same(one, fitted(make_optimizer, **settings))


def cp_plan():
    return make_plan(new_net(), Manual(6), method="cp", example_input=torch.zeros(1, 3, 8, 8), include=["conv2"])


def test_cp_goes_on_from_its_factors_in_the_loop_and_in_the_conversion():
    net, core = trained(sgd, plan=cp_plan())
    assert_same((net, core), fitted(sgd, plan=cp_plan()))
    factors = core.projection.factors
    assert set(factors) == {"conv2"}
    assert_close(
        core.convert().state_dict(),
        hodec.convert(net, core.final_plan(), init_factors=factors).state_dict(),
        rtol=0,
        atol=0,
    )


def test_learned_ranks_are_those_of_the_conversion():
    rule, start = Learned(params=0.4), Learned(params=0.58)
    plan = make_plan(new_net(), start, method="svd", example_input=torch.zeros(1, 3, 8, 8), include=list(LAYERS))
    one = trained(sgd, plan=plan, learner=rule)
    assert_same(one, fitted(sgd, plan=plan, learner=rule))
    final = one[1].final_plan()
    assert {name: layer.ranks for name, layer in final.items()} != {name: plan[name].ranks for name in final}
    compressed = one[1].convert()
    assert compressed.hodec_plan == final
    report = one[1].report()
    assert report["planned_params"] == final.params_after / final.params_before


@pytest.mark.parametrize("make_optimizer", [scheduled, adamw])
@pytest.mark.parametrize("every", [1, "3steps"])
@pytest.mark.parametrize("stop", [(0, 3), (1, 1), (2, 2)], ids=str)
def test_a_loop_that_is_stopped_and_resumed_is_the_one_that_was_not(make_optimizer, every, stop, tmp_path):
    one = trained(make_optimizer, update_every=every)
    net = new_net()
    optimizer, scheduler = parts(net, make_optimizer)
    core = Admm(net, plan_of(net), optimizer, steps_per_epoch=BATCHES, tolerance=0.0, update_every=every)
    next(place for place in loop(net, core, scheduler) if place == stop)
    things = {"net": net, "optimizer": optimizer, "admm": core} | ({"scheduler": scheduler} if scheduler else {})
    torch.save({key: thing.state_dict() for key, thing in things.items()}, tmp_path / "state.pt")

    state = torch.load(tmp_path / "state.pt", weights_only=True)
    net = new_net(1)
    optimizer, scheduler = parts(net, make_optimizer)
    core = Admm(net, plan_of(net), optimizer, steps_per_epoch=BATCHES, tolerance=0.0, update_every=every)
    for key, thing in {"net": net, "optimizer": optimizer, "admm": core, "scheduler": scheduler}.items():
        if thing:
            thing.load_state_dict(state[key])
    list(loop(net, core, scheduler, epochs=range(stop[0], EPOCHS), first=stop[1] + 1))
    core.finish()
    assert_same(one, (net, core))
    assert core.epoch == EPOCHS


def test_a_state_of_another_plan_is_refused():
    _, core = trained(sgd)
    other = new_net()
    with pytest.raises(CheckpointError, match="another plan: 1 layers differ, first fc1"):
        Admm(other, plan_of(other, {"conv*": 3, "fc1": 2}), sgd(other)).load_state_dict(core.state_dict())


# -- the length of an epoch ------------------------------------------------------------------------------------------


def test_without_a_length_the_first_epoch_is_counted_and_said_to_be(caplog):
    net, plain = new_net(), new_net()
    core = Admm(net, plan_of(net), sgd(net))
    steps = loop(net, core)
    assert [next(steps) for _ in range(BATCHES)]
    for number, (x, y) in enumerate(batches()):
        if number == 0:
            optimizer = sgd(plain)
        torch.manual_seed(number)
        optimizer.zero_grad()
        F.cross_entropy(plain(x), y).backward()
        optimizer.step()
    assert_close(net.state_dict(), plain.state_dict(), rtol=0, atol=0)
    assert sum("counts its steps" in r.getMessage() for r in caplog.records) == 1
    next(steps)
    assert core.steps_per_epoch == BATCHES
    assert core.pull == pytest.approx(0.8)
    list(steps)
    assert len(core.primal) == EPOCHS - 1


def test_a_constant_rho_needs_no_length():
    net = new_net()
    core = Admm(net, plan_of(net), sgd(net), rho=2.0, tolerance=0.0)
    list(loop(net, core))
    core.finish()
    assert_same((net, core), trained(sgd, rho=2.0))


def test_a_wrong_length_is_said_to_be(caplog):
    trained(sgd, steps_per_epoch=2 * BATCHES)
    assert sum("had 4 optimizer steps, not steps_per_epoch=8" in r.getMessage() for r in caplog.records) == 1


@pytest.mark.parametrize("length", [0, -3])
def test_a_length_that_is_none_is_refused(length):
    net = new_net()
    with pytest.raises(ConfigError, match=f"steps_per_epoch: {length} given; allowed: a whole number from 1"):
        Admm(net, plan_of(net), sgd(net), steps_per_epoch=length)


def test_an_epoch_without_a_step_is_refused():
    net = new_net()
    with pytest.raises(TrainingError, match="call before_step and after_step"):
        Admm(net, plan_of(net), sgd(net)).end_epoch()


# -- what is reported and converted --------------------------------------------------------------------------------


def test_settings_are_checked_in_python_words():
    net = new_net()
    with pytest.raises(ConfigError, match="^pull: 1.5 given; allowed: a number above 0 and below 1") as error:
        Admm(net, plan_of(net), sgd(net), pull=1.5)
    assert error.value.told(Use.in_hydra).startswith("admm.pull: ")


def test_end_epoch_reports_and_measures_the_truncated_net():
    net = new_net()
    core = Admm(net, plan_of(net), sgd(net), steps_per_epoch=BATCHES, tolerance=10.0)
    steps = loop(net, core)
    for _ in range(BATCHES + 1):
        next(steps)
    seen = []
    report = core.end_epoch(lambda: seen.append(net.conv1.weight.detach().clone()) or 0.25)
    assert report["truncated_accuracy"] == 0.25
    assert_close(seen[0], plan_of(new_net())["conv1"].project(net.conv1.weight.detach()))
    assert report["primal_residual"] == core.primal[-1]
    assert report["pull"] == pytest.approx(1 - 0.2 ** (1 / BATCHES)), "one step since the last Z-update"
    assert core.layer_report().keys() == set(LAYERS)
    assert core.status is core.finish() is Status.CONVERGED


class Normed(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(3, 12, 3, padding=1), nn.BatchNorm2d(12), nn.Linear(12, 5)

    def forward(self, x):
        return self.head(F.relu(self.norm(self.conv(x))).mean(dim=(2, 3)))


def test_convert_takes_covariances_and_reestimates_batchnorm():
    net = Normed()
    plan = make_plan(net, Manual(2), method="svd", example_input=torch.zeros(1, 3, 8, 8), include=["conv"])
    covariances = hodec.collect_covariances(net, plan, batches())
    core = Admm(net, plan, sgd(net), covariances=covariances, steps_per_epoch=BATCHES)
    list(loop(net, core))
    expected = hodec.convert(net, plan, covariances=covariances)
    assert_close(core.convert().state_dict(), expected.state_dict(), rtol=0, atol=0)
    compressed = core.convert(batches=batches())
    hodec.reestimate_batchnorm(expected, batches())
    assert_close(compressed.state_dict(), expected.state_dict(), rtol=0, atol=0)
    assert not torch.equal(compressed.norm.running_mean, net.norm.running_mean)


def test_the_net_may_hang_in_a_wrapper():
    net = new_net()
    core = Admm(nn.DataParallel(net), plan_of(net), sgd(net), steps_per_epoch=BATCHES)
    assert core.model is net
    list(loop(net, core))
    assert type(core.convert()) is type(net)


def test_the_callback_converts_as_well():
    net = new_net()
    callback = admm(net)
    with pytest.raises(TrainingError, match="before trainer.fit has begun"):
        callback.convert()
    fit(Users(net), callback)
    assert_close(
        callback.convert().state_dict(), hodec.convert(net, callback.final_plan()).state_dict(), rtol=0, atol=0
    )


def test_without_lightning_the_callback_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "pytorch_lightning", None)
    monkeypatch.delitem(sys.modules, "hodec.admm.lightning")
    monkeypatch.delitem(vars(hodec), "AdmmCallback", raising=False)
    with pytest.raises(ImportError, match=r"pip install 'hodec\[lightning\]'"):
        _ = hodec.AdmmCallback


def test_the_docs_loop_runs(tmp_path, monkeypatch, capsys):
    """The first Python block of docs/admm.md, with a net, data and an optimizer as it says they are given."""
    text = (Path(__file__).parents[2] / "docs" / "admm.md").read_text(encoding="utf-8")
    block = re.search(r"```python\n(.*?)```", text, re.DOTALL)
    given = {"model": new_net(), "loader": batches(), "epochs": 2, "images": samples()[0]}
    monkeypatch.chdir(tmp_path)
    exec(block[1], given)
    assert capsys.readouterr().out.count("primal_residual") == 2
    assert given["compressed"](samples()[0]).shape == (8 * BATCHES, 5)
