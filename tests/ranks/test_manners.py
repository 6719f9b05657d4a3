"""make_plan as people call it: ranks or a rule's name for the rule, names, classes and patterns for layers."""

import re

import pytest
import torch
from small_nets import IMAGE, SmallResNet
from torch import nn

import hodec
from hodec import make_plan
from hodec.errors import ConfigError, PlanError
from hodec.ranks import Budget, Energy, Manual, RankRule, Ratio
from hodec.ranks.planning import PlanSettings, plan_layers
from hodec.ranks.table import RULES, as_rule

X = torch.randn(IMAGE, generator=torch.Generator().manual_seed(0))
MODEL = SmallResNet()


def layers(**settings: object) -> set[str]:
    return set(make_plan(MODEL, 2, method="svd", example_input=X, **settings))


ALL = layers()


def test_rules_by_ranks_and_by_name():
    assert as_rule(8) == Manual(8)
    assert as_rule([4, 5]) == Manual([4, 5])
    assert as_rule({"fc": 3}) == Manual({"fc": 3})
    assert as_rule(Ratio(0.3)) == Ratio(0.3)
    for name, rule in RULES.items():
        assert as_rule(name) == rule()
    plan = make_plan(MODEL, "energy", method="svd", example_input=X)
    assert plan == make_plan(MODEL, Energy(), method="svd", example_input=X)
    assert make_plan(MODEL, (2,), method="svd", example_input=X)["fc"].ranks == (2,)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("enery", "unknown rank rule 'enery'.*Did you mean: energy"),
        (0, "tt_ranks: 0 given"),
        (True, "tt_ranks: True given"),
        (2.5, r"rule: 2\.5 given; allowed: a rule such as .*\(manual, .*\), or ranks: 16, "),
        (Energy, "rule: <class .*Energy'> given"),
        (None, "rule: None given"),
    ],
)
def test_what_is_no_rule_is_refused(given: object, message: str):
    with pytest.raises(ConfigError, match=message):
        make_plan(MODEL, given, example_input=X)


def test_layers_by_name_class_and_regular_expression():
    convs = {name for name, m in MODEL.named_modules() if isinstance(m, nn.Conv2d)}
    assert convs < ALL
    assert layers(include="layer1.*") == {name for name in ALL if name.startswith("layer1.")}
    assert layers(include=[nn.Conv2d]) == layers(include=nn.Conv2d) == convs
    assert layers(exclude=nn.Conv2d) == ALL - convs
    assert layers(include=re.compile(r"layer1\.conv\d")) == {"layer1.conv1", "layer1.conv2"}
    assert layers(include=[re.compile("conv1"), "fc"]) == {"conv1", "fc"}
    assert layers(include=nn.Conv2d, exclude=["conv1", re.compile(".*2")]) == convs - {"conv1", "layer1.conv2"}
    plan = make_plan(MODEL, 2, method="svd", example_input=X, exclude=[nn.Linear, re.compile("conv1")])
    assert plan.skipped["fc"] == "excluded by Linear"
    assert plan.skipped["conv1"] == "excluded by re.compile('conv1')"


@pytest.mark.parametrize("setting", ["include", "exclude"])
@pytest.mark.parametrize(
    ("given", "message"),
    [
        (nn.Conv3d, "Conv3d matches no layer. Layers are: conv1"),
        (re.compile("conv"), r"re.compile\('conv'\) matches no layer"),
        (["fcc"], "'fcc' matches no layer. Did you mean: fc"),
        ([3], "3 given; allowed: a layer glob, a regular expression, a class of modules"),
    ],
)
def test_what_matches_no_layer_is_refused(setting: str, given: object, message: str):
    with pytest.raises(PlanError, match=f"{setting}:? {message}"):
        layers(**{setting: given})


@pytest.mark.parametrize("given", [2, {"fc": (2, 3)}])
def test_modes_that_are_no_modes_are_refused(given: object):
    with pytest.raises(PlanError, match=r"modes: .* given; allowed: {layer glob: Modes.* give n_modes=2"):
        make_plan(MODEL, 2, example_input=X, modes=given)


