"""Which layers are eligible, the swap, and what it must not touch: most of the fault matrix lives here."""

import copy
import json
import logging
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from small_nets import IMAGE, SmallResNet, Tokens, Twice, assert_untouched, snapshot
from torch import Tensor, nn
from torch.nn.utils import prune
from torch.nn.utils.parametrizations import spectral_norm, weight_norm

from hodec.conversion import conversion_errors, convert, eligible_layers, match_names, reestimate_batchnorm
from hodec.cost.count import count_cost
from hodec.errors import ConvertError, PlanError, TrainingError
from hodec.layers.base import FactorizedLayer
from hodec.layers.tt import TTConv2d, TTLinear
from hodec.methods import METHODS
from hodec.plan import Plan
from hodec.ranks import Manual, make_plan

X = torch.randn(2, 16, 8, 8, generator=torch.Generator().manual_seed(0))
TT = METHODS["tt"]


def planned(model: nn.Module, ranks: object = 4, x: object = X, **settings: object) -> Plan:
    return make_plan(model, Manual(ranks), example_input=x, **settings)


def conv(**settings: object) -> nn.Conv2d:
    return nn.Conv2d(16, 16, 3, padding=1, **settings)


def factorized(model: nn.Module) -> dict[str, FactorizedLayer]:
    return {name: m for name, m in model.named_modules() if isinstance(m, FactorizedLayer)}


class Bare(nn.Module):
    """Children by name; ``run`` says what the forward pass does with them."""

    def __init__(self, run, **children: nn.Module) -> None:
        super().__init__()
        self.run = run
        for name, child in children.items():
            self.add_module(name, child)

    def forward(self, x: Tensor) -> Tensor:
        return self.run(self, x)


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


# -- rows 13 to 22: what cannot be swapped --------------------------------------------------------------------------


@pytest.mark.parametrize("groups", [2, 16])
def test_row_13_grouped_and_depthwise_convolutions_stay_dense(groups: int):
    model = nn.Sequential(conv(groups=groups), conv())
    plan = planned(model)
    assert plan.skipped["0"] == f"grouped convolution (groups={groups})"
    assert set(factorized(convert(model, plan))) == {"1"}


def test_row_14_layers_of_other_kinds_stay_dense_with_the_reason():
    def run(self: nn.Module, x: Tensor) -> Tensor:
        flat = self.one(x.flatten(2)).unflatten(2, (8, 8))
        deep = self.three(x.unsqueeze(2)).squeeze(2)
        return self.ok(self.up(flat + deep + self.own(x))) + self.emb(torch.zeros(2, dtype=torch.long)).sum()

    class OwnConv(nn.Conv2d):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * 2

    model = Bare(
        run,
        one=nn.Conv1d(16, 16, 1),
        three=nn.Conv3d(16, 16, 1),
        up=nn.ConvTranspose2d(16, 16, 3, padding=1),
        own=OwnConv(16, 16, 3, padding=1),
        emb=nn.Embedding(4, 3),
        ok=conv(),
    )
    plan = planned(model)
    kinds = {"one": "Conv1d", "three": "Conv3d", "up": "ConvTranspose2d", "own": "OwnConv", "emb": "Embedding"}
    assert plan.skipped == {name: f"method tt has no layer for {kind}" for name, kind in kinds.items()}
    assert set(plan) == {"ok"}
    assert set(factorized(convert(model, plan))) == {"ok"}


def test_row_14_a_method_without_a_linear_layer_says_so():
    model = nn.Sequential(conv(), nn.Flatten(), nn.Linear(1024, 10))
    plan = planned(model, 9, method="tt_classical", allow_larger=True)
    assert plan.skipped == {"2": "method tt_classical has no layer for Linear"}


def test_row_14_lazy_layers_are_refused_before_they_are_initialized():
    model = nn.Sequential(conv(), nn.LazyConv2d(8, 3))
    before = torch.get_rng_state()
    with pytest.raises(PlanError, match="layer 1 is lazy and has no weight yet: run the model once"):
        planned(model)
    assert type(model[1]) is nn.LazyConv2d
    assert torch.equal(torch.get_rng_state(), before)
    model(X)
    assert set(planned(model)) == {"0", "1"}


@pytest.mark.parametrize("mode", ["reflect", "replicate", "circular"])
def test_row_14_settings_of_convolutions_go_over(mode: str):
    model = nn.Sequential(nn.Conv2d(16, 16, 3, stride=(1, 2), padding=(2, 1), dilation=(2, 1), padding_mode=mode))
    small = convert(model.double(), planned(model, 10**6, X.double(), allow_larger=True))
    torch.testing.assert_close(small(X.double()), model(X.double()), rtol=1e-9, atol=1e-9)


def test_row_15_a_shared_module_stays_one_module_under_all_its_names():
    model = Twice()
    x = torch.randn(1, 6, 8, 8)
    plan = planned(model, 3, x)
    assert set(plan) == {"again", "first"}
    assert plan["first"].aliases == ("second",)
    small = convert(model, plan)
    assert small.first is small.second
    assert type(small.first) is TTConv2d
    assert sum(p.numel() for p in small.parameters()) == plan.params_after


