"""The plan: what it costs, what it prints, how it is saved, edited by hand and refused."""

import copy
import dataclasses
import json
import math
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from small_nets import IMAGE, SmallResNet, Tokens

from hodec.calibration.input_covariance import collect_covariances
from hodec.conversion.swap import convert
from hodec.errors import HodecError, PlanError
from hodec.formats.calls import CallSites
from hodec.formats.modes import Modes
from hodec.plan.layer import LayerPlan
from hodec.plan.plan import Plan
from hodec.ranks import Manual, make_plan


@pytest.fixture
def model() -> SmallResNet:
    return SmallResNet()


@pytest.fixture
def plan(model: SmallResNet) -> Plan:
    return make_plan(model, Manual(4), example_input=torch.randn(IMAGE), exclude=["fc"])


def layer_plan(**changes: Any) -> LayerPlan:
    settings: dict[str, Any] = {
        "method": "tt",
        "layer_type": "conv2d",
        "shape": (64, 64, 3, 3),
        "modes": Modes((8, 8), (8, 8)),
        "ranks": (8, 20, 20, 8),
        "call_sites": CallSites.once((8, 8), (8, 8)),
    }
    return LayerPlan(**{**settings, **changes})


# -- costs -----------------------------------------------------------------------------------------------------


def test_costs_of_one_layer_by_hand():
    layer = layer_plan()
    assert layer.params_before == 64 * 64 * 9
    assert layer.macs_before == 64 * 64 * 64 * 9
    assert layer.params_after == 8 * 8 + 8 * 8 * 20 + 20 * 9 * 20 + 20 * 8 * 8 + 8 * 8
    assert layer.resolved_execution == "merged"
    assert layer.macs_after == 64 * (64 * 20 + 9 * 20 * 20 + 20 * 64)
    assert dataclasses.replace(layer, execution="chain").macs_after == (
        64 * (8 * 8 * 8 + 8 * 8 * 20 + 9 * 20 * 20 + 20 * 8 * 8 + 8 * 8 * 8)
    )


def test_break_even_of_a_square_3x3_layer():
    """2 C R + 9 R^2 = 9 C^2 at R = 0.895 C."""
    one = {"modes": Modes((64,), (64,)), "shape": (64, 64, 3, 3)}
    assert layer_plan(ranks=(57, 57), **one).saves()
    assert not layer_plan(ranks=(58, 58), **one).saves()


def test_a_layer_that_trades_one_cost_for_the_other_saves_nothing():
    classical = layer_plan(method="tt_classical", ranks=(9, 8))
    assert classical.params_after < classical.params_before
    assert classical.macs_after > classical.macs_before
    assert not classical.saves()
    full = layer_plan(modes=Modes((64,), (64,)), ranks=(64, 64))
    assert not full.saves()
    merged_linear = layer_plan(layer_type="linear", shape=(64, 64), ranks=(4,), execution="merged")
    assert merged_linear.macs_after == merged_linear.macs_before  # fewer numbers, the same work
    assert merged_linear.saves()


def test_totals_are_the_dense_model_less_what_the_layers_save(plan: Plan, model: SmallResNet):
    assert plan.params_before == sum(p.numel() for p in model.parameters())
    assert plan.params_before - plan.params_after == sum(p.params_before - p.params_after for p in plan.values()) > 0
    assert plan.macs_before - plan.macs_after == sum(p.macs_before - p.macs_after for p in plan.values()) > 0
    assert plan.reduction == {
        "params": pytest.approx(1 - plan.params_after / plan.params_before),
        "macs": pytest.approx(1 - plan.macs_after / plan.macs_before),
    }


# -- the mapping -----------------------------------------------------------------------------------------------


def test_a_plan_is_a_mapping_of_the_planned_layers(plan: Plan):
    assert set(plan) == set(plan.layers) == {"conv1", "layer1.conv1", "layer1.conv2"}
    assert len(plan) == 3
    assert "conv1" in plan
    assert "fc" not in plan
    assert plan.get("fc") is None
    assert plan["conv1"].shape == (12, 6, 3, 3)


def test_a_missing_layer_is_named_with_why_or_with_its_neighbours(plan: Plan):
    with pytest.raises(KeyError, match="excluded by 'fc'"):
        plan["fc"]
    with pytest.raises(KeyError, match=r"Did you mean: .*layer1\.conv1"):
        plan["layer1.conv3"]


def test_project_is_that_of_the_format(plan: Plan, generator: torch.Generator):
    layer = plan["layer1.conv2"]
    w = torch.randn(layer.shape, generator=generator)
    torch.testing.assert_close(layer.project(w), layer.format.project(w, layer.ranks, layer.modes), rtol=0, atol=0)