def test_a_class_of_modules_means_nothing_in_a_file():
    settings = PlanSettings(include=[nn.Conv2d])
    net = hodec.ranks.NetContext(hodec.cost.count.Cost(1, 1), MODEL.get_submodule)
    with pytest.raises(PlanError, match="allowed: a layer glob, a regular expression, or a list"):
        plan_layers({}, {}, Manual(2), net, method="svd", settings=settings)


def test_a_rule_shows_what_differs_from_its_defaults():
    assert [repr(rule()) for rule in RULES.values()] == [f"{rule.__name__}()" for rule in RULES.values()]
    assert repr(Budget(macs=0.4, round_to=8)) == "Budget(macs=0.4, round_to=8)"
    assert repr(Manual({"fc": 3})) == "Manual(tt_ranks={'fc': 3})"
    assert len(repr(Manual({f"layer{k}": 3 for k in range(99)}))) < 99
    rebuilt: list[RankRule] = [Energy(0.7), Ratio(0.5, metric="params"), Budget(params=0.3, tolerance=0.1)]
    for rule in rebuilt:
        assert eval(repr(rule), vars(hodec.ranks)) == rule


def test_a_plan_is_one_line_and_a_table_in_notebooks():
    plan = make_plan(MODEL, 2, method="svd", example_input=X, exclude="fc")
    cut = plan.reduction
    shares = f"params -{cut['params']:.1%}, macs -{cut['macs']:.1%}".replace("%", " %")
    assert repr(plan) == f"Plan(rule manual: {len(plan)} layers factorized, 1 left dense; {shares})"
    assert repr(plan["conv1"]).startswith("LayerPlan(svd of conv2d (12, 6, 3, 3), ranks [2]: 648 -> ")
    html = plan.without("conv1", "<b>no</b>")._repr_html_()
    assert html.startswith("<pre")
    assert "&lt;b&gt;no&lt;/b&gt;" in html
    assert "layer1.conv2" in html


def test_energy_never_makes_a_layer_larger():
    words = nn.Sequential(nn.Embedding(400, 8), nn.Linear(8, 64))
    ids = torch.zeros(1, 3, dtype=torch.long)
    with pytest.raises(PlanError, match="0: at ranks .*: not worth it; rule energy makes no layer larger"):
        make_plan(words, Energy(1.0), method="svd", example_input=ids, allow_larger=True)
    plan = make_plan(words, Manual(8), method="svd", example_input=ids, allow_larger=True)
    assert plan["0"].params_after / plan["0"].params_before == 1.02


def test_the_public_names_are_there():
    for name in ("Modes", "FactorizedLayer", "reestimate_batchnorm", "conversion_errors", "LatencyTable"):
        assert getattr(hodec, name).__doc__
        assert name in hodec.__all__
    assert issubclass(hodec.METHODS["tt"].layers["conv2d"], hodec.FactorizedLayer)
    assert callable(hodec.decompose_file)


def test_energy_never_raises_the_multiply_adds_of_the_net():
    """An embedding is looked up; its factors are multiplied. It stays where other layers make up for it."""
    torch.manual_seed(0)

    class Words(nn.Module):
        def __init__(self, rank: int) -> None:
            super().__init__()
            self.table, self.out = nn.Embedding(400, 32), nn.Linear(32, 32)
            self.table.weight.data = torch.randn(400, 4) @ torch.randn(4, 32)
            self.out.weight.data = torch.eye(32)[:, :rank] @ torch.eye(32)[:rank]

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return self.out(self.table(ids))

    ids = torch.zeros(2, 5, dtype=torch.long)
    plan = make_plan(Words(2), "energy", method="svd", example_input=ids)
    assert set(plan) == {"table", "out"}
    assert plan.macs_after <= plan.macs_before
    with pytest.raises(PlanError, match="table: its products would raise the net's multiply-adds by .* raises no cost"):
        make_plan(Words(32), "energy", method="svd", example_input=ids)
    assert set(make_plan(Words(32), 4, method="svd", example_input=ids, include="table")) == {"table"}, "as asked"