def test_row_15_modules_shared_through_a_shared_parent():
    block = nn.Sequential(conv(), nn.ReLU())
    model = nn.Sequential(block, block)
    plan = planned(model)
    assert plan["0.0"].aliases == ("1.0",)
    small = convert(model, plan)
    assert small[0][0] is small[1][0]
    assert count_cost(small, X).params == plan.params_after


def test_row_15_a_plan_that_misses_a_name_of_a_shared_module_is_refused():
    model = Twice()
    value = planned(model, 3, torch.randn(1, 6, 8, 8)).to_dict()
    value["layers"]["first"]["aliases"] = []
    with pytest.raises(PlanError, match="first cannot be factorized: it hangs in this model as first, second"):
        convert(model, Plan.from_dict(value))
    value["layers"]["first"]["aliases"] = ["second", "third"]
    with pytest.raises(PlanError, match="first, second"):
        convert(model, Plan.from_dict(value))


def test_row_16_tied_weights_stay_dense_and_tied():
    model = Bare(
        lambda self, x: self.head(self.body(self.emb(x))), emb=nn.Embedding(20, 16), body=nn.Linear(16, 16),
        head=nn.Linear(16, 20, bias=False),
    )  # fmt: skip
    model.head.weight = model.emb.weight
    plan = planned(model, x=torch.zeros(2, 5, dtype=torch.long))
    assert plan.skipped["head"] == "its weight is shared with emb"
    small = convert(model, plan)
    assert small.head.weight is small.emb.weight
    assert type(small.body) is TTLinear


def test_row_16_tied_biases_too():
    model = nn.Sequential(conv(), conv(), conv())
    model[1].bias = model[0].bias
    plan = planned(model)
    assert plan.skipped == {"0": "its bias is shared with 1", "1": "its bias is shared with 0"}


def test_row_16_a_weight_that_the_model_itself_holds():
    model = nn.Sequential(conv(), conv())
    model.register_parameter("kept", model[0].weight)
    assert planned(model).skipped == {"0": "its weight is shared with the model itself"}


def test_row_17_a_weight_used_functionally_only_is_seen_as_never_called():
    model = Bare(
        lambda self, x: self.ok(F.conv2d(x, self.functional.weight, padding=1)), functional=conv(), ok=conv()
    )
    plan = planned(model)
    assert "never called" in plan.skipped["functional"]
    assert set(factorized(convert(model, plan))) == {"ok"}


def test_row_17_a_weight_used_in_both_ways_is_found_by_the_dry_run():
    model = Bare(lambda self, x: self.both(F.conv2d(x, self.both.weight, padding=1)), both=conv())
    plan = planned(model)
    with pytest.raises(ConvertError, match=r"does not run in training mode: AttributeError.*weight.*exclude=\[..\]"):
        convert(model, plan)


def test_row_17_a_break_in_evaluation_only_is_found_too():
    def run(self: nn.Module, x: Tensor) -> Tensor:
        y = self.conv(x)
        return y if self.training else y + self.conv.weight.sum()

    model = Bare(run, conv=conv())
    plan = planned(model)
    with pytest.raises(ConvertError, match="does not run in evaluation mode"):
        convert(model, plan)


def test_row_17_the_output_projection_of_attention_stays_dense():
    model = Bare(
        lambda self, x: self.fc(self.attention(x, x, x)[0]),
        attention=nn.MultiheadAttention(16, 4, batch_first=True),
        fc=nn.Linear(16, 16),
    )
    x = torch.randn(2, 5, 16)
    plan = planned(model, x=x)
    assert list(plan.skipped) == ["attention.out_proj"]
    small = convert(model, plan)
    for training in (True, False):
        assert small.train(training)(x).shape == x.shape


def test_row_17_a_plain_linear_child_of_attention_is_refused():
    model = Bare(
        lambda self, x: self.fc(self.attention(x, x, x)[0]),
        attention=nn.MultiheadAttention(16, 4, batch_first=True),
        fc=nn.Linear(16, 16),
    )
    model.attention.out_proj = nn.Linear(16, 16)
    plan = planned(model, x=torch.randn(2, 5, 16))
    assert "MultiheadAttention reads the weights of its children" in plan.skipped["attention.out_proj"]


def test_row_18_transformer_encoder_layers_stay_dense_and_run_in_both_modes():
    model = nn.Sequential(nn.Linear(16, 16), nn.TransformerEncoderLayer(16, 4, 32, batch_first=True))
    x = torch.randn(2, 5, 16)
    plan = planned(model, x=x)
    assert set(plan) == {"0"}
    for name in ("1.linear1", "1.linear2"):
        assert plan.skipped[name] == "TransformerEncoderLayer reads the weights of its children directly"
    small = convert(model, plan)
    with torch.no_grad():
        for training in (True, False):
            assert small.train(training)(x).shape == x.shape


