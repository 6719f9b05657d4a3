"""The swap: what it takes over, what it must not touch, and what it refuses."""

import json
from pathlib import Path

import pytest
import torch
from small_nets import IMAGE, SmallResNet, Tokens, assert_untouched, snapshot
from swaps import X, conv, factorized, planned
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

from hodec.conversion.batchnorm import reestimate_batchnorm
from hodec.conversion.swap import conversion_errors, convert, planned_spectra
from hodec.errors import ConvertError, DataError, PlanError, TrainingError
from hodec.methods import METHODS
from hodec.plan.plan import Plan

# -- the swap --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("n_modes", [2, 3])
def test_at_full_rank_the_converted_model_answers_as_the_dense_one(method: str, n_modes: int):
    model = SmallResNet().double().eval()
    x = torch.randn(IMAGE).double()
    plan = planned(model, 10**6, x, method=method, n_modes=n_modes, allow_larger=True)
    assert len(plan) >= 4
    small = convert(model, plan)
    assert set(factorized(small)) == set(plan)
    torch.testing.assert_close(small(x), model(x), rtol=1e-9, atol=1e-9)


def test_the_factorized_layers_are_the_planned_ones():
    model = SmallResNet()
    plan = planned(model, {"layer1.*": 4, "conv1": [2, 3, 3, 2]}, torch.randn(IMAGE), execution="chain", n_modes=2)
    small = convert(model, plan)
    for name, layer in factorized(small).items():
        assert (layer.ranks, layer.modes, layer.execution) == (plan[name].ranks, plan[name].modes, "chain")
        expected = plan[name].project(model.get_submodule(name).weight)
        torch.testing.assert_close(layer.dense_weight(), expected, rtol=1e-5, atol=1e-6)
    assert small.conv1.ranks == (2, 3, 3, 2)
    torch.testing.assert_close(small.conv1.bias, model.conv1.bias, rtol=0, atol=0)
    assert type(small.fc) is nn.Linear


def test_planning_and_converting_leave_the_given_model_bit_for_bit_alone():
    """Weights, BatchNorm statistics, training flags, frozen flags, hooks, random numbers."""
    model = SmallResNet()
    model(torch.randn(IMAGE))  # statistics that are not the initial ones
    model.layer1.eval()
    model.conv1.weight.requires_grad_(False)
    x = torch.randn(IMAGE)
    before = snapshot(model)
    plan = planned(model, 4, x)
    assert_untouched(model, before)
    small = convert(model, plan)
    assert_untouched(model, before)
    with torch.no_grad():
        for tensor in [*small.parameters(), *small.buffers()]:
            tensor.zero_()
    assert_untouched(model, before)
    convert(model, plan, decompose=False)
    conversion_errors(model, plan)
    assert_untouched(model, before)


def test_training_and_frozen_flags_go_over():
    model = SmallResNet()
    model.layer1.eval()
    model.conv1.weight.requires_grad_(False)
    small = convert(model, planned(model, 4, torch.randn(IMAGE)))
    assert small.training
    assert small.conv1.training
    assert not small.layer1["conv1"].training
    assert {name: p.requires_grad for name, p in small.conv1.named_parameters()} == {
        name: name == "bias" for name, _ in small.conv1.named_parameters()
    }
    assert all(p.requires_grad for p in small.layer1["conv1"].parameters())


def test_row_20_frozen_layers_stay_frozen():
    model = nn.Sequential(conv(), conv()).requires_grad_(False)
    small = convert(model, planned(model))
    assert not any(p.requires_grad for p in small.parameters())


def test_the_structure_alone_takes_saved_factors():
    model = SmallResNet().eval()
    plan = planned(model, 4, torch.randn(IMAGE))
    small = convert(model, plan)
    other = convert(SmallResNet().eval(), plan, decompose=False)
    other.load_state_dict(small.state_dict())
    x = torch.randn(IMAGE)
    with torch.no_grad():
        torch.testing.assert_close(other(x), small(x), rtol=0, atol=0)


def test_the_structure_alone_needs_no_finite_weights():
    model = SmallResNet()
    plan = planned(model, 4, torch.randn(IMAGE))
    model.conv1.weight.data.fill_(torch.nan)
    assert convert(model, plan, decompose=False).conv1.ranks == plan["conv1"].ranks


