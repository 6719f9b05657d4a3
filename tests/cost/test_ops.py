"""Multiply-adds by hand: recurrent layers, attention, einsum, bilinear maps, products with parameters, bags."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence

from hodec.cost.count import count_by_parameter, count_cost

BATCH, STEPS, IN, HIDDEN = 3, 5, 6, 8
GATES = {nn.RNN: 1, nn.GRU: 3, nn.LSTM: 4, nn.RNNCell: 1, nn.GRUCell: 3, nn.LSTMCell: 4}


def by_hand(cls: type[nn.Module], *, layers: int = 1, directions: int = 1) -> int:
    """Multiply-adds of one step: each gate reads the input and the state before."""
    widths = [IN, *[directions * HIDDEN] * (layers - 1)]
    return sum(directions * GATES[cls] * HIDDEN * (width + HIDDEN) for width in widths)


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("layers", [1, 3])
@pytest.mark.parametrize("cls", [nn.RNN, nn.GRU, nn.LSTM])
def test_recurrent_layers(cls: type[nn.RNNBase], layers: int, bidirectional: bool):
    net = cls(IN, HIDDEN, layers, batch_first=True, bidirectional=bidirectional)
    cost, by_parameter = count_by_parameter(net, torch.randn(BATCH, STEPS, IN))
    assert cost.macs == STEPS * by_hand(cls, layers=layers, directions=1 + bidirectional)
    assert by_parameter == {name: STEPS * p.numel() for name, p in net.named_parameters() if name[:6] == "weight"}


@pytest.mark.parametrize("cls", [nn.RNNCell, nn.GRUCell, nn.LSTMCell])
def test_recurrent_cells(cls: type[nn.RNNCellBase]):
    assert count_cost(cls(IN, HIDDEN), torch.randn(BATCH, IN)).macs == by_hand(cls)


@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")
def test_an_lstm_that_projects_its_output():
    net = nn.LSTM(IN, HIDDEN, batch_first=True, proj_size=2)
    weights = sum(p.numel() for p in net.parameters() if p.ndim > 1)
    assert count_cost(net, torch.randn(BATCH, STEPS, IN)).macs == STEPS * weights


def test_a_packed_batch_counts_the_steps_that_it_has():
    class Packed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn = nn.LSTM(IN, HIDDEN, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            return self.rnn(pack_padded_sequence(x, [5, 3, 1], batch_first=True))[0].data

    assert count_cost(Packed(), torch.randn(3, STEPS, IN)).macs == (5 + 3 + 1) * by_hand(nn.LSTM) // 3


class Multiplies(nn.Module):
    """A net that multiplies by its own parameter."""

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(shape))


class Einsum(Multiplies):
    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("nti,hid->nhtd", x, self.w)


class InDouble(Multiplies):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x.double(), self.w.double())


class Matmul(Multiplies):
    def forward(self, x: Tensor) -> Tensor:
        return x @ self.w


class Slice(Multiplies):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.w[1])


class Vector(Multiplies):
    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([torch.mv(self.w, row) for row in x])


class Stacked(Multiplies):
    def forward(self, x: Tensor) -> Tensor:
        return torch.bmm(x.expand(self.w.shape[0], *x.shape), self.w)


NETS = [  # net, shape of its input, multiply-adds by hand of one image
    (Einsum(2, IN, 4), (BATCH, STEPS, IN), STEPS * 2 * IN * 4),
    (InDouble(7, IN), (BATCH, IN), IN * 7),
    (Matmul(IN, 7), (BATCH, STEPS, IN), STEPS * IN * 7),
    (Slice(3, 7, IN), (BATCH, IN), IN * 7),
    (Vector(7, IN), (BATCH, IN), IN * 7),
    (Stacked(4, IN, 7), (BATCH, IN), 4 * IN * 7),
]


@pytest.mark.parametrize(("net", "size", "macs"), NETS, ids=lambda one: type(one).__name__)
def test_products_with_a_parameter(net: nn.Module, size: tuple[int, ...], macs: int):
    cost, by_parameter = count_by_parameter(net, torch.randn(size))
    assert cost.macs == macs
    assert by_parameter == {"w": macs}


def test_a_bilinear_map_multiplies_by_its_weight_and_then_by_its_second_input():
    macs, shares = count_by_parameter(nn.Bilinear(4, 5, 6), (torch.randn(BATCH, 4), torch.randn(BATCH, 5)))
    assert macs.macs == 6 * 4 * 5 + 6 * 5 == shares["weight"]


class Attention(nn.Module):
    """Attention over heads; ``kernels`` are torch's fused ones where it is not given."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(16, 48), nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (one.unflatten(-1, (4, 4)).transpose(1, 2) for one in self.qkv(x).chunk(3, dim=-1))
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


ATTENTION = STEPS * (16 * 48 + 16 * 16) + 2 * STEPS * STEPS * 16


def test_fused_attention_counts_its_two_products():
    assert count_cost(Attention(), torch.randn(BATCH, STEPS, 16)).macs == ATTENTION


def test_attention_by_torchs_module_and_its_weights():
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(16, 4, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            return self.attention(x, x, x, need_weights=False)[0]

    cost, by_parameter = count_by_parameter(Own(), torch.randn(BATCH, STEPS, 16))
    assert cost.macs == ATTENTION
    assert by_parameter == {
        "attention.in_proj_weight": STEPS * 16 * 48,
        "attention.out_proj.weight": STEPS * 16 * 16,
    }


def test_bags_of_embeddings_multiply_only_by_the_weights_of_samples():
    ids, weights = torch.zeros(BATCH, STEPS, dtype=torch.long), torch.rand(BATCH, STEPS)

    class Bag(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bag = nn.EmbeddingBag(10, 4, mode="sum")

        def forward(self, ids: Tensor, weights: Tensor | None = None) -> Tensor:
            return self.bag(ids, per_sample_weights=weights)

    assert count_cost(Bag(), ids).macs == 0
    assert count_cost(Bag(), (ids, weights)).macs == STEPS * 4


def test_a_tied_weight_has_one_name_and_the_products_of_both_its_users():
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(IN, IN), nn.Linear(IN, IN)
            self.second.weight = self.first.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.second(self.first(x))

    assert count_by_parameter(Tied(), torch.randn(BATCH, IN))[1] == {"first.weight": 2 * IN * IN}
