"""What the Z-update remembers: learned ranks, and factors where a format is found by iteration."""

import copy
from dataclasses import replace

import pytest
import torch
from admm_fits import LAYERS, Users, cosine, fit, new_net, plan_of, samples, sgd
from torch import Tensor, nn
from torch.testing import assert_close

from hodec.admm.lightning import AdmmCallback
from hodec.admm.processes import Processes
from hodec.admm.projection import Projection, with_ranks
from hodec.calibration.input_covariance import InputCovariance, collect_covariances, whitened_projection
from hodec.conversion.swap import convert
from hodec.errors import CheckpointError, PlanError
from hodec.plan.plan import Plan
from hodec.ranks import Learned, Manual, make_plan

RANK = 30  # beyond every side: a CP of this rank is not unique to find


ALONE = Processes()


@pytest.fixture(scope="module")
def cp() -> tuple[nn.Module, Plan]:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(12, 16, 3), nn.ReLU())
    conv = net[0]  # of channels that matter less and less: of white noise a CP is found again
    for axis, n in enumerate(conv.weight.shape[:2]):
        basis = torch.linalg.qr(torch.randn(n, n))[0] * torch.arange(1.0, n + 1).rsqrt()
        conv.weight.data = torch.tensordot(basis, conv.weight.data, ([1], [axis])).movedim(0, axis)
    return net, make_plan(net, Manual(RANK), method="cp", example_input=torch.zeros(1, 12, 9, 9))


@pytest.fixture(scope="module")
def first_z(cp) -> tuple[dict[str, Tensor], dict[str, object]]:
    """The first Z of ``cp``, and what its projection remembers."""
    net, plan = cp
    projection = Projection(plan)
    return projection.update(weights(net, plan), {}, ALONE), projection.state_dict()


@pytest.fixture
def updated(cp, first_z) -> tuple[Projection, dict[str, Tensor]]:
    """A projection after its first update, and that Z."""
    projection = Projection(cp[1])
    projection.load_state_dict(first_z[1])
    return projection, first_z[0]


def weights(net: nn.Module, plan: Plan) -> dict[str, Tensor]:
    return {name: net.get_submodule(name).weight.detach() for name in plan}


def error(a: Tensor, b: Tensor) -> float:
    return float((a - b).detach().norm() / b.detach().norm())


def test_a_second_update_of_the_same_tensor_changes_nothing(cp, updated):
    net, plan = cp
    projection, z = updated
    for name, once in z.items():
        assert error(once, weights(net, plan)[name]) > 0.1
        assert error(Projection(plan).update(z, {}, ALONE)[name], once) > 1e-3  # from nothing: another optimum
    again = projection.update(z, {}, ALONE)
    for name, once in z.items():
        assert error(again[name], once) < 1e-5


def test_an_update_is_at_least_as_near_as_the_last_z_was(updated):
    projection, z = updated
    noise = torch.Generator().manual_seed(1)
    for _ in range(3):
        moved = {n: t + 0.02 * t.norm() * _unit(torch.randn(t.shape, generator=noise)) for n, t in z.items()}
        after = projection.update(moved, {}, ALONE)
        for name in z:
            assert error(after[name], moved[name]) <= error(z[name], moved[name]) + 1e-6
        z = after


def _unit(t: Tensor) -> Tensor:
    return t / t.norm()


def test_truncating_remembers_nothing(cp, updated):
    net, plan = cp
    projection, _ = updated
    before = {name: [f.clone() for f in factors] for name, factors in projection.factors.items()}
    projection.truncate({name: w + 0.1 for name, w in weights(net, plan).items()})
    assert_close(projection.factors, before, rtol=0, atol=0)


