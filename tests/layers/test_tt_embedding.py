"""TT embeddings: rows without a table, a padding row that stays, and vocabularies that cannot be split."""

import pytest
import torch
import torch.nn.functional as F
from swaps import factorized, planned
from torch import nn
from torch.testing import assert_close

from hodec.conversion.swap import convert
from hodec.formats.modes import Modes
from hodec.layers.embedding import TTEmbedding


def net(entries: int = 60, width: int = 16, **settings: object) -> nn.Sequential:
    return nn.Sequential(nn.Embedding(entries, width, **settings), nn.Linear(width, 4))


TOKENS = torch.tensor([[0, 1, 59], [7, 31, 7]])


def test_a_token_is_read_as_digits_the_last_running_fastest():
    layer = TTEmbedding(60, 16, ranks=[2, 3], modes=Modes((3, 4, 5), (2, 2, 4)))
    for token in (0, 1, 23, 59):
        digits = [int(d) for d in layer._digits(torch.tensor([token]))]
        assert (digits[0] * 4 + digits[1]) * 5 + digits[2] == token
        first, second, third = (core[i].detach() for core, i in zip(layer.cores, digits, strict=True))
        row = torch.einsum("apb,bqc,cse->pqs", first, second, third).flatten()
        assert_close(layer(torch.tensor(token)), row)
        assert_close(layer.dense_weight()[token], row)


@pytest.mark.parametrize("shape", [(), (3,), (2, 3), (0,), (2, 0)], ids=str)
def test_tokens_of_any_shape(shape: tuple[int, ...]):
    layer = TTEmbedding(60, 16, ranks=[3], padding_idx=0)
    assert layer(torch.zeros(shape, dtype=torch.long)).shape == (*shape, 16)


def test_tokens_outside_the_vocabulary_are_refused():
    layer = TTEmbedding(60, 16, ranks=[3])
    for token in (60, 1000, -1):
        with pytest.raises(IndexError):
            layer(torch.tensor([token]))


@pytest.mark.parametrize("value", [0.0, 2.5])
def test_the_padding_row_stays_as_it_was_and_learns_nothing(value: float):
    model = net(padding_idx=1)
    model[0].weight.data[1] = value
    layer = TTEmbedding.from_dense(model[0], [3])
    assert_close(layer(torch.tensor([1]))[0], torch.full((16,), value), rtol=0, atol=0)
    assert_close(layer.dense_weight()[1], torch.full((16,), value), rtol=0, atol=0)
    layer(torch.tensor([1, 1])).sum().backward()
    assert all(core.grad is None or not core.grad.any() for core in layer.cores)
    layer(torch.tensor([1, 2])).sum().backward()
    assert all(core.grad.any() for core in layer.cores)
    again = TTEmbedding.like(nn.Embedding(60, 16, padding_idx=1), [3])
    again.load_state_dict(layer.state_dict())
    assert_close(again.dense_weight(), layer.dense_weight(), rtol=0, atol=0)


def test_a_net_converts_and_the_table_is_never_built(monkeypatch):
    model = net(6000, 64)
    plan = planned(model, 4, TOKENS, include=["0"])
    assert plan["0"].params_after < 0.05 * plan["0"].params_before
    assert (plan["0"].macs_before, plan["0"].macs_after) == (0, 3 * 64 * 4)
    small = convert(model, plan)
    assert type(factorized(small)["0"]) is TTEmbedding
    assert sum(p.numel() for p in small.parameters()) == plan.params_after
    expected = F.embedding(TOKENS, plan["0"].project(model[0].weight))
    monkeypatch.setattr(TTEmbedding, "dense_weight", lambda self: pytest.fail("the table was built"))
    assert_close(small[0](TOKENS), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("entries", "n_modes"), [(59, 2), (62, 3)])
def test_a_vocabulary_without_enough_factors_stays_dense_with_the_reason(entries: int, n_modes: int):
    plan = planned(net(entries), 1, TOKENS % 50, n_modes=n_modes, allow_larger=True)
    assert set(plan) == {"1"}
    assert f"its vocabulary of {entries} entries has no {n_modes} factors above 1" in plan.skipped["0"]


def test_training_lowers_the_loss_of_seen_tokens():
    model = net(padding_idx=0)
    small = convert(model, planned(model, 3, TOKENS, allow_larger=True))
    optimizer, target, losses = torch.optim.Adam(small.parameters(), lr=0.02), torch.randn(2, 3, 4), []
    for _ in range(30):
        optimizer.zero_grad()
        loss = F.mse_loss(small(TOKENS), target)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
