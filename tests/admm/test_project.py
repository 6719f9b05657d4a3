"""mode="project": the weights themselves are put onto their ranks every few steps."""

import copy

import pytest
import torch
import torch.nn.functional as F
from admm_fits import BATCHES, LAYERS, Users, batches, fit, new_net, plan_of, samples, sgd
from torch.testing import assert_close

import hodec
from hodec.admm import updates
from hodec.admm.core import Admm
from hodec.admm.lightning import AdmmCallback
from hodec.admm.stopping import Status
from hodec.errors import ConfigError
from hodec.ranks import Learned


def trained(*, epochs=2, until=None, **settings):
    """A net, its optimizer and its Admm after a plain loop of so many steps."""
    net = new_net()
    optimizer = sgd(net)
    core = Admm(net, plan_of(net), optimizer, mode="project", steps_per_epoch=BATCHES, **settings)
    net.eval()  # no dropout: what is left is the order of the data
    steps = 0
    for _ in range(epochs):
        for x, y in batches():
            if steps == until:
                return net, optimizer, core
            optimizer.zero_grad()
            F.cross_entropy(net(x), y).backward()
            core.before_step()
            optimizer.step()
            core.after_step()
            steps += 1
        core.end_epoch()
    core.finish()
    return net, optimizer, core


def gap(core):
    full = {name: weight.detach() for name, weight in core.weights.items()}
    return updates.error(full, core.projection.truncate(full))


def test_weights_are_of_their_ranks_after_every_interval_and_every_epoch():
    gaps = [gap(trained(until=steps, update_every="3steps")[2]) for steps in range(1, 2 * BATCHES)]
    low = [steps for steps, value in enumerate(gaps, start=1) if value < 1e-5]
    # an epoch has four steps, and its end is one more projection, from which the next interval is counted
    assert low == [3, 4, 7]
    assert gap(trained(update_every="3steps")[2]) < 1e-5


def test_converting_changes_nothing():
    net, _, core = trained(update_every="3steps")
    x = torch.randn(5, 3, 8, 8)
    assert_close(core.convert().eval()(x), net.eval()(x), rtol=1e-4, atol=1e-4)
    assert core.status is Status.EPOCHS_ENDED


def test_other_weights_are_trained_as_without_it_until_the_first_projection():
    net, _, _ = trained(until=2, update_every="3steps")
    plain = new_net().eval()
    optimizer = sgd(plain)
    for _, (x, y) in zip(range(2), batches(), strict=False):
        optimizer.zero_grad()
        F.cross_entropy(plain(x), y).backward()
        optimizer.step()
    assert_close(net.state_dict(), plain.state_dict(), rtol=0, atol=0)


def test_momentum_is_kept():
    _, before, _ = trained(until=2, update_every="3steps")
    _, after, _ = trained(until=3, update_every="3steps")
    held = [state["momentum_buffer"] for state in after.state.values()]
    assert len(held) == len(before.state)
    assert all(float(buffer.abs().max()) > 0 for buffer in held)


def test_report_says_how_far_training_moved_from_the_ranks_and_no_rho():
    report = trained(until=BATCHES, update_every="3steps")[2].report()
    assert set(report) == {"primal_residual", "dual_residual", "truncation_error"}
    assert 0 < report["primal_residual"] < 1
    assert report["truncation_error"] < 1e-5


@pytest.mark.parametrize("share", [1.0, 0.3])
def test_it_goes_on_exactly_from_its_state(share):
    one = trained(update_every="3steps", share=share)
    net, optimizer, core = trained(until=5, update_every="3steps", share=share)
    again = copy.deepcopy(net)
    optimizer2 = sgd(again)
    optimizer2.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    settings = {"mode": "project", "steps_per_epoch": BATCHES, "update_every": "3steps", "share": share}
    resumed = Admm(again, plan_of(new_net()), optimizer2, **settings)
    resumed.load_state_dict(core.state_dict())
    for number, (x, y) in enumerate(batches()):
        if number < 1:
            continue
        optimizer2.zero_grad()
        F.cross_entropy(again(x), y).backward()
        resumed.before_step()
        optimizer2.step()
        resumed.after_step()
    resumed.end_epoch()
    assert_close(again.state_dict(), one[0].state_dict(), rtol=0, atol=0)