def test_a_conversion_that_starts_at_the_factors_loses_nothing_that_admm_kept(cp, updated):
    net, plan = copy.deepcopy(cp[0]), cp[1]
    projection, z = updated
    for name in plan:
        net.get_submodule(name).weight.data.copy_(z[name])
    near, cold = convert(net, plan, init_factors=projection.factors), convert(net, plan)
    for name in plan:
        assert error(near.get_submodule(name).dense_weight(), z[name]) < 1e-5
        assert error(cold.get_submodule(name).dense_weight(), z[name]) > 1e-3


def test_a_layer_that_is_frozen_meanwhile_keeps_its_factors(cp, updated):
    projection, _ = updated
    before = projection.factors["0"]
    projection.update({}, {}, ALONE)
    assert projection.factors["0"] is before


def test_factors_of_other_ranks_are_not_started_from(cp, updated):
    net, plan = cp
    projection, _ = updated
    projection.plan = with_ranks(plan, {"0": (5,)})
    z = projection.update(weights(net, plan), {}, ALONE)
    fresh = Projection(projection.plan).update(weights(net, plan), {}, ALONE)
    assert_close(z["0"], fresh["0"])


def test_state_goes_on_where_it_was(cp, updated):
    net, plan = cp
    one, two = updated[0], Projection(plan)
    two.load_state_dict(one.state_dict())
    moved = {name: w + 0.01 for name, w in weights(net, plan).items()}
    assert_close(one.update(moved, {}, ALONE), two.update(moved, {}, ALONE), rtol=0, atol=0)


def test_admm_with_cp_converges_and_hands_on_its_factors():
    net = new_net()
    plan = make_plan(net, Manual(14), method="cp", example_input=torch.zeros(1, 3, 8, 8), include=["conv2"])
    callback = AdmmCallback(plan, track_truncated=False, update_every="20steps")
    fit(Users(net, lambda module: cosine(sgd(module), 160)), callback, epochs=40)
    assert callback.admm.primal[-1] < 0.02 < callback.admm.primal[0]
    small = convert(net, plan, init_factors=callback.admm.projection.factors)
    assert error(small.conv2.dense_weight().detach(), net.conv2.weight.detach()) < 0.02


# -- learned ranks -------------------------------------------------------------------------------------------------


def learned(net: nn.Module, share: float = 0.4) -> tuple[Plan, Learned]:
    rule = Learned(params=share)
    return make_plan(net, rule, method="svd", example_input=torch.zeros(1, 3, 8, 8), include=list(LAYERS)), rule


def test_admm_changes_the_ranks_and_stays_within_the_target():
    net = new_net()
    plan, learner = learned(net)
    callback = AdmmCallback(plan, learner=learner, track_truncated=False, update_every="20steps")
    fit(Users(net), callback, epochs=15)
    now = callback.admm.projection.plan
    assert isinstance(now, Plan)
    assert {name: layer.ranks for name, layer in now.items()} != {name: layer.ranks for name, layer in plan.items()}
    for name, layer in now.items():  # Z has the ranks that the plan says
        z = callback.admm.states[name].z
        assert error(layer.project(z), z) < 1e-5
    final = callback.final_plan()
    assert isinstance(final, Plan)
    assert all(layer.saves() for layer in final.values())
    assert final.params_after <= 0.4 * plan.params_before
    assert callback.latest["admm/planned_params"] == final.params_after / final.params_before
    assert callback.latest["admm/planned_macs"] == final.macs_after / final.macs_before
    assert callback.admm.start_plan == plan  # the one that was given stays as it is
    assert convert(net, final)


def test_without_a_learner_the_plan_is_the_one_given():
    net = new_net()
    callback = AdmmCallback(plan_of(net), track_truncated=False)
    fit(Users(net), callback, epochs=1)
    assert callback.final_plan() is callback.admm.projection.plan is callback.admm.start_plan
    assert "admm/planned_macs" not in callback.latest


