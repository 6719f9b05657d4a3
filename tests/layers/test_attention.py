"""Attention with factorized projections: at full rank it is torch's own, with every mask, layout and mode."""

import copy

import pytest
import torch
from swaps import planned
from torch import Tensor, nn

import hodec
from hodec.conversion.inner import stand_in
from hodec.formats.roles import REBUILT
from hodec.layers.inner import multiply_out, put_inside

WAYS = [("svd", "merged"), ("tt", "chain"), ("svd", REBUILT)]
every_way = pytest.mark.parametrize(("method", "execution"), WAYS)
L, S, E = 4, 4, 8
CAUSAL = torch.ones(L, S, dtype=torch.bool).triu(1)
PADDING = torch.tensor([[False] * 4, [False, False, True, True], [False] * 3 + [True]])
CALLS = [
    {},
    {"need_weights": False},
    {"average_attn_weights": False, "attn_mask": CAUSAL},
    {"need_weights": False, "attn_mask": CAUSAL, "is_causal": True},
    {"key_padding_mask": PADDING, "attn_mask": CAUSAL},
    {"key_padding_mask": PADDING, "need_weights": False},
    {"attn_mask": torch.randn(3 * 2, L, S).double(), "need_weights": False},
]


class Attends(nn.Module):
    def __init__(self, **settings: object) -> None:
        super().__init__()
        self.attention, self.call = nn.MultiheadAttention(E, 2, **settings).double(), {}

    def forward(self, *given: Tensor) -> tuple[Tensor, Tensor | None]:
        return self.attention(*(given * 3)[:3], **self.call)


def full(net: nn.Module, x: object, method: str, execution: str) -> nn.Module:
    return hodec.convert(net, planned(net, 10**6, x, method=method, execution=execution, allow_larger=True))


def check(small: Attends, net: Attends, *given: Tensor, **call: object) -> None:
    small.call = net.call = call
    for training in (True, False):
        mine, theirs = small.train(training)(*given), net.train(training)(*given)
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-9)
        with torch.no_grad():  # torch's fast path
            torch.testing.assert_close(small(*given), theirs, rtol=1e-9, atol=1e-9)


@every_way
@pytest.mark.parametrize("batch_first", [True, False])
def test_self_attention_is_torchs(method: str, execution: str, batch_first: bool):
    net, x = Attends(batch_first=batch_first), torch.randn(3, L, E).double()
    small = full(net, x if batch_first else x.transpose(0, 1), method, execution)
    for call in CALLS:
        check(small, net, x if batch_first else x.transpose(0, 1), **call)
    for call in ({}, {"attn_mask": CAUSAL}, {"key_padding_mask": PADDING[1]}):
        check(small, net, x[0], **call)


@every_way
@pytest.mark.parametrize("settings", [{}, {"kdim": 5, "vdim": 6}, {"add_bias_kv": True}, {"add_zero_attn": True}])
def test_cross_attention_is_torchs(method: str, execution: str, settings: dict):
    net = Attends(batch_first=True, **settings)
    x, memory = torch.randn(3, L, E).double(), torch.randn(3, 7, E).double()
    given = x, memory[..., : settings.get("kdim", E)], memory[..., : settings.get("vdim", E)]
    plan = planned(net, 10**6, given, method=method, execution=execution, allow_larger=True)
    joint = plan.get("attention.in_proj_weight")
    if joint is not None:  # a third of it is multiplied by each of the three
        assert joint.call_sites.out_positions == (4 + 7 + 7) // 3
        assert (joint.resolved_execution, joint.role.value) == (REBUILT, "parameter")
        assert execution == REBUILT or "does not apply" in joint.notes[-1]
    else:
        assert [plan[f"attention.{k}_proj_weight"].call_sites.out_positions for k in "qkv"] == [4, 7, 7]
    check(hodec.convert(net, plan), net, *given)


@every_way
def test_autocast_gives_the_type_that_torchs_module_gives(method: str, execution: str):
    net, x = Attends(batch_first=True).float(), torch.randn(3, L, E)
    small = full(net, x, method, execution)
    for call in ({}, {"need_weights": False}):
        small.call = net.call = call
        with torch.autocast("cpu", torch.bfloat16):
            assert small(x)[0].dtype == net(x)[0].dtype


@every_way
def test_every_factor_learns(method: str, execution: str):
    net, x = Attends(batch_first=True), torch.randn(3, L, E).double()
    small = hodec.convert(net, planned(net, 2, x, method=method, execution=execution, allow_larger=True))
    small(x)[0].square().sum().backward()
    assert all(p.grad is not None and float(p.grad.norm()) > 0 for name, p in small.named_parameters())


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(E, 2, 16, batch_first=True, dropout=0.0)
        self.encoder = nn.TransformerEncoder(layer, 2).double()
        self.padding: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        return self.encoder(x, src_key_padding_mask=self.padding)


@every_way
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
def test_an_encoder_answers_alike_in_both_modes_and_with_padding(method: str, execution: str):
    net, x = Encoder(), torch.randn(3, L, E).double()
    include = ["*self_attn*"] if execution == REBUILT else None  # its other layers are swapped, not rebuilt
    plan = planned(net, 2, x, method=method, execution=execution, allow_larger=True, include=include)
    assert len(plan) == (4 if include else 8)
    small, near = hodec.convert(net, plan), copy.deepcopy(net)
    with torch.no_grad():
        for name, layer in plan.items():
            weight = near.get_parameter(layer.parameter(name))
            weight.copy_(layer.project(weight))
    for padding in (None, PADDING):
        small.padding = near.padding = padding
        for training in (True, False):
            mine, theirs = small.train(training)(x), near.train(training)(x)
            with torch.no_grad():
                again = small(x)
            for made in (mine, again):  # what stands in padded places depends on torch's kernel
                kept = (made, theirs) if padding is None else (made[~padding], theirs[~padding])
                torch.testing.assert_close(*kept, rtol=1e-9, atol=1e-9)


def test_a_fused_encoder_runs_plain_layers():
    net, x = Encoder().float(), torch.randn(3, L, E)
    small = hodec.convert(net, planned(net, 2, x, method="svd")).eval()
    fused = hodec.fuse(small, example_input=x, target="macs")
    assert len(fused.fuse_report.layers) == 8
    torch.testing.assert_close(fused(x), small(x))


@every_way
def test_multiplied_out_it_is_torchs_module_again(method: str, execution: str):
    net, x = Attends(batch_first=True), torch.randn(3, L, E).double()
    small = hodec.convert(net, planned(net, 2, x, method=method, execution=execution, allow_larger=True))
    dense = multiply_out(copy.deepcopy(small))
    assert type(dense.attention) is nn.MultiheadAttention
    assert type(dense.attention.out_proj) is type(net.attention.out_proj)
    assert {name: p.shape for name, p in dense.named_parameters()} == {n: p.shape for n, p in net.named_parameters()}
    assert all(p.requires_grad for p in dense.parameters())
    check(small, dense, x)


def test_a_weight_that_is_put_back_is_the_same_parameter():
    net, x = Attends(batch_first=True), torch.randn(3, L, E).double()
    plan = planned(net, 2, x, method="svd", allow_larger=True)
    small, dense = hodec.convert(net, plan), copy.deepcopy(net)
    for path in plan:
        put_inside(small, path, stand_in(dense, path))
    assert small.attention.out_proj.weight is dense.attention.out_proj.weight
    assert type(small.attention) is nn.MultiheadAttention
    check(small, dense, x)
