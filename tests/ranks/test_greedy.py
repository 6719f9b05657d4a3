"""The greedy rule on small nets: costs as they run, choices, resumption, fine-tuning, and what it refuses."""

import json
import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rank_cases import NO_MODEL
from small_nets import IMAGE, SmallResNet, Tokens, assert_untouched, snapshot
from torch import Tensor, nn

from hodec.conversion.swap import convert
from hodec.cost.count import count_cost
from hodec.cost.metric import GivenTimes
from hodec.errors import ConfigError, PlanError
from hodec.layers.base import FactorizedLayer
from hodec.plan.layer import LayerPlan
from hodec.plan.plan import Plan
from hodec.ranks import Greedy, make_plan
from hodec.ranks.greedy.rule import convert_in_turn
from hodec.ranks.greedy.stats import GreedyStats

X = torch.randn(IMAGE, generator=torch.Generator().manual_seed(0))
WORDS = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(0))


class Nearness:
    """Minus the relative distance of a net's outputs from those of the dense net; counts its calls."""

    def __init__(self, dense: nn.Module, x: Tensor = X, fails_at: int = 0) -> None:
        self.x, self.calls, self.fails_at = x, 0, fails_at
        with torch.no_grad():
            self.wanted = dense.eval()(x)

    @torch.no_grad()
    def __call__(self, model: nn.Module) -> float:
        self.calls += 1
        if self.calls == self.fails_at:
            raise RuntimeError("power cut")
        assert not model.training
        return -float((model(self.x) - self.wanted).norm() / self.wanted.norm())


def resnet() -> nn.Module:
    torch.manual_seed(1)
    return SmallResNet().eval()


def searched(rule: Greedy, model: nn.Module | None = None, **how: object) -> tuple[Plan, GreedyStats]:
    """The plan of a rule, and the statistics of its search."""
    reports: list[GreedyStats] = []
    how = {"method": "weight_svd", "example_input": X} | how
    plan = make_plan(model or resnet(), replace(rule, report=reports.append), **how)
    return plan, reports[0]


def greedy(
    target: float = 0.6,
    metric: str = "macs",
    *,
    model: nn.Module | None = None,
    x: Tensor = X,
    method: str = "weight_svd",
    **settings: object,
) -> tuple[GreedyStats, Plan]:
    """The statistics of the search, and the plan."""
    model = model or resnet()
    rule = Greedy(Nearness(model, x), target, metric, progress=False, **({"ratios": 5} | settings))
    plan, stats = searched(rule, model, method=method, example_input=x)
    return stats, plan


# -- costs ---------------------------------------------------------------------------------------------------------


def test_defect_a_the_ratios_reported_are_those_of_the_converted_net():
    model = resnet()
    stats, plan = greedy(0.6, model=model)
    dense, small = count_cost(model, X), count_cost(convert(model, plan), X)
    assert "layer1.conv1" in plan
    assert stats.macs == pytest.approx(small.macs / dense.macs, abs=1e-12)
    assert stats.params == pytest.approx(small.params / dense.params, abs=1e-12)
    assert stats.ratio == pytest.approx(stats.macs, abs=1e-12)
    assert stats.ratio <= 0.601


@pytest.mark.parametrize("metric", ["macs", "params"])
def test_defect_b_linear_layers_over_sequences_are_not_cut_to_rank_1(metric: str):
    model = Tokens().eval()
    stats, plan = greedy(0.7, metric, model=model, x=WORDS, ratios=10, method="svd")
    # 16 x 36 numbers at 52 a rank, 36 x 8 at 44; rank 1 keeps 0.09 and 0.15, so 1/n of less is out of reach
    assert [p.ranks for p in stats.curves["up"]] == [(r,) for r in (1, 2, 3, 4, 5, 6, 7, 8, 9)]
    assert [p.ranks for p in stats.curves["down"]] == [(r,) for r in range(1, 6)]
    assert count_cost(convert(model, plan), WORDS).macs == plan.macs_after


def test_embeddings_save_no_macs_and_stay_dense():
    class Bag(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words, self.head = nn.Embedding(50, 16), nn.Linear(16, 16)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.words(x))

    model, x = Bag().eval(), torch.zeros(2, 5, dtype=torch.long)
    _, plan = greedy(0.7, model=model, x=x, method="svd")
    assert plan.skipped == {"words": "none of its 4 ratios saves macs"}
    _, plan = greedy(0.7, "params", model=model, x=x, method="svd")
    assert "words" in plan


