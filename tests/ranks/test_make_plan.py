"""make_plan: which layers, which modes, what it costs, and that the costs are those of the converted model."""

import itertools
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import EntryPoint
from types import SimpleNamespace

import pytest
import torch
from small_nets import IMAGE, SmallResNet, Tokens, Twice
from torch import nn

from hodec.conversion.swap import convert
from hodec.cost.count import count_cost
from hodec.errors import ConfigError, PlanError
from hodec.formats.modes import Modes
from hodec.methods import METHODS, get_method
from hodec.plan.plan import Plan
from hodec.ranks import (
    RULES,
    Choice,
    LayerContext,
    Manual,
    NetContext,
    RankRule,
    get_rule,
    make_plan,
    register,
    rule_names,
    table,
)

X = torch.randn(IMAGE, generator=torch.Generator().manual_seed(0))


def planned(ranks: object = 4, **settings: object) -> Plan:
    return make_plan(SmallResNet(), Manual(ranks), example_input=X, **settings)


# -- costs are real ----------------------------------------------------------------------------------------------

NETS = {
    "resnet": (SmallResNet, X),
    "resnet_batch_5": (SmallResNet, torch.randn(5, *IMAGE[1:])),
    "tokens": (Tokens, torch.randn(2, 5, 16)),
    "shared": (Twice, torch.randn(2, 6, 8, 8)),
    "encoder": (lambda: nn.Sequential(nn.Linear(16, 16), nn.TransformerEncoderLayer(16, 4, 32, batch_first=True)),
                torch.randn(2, 5, 16)),
}  # fmt: skip


def combinations() -> Iterator[object]:
    """Net, method, execution, number of modes; slow where a method has one execution, or a net is a larger batch."""
    for net, method, (execution, n_modes) in itertools.product(
        NETS, METHODS, [("auto", 2), ("merged", 3), ("chain", 2)]
    ):
        executions = [METHODS[method].format(kind).executions for kind in METHODS[method].layers]
        if execution != "auto" and not all(execution in each for each in executions):
            continue
        if net in ("tokens", "encoder") and "linear" not in METHODS[method].layers:
            continue
        fast = method == "tt" or (execution == "auto" and net != "resnet_batch_5")
        yield pytest.param(net, method, execution, n_modes, marks=[] if fast else [pytest.mark.slow])


@pytest.mark.parametrize(("net", "method", "execution", "n_modes"), list(combinations()))
def test_the_plans_totals_are_those_of_the_converted_model(net: str, method: str, execution: str, n_modes: int):
    build, x = NETS[net]
    model = build()
    plan = make_plan(model, Manual(4), method=method, example_input=x, execution=execution, n_modes=n_modes,
                     allow_larger=True)  # fmt: skip
    for name, layer in plan.items():
        if 1 in layer.ranks:  # torch then multiplies elementwise, which its counter does not see
            plan = plan.without(name)
    if not len(plan):
        pytest.skip("every layer has a rank of 1")
    dense, small = count_cost(model, x), count_cost(convert(model, plan), x)
    assert (plan.params_before, plan.macs_before) == (dense.params, dense.macs)
    assert (plan.params_after, plan.macs_after) == (small.params, small.macs)
    assert plan.params_after != plan.params_before


def test_tucker_2_totals_too():
    plan = planned(5, n_modes=1, exclude=["fc"])
    small = count_cost(convert(SmallResNet(), plan), X)
    assert (plan.params_after, plan.macs_after) == (small.params, small.macs)


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_resnet18_totals(method: str):
    from torchvision.models import resnet18

    model, x = resnet18().eval(), torch.randn(1, 3, 224, 224)
    plan = make_plan(model, Manual(32), method=method, example_input=x, exclude=["conv1", "fc"], allow_larger=True)
    assert (plan.params_before, plan.macs_before) == (11_689_512, 1_814_073_344)
    small = count_cost(convert(model, plan), x)
    assert (plan.params_after, plan.macs_after) == (small.params, small.macs)


# -- layers that are not worth it ----------------------------------------------------------------------------------


def test_row_11_a_layer_that_would_cost_more_stays_dense_with_the_numbers():
    model = SmallResNet()
    with pytest.raises(PlanError, match="no layer is left to factorize.*not worth it"):
        make_plan(model, Manual(10**6), example_input=X)
    plan = make_plan(model, Manual({"layer1.conv2": 4, "layer1.conv1": 10**6}), example_input=X)
    assert set(plan) == {"layer1.conv2"}
    larger = make_plan(model, Manual({"layer1.conv1": 10**6}), example_input=X, allow_larger=True)["layer1.conv1"]
    assert not larger.saves()
    assert plan.skipped["layer1.conv1"] == (
        f"at ranks {list(larger.ranks)} it would cost {larger.params_after:,} parameters (dense 2,592) and "
        f"{larger.macs_after:,} MACs (dense {larger.macs_before:,}): not worth it"
    )


