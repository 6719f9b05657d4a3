"""Every parameter of a model is planned, skipped with a reason and its cost, or counted among the others."""

import pytest
import torch
from small_nets import IMAGE, SmallResNet
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from hodec import convert, make_plan
from hodec.errors import PlanError
from hodec.plan.plan import Plan
from hodec.ranks import Manual, Vbmf


class OwnLSTM(nn.LSTM):
    """Subclasses of modules with several weights stay dense."""


class OwnAttention(nn.MultiheadAttention):
    """So does this one."""


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rnn, self.norm, self.out = OwnLSTM(6, 8, 2, batch_first=True), nn.LayerNorm(8), nn.Linear(8, 40)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.norm(self.rnn(x)[0]))


class Experts(nn.Module):
    """Fused weights of several experts, a position table, a token, a table that is looked up, one that is unused."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.Module()
        self.experts.gate_up = nn.Parameter(torch.randn(3, 24, 16))
        self.positions = nn.Parameter(torch.randn(1, 5, 16))
        self.token = nn.Parameter(torch.randn(1, 1, 16))
        self.unused = nn.Parameter(torch.randn(30, 16))
        self.out = nn.Linear(24, 24)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.einsum("nti,ehi->neth", x + self.positions + self.token, self.experts.gate_up)
        return self.out(y.sum(1))


class Mixed(nn.Module):
    """Layers of torch that hodec knows and leaves dense."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.bag = nn.Embedding(9, 16), nn.EmbeddingBag(9, 16)
        self.attention = OwnAttention(16, 2, batch_first=True)
        self.normed, self.pair, self.out = weight_norm(nn.Linear(16, 16)), nn.Bilinear(16, 16, 16), nn.Linear(16, 16)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.words(ids)
        x = self.attention(x, x, x)[0] + self.bag(ids)[:, None]
        return self.out(self.pair(self.normed(x), x))


NETS = {
    "recurrent": (Recurrent(), torch.randn(2, 5, 6)),
    "experts": (Experts(), torch.randn(2, 5, 16)),
    "mixed": (Mixed(), torch.zeros(2, 5, dtype=torch.long)),
    "resnet": (SmallResNet(), torch.randn(IMAGE)),
}


def planned(name: str) -> Plan:
    model, x = NETS[name]
    return make_plan(model, Manual(2), method="svd", example_input=x)


@pytest.mark.parametrize("name", NETS)
def test_all_parameters_and_all_products_with_weights_are_accounted_for(name: str):
    plan = planned(name)
    skipped = sum(params for params, _ in plan.skipped_costs.values())
    assert list(plan.skipped_costs) == list(plan.skipped)
    weights = sum(layer.params_before for layer in plan.values())
    assert weights + skipped + sum(plan.other.values()) == plan.dense_params
    assert plan.coverage["params"] == weights / plan.dense_params
    assert sum(p.macs_before for p in plan.values()) + sum(m or 0 for _, m in plan.skipped_costs.values()) <= (
        plan.dense_macs
    )


def test_weights_of_modules_without_a_layer_are_named_by_their_path():
    plan = planned("recurrent")
    names = [f"rnn.weight_{end}" for end in ("ih_l0", "hh_l0", "ih_l1", "hh_l1")]
    assert list(plan.skipped) == names
    assert plan.skipped[names[0]] == "method svd has no layer for a weight of OwnLSTM"
    assert [plan.skipped_costs[n] for n in names] == [(32 * 6, 5 * 32 * 6), *[(32 * 8, 5 * 32 * 8)] * 3]
    assert plan.other == {"norms": 8, "biases": 8 + 40 + 4 * 32}
    assert plan.dense_macs == 5 * (32 * 6 + 3 * 32 * 8 + 8 * 40)


def test_what_multiplies_nothing_is_named_only_where_it_is_large():
    plan = planned("experts")
    assert plan.skipped == {
        "unused": "a parameter of Experts that is in no product with this input",
        "experts.gate_up": "method svd has no layer for a weight of Module",
    }
    assert plan.skipped_costs["unused"] == (480, None)
    assert plan.other == {"biases": 24, "tables, tokens and scales": 6 * 16}


def test_a_layer_of_torch_keeps_one_name_for_all_of_its_weights():
    plan = planned("mixed")
    assert list(plan.skipped) == ["bag", "attention", "attention.out_proj", "pair"]
    assert plan["normed"].params_before == plan["out"].params_before + 16  # the magnitudes that the factors replace
    assert plan.skipped_costs["attention"] == (3 * 16 * 16, 5 * 3 * 16 * 16)
    assert plan.skipped_costs["bag"] == (9 * 16, 0)


def test_the_printed_plan_ends_with_what_it_covers():
    text = str(planned("recurrent")).splitlines()
    assert text[-1] == "covered: 21.9% of the parameters and 25.0% of the MACs are planned"
    assert text[-2].startswith("other: ")
    assert any(line.startswith("dense: rnn.weight_ih_l0: method svd has no") for line in text)
    assert "of the parameters, 15.0% of the MACs)" in " ".join(text)


def test_a_layer_taken_out_of_the_plan_keeps_its_cost():
    plan = planned("recurrent")
    layer, model = plan["out"], planned("resnet")
    assert plan.without("out").skipped_costs["out"] == (layer.params_before, layer.macs_before)
    assert model.without("conv1").coverage["params"] < model.coverage["params"]


def test_a_file_keeps_it_and_one_of_an_older_version_has_none():
    plan = planned("recurrent")
    assert Plan.from_dict(plan.to_dict()) == plan
    older = {key: value for key, value in plan.to_dict().items() if key not in ("skipped_costs", "other")}
    for version in (1, 2):
        read = Plan.from_dict({**older, "version": version})
        assert (read.skipped_costs, read.other, read.layers) == ({}, {}, plan.layers)
        assert "other:" not in str(read)


def test_layers_that_are_factorized_already_are_named():
    model, x = SmallResNet(), torch.randn(IMAGE)
    plan = make_plan(model, Manual(2), method="svd", example_input=x, exclude=["fc"])
    small = convert(model, plan)
    again = make_plan(small, Manual(2), method="svd", example_input=x)
    assert list(again) == ["fc"]
    assert again.skipped["conv1"].startswith("it is factorized already: SVDConv2d of ranks [2]")
    assert again.skipped_costs["conv1"][0] == plan["conv1"].params_after
    with pytest.raises(PlanError, match=r"no layer is left to factorize .*conv1: it is factorized already"):
        make_plan(small, Manual(2), method="svd", example_input=x, exclude=["fc"])


def test_the_notes_of_a_rule_stand_in_the_printed_plan():
    model = nn.Sequential(*(nn.Linear(30, 30) for _ in range(5)))
    plan = make_plan(model, Vbmf(), method="svd", example_input=torch.randn(1, 30))
    text = str(plan)
    assert "note: VBMF finds only noise for rank 1 of 1: kept at 1: 0, 1, 2 and 2 more" in text