# -- choices -------------------------------------------------------------------------------------------------------


def test_fragile_layers_stay_dense_and_robust_ones_are_cut_hard():
    model = resnet()
    with torch.no_grad():  # exactly of rank 2 on its input side
        model.layer1["conv2"].weight[:, 2:] = 0
    stats, plan = greedy(0.75, "params", model=model)
    assert plan["layer1.conv2"].ranks == stats.curves["layer1.conv2"][0].ranks
    assert stats.curves["layer1.conv2"][0].score == pytest.approx(0, abs=1e-5)
    dense = [name for name, point in stats.choices.items() if point is None]
    assert dense
    for name in dense:
        assert plan.skipped[name].startswith("its mildest ratio scores -0.")
        assert plan.skipped[name].endswith(f"below the threshold {stats.threshold:.6g}")
        assert stats.curves[name][-1].score < stats.threshold
    score = stats.choices["layer1.conv2"].score
    assert plan["layer1.conv2"].notes == (f"keeps 0.185 of its params; score {score:.6g} alone, dense 0",)


def test_defect_d_where_all_scores_are_equal_all_layers_are_cut():
    plan, stats = searched(Greedy(lambda model: 0.1, 0.9, ratios=4), method="svd")
    assert {name: p.ranks for name, p in plan.items()} == {n: t[0].ranks for n, t in stats.curves.items()}
    assert plan.skipped == {}


def test_defect_e_rounded_ranks_take_their_score_from_the_line_around_them():
    stats, plan = greedy(0.8, "params", ratios=10, multiplicity=5)
    for name, point in stats.choices.items():
        if point is None:
            continue
        measured = stats.curves[name]
        most = plan[name].format.max_ranks(plan[name].shape, plan[name].modes)
        assert all(r % 5 == 0 or r == full for r, full in zip(point.ranks, most, strict=True))
        left = [p for p in measured if p.ratio <= point.ratio][-1]
        right = next((p for p in measured if p.ratio >= point.ratio), None)
        ends = sorted((left.score, right.score if right else stats.baseline))
        assert ends[0] <= point.score <= ends[1]
        if right and right.ratio == left.ratio:
            assert point.score == left.score
    assert any("multiplicity=5" in layer.notes[0] for layer in plan.values())


def test_monotonic_smooths_what_the_search_sees_but_not_the_table():
    def noisy(model: nn.Module) -> float:
        """Ranks of the first convolution score against their size."""
        return -float(getattr(model.conv1, "ranks", (0,))[0])

    model = resnet()
    plain, smooth = (
        searched(Greedy(noisy, 0.95, ratios=5, monotonic=on, ignore=["layer1.*", "fc"]), model)[1]
        for on in (False, True)
    )
    assert plain.curves == smooth.curves
    scores = [p.score for p in smooth.curves["conv1"]]
    assert scores == sorted(scores, reverse=True)
    assert smooth.choices["conv1"].score == pytest.approx(sum(scores) / len(scores))
    assert plain.choices["conv1"].score == scores[0]


def test_latency_counts_where_tables_are_given():
    def milliseconds(layer: LayerPlan) -> float:
        return layer.macs_after / 1e5 + 0.01

    def dense(layer: LayerPlan) -> float:
        return layer.macs_before / 1e5

    stats, plan = greedy(0.9, "latency_ms", latency_table=GivenTimes(milliseconds, dense, 0.05))
    macs = count_cost(resnet(), X).macs  # all in the five candidates
    whole = macs / 1e5 + 0.05
    saved = sum(dense(layer) - milliseconds(layer) for layer in plan.values())
    assert stats.ratio == pytest.approx(1 - saved / whole)
    assert stats.ratio <= 0.901
    assert plan.skipped["fc"] == "none of its 4 ratios saves latency_ms"  # 0.01 ms is more than all of it
    for name, layer in plan.items():
        assert stats.choices[name].ratio == pytest.approx(milliseconds(layer) / dense(layer))