def _old_weight_norm(module: nn.Module) -> nn.Module:
    return torch.nn.utils.weight_norm(module)


@pytest.mark.parametrize("wrap", [weight_norm, spectral_norm, _old_weight_norm])
@pytest.mark.filterwarnings("ignore:.*weight_norm.*is deprecated:FutureWarning")
def test_row_19_parametrized_weights_are_refused_with_the_remedy(wrap):
    model = nn.Sequential(wrap(conv()), conv())
    plan = planned(model)
    assert "weight is parametrized" in plan.skipped["0"]
    assert "remove the parametrization first" in plan.skipped["0"]
    assert set(plan) == {"1"}


def test_row_19_pruned_weights_too():
    model = nn.Sequential(prune.l1_unstructured(conv(), "weight", 0.5), conv())
    assert "parametrized" in planned(model).skipped["0"]


def test_row_20_unused_layers_are_skipped_and_if_none_is_left_that_is_an_error():
    model = Bare(lambda self, x: self.used(x), used=conv(), unused=conv())
    plan = planned(model)
    assert "never called by the forward pass" in plan.skipped["unused"]
    with pytest.raises(PlanError, match="no layer is left to factorize.*unused: never called"):
        planned(model, exclude=["used"])


def test_row_21_globs_that_match_nothing_are_refused_with_near_matches():
    names = ["layer1.0.conv1", "layer1.0.conv2", "fc"]
    assert match_names("layer1.*", names, "include") == names[:2]
    assert match_names("*", names, "include") == names
    with pytest.raises(PlanError, match=r"include 'layer1\.0\.cnv1' matches no layer\. Did you mean: layer1\.0\.conv1"):
        match_names("layer1.0.cnv1", names, "include")
    with pytest.raises(PlanError, match=r"matches no layer\. Layers are: layer1\.0\.conv1, "):
        match_names("zzzz*", names, "include")


@pytest.mark.parametrize("place", ["whole", "part"])
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_row_22_compiled_models(place: str):
    plain = nn.Sequential(conv(), nn.Sequential(conv()))
    if place == "whole":
        model = torch.compile(plain, backend="eager")
    else:
        model = copy.deepcopy(plain)
        model[1] = torch.compile(model[1], backend="eager")
    plan = planned(model)
    assert len(plan) == 2
    if place == "whole":
        assert set(plan) == {"0", "1.0"}
        assert set(factorized(convert(plain, plan))) == {"0", "1.0"}
        assert set(conversion_errors(model, plan)) == {"0", "1.0"}
    small = convert(model, plan)
    assert len(factorized(small)) == 2
    assert small(X).shape == X.shape


def test_a_model_that_is_one_layer_is_refused_with_the_remedy():
    with pytest.raises(PlanError, match=r"wrap it in nn\.Sequential"):
        planned(conv())


def test_a_layer_held_in_a_second_place_is_refused():
    """The swap would change parameters that nobody uses."""

    class Held(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = conv()
            self.also = [self.conv]

        def forward(self, x: Tensor) -> Tensor:
            return self.also[0](x)

    model = Held()
    plan = planned(model)
    with pytest.raises(ConvertError, match="conv: the forward pass does not call the factorized layer"):
        convert(model, plan)


def test_a_model_that_trains_on_more_inputs_than_it_evaluates_converts_with_a_word(caplog):
    class Detector(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = conv()

        def forward(self, x: Tensor, targets: Tensor | None = None) -> Tensor:
            if self.training and targets is None:
                raise ValueError("targets are missing")
            return self.conv(x)

    model = Detector()
    with caplog.at_level(logging.WARNING):
        small = convert(model, planned(model))
    assert "not even the dense model runs in training mode" in caplog.text
    assert type(small.conv) is TTConv2d


def test_eligible_layers_says_what_runs_where():
    sites, refused = eligible_layers(SmallResNet(), TT, torch.randn(IMAGE))
    assert {name: (site.kind, site.pixels) for name, site in sites.items()} == {
        "conv1": ("conv2d", (144, 144)),
        "layer1.conv1": ("conv2d", (144, 36)),
        "layer1.conv2": ("conv2d", (36, 36)),
        "layer1.shortcut": ("conv2d", (144, 36)),
        "fc": ("linear", (1, 1)),
    }
    assert refused == {}


# -- a plan for another model ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: setattr(m, "conv1", nn.Conv2d(6, 12, 5)), r"conv1: the plan is for a conv2d weight \(12, 6, 3, 3\)"),
        (lambda m: setattr(m, "conv1", nn.Identity()), "this model has Identity"),
        (lambda m: delattr(m, "conv1"), "names layer conv1, which this model lacks.*Did you mean"),
        (lambda m: setattr(m, "conv1", nn.Conv2d(12, 12, 3, groups=2)), r"conv1 cannot be factorized: grouped"),
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
    with pytest.raises(RuntimeError):
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
