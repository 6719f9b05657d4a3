"""The updates are mathematics: they return new values, keep the true dual, and solve a problem with a known answer."""

import pytest
import torch
from torch.testing import assert_close

from hodec.admm.updates import (
    AdmmState,
    Residuals,
    full_precision,
    measure,
    project_layers,
    start,
    step,
    total,
    with_rho,
)
from hodec.formats.calls import CallSites
from hodec.formats.modes import Modes
from hodec.plan.layer import LayerPlan


def conv_plan(channels=16, rank=3, modes=None):
    split = modes or Modes((channels,), (channels,))
    count = 2 * len(split.inputs)
    return LayerPlan("tt", "conv2d", (channels, channels, 3, 3), split, (rank,) * count, CallSites.once((8, 8), (8, 8)))


def linear_plan(rank=3):
    """Two modes a side: one rank, so that its projection is the truncated SVD of a rearranged matrix: exact."""
    return LayerPlan("tt", "linear", (16, 12), Modes((3, 4), (4, 4)), (rank,), (1, 1))


def projection(plan):
    return lambda tensors: project_layers(plan, tensors)


def solve(plan, wanted, *, rho=1.0, relax=1.0, dual=True, updates=200, tolerance=1e-9):
    """ADMM on 1/2 |W - A|^2, whose W-step has a closed form. Returns the weights, states, and residuals."""
    project = projection(plan)
    weights = {name: a.clone() for name, a in wanted.items()}
    states, history = start(weights, dict.fromkeys(wanted, rho), project), []
    for _ in range(updates):
        weights = {n: (a + rho * (states[n].z - states[n].u)) / (1 + rho) for n, a in wanted.items()}
        states, residuals = step(weights, states, project, relax=relax, dual=dual)
        history.append(total(residuals).primal)
        if history[-1] < tolerance:
            break
    return weights, states, history


def falling(generator):
    """A weight (16, 12) whose projection's singular values are 1, 0.4, 0.16, ..: ADMM converges for rho > 0.4."""
    u, _ = torch.linalg.qr(torch.randn(12, 12, generator=generator, dtype=torch.float64))
    v, _ = torch.linalg.qr(torch.randn(16, 12, generator=generator, dtype=torch.float64))
    matrix = u @ torch.diag(0.4 ** torch.arange(12.0, dtype=torch.float64)) @ v.mT  # (O_1 I_1, O_2 I_2)
    return matrix.reshape(4, 3, 4, 4).permute(0, 2, 1, 3).reshape(16, 12)


@pytest.mark.parametrize(("rho", "relax"), [(0.5, 1.0), (1.0, 1.0), (4.0, 1.0), (1.0, 1.6), (4.0, 1.6)])
def test_least_squares_ends_at_the_projection(generator, rho, relax):
    plan, wanted = {"fc": linear_plan()}, falling(generator)
    nearest = plan["fc"].project(wanted)
    assert_close((wanted - nearest).norm(), (0.4 ** torch.arange(3.0, 12.0, dtype=torch.float64)).norm())

    weights, states, history = solve(plan, {"fc": wanted}, rho=rho, relax=relax)
    assert history[-1] < 1e-8, history
    assert_close(weights["fc"], nearest, rtol=0, atol=1e-7)
    assert_close(states["fc"].z, nearest, rtol=0, atol=1e-7)
    # at the solution the true dual is the gradient of the loss: rho U = A - W
    assert_close(rho * states["fc"].u, wanted - nearest, rtol=0, atol=1e-6)


def test_without_dual_the_pull_ends_between_the_weight_and_its_projection(generator):
    wanted, plan = falling(generator), {"fc": linear_plan()}
    weights, states, _ = solve(plan, {"fc": wanted}, rho=3.0, dual=False)
    assert not states["fc"].u.any()
    z = plan["fc"].project(wanted)
    assert_close(states["fc"].z, z)
    assert_close(weights["fc"], (wanted + 3 * z) / 4)  # what minimizes 1/2 |W - A|^2 + 3/2 |W - Z|^2


def test_over_relaxation_is_faster(generator):
    wanted = {"fc": falling(generator)}
    plain, relaxed = (len(solve({"fc": linear_plan()}, wanted, relax=relax)[2]) for relax in (1.0, 1.6))
    assert relaxed < 0.6 * plain


def test_too_small_a_rho_never_agrees(generator):
    """What the warning about a weak pull is for: U winds up and W - Z stays."""
    *_, history = solve({"fc": linear_plan()}, {"fc": falling(generator)}, rho=0.1)
    assert history[-1] > 0.05


def test_update_formulas(generator):
    plan = {"conv": conv_plan()}
    w, z, u = (torch.randn(16, 16, 3, 3, generator=generator) for _ in range(3))
    states, residuals = step({"conv": w}, {"conv": AdmmState(z, u, 2.0)}, projection(plan), relax=1.5)
    relaxed = 1.5 * w - 0.5 * z
    after = states["conv"]
    assert_close(after.z, plan["conv"].project(relaxed + u))
    assert_close(after.u, u + relaxed - after.z)
    assert after.rho == 2.0
    found = residuals["conv"]
    assert found.primal == pytest.approx(float((w - after.z).norm() / w.norm()), rel=1e-5)
    assert found.dual == pytest.approx(float((after.z - z).norm() / after.u.norm()), rel=1e-5)