def test_ignored_layers_are_not_evaluated_and_say_why():
    stats, plan = greedy(0.8, ignore=["layer1.conv*", "bn1"])
    assert plan.skipped["layer1.conv1"] == "ignored by 'layer1.conv*'"
    assert "layer1.conv2" not in stats.curves
    assert stats.choices["layer1.conv2"] is None
    _, plan = greedy(0.8, "params", ignore=None)
    assert len(plan)
    with pytest.raises(PlanError, match=r"^ignore 'layer1\.con1' matches no layer.*mean: layer1\.conv1"):
        greedy(ignore=["layer1.con1"])
    with pytest.raises(PlanError, match="no layer is left to factorize.*ignored by"):
        greedy(ignore=["*"])


def test_the_model_and_the_random_numbers_are_left_alone():
    model = SmallResNet()  # in training mode
    before = snapshot(model)
    drawn: list[float] = []

    def drawing(net: nn.Module) -> float:
        assert not net.training
        drawn.append(float(torch.rand(())))
        next(net.parameters()).data.zero_()
        return 0.0

    make_plan(model, Greedy(drawing, 0.9, ratios=3), method="svd", example_input=X)
    assert_untouched(model, before)
    torch.manual_seed(99)
    make_plan(model, Greedy(drawing, 0.9, ratios=3), method="svd", example_input=X)
    assert len(set(drawn)) == 1  # so a run that is resumed sees the same numbers as one that is not


def test_the_same_settings_give_the_same_plan():
    assert greedy()[1] == greedy()[1]


def test_a_gap_below_the_target_is_warned_about(caplog: pytest.LogCaptureFixture):
    make_plan(resnet(), Greedy(lambda model: 0.1, 0.9), method="svd", example_input=X)
    assert "ratios=20 has finer steps" in caplog.text


# -- resumption ----------------------------------------------------------------------------------------------------


def planned(path: Path, evaluate: Callable[[nn.Module], float], model: nn.Module | None = None, **settings: object):
    return searched(Greedy(evaluate, 0.6, ratios=4, table=path, progress=False, **settings), model)


def test_defect_f_a_run_that_broke_off_evaluates_only_what_is_missing(tmp_path: Path):
    path, whole = tmp_path / "scores.json", Nearness(resnet())
    expected, stats = planned(tmp_path / "other.json", whole)
    assert whole.calls == 1 + sum(map(len, stats.curves.values())) + 1
    broken = Nearness(resnet(), fails_at=8)
    with pytest.raises(RuntimeError, match="power cut"):
        planned(path, broken)
    resumed = Nearness(resnet())
    plan, again = planned(path, resumed)
    assert resumed.calls == whole.calls - 7
    assert plan == expected
    assert again == stats
    third = Nearness(resnet())
    assert planned(path, third)[0] == expected
    assert third.calls == 0


def test_scores_serve_other_targets_multiplicities_and_smoothing(tmp_path: Path):
    path, first = tmp_path / "scores.json", Nearness(resnet())
    planned(path, first)
    for settings in ({"multiplicity": 4}, {"monotonic": True}, {"ignore": ["fc"]}):
        second = Nearness(resnet())
        planned(path, second, **settings)
        assert second.calls <= 1  # the net with all choices


def test_defect_f_scores_of_other_weights_or_another_key_are_not_used(tmp_path: Path):
    path, first = tmp_path / "scores.json", Nearness(resnet())
    planned(path, first)
    changed = resnet()
    with torch.no_grad():
        changed.fc.bias += 1
    for settings in ({"model": changed}, {"key": "other data"}):
        again = Nearness(resnet())
        planned(path, again, **settings)
        assert again.calls >= first.calls - 1
    assert len(json.loads(path.read_text())["tables"]) == 3


# -- what it is given ----------------------------------------------------------------------------------------------


def test_unreachable_targets_are_refused_before_anything_is_evaluated():
    evaluate = Nearness(resnet())
    with pytest.raises(PlanError, match=r"target=0\.05 cannot be reached"):
        make_plan(resnet(), Greedy(evaluate, 0.05), method="svd", example_input=X)
    assert evaluate.calls == 0


@pytest.mark.parametrize(
    ("score", "message"),
    [
        (float("nan"), "returns nan with no layer factorized; it must return a finite number"),
        (float("-inf"), "returns -inf"),
        (None, "returns None with no layer factorized; it must return a number"),
        ("high", "returns 'high'"),
    ],
)
def test_scores_that_are_no_finite_numbers_are_refused(score: object, message: str):
    with pytest.raises(PlanError, match=message):
        make_plan(resnet(), Greedy(lambda model: score, 0.6), method="svd", example_input=X)