def test_converting_twice_gives_the_same_bits():
    model = SmallResNet()
    plan = planned(model, 4, torch.randn(IMAGE))
    one, two = convert(model, plan), convert(model, plan)
    torch.testing.assert_close(dict(one.state_dict()), dict(two.state_dict()), rtol=0, atol=0)


def test_a_plan_from_a_file_converts_alike(tmp_path: Path):
    model = SmallResNet()
    plan = planned(model, 4, torch.randn(IMAGE))
    plan.save(tmp_path / "plan.json")
    one, two = convert(model, plan), convert(model, Plan.load(tmp_path / "plan.json"))
    torch.testing.assert_close(dict(one.state_dict()), dict(two.state_dict()), rtol=0, atol=0)


def test_hooks_go_over_to_the_factorized_layer():
    model = nn.Sequential(conv(), conv()).eval()
    model[0].register_forward_hook(lambda module, args, out: out * 2)
    model[0].register_forward_pre_hook(lambda module, args: (args[0] + 1,))
    seen = []
    model[0].register_full_backward_hook(lambda module, before, after: seen.append(after[0].shape))
    small = convert(model, planned(model, 10**6, allow_larger=True))
    torch.testing.assert_close(small(X), model(X), rtol=1e-4, atol=1e-4)
    small(X.clone().requires_grad_()).sum().backward()
    assert seen == [(2, 16, 8, 8)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_row_5_models_of_other_types(dtype: torch.dtype):
    model = SmallResNet().to(dtype)
    x = torch.randn(IMAGE, dtype=dtype)
    small = convert(model, planned(model, 4, x))
    assert {p.dtype for p in small.parameters()} == {dtype}
    assert small(x).dtype == dtype


def test_row_7_converting_under_autocast_changes_nothing():
    model = SmallResNet()
    plan = planned(model, 4, torch.randn(IMAGE))
    outside = convert(model, plan)
    with torch.autocast("cpu", torch.bfloat16):
        inside = convert(model, plan)
    torch.testing.assert_close(dict(inside.state_dict()), dict(outside.state_dict()), rtol=0, atol=0)


# -- NaN ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_rows_1_and_2_nan_and_inf_are_refused_with_the_layers_name(bad: float):
    model = SmallResNet()
    plan = planned(model, 4, torch.randn(IMAGE))
    model.layer1["conv2"].weight.data[0, 0] = bad
    for attempt in (lambda: planned(model, 4, torch.randn(IMAGE)), lambda: convert(model, plan)):
        with pytest.raises(TrainingError, match=r"layer layer1\.conv2: 9 of 5184 weights are NaN or Inf"):
            attempt()


# -- a plan for another model ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: setattr(m, "conv1", nn.Conv2d(6, 12, 5)), r"conv1: the plan is for a conv2d weight \(12, 6, 3, 3\)"),
        (lambda m: setattr(m, "conv1", nn.Identity()), "this model has Identity"),
        (lambda m: delattr(m, "conv1"), "names layer conv1, which this model lacks.*Did you mean"),
        (lambda m: setattr(m, "conv1", nn.Conv2d(12, 12, 3, groups=2)), r"conv1: .* in 2 groups; make the plan"),
        (lambda m: weight_norm(m.conv1), "conv1: .*ParametrizedConv2d"),
    ],
)
def test_a_plan_for_another_model_is_refused(change, message: str):
    model = SmallResNet()
    plan = planned(model, 4, torch.randn(IMAGE))
    other = SmallResNet()
    change(other)
    with pytest.raises(PlanError, match=message):
        convert(other, plan)


def test_converting_a_converted_model_is_refused():
    model = SmallResNet()
    plan = planned(model, 4, torch.randn(IMAGE))
    with pytest.raises(PlanError, match="this model has TTConv2d"):
        convert(convert(model, plan), plan)


# -- afterwards --------------------------------------------------------------------------------------------------