def test_start_is_the_projection_with_no_dual(generator):
    plan = {"conv": conv_plan()}
    w = torch.randn(16, 16, 3, 3, generator=generator)
    state = start({"conv": w}, {"conv": 0.5}, projection(plan))["conv"]
    assert_close(state.z, plan["conv"].project(w), rtol=0, atol=0)
    assert not state.u.any()
    assert state.rho == 0.5


def test_nothing_given_is_changed(generator):
    plan = {"conv": conv_plan()}
    w, z, u = (torch.randn(16, 16, 3, 3, generator=generator) for _ in range(3))
    given, copies = (w, z, u), [t.clone() for t in (w, z, u)]
    state = AdmmState(z, u, 2.0)
    step({"conv": w}, {"conv": state}, projection(plan))
    with_rho(state, 5.0)
    start({"conv": w}, {"conv": 1.0}, projection(plan))
    for now, before in zip(given, copies, strict=True):
        assert_close(now, before, rtol=0, atol=0)
    with pytest.raises(AttributeError):
        state.rho = 1.0


def test_new_rho_keeps_the_true_dual(generator):
    u = torch.randn(4, 4, generator=generator)
    state = AdmmState(torch.zeros(4, 4), u, 0.3)
    changed = with_rho(state, 1.7)
    assert changed.rho == 1.7
    assert_close(changed.rho * changed.u, state.rho * state.u)
    assert with_rho(state, 0.3) is state


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_state_is_kept_in_full_precision(generator, dtype):
    plan = {"conv": conv_plan()}
    w = torch.randn(16, 16, 3, 3, generator=generator).to(dtype).requires_grad_()
    kept = torch.float64 if dtype == torch.float64 else torch.float32
    state = start({"conv": w}, {"conv": 1.0}, projection(plan))["conv"]
    state = step({"conv": w}, {"conv": state}, projection(plan))[0]["conv"]
    assert {state.z.dtype, state.u.dtype, full_precision(w).dtype} == {kept}
    assert not state.z.requires_grad
    assert not state.u.requires_grad


def test_batched_projection_is_the_one_by_one(generator):
    """Layers of one shape go through one call; other shapes, ranks and modes, and large ones, by themselves."""
    two_modes = conv_plan(modes=Modes((4, 4), (4, 4)))
    plan = {f"a{i}": conv_plan() for i in range(5)}
    plan |= {"rank": conv_plan(rank=5), "modes": two_modes, "modes2": two_modes}
    plan |= {"fc": linear_plan(), "fc2": linear_plan()}
    plan |= {"big": conv_plan(channels=160, rank=10), "big2": conv_plan(channels=160, rank=10)}
    tensors = {name: torch.randn(layer.shape, generator=generator) for name, layer in plan.items()}
    together = project_layers(plan, tensors)
    assert together.keys() == tensors.keys()
    for name, layer in plan.items():
        alone = layer.project(tensors[name])
        assert_close(together[name], alone, rtol=0, atol=1e-6 * float(tensors[name].norm()))


def test_a_layer_in_another_type_is_not_batched_with_the_rest(generator):
    plan = {"a": conv_plan(), "b": conv_plan()}
    tensors = {"a": torch.randn(16, 16, 3, 3, generator=generator), "b": torch.randn(16, 16, 3, 3).double()}
    result = project_layers(plan, tensors)
    assert (result["a"].dtype, result["b"].dtype) == (torch.float32, torch.float64)


def test_residuals_add_up_as_squares():
    a, b = Residuals(gap=9, weight=100, move=1, dual_scale=4), Residuals(gap=16, weight=300, move=8, dual_scale=32)
    both = total({"a": a, "b": b})
    assert both.primal == pytest.approx((25 / 400) ** 0.5)
    assert both.dual == pytest.approx((9 / 36) ** 0.5)
    assert total({}).primal == total({}).dual == 0


def test_zero_weights_have_no_residual():
    zero = torch.zeros(3, 3)
    found = measure(zero, AdmmState(zero, zero, 1.0), zero)
    assert (found.primal, found.dual) == (0.0, 0.0)


def test_a_weight_that_has_the_ranks_already_is_converged(generator):
    """U stays at rounding then, and dividing by it would tell noise from noise."""
    plan = {"conv": conv_plan(rank=8)}
    w = plan["conv"].project(torch.randn(16, 16, 3, 3, generator=generator))
    state = start({"conv": w}, {"conv": 1.0}, projection(plan))["conv"]
    for _ in range(3):
        states, residuals = step({"conv": w}, {"conv": state}, projection(plan))
        state = states["conv"]
    assert residuals["conv"].primal < 1e-5
    assert residuals["conv"].dual < 1e-3
