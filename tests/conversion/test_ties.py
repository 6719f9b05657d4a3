"""Layers that share their weight: one factorization, the same factors in each."""

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from swaps import X, conv, factorized, planned
from torch import Tensor, nn

import hodec
from hodec.cost.count import count_cost
from hodec.errors import PlanError
from hodec.layers.base import factor_parameters, randomize_factors
from hodec.layers.tied import SVDRows, TTRows
from hodec.plan.plan import Plan

TOKENS = torch.arange(24).reshape(2, 12)
METHODS = {"svd": SVDRows, "tt": TTRows}


class Language(nn.Module):
    """Tokens (n, t) -> scores (n, t, 96); the head has the weight of the embedding."""

    def __init__(self, padding: int | None = None, *, tied: bool = True) -> None:
        super().__init__()
        self.embed = nn.Embedding(96, 32, padding_idx=padding)
        self.body = nn.Linear(32, 32)
        self.head = nn.Linear(32, 96)
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(self.embed(x)).tanh())


def are_one(model: nn.Module, *names: str) -> bool:
    """Whether these layers have the same factors."""
    first, *others = (factor_parameters(model.get_submodule(name)) for name in names)
    return all(a is b for other in others for a, b in zip(first, other, strict=True))


@pytest.fixture(params=METHODS)
def method(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def small(method: str) -> nn.Module:
    return hodec.convert(Language(), planned(Language(), 4, TOKENS, method=method, allow_larger=True))


@pytest.mark.parametrize("padding", [None, 3])
def test_embedding_and_head_are_exact_at_full_rank(method: str, padding: int | None):
    model = Language(padding).double().eval()
    plan = planned(model, 10**6, TOKENS, method=method, allow_larger=True)
    full = hodec.convert(model, plan)
    assert list(plan) == ["body", "head"]
    assert [tie.name for tie in plan["head"].ties] == ["embed"]
    assert type(full.embed) is METHODS[method]
    assert are_one(full, "head", "embed")
    torch.testing.assert_close(full(TOKENS), model(TOKENS), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(full.embed.dense_weight(), full.head.dense_weight())
    assert max(hodec.conversion_errors(model, plan, full).values()) < 1e-9


def test_the_plan_has_the_costs_of_both(method: str):
    model = Language()
    plan = planned(model, 4, TOKENS, method=method, allow_larger=True)
    small = hodec.convert(model, plan)
    dense, real = count_cost(model, TOKENS), count_cost(small, TOKENS)
    assert (plan.params_before, plan.macs_before) == (dense.params, dense.macs)
    assert (plan.params_after, plan.macs_after) == (real.params, real.macs)
    assert plan.coverage["macs"] == 1
    assert "embed" not in {*plan, *plan.skipped}
    assert Plan.from_dict(plan.to_dict()).to_dict() == plan.to_dict()


def test_a_head_pays_for_the_products_of_its_embedding():
    """Of one row a call, factors of rank 8 cost the head 8 (96 + 32) and the embedding 8 * 32 multiply-adds."""
    plan = planned(Language(), 8, TOKENS[:, :1], method="svd")
    layer = plan["head"]
    assert (layer.macs_before, layer.macs_after) == (96 * 32, 8 * (96 + 32) + 8 * 32)
    assert (layer.params_before, layer.params_after) == (96 * 32, 8 * (96 + 32))


def test_what_only_the_lookup_costs_refuses_no_layer():
    """The head of a tensor train costs what it did dense, the rows something: memory decides, as for an embedding."""
    plan = planned(Language(), 4, TOKENS, method="tt")
    assert plan["head"].macs_after > plan["head"].macs_before
    assert plan["head"].saves()


def test_one_gradient_reaches_the_factors(small: nn.Module):
    small(TOKENS).square().mean().backward()
    assert all(p.grad is not None and p.grad.any() for p in factor_parameters(small.embed))
    assert len(list(small.parameters())) == len({*small.parameters()})
    optimizer = torch.optim.SGD(small.parameters(), 0.1)
    before = small.head.dense_weight().detach().clone()
    optimizer.step()
    assert are_one(small, "head", "embed")
    torch.testing.assert_close(small.embed.dense_weight(), small.head.dense_weight())
    assert not torch.equal(before, small.head.dense_weight())


def test_merge_ties_the_dense_layers_again(small: nn.Module):
    dense = hodec.merge(small)
    assert dense.head.weight is dense.embed.weight
    assert {type(dense.head), type(dense.embed)} == {nn.Linear, nn.Embedding}
    torch.testing.assert_close(dense(TOKENS), small(TOKENS))


def test_copies_and_files_keep_the_tie(small: nn.Module, tmp_path: Path):
    assert are_one(copy.deepcopy(small), "head", "embed")
    path = tmp_path / "small.safetensors"
    hodec.save(small, path)
    size = sum(p.numel() for p in small.parameters()) * 4
    assert size < path.stat().st_size < size + 1500  # each factor once, and the names
    back = hodec.load(path, Language())
    assert are_one(back, "head", "embed")
    assert torch.equal(back(TOKENS), small(TOKENS))
    back.load_state_dict(small.state_dict())
    assert are_one(back, "head", "embed")


def test_files_that_have_a_shared_factor_twice_are_read(small: nn.Module, tmp_path: Path, monkeypatch):
    monkeypatch.setattr("hodec.export.checkpoint._once", dict)
    hodec.save(small, tmp_path / "small.safetensors")
    monkeypatch.undo()
    back = hodec.load(tmp_path / "small.safetensors", Language())
    assert torch.equal(back(TOKENS), small(TOKENS))


def test_fused_nets_hold_a_shared_factor_once():
    small = hodec.convert(Language(), planned(Language(), 4, TOKENS, method="svd")).eval()
    fused = hodec.fuse(small, example_input=TOKENS, target="macs")
    assert sum(p.numel() for p in fused.parameters()) == sum(p.numel() for p in small.parameters())
    torch.testing.assert_close(fused(TOKENS), small(TOKENS))


def test_admm_pulls_the_weight_once(method: str):
    model = Language()
    plan = planned(model, 4, TOKENS, method=method, allow_larger=True)
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    admm = hodec.Admm(model, plan, optimizer, rho=0.5, steps_per_epoch=1)
    (0.0 * model(TOKENS).sum()).backward()
    admm.before_step()
    assert list(admm.states) == ["body", "head"]
    z, u, weight = admm.states["head"].z, admm.states["head"].u, model.embed.weight
    assert weight.grad.norm() > 0
    torch.testing.assert_close(weight.grad, 0.5 * (weight.detach() - z + u))
    with torch.no_grad():
        model.head.weight.copy_(plan["head"].project(model.head.weight))
    small = admm.convert()
    assert are_one(small, "head", "embed")
    torch.testing.assert_close(small.embed.dense_weight(), model.embed.weight, rtol=1e-4, atol=1e-5)


def test_random_factors_are_drawn_once():
    small = hodec.convert(Language(), planned(Language(), 4, TOKENS, method="svd"))
    randomize_factors(small, seed=3)
    entries = 96  # which an embedding takes for its inputs: it is the first of both
    assert small.head.dense_weight().square().mean().item() == pytest.approx(2 / entries, rel=1e-4)


# -- who can share ---------------------------------------------------------------------------------------------------


class Several(nn.Module):
    """Layers by name, of which the others have the weight of the first; all are called one after another."""

    def __init__(self, run: Callable[[nn.Module, Tensor], Tensor] | None = None, **layers: nn.Module) -> None:
        super().__init__()
        self.run = run
        for name, layer in layers.items():
            self.add_module(name, layer)
        first, *others = layers.values()
        for other in others:
            other.weight = first.weight

    def forward(self, x: Tensor) -> Tensor:
        if self.run is not None:
            return self.run(self, x)
        for layer in self.children():
            x = layer(x)
        return x


@pytest.mark.parametrize(
    ("make", "x", "ranks"),
    [
        (lambda: Several(a=conv(), b=conv(stride=2), c=conv()), X, 4),
        (lambda: Several(a=nn.Linear(16, 16), b=nn.Linear(16, 16, bias=False)), torch.randn(2, 3, 16), 4),
        (
            lambda: Several(lambda self, x: self.a(x) + self.b(x), a=nn.Embedding(96, 32), b=nn.Embedding(96, 32)),
            TOKENS,
            4,
        ),
    ],
    ids=["convolutions", "linear layers", "embeddings"],
)
def test_layers_of_one_kind_share_their_factors(make: Callable[[], nn.Module], x: Tensor, ranks: int, method: str):
    model = make().eval()
    full = hodec.convert(model, planned(model, 10**6, x, method=method, allow_larger=True))
    torch.testing.assert_close(full(x), model(x), rtol=1e-3, atol=1e-4)
    plan = planned(model, ranks, x, method=method, allow_larger=True)
    small = hodec.convert(model, plan)
    assert list(plan) == ["a"]
    assert are_one(small, *factorized(small))
    assert len(factorized(small)) == len(list(model.children()))
    real = count_cost(small, x)
    assert (plan.params_after, plan.macs_after) == (real.params, real.macs)
    merged = hodec.merge(small)
    assert merged.a.weight is merged.b.weight


def test_an_embedding_that_is_not_called_goes_with_the_others():
    """As in T5: the shared table hangs in the model beside those that look it up."""
    model = Several(
        lambda self, x: self.head(self.used(x)), table=nn.Embedding(96, 32), used=nn.Embedding(96, 32),
        head=nn.Linear(32, 96),
    )  # fmt: skip
    plan = planned(model, 4, TOKENS, method="svd")
    small = hodec.convert(model, plan)
    assert [tie.name for tie in plan["head"].ties] == ["table", "used"]
    assert are_one(small, "table", "used", "head")
    assert plan.macs_after == count_cost(small, TOKENS).macs
    assert Plan.from_dict(plan.to_dict())["head"] == plan["head"]


def test_a_linear_layer_that_is_not_called_keeps_the_others_dense():
    model = Several(lambda self, x: self.b(x), a=nn.Linear(16, 16), b=nn.Linear(16, 16))
    model.more = nn.Linear(16, 16)
    model.run = lambda self, x: self.more(self.b(x))
    plan = planned(model, 4, torch.randn(2, 16), method="svd")
    assert plan.skipped["b"].startswith("its weight is shared with a (a is never called with this input), and both")


def test_a_method_without_both_layers_keeps_them_dense():
    plan = planned(Language(), 4, TOKENS, method="tucker")
    assert plan.skipped["embed"] == "method tucker has no layer for Embedding"
    assert plan.skipped["head"].startswith("its weight is shared with embed, and both stay dense")


def test_a_shared_bias_goes_on_being_shared():
    model = nn.Sequential(conv(), conv(), conv())
    model[1].bias = model[0].bias
    small = hodec.convert(model, planned(model))
    assert small[0].bias is small[1].bias
    assert small[0].bias is not model[0].bias
    merged = hodec.merge(small)
    assert merged[0].bias is merged[1].bias


@pytest.mark.parametrize("name", ["embed", "head"])
def test_a_layer_can_be_named_by_any_of_its_users(name: str):
    out = planned(Language(), 4, TOKENS, method="svd", exclude=name)
    assert list(out) == ["body"]
    assert out.skipped["head"] == f"excluded by {name!r}"
    assert list(planned(Language(), 4, TOKENS, method="svd", include=name)) == ["head"]


@pytest.mark.parametrize("planned_tied", [True, False])
def test_a_plan_for_other_ties_is_refused(planned_tied: bool):
    plan = planned(Language(tied=planned_tied), 4, TOKENS, method="svd")
    with pytest.raises(PlanError, match=r"its weight is shared with .* in this model, and with .* in the plan"):
        hodec.convert(Language(tied=not planned_tied), plan)


def test_a_tie_that_the_method_has_not_is_refused_when_the_plan_is_read():
    value = planned(Language(), 4, TOKENS, method="svd").to_dict()
    value["layers"]["head"]["method"] = "tucker"
    with pytest.raises(PlanError, match="head: method tucker cannot tie the layer embed of type 'embedding'"):
        Plan.from_dict(value)


def test_a_convolution_that_cannot_run_is_left_dense_with_all_that_share_its_weight():
    class Reads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 16)
            self.b.weight = self.a.weight

        def forward(self, x: Tensor) -> Tensor:
            if not isinstance(self.b, nn.Linear):
                raise TypeError("no linear layer")
            return self.c(self.b(self.a(x)))

    model = Reads()
    small = hodec.convert(model, planned(model, 4, torch.randn(2, 16), method="svd"), on_error="skip")
    assert list(factorized(small)) == ["c"]
    assert small.a.weight is small.b.weight
    assert list(small.hodec_plan) == ["c"]