def test_the_callback_does_the_same_in_lightning():
    net = new_net()
    callback = AdmmCallback(plan_of(net), mode="project", update_every="3steps", track_truncated=False)
    fit(Users(net), callback, epochs=2)
    assert gap(callback.admm) < 1e-5
    small = hodec.convert(net, plan_of(net)).eval()
    x = torch.randn(5, 3, 8, 8)
    assert_close(small(x), net.eval()(x), rtol=1e-4, atol=1e-4)
    assert set(callback.admm.weights) == set(LAYERS)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"mode": "project", "rho": 1e-3}, "mode='project' has no such setting"),
        ({"mode": "projekt"}, "allowed: admm, project"),
        ({"mode": "project", "update_every": 0}, "update_every"),
        ({"share": 0.5}, "mode='admm' has no such setting"),
        *(
            ({"mode": "project", "share": share}, "share: .* given; allowed: a number above 0 and at most 1")
            for share in (0, -0.1, 1.1, float("nan"), "half", True)
        ),
    ],
)
def test_what_the_mode_does_not_have_is_refused(settings, words):
    net = new_net()
    with pytest.raises(ConfigError, match=words):
        AdmmCallback(plan_of(net), **settings)
    with pytest.raises(ConfigError, match=words):
        Admm(net, plan_of(net), sgd(net), **settings)


def test_ranks_are_not_learned_by_it():
    net = new_net()
    with pytest.raises(ConfigError, match="no penalty to learn ranks from"):
        Admm(net, plan_of(net), sgd(net), mode="project", learner=Learned(params=0.4))


def test_the_callback_moves_by_a_share_as_a_loop_does():
    net = new_net()
    net.dropout.p = 0.0
    callback = AdmmCallback(plan_of(net), mode="project", update_every="3steps", share=0.3, track_truncated=True)
    trainer = fit(Users(net), callback, epochs=2, val=batches())
    assert_close(net.state_dict(), trained(update_every="3steps", share=0.3)[0].state_dict(), rtol=0, atol=0)
    assert trainer.callback_metrics["admm/truncation_error"] > 1e-3
    assert 0 <= trainer.callback_metrics["admm/truncated_accuracy"] <= 1


def soft(share, *, plan=None, covariances=None):
    """Each layer's weight before a projection and after it, and the Admm that did it."""
    net = new_net()
    core = Admm(net, plan or plan_of(net), sgd(net), mode="project", share=share, covariances=covariances)
    core.start()
    before = {name: w.detach().clone() for name, w in core.weights.items()}
    core.update()
    return before, {name: w.detach() for name, w in core.weights.items()}, core


@pytest.mark.parametrize("share", [0.25, 0.9])
def test_a_share_shrinks_the_singular_values_behind_the_rank(share):
    plan = plan_of(new_net(), method="weight_svd")
    before, after, core = soft(share, plan=plan)
    for name, w in before.items():
        old, new = (plan[name].format.spectra(one, plan[name].modes)[0][1] for one in (w, after[name]))
        expected = torch.cat([old[:3], (1 - share) * old[3:]])
        assert_close(new, expected.sort(descending=True).values, rtol=1e-5, atol=1e-6)
    whole, cut = (sum(float(w.square().sum()) for w in many.values()) ** 0.5 for many in (before, after))
    report = core.report()
    assert report["truncation_error"] * cut == pytest.approx((1 - share) * report["primal_residual"] * whole, rel=1e-4)


@pytest.mark.parametrize("method", ["tt", "tucker", "cp", "svd", "spatial_svd"])
@pytest.mark.parametrize("aware", [False, True])
def test_a_share_of_every_projection(method, aware):
    plan = plan_of(new_net(), method=method)
    if aware and any(layer.format.iterative for layer in plan.values()):
        pytest.skip("a format found by iteration knows no covariance")
    covariances = hodec.collect_covariances(new_net(), plan, [samples()[0]]) if aware else None
    before, after, _ = soft(0.3, plan=plan, covariances=covariances)
    _, nearest, _ = soft(1.0, plan=plan, covariances=covariances)
    for name, w in before.items():
        assert_close(after[name], w + 0.3 * (nearest[name] - w), rtol=0, atol=1e-6)
        assert (nearest[name] - w).abs().max() > 1e-3


def test_many_soft_projections_end_at_the_hard_one_and_converting_cuts_off_what_is_left():
    net, _, core = trained(share=0.3, update_every="1step")
    x = torch.randn(5, 3, 8, 8)
    left = core.report()["truncation_error"]
    assert left > 1e-3
    small = core.convert().eval()
    assert float((small(x) - net.eval()(x)).detach().norm()) > 1e-4
    with updates.weights_replaced(core.own, core.projection.truncate(core.own)):
        assert_close(small(x), net(x), rtol=1e-4, atol=1e-4)
    for _ in range(40):
        core.update()
    assert core.report()["truncation_error"] < 1e-4 * left
