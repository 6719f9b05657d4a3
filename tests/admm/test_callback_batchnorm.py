"""BatchNorm's statistics in validation: those of the weights of now, without a change of the training."""

import logging
import runpy
from contextlib import nullcontext
from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch
from admm_fits import BATCHES, Users, admm, batches, fit, samples
from torch import nn
from torch.nn import functional as F
from torch.testing import assert_close
from torch.utils.data import DataLoader, TensorDataset

import hodec
from hodec.admm.processes import Processes
from hodec.admm.statistics import RecentCalls
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


def trained(bn_batches, users=Users, **options):
    net, statistics = normed(), Statistics()
    callback = admm(net, ranks={"3": 3}, root="backbone", bn_batches=bn_batches)
    fit(users(net), callback, statistics, **{"epochs": 3, "val": batches(), **options})
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


class Prepared(Users):
    """Changes its images in the training step, and calls the net twice."""

    def training_step(self, batch, index):
        x, y = batch
        return F.cross_entropy(self.backbone(2 * x + 1), y) + F.cross_entropy(self.backbone(x.flip(3)), y)


def test_the_calls_are_those_of_the_training_step():
    (net, _, seen), x = trained(bn_batches=1, users=Prepared), samples()[0]
    for state in seen:
        net.load_state_dict(state)
        hodec.reestimate_batchnorm(net, [2 * x[-8:] + 1, x[-8:].flip(3)])
        assert_close(net[4].running_var, state["4.running_var"])


