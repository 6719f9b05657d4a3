"""Stacked expert weights: each expert is factorized on its own, all at the same ranks."""

import copy
import pickle

import pytest
import torch
from swaps import planned
from torch import Tensor, nn

import hodec
from hodec.errors import PlanError
from hodec.formats.layer_types import DenseExperts
from hodec.formats.modes import Modes
from hodec.methods import METHODS
from hodec.ranks import Energy, make_plan

SHAPE = (12, 8, 3)  # O, I, E
MODES = {"svd": Modes((8,), (12,)), "tt": Modes((2, 4), (3, 4))}
every_method = pytest.mark.parametrize("method", MODES)


class Experts(nn.Module):
    """Every token goes to two experts; each reads its slice of the stack."""

    def __init__(self) -> None:
        super().__init__()
        self.num_experts = 3
        self.up = nn.Parameter(torch.randn(3, 12, 8).double())
        self.down = nn.Parameter(torch.randn(3, 8, 12).double())

    def forward(self, x: Tensor, chosen: Tensor) -> Tensor:
        y = torch.zeros_like(x)
        for expert in range(3):
            rows, _ = torch.where(chosen == expert)
            y = y.index_add(0, rows, torch.relu(x[rows] @ self.up[expert].T) @ self.down[expert].T)
        return y


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.experts, self.head = Experts(), nn.Linear(8, 2).double()

    def forward(self, x: Tensor) -> Tensor:
        flat = x.flatten(0, 1)
        chosen = torch.arange(len(flat)).unsqueeze(1).add(torch.tensor([0, 1])) % 3
        return self.head(self.experts(flat, chosen)).unflatten(0, x.shape[:2])


X = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0)).double()


@every_method
def test_the_format_is_that_of_each_expert(method: str):
    stacked, one, modes = METHODS[method].format("experts"), METHODS[method].format("linear"), MODES[method]
    weights = torch.randn(2, *SHAPE).double()
    full = stacked.max_ranks(SHAPE, modes)
    torch.testing.assert_close(stacked.project(weights[0], full, modes), weights[0])
    ranks = tuple(min(3, rank) for rank in full)
    projected = stacked.project_many(weights, ranks, modes)
    for k, e in ((0, 0), (1, 2)):
        torch.testing.assert_close(projected[k, ..., e], one.project(weights[k, ..., e], ranks, modes))
    factors = stacked.decompose(weights[0], ranks, modes)
    torch.testing.assert_close(stacked.reconstruct(factors, SHAPE, modes), projected[0])
    assert stacked.ranks(factors) == ranks
    assert stacked.params(SHAPE, ranks, modes) == sum(f.numel() for f in factors)


def test_the_spectrum_says_what_a_common_rank_loses():
    stacked, w = METHODS["svd"].format("experts"), torch.randn(SHAPE).double()
    ((position, values),) = stacked.spectra(w, MODES["svd"])
    lost = (w - stacked.project(w, (5,), MODES["svd"])).square().sum()
    assert position == 0
    torch.testing.assert_close(values[5:].square().sum(), lost)


@every_method
def test_the_layer_is_the_dense_one_of_its_weight(method: str):
    dense, x = DenseExperts(3, 12, 8).double(), torch.randn(3, 5, 8).double()
    cls, ranks = METHODS[method].layer("experts"), (3,)
    layer, twin = cls.from_dense(dense, ranks, modes=MODES[method]), copy.deepcopy(dense)
    twin.weight.data.copy_(layer.dense_weight().detach())
    for training in (True, False):
        torch.testing.assert_close(layer.train(training)(x), twin(x))
    other = pickle.loads(pickle.dumps(layer))
    assert type(other) is cls
    torch.testing.assert_close(other(x), layer(x), rtol=0, atol=0)
    fresh = cls.like(dense, ranks, modes=MODES[method], initialize=True)
    assert float(fresh.dense_weight().detach().square().mean()) == pytest.approx(2 / 8, rel=1e-5)


@every_method
def test_experts_are_planned_and_at_full_rank_answer_alike(method: str):
    net = Net()
    plan = planned(net, 10**6, X, method=method, allow_larger=True)
    assert list(plan) == ["experts.up", "experts.down", "head"]
    up = plan["experts.up"]
    assert (up.shape, up.stored_shape, up.role.value) == (SHAPE, (3, 12, 8), "parameter")
    assert up.call_sites.out_positions == 10  # five tokens, each sent to two experts
    assert up.macs_before == up.macs_after == 10 * 12 * 8
    small = hodec.convert(net, plan)
    for training in (True, False):
        torch.testing.assert_close(small.train(training)(X), net.train(training)(X), rtol=1e-9, atol=1e-9)


@every_method
def test_copies_and_files_of_factorized_experts_answer_the_same(method: str, tmp_path):
    net = Net()
    plan = planned(net, 2, X, method=method, include=["experts.*"])
    small = hodec.convert(net, plan)
    assert sum(p.numel() for p in small.parameters()) == plan.params_after < plan.params_before
    small(X).square().sum().backward()
    assert all(float(p.grad.norm()) > 0 for p in small.parameters())
    hodec.save(small.eval(), tmp_path / "small.safetensors")
    others = copy.deepcopy(small), pickle.loads(pickle.dumps(small)), hodec.load(tmp_path / "small.safetensors", Net())
    with torch.no_grad():
        for other in others:
            torch.testing.assert_close(other.eval()(X), small(X), rtol=0, atol=0)
    assert 0 < max(hodec.conversion_errors(net, plan, small).values()) < 1


def test_a_weight_that_is_read_often_is_rebuilt_once_a_call(monkeypatch: pytest.MonkeyPatch):
    net = Net()
    small = hodec.convert(net, planned(net, 2, X, method="svd", include=["experts.*"]))
    layers, counts = small.experts.factorized, {"up": 0, "down": 0}
    for name, layer in layers.items():

        def counted(name: str = name, whole=layer.dense_weight) -> Tensor:
            counts[name] += 1
            return whole()

        monkeypatch.setattr(layer, "dense_weight", counted)
    small.train()(X)
    assert counts == {"up": 1, "down": 1}
    with torch.no_grad():
        small.eval()(X), small(X)
    assert counts == {"up": 2, "down": 2}


def test_rules_choose_one_rank_for_all_experts_and_whitening_is_refused():
    net = Net()
    plan = make_plan(net, Energy(0.5), method="svd", example_input=X, allow_larger=True)
    assert len(plan["experts.up"].ranks) == 1
    with pytest.raises(PlanError, match=r"experts.up is a weight inside a module.*plan.without"):
        hodec.collect_covariances(net, plan, [X])
    covariances = hodec.collect_covariances(net, plan.without("experts.up").without("experts.down"), [X])
    assert set(covariances) == {"head"}
    hodec.convert(net, plan, covariances=covariances)