def test_conversion_errors_are_those_of_the_layers():
    model = SmallResNet()
    plan = planned(model, 4, torch.randn(IMAGE))
    small, errors = convert(model, plan), conversion_errors(model, plan)
    assert set(errors) == set(plan)
    for name, error in errors.items():
        w = model.get_submodule(name).weight
        truth = ((w - small.get_submodule(name).dense_weight()).norm() / w.norm()).item()
        assert error == pytest.approx(truth, rel=1e-4)
        assert 0.05 < error < 1
    full = planned(model, 10**6, torch.randn(IMAGE), allow_larger=True)
    assert max(conversion_errors(model, full).values()) < 1e-5


def test_spectra_are_those_of_the_weight_with_outputs_first():
    model = nn.Sequential(nn.ConvTranspose2d(8, 32, 3))
    ranks = {"svd": [8 * 9], "tucker": [8, 32]}
    for method, lengths in ranks.items():
        plan = planned(model, 4, torch.randn(1, 8, 6, 6), method=method, allow_larger=True)
        found = planned_spectra(model, plan)["0"]
        assert [len(values) for _, values in sorted(found)] == [min(n, 32) for n in lengths]
        matrix = model[0].weight.detach().transpose(0, 1).flatten(1).double()
        torch.testing.assert_close(found[-1][1], torch.linalg.svdvals(matrix), rtol=1e-5, atol=1e-5)


def test_a_compressed_model_of_another_plan_is_refused():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    plan = planned(model, 2, torch.randn(1, 8), method="svd", allow_larger=True)
    for other, words in ((model, "0 is Linear"), (nn.Sequential(), "0 is nothing")):
        with pytest.raises(ConvertError, match=f"{words} in the compressed model, not a factorized layer"):
            conversion_errors(model, plan, other)


def test_the_error_of_a_zero_weight_is_zero():
    model = nn.Sequential(conv())
    nn.init.zeros_(model[0].weight)
    assert conversion_errors(model, planned(model)) == {"0": 0.0}


def test_reestimated_batchnorm_holds_the_mean_and_variance_of_all_batches():
    model = SmallResNet()
    batches = [torch.randn(4, *IMAGE[1:]) * 3 + 1 for _ in range(3)]
    model.layer1.eval()
    flags, momenta = [m.training for m in model.modules()], model.bn1.momentum
    assert reestimate_batchnorm(model, iter(batches)) == 3
    with torch.no_grad():
        seen = [model.conv1(x) for x in batches]
    mean = torch.stack([y.mean(dim=(0, 2, 3)) for y in seen]).mean(dim=0)
    variance = torch.stack([y.var(dim=(0, 2, 3)) for y in seen]).mean(dim=0)
    torch.testing.assert_close(model.bn1.running_mean, mean, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(model.bn1.running_var, variance, rtol=1e-4, atol=1e-5)
    assert [m.training for m in model.modules()] == flags
    assert model.bn1.momentum == momenta


def test_reestimating_without_batches_changes_nothing():
    model = SmallResNet()
    model(torch.randn(IMAGE))
    before = snapshot(model)
    assert reestimate_batchnorm(model, []) == 0
    torch.testing.assert_close(dict(model.state_dict()), before["state"], rtol=0, atol=0)
    assert reestimate_batchnorm(nn.Sequential(conv()), [X]) == 0


def test_reestimating_that_fails_restores_the_momentum():
    model = SmallResNet()
    with pytest.raises(DataError, match=r"does not run on a batch of the data \(float32 1x5x12x12\): RuntimeError"):
        reestimate_batchnorm(model, [torch.ones(1, 5, 12, 12)])
    assert model.bn1.momentum == 0.1
    assert model.training


def test_tokens_convert_and_serve_any_length():
    model = Tokens().eval()
    small = convert(model, planned(model, 10**6, torch.randn(1, 5, 16), allow_larger=True))
    x = torch.randn(3, 9, 16)
    torch.testing.assert_close(small(x), model(x), rtol=1e-4, atol=1e-4)


def test_the_plan_in_a_file_is_plain_json(tmp_path: Path):
    planned(SmallResNet(), 4, torch.randn(IMAGE)).save(tmp_path / "plan.json")
    value = json.loads((tmp_path / "plan.json").read_text())
    assert value["layers"]["conv1"]["shape"] == [12, 6, 3, 3]