def test_row_11_no_planned_layer_costs_more_than_it_did():
    for cap in range(1, 20):
        try:
            plan = planned(cap)
        except PlanError:
            continue
        assert all(layer.saves() for layer in plan.values())
        assert plan.params_after < plan.params_before
        assert plan.macs_after <= plan.macs_before


def test_allow_larger_keeps_them():
    plan = planned(10**6, allow_larger=True)
    assert len(plan) == 5
    assert plan.skipped == {}
    assert plan.params_after > plan.params_before
    assert plan.reduction["params"] < 0


# -- which layers --------------------------------------------------------------------------------------------------


def test_include_and_exclude_are_globs():
    assert set(planned(3, include=["layer1.conv*"])) == {"layer1.conv1", "layer1.conv2"}
    plan = planned(3, include=["layer1.*", "conv1"], exclude=["*.shortcut", "layer1.conv2"])
    assert set(plan) == {"layer1.conv1", "conv1"}
    assert plan.skipped == {
        "layer1.conv2": "excluded by 'layer1.conv2'",
        "layer1.shortcut": "excluded by '*.shortcut'",
        "fc": "not among include",
    }


def test_planned_and_skipped_stand_in_the_order_of_the_model():
    plan = planned(3, exclude=["conv1", "fc"])
    assert list(plan) == ["layer1.conv1", "layer1.conv2", "layer1.shortcut"]
    assert list(plan.skipped) == ["conv1", "fc"]


@pytest.mark.parametrize("key", ["include", "exclude"])
def test_row_21_a_glob_that_matches_nothing_names_its_key_and_near_matches(key: str):
    with pytest.raises(PlanError, match=rf"{key} 'layer1\.con1' matches no layer\. Did you mean: layer1\.conv1"):
        planned(3, **{key: ["layer1.con1"]})
    with pytest.raises(PlanError, match=f"{key}: 3 given; allowed: a layer glob"):
        planned(3, **{key: 3})


def test_row_21_including_only_what_cannot_be_factorized_gives_the_reason():
    model = nn.Sequential(nn.Conv2d(6, 6, 3, groups=6), nn.Conv2d(6, 6, 3))
    with pytest.raises(PlanError, match="no layer is left to factorize.*0: depthwise convolution"):
        make_plan(model, Manual(2), example_input=X, include=["0"])


def test_row_20_a_model_without_weights_is_refused():
    with pytest.raises(PlanError, match="no layer is left to factorize"):
        make_plan(nn.Sequential(nn.ReLU()), Manual(2), example_input=X)


# -- methods, modes, executions ------------------------------------------------------------------------------------


def test_unknown_methods_are_refused_with_those_there_are():
    with pytest.raises(PlanError, match="unknown method 'tt_clasical'; there are .*Did you mean: tt_classical"):
        planned(3, method="tt_clasical")
    for name, method in METHODS.items():
        assert get_method(name) is method
        assert method.name == name
        assert method.source


@pytest.mark.parametrize(("n_modes", "inputs"), [(1, (24,)), (2, (4, 6)), (3, (2, 3, 4)), (4, (2, 2, 2, 3))])
def test_modes_split_evenly_into_as_many_as_asked_for(n_modes: int, inputs: tuple[int, ...]):
    layer = planned(3, n_modes=n_modes, include=["layer1.conv2"], allow_larger=True)["layer1.conv2"]
    assert layer.modes.inputs == inputs
    assert len(layer.ranks) == 2 * n_modes


def test_linear_layers_need_two_modes():
    plan = planned(3, n_modes=1)
    assert plan.skipped["fc"] == "method tt needs at least 2 modes a side for a linear layer"


def test_modes_by_glob_the_last_match_counts():
    given = {"layer1.*conv2": Modes((6, 4), (6, 4)), "layer1.conv2": Modes((12, 2), (2, 12))}
    plan = planned(3, modes=given, include=["layer1.conv*"])
    assert plan["layer1.conv2"].modes == given["layer1.conv2"]
    assert plan["layer1.conv1"].modes == Modes((3, 4), (4, 6))
    with pytest.raises(PlanError, match=r"modes 'layr1\.conv2' matches no layer"):
        planned(3, modes={"layr1.conv2": Modes((6, 4), (6, 4))})
    with pytest.raises(PlanError, match="do not fit 24 -> 24 channels"):
        planned(3, modes={"layer1.conv2": Modes((6, 5), (6, 4))})


@pytest.mark.parametrize("n_modes", [0, -1, 9, 2.5])
def test_senseless_numbers_of_modes_are_refused(n_modes: int):
    with pytest.raises(
        PlanError, match=f"n_modes: {n_modes} given; allowed: a whole number of at least 1 and at most 4"
    ):
        planned(3, n_modes=n_modes)