def test_a_bad_score_names_the_layer_and_its_ranks():
    def breaks(model: nn.Module) -> float:
        return float("nan") if isinstance(model.fc, FactorizedLayer) else 0.0

    with pytest.raises(PlanError, match=r"returns nan with fc at ranks \[1\] factorized.*exclude"):
        make_plan(resnet(), Greedy(breaks, 0.6), method="svd", example_input=X)


def test_scalar_tensors_are_scores():
    make_plan(resnet(), Greedy(lambda model: torch.tensor(0.5), 0.6), method="svd", example_input=X)


BAD = {
    "evaluate": ({"evaluate": 0.9}, r"^evaluate: 0\.9 given; allowed: a function"),
    "target": ({"target": 0}, "^target: 0 given; allowed: a number above 0 and at most 1"),
    "target_above": ({"target": 1.1}, r"^target: 1\.1 given"),
    "metric": ({"metric": "latency"}, r"^metric: 'latency' given; allowed: .*macs \| params \| latency_ms"),
    "ratios": ({"ratios": 1}, "^ratios: 1 given; allowed: a whole number at least 2"),
    "ratios_float": ({"ratios": 4.0}, r"^ratios: 4\.0"),
    "multiplicity": ({"multiplicity": 0}, "^multiplicity: 0 given; allowed: a whole number at least 1"),
    "multiplicity_bool": ({"multiplicity": True}, "^multiplicity: True"),
    "ignore": ({"ignore": "conv1"}, "^ignore: 'conv1' given; allowed: null or a list of globs"),
}


@pytest.mark.parametrize("case", BAD)
def test_settings_out_of_range_are_refused(case: str):
    settings, message = BAD[case]
    with pytest.raises(ConfigError, match=message):
        Greedy(**({"evaluate": float, "target": 0.5} | settings))


def test_it_needs_an_evaluation_and_a_net():
    assert (Greedy.name, Greedy.reads_weights) == ("greedy", True)
    with pytest.raises(ConfigError, match="greedy: evaluate is missing; give a function model -> score"):
        make_plan(resnet(), Greedy(), method="svd", example_input=X)
    with pytest.raises(PlanError, match="greedy evaluates the net: that takes a model with a Python class"):
        Greedy(lambda model: 0.0, 0.9).choose({}, NO_MODEL)


# -- fine-tuning layer by layer ------------------------------------------------------------------------------------


def test_layers_are_converted_in_turn_with_fine_tuning_after_each():
    seen: list[set[str]] = []

    def fine_tune(net: nn.Module) -> None:
        seen.append({name for name, m in net.named_modules() if isinstance(m, FactorizedLayer)})
        with torch.no_grad():
            net.fc.weight.zero_()

    model = resnet()
    _, plan = greedy(model=model, ratios=4, ignore=["fc"])
    before = snapshot(model)
    small = convert_in_turn(model, plan, fine_tune)
    assert seen == [set(list(plan)[: i + 1]) for i in range(len(plan))]
    assert len(plan) >= 2
    assert not small.fc.weight.any()
    assert small.hodec_plan == plan
    assert_untouched(model, before)


# -- progress ------------------------------------------------------------------------------------------------------


def test_log_lines_tell_how_far_it_is(caplog: pytest.LogCaptureFixture):
    with caplog.at_level(logging.INFO, "hodec"):
        rule = Greedy(lambda model: 0.0, 1.0, ratios=3, ignore=["layer1.*", "conv1"])
        make_plan(resnet(), rule, method="svd", example_input=X)
    lines = [record.getMessage() for record in caplog.records]
    assert "greedy: 3 evaluations, 0 of them known" in lines
    assert "1/3 dense: score 0" in lines
    assert "3/3 fc [4]: score 0" in lines


def test_on_a_terminal_there_is_a_bar(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.setattr("rich.console.Console.is_terminal", True)
    rule = Greedy(lambda model: 0.0, 1.0, ratios=3, ignore=["layer1.*", "conv1"])
    make_plan(resnet(), rule, method="svd", example_input=X)
    assert "3/3" in capsys.readouterr().err