# -- changed copies ----------------------------------------------------------------------------------------------


def test_replace_changes_a_copy_and_notes_it(plan: Plan):
    changed = plan.replace("conv1", ranks=[2, 3, 3, 2])
    assert changed["conv1"].ranks == (2, 3, 3, 2)
    assert changed["conv1"].notes[-1] == "edited by hand"
    assert plan["conv1"].ranks != (2, 3, 3, 2)
    assert changed.params_after < plan.params_after
    assert {k: v for k, v in changed.items() if k != "conv1"} == {k: v for k, v in plan.items() if k != "conv1"}
    other = plan.replace("conv1", method="tt_classical", modes=Modes((6,), (12,)), ranks=(4,), execution="auto")
    assert (other["conv1"].method, other["conv1"].resolved_execution) == ("tt_classical", "chain")


def test_another_method_has_the_modes_that_it_can_have(generator: torch.Generator):
    net, data = torch.nn.Sequential(torch.nn.Linear(32, 24)), [torch.randn(64, 32, generator=generator)]
    plan = make_plan(net, Manual(6), example_input=data[0][:1])
    matrix = plan.replace("0", method="weight_svd", ranks=[6])
    assert matrix["0"].modes == Modes((32,), (24,))
    near = convert(net, matrix, covariances=collect_covariances(net, matrix, data))
    assert int(torch.linalg.matrix_rank(near[0].dense_weight(), rtol=1e-5)) == 6
    assert matrix.replace("0", method="tt", ranks=plan["0"].ranks)["0"].modes == plan["0"].modes
    with pytest.raises(
        PlanError, match=r"0: modes in=\[4, 8\] .* allowed: in=\[32\] out=\[24\], for method weight_svd"
    ):
        matrix.replace("0", modes=plan["0"].modes)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ranks": (9, 9, 9, 9)}, r"conv1 \(conv2d 6->12, 3x3, method tt, modes in=\[2, 3\] out=\[3, 4\]\).*not fit"),
        ({"ranks": (2, 3)}, "needs 4 ranks, got 2"),
        ({"ranks": (2, 0, 3, 2)}, "rank 0"),
        ({"modes": Modes((2, 2), (3, 4))}, "conv1: modes .* do not fit 6 -> 12 channels"),
        ({"execution": "sideways"}, "execution 'sideways' is not one of auto, merged, chain"),
        ({"method": "tucker3"}, "unknown method 'tucker3'"),
        ({"method": "tt_classical"}, "needs 2 ranks, got 4"),
    ],
    ids=str,
)
def test_replace_refuses_what_does_not_fit(plan: Plan, change: dict[str, Any], message: str):
    with pytest.raises(PlanError, match=message):
        plan.replace("conv1", **change)


def test_a_method_without_a_layer_for_the_kind_is_refused():
    with pytest.raises(PlanError, match="x: method tt_classical has no layer for layer type 'linear'"):
        layer_plan(layer_type="linear", shape=(64, 64), method="tt_classical", ranks=(4,)).check("x")


def test_broken_modes_are_named_for_every_method():
    for method in ("tt", "tt_classical"):
        with pytest.raises(PlanError, match="x: modes"):
            layer_plan(method=method, modes=Modes((8, 8), (64,))).check("x")


def test_without_leaves_a_layer_dense_with_a_reason(plan: Plan):
    less = plan.without("conv1")
    assert "conv1" not in less
    assert less.skipped["conv1"] == "left dense by hand"
    assert plan.without("conv1", "it hurts").skipped["conv1"] == "it hurts"
    assert less.params_after == plan.params_after + plan["conv1"].params_before - plan["conv1"].params_after
    assert "conv1" in plan
    with pytest.raises(KeyError):
        plan.without("conv7")


def test_plans_do_not_change(plan: Plan):
    with pytest.raises(dataclasses.FrozenInstanceError):
        plan.rule = "other"
    with pytest.raises(dataclasses.FrozenInstanceError):
        plan["conv1"].ranks = (1, 1, 1, 1)
    for mapping in (plan.layers, plan.skipped):
        with pytest.raises(TypeError):
            mapping["conv1"] = None


def test_plans_are_copied_and_pickled_whole(plan: Plan):
    for again in (copy.deepcopy(plan), pickle.loads(pickle.dumps(plan))):
        assert again == plan
        assert list(again) == list(plan)


# -- files -----------------------------------------------------------------------------------------------------


