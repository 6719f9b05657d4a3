"""What the callback does to a step: the same as the penalty in the loss, and the pull that was asked for."""

import pytest
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from admm_fits import BATCHES, LAYERS, Probe, Users, admm, batches, cosine, distance, fit, new_net, plan_of, sgd
from torch.testing import assert_close

from hodec.admm.options import AdmmOptions
from hodec.admm.updates import project_layers, start, step
from hodec.errors import ConfigError


def penalised(net, make_optimizer, *, rho, epochs, accumulate=1, clip=None):
    """The whole algorithm in plain torch, with the penalty in the loss. Returns the states at the end."""
    plan, optimizer = plan_of(net), make_optimizer(net)
    weights = {name: net.get_submodule(name).weight for name in plan}

    def project(tensors):
        return project_layers(plan, tensors)

    net.train()
    states = start(weights, {name: rho[name] for name in plan}, project)
    for _ in range(epochs):
        for number, (x, y) in enumerate(batches(), 1):
            (F.cross_entropy(net(x), y) / accumulate).backward()
            if number % accumulate:
                continue
            for name, w in weights.items():
                (states[name].rho / 2 * (w - states[name].z + states[name].u).square().sum()).backward()
            if clip:
                torch.nn.utils.clip_grad_norm_(net.parameters(), clip)
            optimizer.step()
            optimizer.zero_grad()
        states, _ = step(weights, states, project)
    return states


def grouped(module):
    """Layers at rates of their own; two of three in one group."""
    net = getattr(module, "backbone", module)
    own = list(net.conv2.parameters())
    rest = [p for p in net.parameters() if all(p is not q for q in own)]
    groups = [{"params": own, "lr": 0.01}, {"params": rest, "lr": 0.1}]
    return torch.optim.SGD(groups, momentum=0.5, weight_decay=1e-3)


@pytest.mark.parametrize(
    ("options", "make_optimizer"),
    [
        ({}, sgd),
        ({"accumulate": 2}, sgd),
        ({"clip": 0.2}, sgd),
        ({"accumulate": 2, "clip": 0.2}, sgd),
        ({}, grouped),
        ({}, lambda module: torch.optim.Adam(module.parameters(), lr=1e-2)),
    ],
    ids=["plain", "accumulated", "clipped", "accumulated and clipped", "two groups", "adam"],
)
def test_equals_the_penalty_in_the_loss(options, make_optimizer):
    net, oracle = new_net(), new_net()
    net.dropout.p = oracle.dropout.p = 0.0
    rho = {"conv1": 0.3, "conv2": 1.0, "fc1": 0.05}
    callback = admm(net, rho)
    trainer = {"accumulate_grad_batches": options.get("accumulate", 1), "gradient_clip_val": options.get("clip")}
    fit(Users(net, make_optimizer), callback, epochs=3, **trainer)
    states = penalised(oracle, make_optimizer, rho=rho, epochs=3, **options)

    unpulled = new_net()
    unpulled.dropout.p = 0.0
    fit(Users(unpulled, make_optimizer), epochs=3, **trainer)
    for name in LAYERS:
        w = net.get_submodule(name).weight
        assert_close(w, oracle.get_submodule(name).weight, rtol=0, atol=1e-6)
        assert_close(callback.admm.states[name].z, states[name].z, rtol=0, atol=1e-5)
        assert_close(callback.admm.states[name].u, states[name].u, rtol=0, atol=1e-5)
        assert (w - unpulled.get_submodule(name).weight).abs().max() > 1e-3, "the penalty did nothing"
    assert_close(net.head.weight, oracle.head.weight, rtol=0, atol=1e-6)


def scheduled(module):
    return cosine(sgd(module), 3 * BATCHES)


def test_a_schedule_per_step_keeps_the_pull():
    net = new_net()
    callback = admm(net, "auto", pull=0.6)

    def look(trainer):
        lr = trainer.optimizers[0].param_groups[0]["lr"]
        return lr, lr * callback.admm.states["conv1"].rho, callback.admm.pull

    probe = Probe(look)
    fit(Users(net, scheduled), callback, probe, epochs=3)
    assert len({lr for lr, _, _ in probe.seen}) == 3 * BATCHES
    assert [rate for _, rate, _ in probe.seen] == pytest.approx([probe.seen[0][1]] * 3 * BATCHES, rel=1e-12)
    assert [pull for *_, pull in probe.seen] == pytest.approx([0.6] * 3 * BATCHES, rel=1e-9)


def test_changing_rho_in_mid_epoch_keeps_the_true_dual():
    net = new_net()
    callback = admm(net)
    probe = Probe(lambda trainer: callback.admm.states["conv2"].rho * callback.admm.states["conv2"].u)
    fit(Users(net, scheduled), callback, probe, epochs=2)
    second = probe.seen[BATCHES:]
    assert second[0].abs().max() > 1e-3
    for dual in second:
        assert_close(dual, second[0])


def test_groups_at_their_own_rates_have_one_pull():
    net = new_net()
    callback = admm(net, "auto", pull=0.5)
    fit(Users(net, grouped), callback)
    assert callback.admm.states["conv2"].rho == pytest.approx(10 * callback.admm.states["conv1"].rho)
    assert callback.admm.states["conv1"].rho == callback.admm.states["fc1"].rho