def test_row_12_prime_channels_and_three_inputs_are_planned_and_converted():
    model = nn.Sequential(nn.Conv2d(3, 17, 3), nn.Conv2d(17, 127, 3), nn.Conv2d(127, 16, 3)).eval()
    x = torch.randn(1, 3, 10, 10)
    plan = make_plan(model, Manual(8), example_input=x)
    assert plan["1"].modes == Modes((1, 17), (1, 127))
    small = convert(model, plan)
    assert small(x).shape == model(x).shape
    full = make_plan(model, Manual(10**6), example_input=x, allow_larger=True)
    torch.testing.assert_close(convert(model, full)(x), model(x), rtol=1e-4, atol=1e-4)


def test_executions_are_chosen_checked_and_obeyed():
    for execution in ("merged", "chain"):
        plan = planned(3, execution=execution)
        assert {layer.resolved_execution for layer in plan.values()} == {execution}
    auto = planned(3)
    for layer in auto.values():
        assert layer.execution == "auto"
        assert layer.resolved_execution in layer.format.executions
    with pytest.raises(PlanError, match="execution 'chian' is not one of auto, merged, chain"):
        planned(3, execution="chian")
    with pytest.raises(PlanError, match="execution 'merged' is not one of auto, chain"):
        planned(3, execution="merged", method="tt_classical", allow_larger=True)


# -- rules ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class FirstOnly(RankRule):
    """A rule that likes the first layer only."""

    name = "first_only"

    def choose(self, layers: Mapping[str, LayerContext], net: NetContext) -> dict[str, Choice]:
        first, *rest = layers
        least = tuple(1 for _ in layers[first].full_ranks)
        choices = {name: Choice(None, reason="not first") for name in rest}
        return {first: Choice(least, notes=("as small as can be",)), **choices}


def test_any_rule_decides_and_is_named_in_the_plan():
    plan = make_plan(SmallResNet(), FirstOnly(), example_input=X)
    assert plan.rule == "first_only"
    assert list(plan) == ["conv1"]
    assert plan["conv1"].ranks == (1, 1, 1, 1)
    assert plan["conv1"].notes == ("as small as can be",)
    assert set(plan.skipped.values()) == {"not first"}


def test_ranks_of_a_rule_are_checked():
    class Wrong(FirstOnly):
        def choose(self, layers: Mapping[str, LayerContext], net: NetContext) -> dict[str, Choice]:
            return {name: Choice((99,) * len(layer.full_ranks)) for name, layer in layers.items()}

    with pytest.raises(PlanError, match="conv1 .*do not fit"):
        make_plan(SmallResNet(), Wrong(), example_input=X)


def test_rules_by_name():
    assert get_rule("manual") is Manual
    with pytest.raises(ConfigError, match="unknown rank rule 'manul'; there are .*Did you mean: manual"):
        get_rule("manul")


def test_a_rule_is_registered_once_and_takes_no_other_s_name(monkeypatch):
    monkeypatch.setattr(table, "RULES", dict(RULES))
    assert register(FirstOnly) is FirstOnly
    assert register(FirstOnly) is get_rule("first_only") is FirstOnly
    for name in ("manual", ""):
        with pytest.raises(ConfigError, match=f"has the name {name!r}; give it one that none of these have: manual, "):
            register(type("Other", (FirstOnly,), {"name": name}))


def test_an_installed_package_offers_rules_that_are_loaded_when_asked_for(monkeypatch):
    """The entry point is a real one; only where packages are listed is stood in for."""
    monkeypatch.setattr(table, "RULES", dict(RULES))
    monkeypatch.setitem(
        sys.modules, "plugin", SimpleNamespace(First=FirstOnly, Fake=type("Fake", (FirstOnly,), {"name": "manual"}))
    )
    offered = {name: EntryPoint(name, value, table.ENTRY_POINTS) for name, value in
               {"first_only": "plugin:First", "manual": "plugin:Fake", "broken": "plugin:First"}.items()}  # fmt: skip
    monkeypatch.setattr(table, "_offered", lambda: offered)
    assert rule_names() == (*RULES, "first_only", "broken")
    assert "first_only" not in table.RULES
    assert get_rule("first_only") is table.RULES["first_only"] is FirstOnly
    with pytest.raises(ConfigError, match="has the name 'manual'"):
        get_rule("manual")
    with pytest.raises(ConfigError, match="entry point broken = plugin:First of hodec.rules is no RankRule"):
        get_rule("broken")


def test_rules_and_their_settings_are_known_without_torch():
    code = "import sys, hodec.ranks; assert 'torch' not in sys.modules and hodec.ranks.Budget(0.4).targets"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


# -- what else a plan remembers --------------------------------------------------------------------------------------


def test_inputs_are_remembered_for_the_dry_run():
    assert planned(4).inputs == (((2, 6, 12, 12), "float32"),)


def test_the_same_model_gives_the_same_plan():
    assert planned(4) == planned(4)


def test_row_22_a_compiled_model_has_the_plan_of_the_plain_one():
    plain = SmallResNet()
    plan = make_plan(torch.compile(plain, backend="eager"), Manual(4), example_input=X)
    assert plan == make_plan(plain, Manual(4), example_input=X)