def test_a_saved_plan_comes_back_equal(plan: Plan, tmp_path: Path):
    rich = plan.replace("conv1", ranks=(2, 3, 3, 2)).without("layer1.conv1")
    rich.save(tmp_path / "plan.json")
    again = Plan.load(str(tmp_path / "plan.json"))
    assert again == rich
    assert list(again) == list(rich)
    assert (again.params_after, again.macs_after) == (rich.params_after, rich.macs_after)
    again.save(tmp_path / "again.json")
    assert (tmp_path / "again.json").read_bytes() == (tmp_path / "plan.json").read_bytes()


def test_a_plan_of_shared_modules_and_sequences_comes_back_equal(tmp_path: Path):
    model = Tokens()
    model.again = model.up
    plan = make_plan(model, Manual(4), example_input=torch.randn(1, 5, 16))
    assert plan["up"].aliases == ("again",)
    plan.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == plan


def test_hand_edited_ranks_are_obeyed(plan: Plan, model: SmallResNet, tmp_path: Path):
    path = tmp_path / "plan.json"
    plan.save(path)
    value = json.loads(path.read_text())
    value["layers"]["layer1.conv2"]["ranks"] = [2, 3, 5, 3]
    value["layers"]["layer1.conv1"]["execution"] = "chain"
    del value["layers"]["conv1"]
    path.write_text(json.dumps(value))
    edited = Plan.load(path)
    small = convert(model, edited)
    assert small.layer1["conv2"].ranks == (2, 3, 5, 3)
    assert small.layer1["conv1"].execution == "chain"
    assert type(small.conv1) is torch.nn.Conv2d
    # costs in the file are for the reader: they are counted anew, not believed
    assert edited.params_after == sum(p.numel() for p in small.parameters())


def test_stale_costs_in_the_file_are_not_believed(plan: Plan):
    value = plan.to_dict()
    value["layers"]["conv1"]["params_after"] = 1
    value["totals"]["params_after"] = 1
    assert Plan.from_dict(value) == plan


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda v: v["layers"]["conv1"].update(ranks=[2, 3, 3]), "conv1 .*needs 4 ranks, got 3.*tt_ranks="),
        (lambda v: v["layers"]["conv1"].update(ranks=[2, 3, 99, 3]), r"conv1 .*the most they can be is .*tt_ranks="),
        (lambda v: v["layers"]["conv1"].update(ranks=[2, 3, 2.5, 3]), "rank 2.5"),
        (lambda v: v["layers"]["conv1"].update(modes={"in": [6], "out": [3, 4]}), "conv1: modes"),
        (lambda v: v["layers"]["conv1"].update(method="ttt"), "unknown method 'ttt'.*Did you mean: tt"),
        (lambda v: v["layers"]["conv1"].update(layer_type="bilinear"), "has no layer for layer type 'bilinear'"),
        (lambda v: v["layers"]["conv1"].update(execution="quick"), "execution 'quick'"),
        (lambda v: v["layers"]["conv1"].pop("shape"), "conv1: field 'shape'"),
        (lambda v: v.pop("layers"), "lacks a field.*layers"),
        (lambda v: v.update(format="other"), "not a hodec plan"),
        (lambda v: v.pop("format"), "not a hodec plan"),
        (lambda v: v.update(version=99), "version 99 is not one of"),
    ],
)
def test_bad_edits_are_refused_with_their_place(plan: Plan, tmp_path: Path, edit: Any, message: str):
    value = plan.to_dict()
    edit(value)
    (tmp_path / "plan.json").write_text(json.dumps(value))
    with pytest.raises(PlanError, match=message):
        Plan.load(tmp_path / "plan.json")


@pytest.mark.parametrize("content", ["", "{", "[]", "null", "3", '"text"'])
def test_files_that_are_no_plan_are_refused(tmp_path: Path, content: str):
    (tmp_path / "plan.json").write_text(content)
    with pytest.raises(PlanError):
        Plan.load(tmp_path / "plan.json")


def test_inputs_that_would_fill_the_memory_are_refused(plan: Plan):
    """The dry run after conversion makes two of them: here 240 GB."""
    value = plan.to_dict() | {"inputs": [{"shape": [1, 3, 10**5, 10**5], "dtype": "float32"}]}
    with pytest.raises(
        PlanError, match=r"\[1, 3, 100000, 100000\] hold 30,000,000,000 numbers; a file may ask for 268"
    ):
        Plan.from_dict(value)