class ZeroGradients(pl.Callback):
    """The loss has no say: what moves the weights is ADMM alone. Put it before the ADMM callback."""

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        for p in pl_module.parameters():
            p.grad.zero_()


OPTIMIZERS = {
    "sgd": lambda m: torch.optim.SGD(m.parameters(), lr=0.05),
    "momentum": lambda m: torch.optim.SGD(m.parameters(), lr=0.01, momentum=0.9),
    "adamw": lambda m: torch.optim.AdamW(m.parameters(), lr=1e-3, weight_decay=0.0),
    "scheduled adamw": lambda m: cosine(torch.optim.AdamW(m.parameters(), lr=1e-3, weight_decay=0.0), 100),
}


@pytest.mark.parametrize(
    ("name", "accuracy"), [("sgd", 0.02), ("momentum", 0.1), ("adamw", 1e-4), ("scheduled adamw", 1e-4)]
)
@pytest.mark.parametrize("pull", [0.5, 0.9])
def test_weights_cover_the_pull_between_two_updates(name, accuracy, pull):
    """A momentum lags in the first steps, and SGD compounds in steps, not smoothly; AdamW is exact."""
    net = new_net()
    before = {layer: net.get_submodule(layer).weight.detach().clone() for layer in LAYERS}
    callback = admm(net, "auto", pull=pull, update_every="100steps")
    targets = {}
    stop = Probe(lambda trainer: targets or targets.update({n: s.z - s.u for n, s in callback.admm.states.items()}))
    fit(Users(net, OPTIMIZERS[name]), ZeroGradients(), stop, callback, epochs=25, max_steps=99)
    assert not callback.admm.primal
    for layer in LAYERS:
        way = distance(before[layer], targets[layer])
        left = distance(net.get_submodule(layer).weight, targets[layer])
        expected = 1 - (1 - pull) ** 0.99
        assert 1 - left / way == pytest.approx(expected, abs=accuracy), layer


def test_a_decoupled_pull_counts_optimizer_steps_not_batches():
    net = new_net()
    before = net.fc1.weight.detach().clone()
    callback = admm(net, "auto", pull=0.8, update_every=10)
    fit(Users(net, OPTIMIZERS["adamw"]), ZeroGradients(), callback, epochs=10, accumulate_grad_batches=2)
    target = plan_of(new_net())["fc1"].project(before)
    # 20 steps: the update comes after the tenth epoch, so all of the pull has been applied
    left = distance(net.fc1.weight, target) / distance(before, target)
    assert 1 - left == pytest.approx(0.8, abs=1e-3)


def test_adamw_is_pulled_beside_its_gradient():
    """Adam divides gradients by their size: a pull within them would have no size of its own."""
    gradients = []
    for callbacks in (lambda net: [admm(net)], lambda net: []):
        net = new_net()
        net.dropout.p = 0.0
        look = Probe(lambda trainer, net=net: net.conv2.weight.grad.clone())
        fit(Users(net, OPTIMIZERS["adamw"]), *callbacks(net), look, limit_train_batches=1)
        gradients.append(look.seen[0])
    assert_close(gradients[0], gradients[1], rtol=0, atol=0)


@pytest.mark.parametrize(
    ("every", "accumulate", "steps"),
    [
        (1, 1, [4, 8, 12, 16]),
        (2, 1, [8, 16]),
        ("2epochs", 1, [8, 16]),
        ("3epochs", 1, [12]),
        ("1step", 1, list(range(1, 17))),
        ("3steps", 1, [3, 6, 9, 12, 15]),
        ("3steps", 2, [3, 6]),
        (1, 2, [2, 4, 6, 8]),
        (1, 3, [2, 4, 6, 8]),  # the fourth batch is stepped on although its window is not full
    ],
)
def test_updates_count_optimizer_steps(every, accumulate, steps):
    net = new_net()
    callback = admm(net, update_every=every)
    updated = []

    class Watch(pl.Callback):
        def on_train_batch_end(self, trainer, *rest):
            if len(callback.admm.primal) > len(updated):
                updated.append(trainer.global_step)

    fit(Users(net), callback, Watch(), epochs=4, accumulate_grad_batches=accumulate)
    assert updated == steps
    assert callback.admm.updated_at == steps[-1]


@pytest.mark.parametrize(
    ("text", "count", "unit"),
    [(1, 1, "epoch"), ("2", 2, "epoch"), ("2epochs", 2, "epoch"), ("1epoch", 1, "epoch"), ("50steps", 50, "step")],
)
def test_interval(text, count, unit):
    assert AdmmOptions(update_every=text).interval(7) == (count, unit)


@pytest.mark.parametrize("text", [0, -1, 1.5, "0steps", "steps", "5 minutes", True, ""])
def test_what_is_no_interval_is_refused(text):
    with pytest.raises(ConfigError, match="update_every: .* given; allowed: whole epochs from 1, or 50steps"):
        AdmmOptions(update_every=text)


def test_relaxation_outside_its_range_is_refused():
    for relax in (0.5, 2.0, float("nan")):
        with pytest.raises(ConfigError, match="relax: .* at least 1 and at most 1.9"):
            admm(new_net(), relax=relax)