def test_a_validation_within_the_epoch_has_the_batches_before_it():
    (net, _, seen), x = trained(bn_batches=1, epochs=1, val_check_interval=BATCHES // 2), samples()[0]
    assert len(seen) == 2
    for state, batch in zip(seen, (BATCHES // 2 - 1, BATCHES - 1), strict=True):
        net.load_state_dict(state)
        hodec.reestimate_batchnorm(net, [x[8 * batch : 8 * batch + 8]])
        assert_close(net[4].running_var, state["4.running_var"])


class Frozen(Users):
    """Its first BatchNorm is in evaluation mode, its second one does not follow."""

    def on_train_batch_start(self, batch, index):
        self.backbone[1].eval()
        self.backbone[4].momentum = 0.0


def test_a_frozen_batchnorm_is_left_alone():
    _, _, seen = trained(bn_batches=2, users=Frozen)
    for state in seen:
        assert torch.equal(state["1.running_var"], torch.ones(12))
        assert torch.equal(state["4.running_mean"], torch.zeros(12))


class LayerByLayer(Users):
    """No module that holds a BatchNorm is called as one."""

    def forward(self, x):
        for layer in self.backbone:
            x = layer(x)
        return x

    def training_step(self, batch, index):
        return F.cross_entropy(self.forward(batch[0]), batch[1])


def test_what_cannot_be_measured_is_said_once(caplog):
    with caplog.at_level(logging.WARNING):
        _, _, seen = trained(bn_batches=2, users=LayerByLayer)
        _, _, lagging = trained(bn_batches=0, users=LayerByLayer)
    assert [r.message for r in caplog.records if "not measured anew" in r.message] == [
        "BatchNorm's statistics are not measured anew before a validation: the training step calls its layers one by "
        "one, and no module that holds BatchNorm and them"
    ]
    for one, other in zip(seen, lagging, strict=True):
        assert all(torch.equal(one[key], other[key]) for key in one if "num_batches" not in key)


def recorded(net, *inputs):
    calls = RecentCalls(net, len(inputs))
    for x in inputs:
        calls.listen()
        net(x)
        calls.close()
    return calls


def test_a_forward_that_another_stands_in_for_is_not_called(monkeypatch):
    """Lightning calls ``training_step`` in its place, so that DDP's hooks run."""
    net, x = nn.Sequential(normed()), torch.randn(4, 3, 8, 8)
    monkeypatch.setattr(net, "forward", lambda batch, index: net[0](batch[0]), raising=False)
    calls = RecentCalls(net, 1)
    calls.listen()
    net([x], 0)
    calls.close()
    assert not calls.measure(Processes(), nullcontext())
    twin = normed()
    hodec.reestimate_batchnorm(twin, [x])
    assert_close(net[0][4].running_var, twin[4].running_var)


def test_a_call_that_fails_leaves_the_statistics():
    net, x = normed(), torch.randn(4, 3, 8, 8)
    calls = recorded(net, x)
    before = {key: value.clone() for key, value in net.state_dict().items()}
    net[4].register_forward_pre_hook(lambda *_: 1 / 0)
    assert calls.measure(Processes(), nullcontext()) == "ZeroDivisionError: division by zero"
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())
    assert net[1].momentum == 0.1


def test_processes_have_the_mean_of_theirs():
    net, x = normed(), torch.randn(4, 3, 8, 8)
    calls = recorded(net, x)

    class Two(Processes):
        """The other one measured twice as much."""

        def gather(self, value):
            return [value, value if isinstance(value, str) else {n: 2 * one for n, one in value.items()}]

    twin = normed()
    hodec.reestimate_batchnorm(twin, [x])
    assert not calls.measure(Two(), nullcontext())
    assert_close(net[4].running_var, 1.5 * twin[4].running_var)


def test_a_number_of_batches_below_0_is_refused():
    with pytest.raises(ConfigError, match="bn_batches: -1 given"):
        admm(normed(), ranks={"3": 3}, bn_batches=-1)


def accuracies(schedule, seed, *callbacks):
    """Validation accuracy after each epoch, %, of the experiment's CNN."""
    script = runpy.run_path(str(Path(__file__).parents[2] / "experiments" / "schedules_digits" / "run.py"))
    torch.manual_seed(seed)
    net, (x, y), seen = script["small_cnn"](), script["images"](), []

    def optimizer(module):
        sgd = torch.optim.SGD(module.parameters(), script["RATE"], 0.9)
        rates = {"scheduler": script["SCHEDULES"][schedule](sgd), "interval": "step"}
        return {"optimizer": sgd, "lr_scheduler": rates}

    class Measured(pl.Callback):
        def on_validation_start(self, trainer, module):
            seen.append(script["accuracy_of"](module.backbone, x, y))

    held = script["HELD_OUT"]
    data = TensorDataset(x[:-held], y[:-held]), TensorDataset(x[-held:], y[-held:])
    order = torch.Generator().manual_seed(100 + seed)
    train = DataLoader(data[0], batch_size=script["BATCH"], shuffle=True, generator=order)
    if callbacks:
        plan = hodec.make_plan(net, hodec.ranks.Manual({"3": 8, "6": 8}), method="tucker", example_input=x[:1])
        callbacks = [make(plan) for make in callbacks]
    fit(Users(net, optimizer), *callbacks, Measured(), epochs=16, data=train, val=DataLoader(data[1], batch_size=held))
    return seen


@pytest.mark.slow
@pytest.mark.parametrize("schedule", ["constant", "cosine, restarted every 4 epochs", "one cycle to 0.1"])
def test_validation_under_admm_is_within_three_points_of_the_same_training_without(schedule):
    """At every epoch after the third, in the mean of three seeds."""
    pytest.importorskip("sklearn")
    without, under = (
        torch.tensor([accuracies(schedule, seed, *callbacks) for seed in range(3)]).mean(0)
        for callbacks in ((), (hodec.AdmmCallback,))
    )
    assert len(under) == 16
    assert float((without - under)[3:].max()) < 3


class Compiled(Users):
    """Its training step calls torch.compile's wrapper of the net."""

    def __init__(self, net):
        super().__init__(net)
        self.fast = torch.compile(net, backend="eager")

    def training_step(self, batch, index):
        return F.cross_entropy(self.fast(batch[0]), batch[1])


@pytest.mark.slow
def test_a_compiled_net_is_measured_too():
    (net, _, seen), x = trained(bn_batches=1, users=Compiled), samples()[0]
    net.load_state_dict(seen[-1])
    hodec.reestimate_batchnorm(net, [x[-8:]])
    assert_close(net[4].running_var, seen[-1]["4.running_var"])