@pytest.mark.parametrize("calls", [[[1, [8], [8]]], [[1, [8, 8, 8], [8, 8, 8]]], [[1, [], []]]])
def test_calls_of_another_number_of_axes_are_refused(plan: Plan, calls: list[object]):
    """Their multiply-adds would be counted all the same."""
    value = json.loads(json.dumps(plan.to_dict()))
    name = next(iter(plan))
    value["layers"][name]["call_sites"] = calls
    with pytest.raises(PlanError, match=rf"{name}: call_sites have .* of other than the 2 axes of its kernel"):
        Plan.from_dict(value)


def test_a_place_that_cannot_be_written_is_one_message(plan: Plan, tmp_path: Path):
    with pytest.raises(PlanError, match="could not be written"):
        plan.save(tmp_path)


def test_files_nested_without_end_are_refused(plan: Plan, tmp_path: Path):
    path = tmp_path / "plan.json"
    path.write_text("[" * 10**5 + "]" * 10**5)
    with pytest.raises(PlanError, match=r"plan\.json is not readable JSON"):
        Plan.load(path)
    form: list[Any] = []
    for _ in range(5000):
        form = [form]
    with pytest.raises(PlanError):
        Plan.from_dict(plan.to_dict() | {"input_form": form})


def test_truncated_and_missing_files_are_refused(plan: Plan, tmp_path: Path):
    path = tmp_path / "plan.json"
    with pytest.raises(PlanError, match="does not exist"):
        Plan.load(path)
    plan.save(path)
    whole = path.read_bytes()
    for share in (0.01, 0.3, 0.9):
        path.write_bytes(whole[: int(len(whole) * share)])
        with pytest.raises(PlanError, match="truncated"):
            Plan.load(path)


JUNK = [None, True, -1, 0, 1.5, 10**12, "x", [], ["x"], {}, [[1]]]


def _places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield from _places(inner, (*path, key))


def _replaced(value: Any, path: tuple[Any, ...], junk: Any) -> Any:
    if not path:
        return junk
    value = copy.copy(value)
    value[path[0]] = _replaced(value[path[0]], path[1:], junk)
    return value


def test_junk_anywhere_in_the_file_is_refused_or_harmless(plan: Plan, model: SmallResNet):
    """Every field of a plan, replaced by every kind of junk: a HodecError, or a plan that prints and converts."""
    small_plan = plan.without("layer1.conv1").without("layer1.conv2")
    value = json.loads(json.dumps(small_plan.to_dict()))
    refused, problems = 0, []
    for path in _places(value):
        for junk in JUNK:
            where = f"{'.'.join(map(str, path))} = {junk!r}"
            try:
                read = Plan.from_dict(_replaced(value, path, junk))
                str(read)
                read.to_dict()
                if path[:1] == ("inputs",) and junk != 10**12:  # torch has its own word for too much memory
                    convert(model, read)
            except HodecError:
                refused += 1
            except Exception as error:
                problems.append(f"{where} raises {type(error).__name__}: {error}")
    assert not problems, "\n".join(problems)
    assert refused > 100


# -- what people read ----------------------------------------------------------------------------------------------


def test_the_printed_plan_names_layers_ranks_costs_and_reasons(plan: Plan):
    text = str(plan)
    parts = ("rule manual", "3 layers factorized, 2 left dense", "layer1.conv2", "24·24·3·3", "4·6 x 4·6", "merged")
    for part in parts:
        assert part in text
    assert "dense: fc: excluded by 'fc'" in text
    assert f"{plan.reduction['params']:.1%} of the parameters" in text
    assert max(map(len, text.splitlines())) <= 150


def test_example_inputs_are_seeded_and_of_the_given_kinds():
    plan = Plan({}, {}, "manual", 1, 1, inputs=(((1, 3, 4), "float32"), ((5, 7), "int64"), ((1,), "bfloat16")))
    before = torch.get_rng_state()
    x, ids, low = plan.example_inputs()
    assert torch.equal(torch.get_rng_state(), before)
    assert (x.shape, x.dtype) == ((2, 3, 4), torch.float32)
    assert (ids.shape, ids.dtype, int(ids.sum())) == ((2, 7), torch.int64, 0)
    assert (low.shape, low.dtype) == ((2,), torch.bfloat16)
    torch.testing.assert_close(plan.example_inputs()[0], x, rtol=0, atol=0)
    assert not math.isclose(float(x.std()), 0)


def test_an_empty_model_reduces_nothing():
    assert Plan({}, {}, "manual", 10, 0).reduction == {"params": 0, "macs": 0}
    assert Plan({}, {}, "manual", 0, 0).reduction == {"params": 0, "macs": 0}
