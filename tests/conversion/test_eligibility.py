"""What cannot be swapped, and the reason the plan gives: rows 13 to 22 of the fault matrix."""

import copy
import logging

import pytest
import torch
import torch.nn.functional as F
from small_nets import IMAGE, SmallResNet, Twice
from swaps import X, conv, factorized, planned
from torch import Tensor, nn
from torch.nn.utils import prune
from torch.nn.utils.parametrizations import spectral_norm, weight_norm

from hodec.conversion.eligibility import eligible_layers, match_names
from hodec.conversion.swap import conversion_errors, convert
from hodec.cost.count import count_cost
from hodec.errors import ConvertError, PlanError
from hodec.layers.tt import TTConv2d
from hodec.methods import METHODS
from hodec.plan.plan import Plan

TT = METHODS["tt"]


class Bare(nn.Module):
    """Children by name; ``run`` says what the forward pass does with them."""

    def __init__(self, run, **children: nn.Module) -> None:
        super().__init__()
        self.run = run
        for name, child in children.items():
            self.add_module(name, child)

    def forward(self, x: Tensor) -> Tensor:
        return self.run(self, x)


@pytest.mark.parametrize("groups", [2, 16])
def test_row_13_grouped_convolutions_are_factorized_and_depthwise_ones_stay_dense(groups: int):
    model = nn.Sequential(conv(groups=groups), conv())
    plan = planned(model)
    assert ("depthwise convolution (groups=16)" in plan.skipped.get("0", "")) == (groups == 16)
    assert set(factorized(convert(model, plan))) == ({"1"} if groups == 16 else {"0", "1"})


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
    plan = planned(model, method="spatial_svd")
    kinds = {"one": "Conv1d", "three": "Conv3d", "emb": "Embedding"}
    assert plan.skipped["own"].startswith("OwnConv changes what Conv2d computes")
    assert {name: reason for name, reason in plan.skipped.items() if name != "own"} == {
        name: f"method spatial_svd has no layer for {layer_type}" for name, layer_type in kinds.items()
    }
    assert set(plan) == {"up", "ok"}
    assert set(factorized(convert(model, plan))) == {"up", "ok"}


def test_row_14_weights_without_real_numbers_stay_dense():
    def run(self: nn.Module, x: Tensor) -> Tensor:
        x = self.complex(x.to(torch.complex64)).real
        return self.last(x + self.empty(x.movedim(1, -1)[..., :0]).movedim(-1, 1))

    model = Bare(
        run, complex=nn.Conv2d(16, 16, 3, bias=False, dtype=torch.complex64), empty=nn.Linear(1, 16), last=conv()
    )
    model.empty.weight = nn.Parameter(torch.zeros(16, 0))
    plan = planned(model, method="svd")
    assert set(plan) == {"last"}
    assert "(16, 16, 3, 3) and type torch.complex64 holds no real numbers" in plan.skipped["complex"]
    assert "(16, 0) and type torch.float32 holds no real numbers" in plan.skipped["empty"]


def test_row_14_a_subclass_that_computes_the_same_is_a_layer_like_any_other():
    class Named(nn.Conv2d):
        def __init__(self, channels: int) -> None:
            super().__init__(channels, channels, 3, padding=1)

    plain = nn.Sequential(Named(16), nn.modules.linear.NonDynamicallyQuantizableLinear(8, 8)).double()
    small = convert(plain, planned(plain, 10**6, X.double(), allow_larger=True))
    assert set(factorized(small)) == {"0", "1"}
    torch.testing.assert_close(small(X.double()), plain(X.double()), rtol=1e-9, atol=1e-9)


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


def test_row_16_a_weight_that_the_model_itself_holds():
    model = nn.Sequential(conv(), conv())
    model.register_parameter("kept", model[0].weight)
    assert planned(model).skipped["0"].startswith("its weight is shared with the model itself,")