def test_learned_ranks_are_state():
    net = new_net()
    plan, learner = learned(net)
    callback = AdmmCallback(plan, learner=learner, track_truncated=False)
    fit(Users(net), callback, epochs=2)
    state = callback.state_dict()
    assert state["projection"]["ranks"] == {
        name: list(layer.ranks) for name, layer in callback.admm.projection.plan.items()
    }
    again = Projection(plan, learner)
    again.load_state_dict(state["projection"])
    assert again.plan == callback.admm.projection.plan != plan


def test_state_of_another_plan_is_refused_before_its_ranks_are_taken():
    net = new_net()
    plan, learner = learned(net)
    callback = AdmmCallback(plan, learner=learner, track_truncated=False)
    fit(Users(net), callback, epochs=1)
    state = callback.state_dict()
    state["plan"]["conv1"] = state["plan"]["conv1"].replace("svd", "tt")
    state["projection"]["ranks"]["conv1"] = [1, 2, 3]
    other = AdmmCallback(plan, learner=learner, track_truncated=False)
    other.load_state_dict(state)
    with pytest.raises(CheckpointError, match="another plan: 1 layers differ, first conv1"):
        fit(Users(new_net()), other, epochs=2)


def test_ranks_that_do_not_fit_are_refused():
    plan = plan_of(new_net())
    with pytest.raises(PlanError, match="conv1"):
        with_ranks(plan, {"conv1": (99,)})
    assert with_ranks(plan, {}) == replace(plan)


# -- covariances -------------------------------------------------------------------------------------------------------


@pytest.fixture
def measured() -> tuple[nn.Module, Plan, dict[str, InputCovariance]]:
    net = new_net()
    plan = plan_of(net, {"conv2": 3, "fc1": 3})
    return net, plan, collect_covariances(net, plan, [samples()[0]])


def test_with_metrics_z_is_the_nearest_by_outputs(measured):
    net, plan, covariances = measured
    w = weights(net, plan)
    z = Projection(plan, covariances=covariances).update(w, {}, ALONE)
    plain = Projection(plan).update(w, {}, ALONE)
    for name, covariance in covariances.items():
        assert_close(z[name], whitened_projection(plan[name], w[name], covariance))
        assert float(covariance.apply(w[name] - z[name]).norm()) < float(covariance.apply(w[name] - plain[name]).norm())


def test_admm_converges_with_metrics_too(measured):
    net, plan, covariances = measured
    callback = AdmmCallback(plan, track_truncated=False, update_every="20steps", covariances=covariances)
    fit(Users(net, lambda module: cosine(sgd(module), 160)), callback, epochs=40)
    assert callback.admm.primal[-1] < 0.1 * callback.admm.primal[0]


@pytest.mark.parametrize("method", ["cp", "tucker", "svd"])
def test_autocast_changes_no_z(method):
    net = new_net()
    plan = plan_of(net, {"conv2": 3} if method != "svd" else {"fc1": 3}, method=method)
    w = weights(net, plan)
    plain = Projection(plan).update(w, {}, ALONE)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = Projection(plan).update(w, {}, ALONE)
    for name in plan:
        assert torch.equal(mixed[name], plain[name])


def test_metrics_of_other_layers_are_refused(measured):
    _, plan, covariances = measured
    with pytest.raises(PlanError, match="a covariance for conv2, which is not in the plan"):
        AdmmCallback(plan.without("conv2", "by hand"), covariances=covariances)


def test_metrics_of_other_layers_are_refused_before_a_trainer_of_transformers_loads_anything(measured):
    pytest.importorskip("transformers", reason="pip install transformers")
    from hodec import AdmmTrainerCallback

    _, plan, covariances = measured
    with pytest.raises(PlanError, match="a covariance for conv2, which is not in the plan"):
        AdmmTrainerCallback(plan.without("conv2", "by hand"), covariances=covariances)


def test_metrics_and_iteration_are_refused(cp):
    net, plan = cp
    with pytest.raises(PlanError, match=r"0: cp is found by iteration.*or no calibration data"):
        Projection(plan, covariances=collect_covariances(net, plan, [torch.randn(4, 12, 9, 9)]))