def test_row_17_a_weight_used_functionally_only_is_seen_as_never_called():
    model = Bare(lambda self, x: self.ok(F.conv2d(x, self.functional.weight, padding=1)), functional=conv(), ok=conv())
    plan = planned(model)
    assert "never called" in plan.skipped["functional"]
    assert set(factorized(convert(model, plan))) == {"ok"}


def test_row_17_a_weight_used_in_both_ways_is_rebuilt_where_it_is_read():
    model = Bare(lambda self, x: self.both(F.conv2d(x, self.both.weight, padding=1)), both=conv()).double().eval()
    small = convert(model, planned(model, 10**6, X.double(), allow_larger=True))
    torch.testing.assert_close(small(X.double()), model(X.double()), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("mode", ["training", "evaluation"])
def test_row_17_a_parent_that_reads_what_only_torchs_layer_has_is_found_by_the_dry_run(mode: str):
    def run(self: nn.Module, x: Tensor) -> Tensor:
        reads = self.training == (mode == "training")
        return self.conv(x) + len(self.conv._reversed_padding_repeated_twice) if reads else self.conv(x)

    model = Bare(run, conv=conv())
    plan = planned(model)
    with pytest.raises(ConvertError, match=rf"does not run in {mode} mode: AttributeError.*exclude=\[conv\]"):
        convert(model, plan)


def _attends(attention: nn.Module) -> nn.Module:
    return Bare(lambda self, x: self.fc(self.attention(x, x, x)[0]), attention=attention, fc=nn.Linear(16, 16))


def test_row_17_the_weights_of_attention_are_planned_one_by_one():
    model, x = _attends(nn.MultiheadAttention(16, 4, batch_first=True)), torch.randn(2, 5, 16)
    plan = planned(model, x=x)
    assert list(plan) == ["attention.in_proj_weight", "attention.out_proj.weight", "fc"]
    assert not plan.skipped
    small = convert(model, plan)
    assert sum(p.numel() for p in small.parameters()) == plan.params_after
    for training in (True, False):
        assert small.train(training)(x).shape == x.shape


def test_row_17_a_plain_linear_child_of_attention_is_one_of_its_weights():
    model = _attends(nn.MultiheadAttention(16, 4, batch_first=True))
    model.attention.out_proj = nn.Linear(16, 16)
    assert "attention.out_proj.weight" in planned(model, x=torch.randn(2, 5, 16))


def test_row_17_subclasses_of_attention_stay_dense():
    class Own(nn.MultiheadAttention):
        pass

    plan = planned(_attends(Own(16, 4, batch_first=True)), x=torch.randn(2, 5, 16))
    assert plan.skipped == {
        "attention": "a subclass of nn.MultiheadAttention may use its weights in its own way",
        "attention.out_proj": "Own reads the weights of its children directly",
    }


def _old_weight_norm(module: nn.Module) -> nn.Module:
    return torch.nn.utils.weight_norm(module)


WRAPS = {"WeightNorm": weight_norm, "SpectralNorm": spectral_norm, "WeightNorm ": _old_weight_norm,
         "L1Unstructured": lambda m: prune.l1_unstructured(m, "weight", 0.5)}  # fmt: skip


@pytest.mark.parametrize("name", WRAPS)
@pytest.mark.filterwarnings("ignore:.*weight_norm.*is deprecated:FutureWarning")
def test_row_19_a_note_names_what_computes_a_weight(name: str):
    plan = planned(nn.Sequential(WRAPS[name](conv()), conv()))
    assert plan["0"].notes[0].startswith(f"its weight is computed from other parameters ({name.strip()}): conversion")
    assert not plan["1"].notes
    assert f"({name.strip()})" in str(plan).replace("\n", " ")


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
    assert {
        name: (site.layer_type, (site.call_sites.in_positions, site.call_sites.out_positions))
        for name, site in sites.items()
    } == {
        "conv1": ("conv2d", (144, 144)),
        "layer1.conv1": ("conv2d", (144, 36)),
        "layer1.conv2": ("conv2d", (36, 36)),
        "layer1.shortcut": ("conv2d", (144, 36)),
        "fc": ("linear", (1, 1)),
    }
    assert refused == {}
