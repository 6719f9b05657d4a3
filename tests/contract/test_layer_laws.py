"""Laws of every factorized layer: it is the dense layer whose weight it shows, only stored differently."""

import copy

import pytest
import torch
from cases import Case, every_case, every_execution, relative
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from hodec.errors import ConvertError, RankError, TrainingError
from hodec.formats.calls import CallSites
from hodec.formats.layer_types import LAYER_TYPES
from hodec.layers.base import FactorizedLayer

RUNS = [CallSites.once((8,) * max(1, dims), (8,) * max(1, dims)) for dims in range(4)]
PRECISION = {torch.float64: 1e-9, torch.float32: 1e-4}
SETTINGS = {
    "conv2d": [
        {},
        {"kernel_size": 1},
        {"kernel_size": (3, 1), "padding": (1, 0)},
        {"stride": (1, 2)},
        {"kernel_size": 1, "stride": 2},
        {"padding": (2, 0)},
        {"dilation": (2, 1)},
        {"padding": "same"},
        {"padding": "same", "dilation": (2, 1)},
        {"padding": "valid"},
        *({"padding": (2, 0), "padding_mode": mode} for mode in ("zeros", "reflect", "replicate", "circular")),
        {"padding": "same", "dilation": (2, 1), "padding_mode": "reflect"},
        {"kernel_size": (2, 3), "padding": "same", "padding_mode": "replicate"},  # an odd number of added rows
        {"kernel_size": (3, 4), "padding": "same", "padding_mode": "circular"},  # and columns
        {"padding": "valid", "padding_mode": "circular"},
        {"padding": (1, 2), "stride": (1, 2), "dilation": (2, 1), "padding_mode": "reflect"},
    ],
    "conv1d": [{}, {"kernel_size": 1}, {"stride": 2, "padding": 1}, {"padding": "same", "dilation": 2}],
    "conv3d": [{}, {"kernel_size": 1}, {"stride": (1, 2, 1), "padding": (1, 0, 2), "padding_mode": "replicate"}],
    "conv_transpose1d": [{}, {"stride": 2, "padding": 1, "output_padding": 1}, {"dilation": 2}],
    "conv_transpose2d": [
        {},
        {"kernel_size": 1},
        {"kernel_size": (2, 3), "stride": (2, 1), "padding": (1, 0)},
        {"stride": (2, 3), "padding": 1, "output_padding": (1, 2), "dilation": (1, 2)},
    ],
    "conv_transpose3d": [{}, {"stride": 2, "padding": 1, "output_padding": 1}],
    "linear": [{}],
    "linear_in_first": [{}],
    "embedding": [{}],
}
STRIDED = {
    "conv1d": {"stride": 2, "padding": 1},
    "conv2d": {"stride": 2, "padding": 1},
    "conv3d": {"stride": 2},
    "conv_transpose1d": {"stride": 2},
    "conv_transpose2d": {"stride": (2, 3), "padding": (1, 0)},
    "conv_transpose3d": {"stride": 2},
}


@torch.no_grad()
def dense_twin(dense: nn.Module, layer: FactorizedLayer) -> nn.Module:
    """The dense layer with the weight that the factorized one stands for."""
    twin = copy.deepcopy(dense)
    twin.weight.copy_(layer.dense_weight())
    return twin


@every_execution
def test_equals_the_dense_layer_of_its_weight(case: Case, execution: str):
    for settings in ({"bias": False}, *SETTINGS[case.layer_type]):
        exact = case.dense(**settings)
        converted = case.layer(exact, execution=execution).eval()
        for dtype, tolerance in PRECISION.items():
            dense, layer, x = copy.deepcopy(exact).to(dtype), copy.deepcopy(converted).to(dtype), case.input(dtype)
            expected = dense_twin(dense, layer)(x)
            assert layer.ranks == case.format.max_ranks(layer.shape, layer.modes) or (
                relative(layer.dense_weight(), dense.weight) > 0.05  # or nothing was cut
            )
            for training in (False, True):
                message = lambda text: f"{settings} {dtype} training={training}: {text}"  # noqa: B023, E731
                y = layer.train(training)(x)
                torch.testing.assert_close(y, expected, rtol=tolerance, atol=tolerance, msg=message)
            with torch.no_grad():
                torch.testing.assert_close(layer.eval()(x), expected, rtol=tolerance, atol=tolerance)


@every_execution
def test_full_rank_equals_the_dense_layer(case: Case, execution: str):
    dense = case.dense()
    layer = case.layer(dense, cap=10**6, execution=execution).eval()
    torch.testing.assert_close(layer(case.input()), dense(case.input()), rtol=1e-9, atol=1e-9)


@every_case
def test_row_14_the_dense_layer_is_left_alone_and_its_mode_kept(case: Case):
    dense = case.dense().eval()
    before, state = copy.deepcopy(dense.state_dict()), torch.get_rng_state()
    layer = case.layer(dense)
    assert not layer.training
    assert case.layer(dense.train()).training
    torch.testing.assert_close(dict(dense.state_dict()), dict(before), rtol=0, atol=0)
    if not LAYER_TYPES[case.layer_type].is_embedding:
        torch.testing.assert_close(layer.bias, dense.bias, rtol=0, atol=0)
        assert layer.bias is not dense.bias
    assert torch.equal(torch.get_rng_state(), state)


@every_case
def test_params_are_the_modules_numbers(case: Case):
    layer = case.layer(case.dense(bias=False))
    assert sum(p.numel() for p in layer.parameters()) == case.format.params(case.shape, layer.ranks, case.modes)
    with_bias = case.layer(case.dense(bias=True))
    assert sum(p.numel() for p in with_bias.parameters()) == (
        case.format.params(case.shape, layer.ranks, case.modes) + (case.shape[0] if with_bias.bias is not None else 0)
    )


@every_execution
def test_macs_are_torchs_own_count(case: Case, execution: str):
    for settings in [{}, STRIDED.get(case.layer_type, {})]:
        layer, x = case.layer(case.dense(**settings), execution=execution).eval(), case.input()
        with torch.no_grad():
            y = layer(x)  # merges once
            with FlopCounterMode(display=False) as counter:
                layer(x)
        dims = LAYER_TYPES[case.layer_type].dims
        sizes = (x.shape[2:], y.shape[2:]) if dims else ((5,), (5,))
        call_sites = CallSites(((len(x), tuple(sizes[0]), tuple(sizes[1])),))
        macs = case.format.macs(case.shape, layer.ranks, case.modes, call_sites=call_sites, execution=execution)
        assert macs == counter.get_total_flops() / 2


@every_case
def test_the_chosen_execution_is_never_the_costlier_one(case: Case):
    for cap in (2, 3, 6, 10**6):
        ranks = case.ranks(cap)
        calls = RUNS[LAYER_TYPES[case.layer_type].dims]
        chosen = case.format.choose_execution(case.shape, ranks, case.modes, call_sites=calls)
        macs = {e: case.format.macs(case.shape, ranks, case.modes, call_sites=calls, execution=e)
                for e in case.format.executions}  # fmt: skip
        # the chain runs at a lower rate, so it must save some; a quarter at most is given away for it
        assert macs[chosen] <= min(macs.values()) / 0.75
        assert chosen in case.format.executions


@every_execution
def test_every_parameter_learns_as_the_dense_weight_says(case: Case, execution: str):
    dense = case.dense()
    layer, x = case.layer(dense, execution=execution).eval(), case.input()
    layer(x).square().sum().backward()
    through_layer = [p.grad for p in layer.parameters()]
    assert all(g is not None and float(g.norm()) > 0 for g in through_layer)

    layer.zero_grad()
    named = {"weight": layer.dense_weight(), "bias": layer.bias}
    torch.func.functional_call(dense, named, (x,)).square().sum().backward()
    through_weight = [p.grad for p in layer.parameters()]
    torch.testing.assert_close(through_layer, through_weight, rtol=1e-9, atol=1e-9)


@every_execution
def test_gradients_are_those_of_finite_differences(case: Case, execution: str):
    layer = case.layer(case.dense(), cap=2, execution=execution).eval()
    names, values = zip(*layer.named_parameters())
    if LAYER_TYPES[case.layer_type].is_embedding:
        pytest.skip("the input of a lookup has no gradient; its parameters' are tested above")
    x = case.input()[:1, ..., :5] if LAYER_TYPES[case.layer_type].dims else case.input()[:1, :2]
    x = x.clone().requires_grad_()

    def run(x: Tensor, *values: Tensor) -> Tensor:
        return torch.func.functional_call(layer, dict(zip(names, values)), (x,))

    assert torch.autograd.gradcheck(run, (x, *values), fast_mode=True)


@every_execution
def test_training_lowers_the_loss(case: Case, execution: str):
    x = case.input(torch.float32)
    target = case.layer(case.dense(torch.float32))(x).detach()  # what such a layer can learn
    layer = case.layer(case.dense(torch.float32), execution=execution)
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.02)
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        loss = (layer(x) - target).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]


@every_case
def test_factors_have_equal_sizes_after_conversion(case: Case):
    sizes = [f.square().mean().sqrt() for f in case.layer(case.dense()).factors()]
    torch.testing.assert_close(torch.stack(sizes), sizes[0].expand(len(sizes)))


@every_case
def test_factors_go_out_and_in(case: Case):
    layer, other = case.layer(case.dense()), case.layer(case.dense())
    versions = {name: p._version for name, p in other.named_parameters()}
    other.load_factors(layer.factors())
    # each change is one that remembered merges are told of
    assert all(p._version > versions[name] for name, p in other.named_parameters() if name != "bias")
    for mine, theirs in zip(layer.factors(), other.factors(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=0)
    torch.testing.assert_close(other.dense_weight(), layer.dense_weight(), rtol=0, atol=0)


# -- precision and bad input ---------------------------------------------------------------------------------------


@every_execution
def test_row_5_a_half_precision_layer_is_factorized_in_float32(case: Case, execution: str):
    for dtype in (torch.bfloat16, torch.float16):
        dense = case.dense(dtype)
        layer = case.layer(dense, execution=execution).eval()
        exact = case.layer(copy.deepcopy(dense).float(), execution=execution)
        assert {p.dtype for p in layer.parameters()} == {dtype}
        for mine, full in zip(layer.parameters(), exact.parameters()):
            torch.testing.assert_close(mine, full.to(dtype), rtol=0, atol=0)
        with torch.no_grad():
            x = case.input(dtype)
            y = layer(x)
        assert y.dtype == dtype
        assert relative(y.float(), exact.eval()(x.float() if x.is_floating_point() else x)) < 0.05


@every_case
def test_row_7_autocast_changes_no_factorization(case: Case):
    dense = case.dense(torch.float32)
    outside = case.layer(dense)
    with torch.autocast("cpu", torch.bfloat16):
        inside = case.layer(dense)
    torch.testing.assert_close(list(inside.parameters()), list(outside.parameters()), rtol=0, atol=0)


@every_case
def test_row_1_nan_is_refused_by_the_layer_too(case: Case):
    dense = case.dense(torch.float32)
    dense.weight.data.view(-1)[0] = torch.nan
    with pytest.raises(TrainingError, match="NaN or Inf"):
        case.layer(dense)


@every_case
def test_row_4_a_huge_weight_is_factorized_finitely(case: Case):
    dense = case.dense(torch.float32)
    with torch.no_grad():
        dense.weight.div_(dense.weight.abs().max())
        like_any_other = case.layer(dense).dense_weight()
        dense.weight.mul_(1e38)
        layer = case.layer(dense)
    assert max(p.detach().abs().max().item() for p in layer.factors()) < 1e20  # balanced: none near its end
    assert relative(layer.dense_weight() / 1e38, like_any_other) < 1e-5


@every_case
def test_a_zero_weight_can_still_learn(case: Case):
    dense = case.dense()
    nn.init.zeros_(dense.weight)
    layer = case.layer(dense)
    torch.testing.assert_close(layer.dense_weight(), torch.zeros_like(dense.weight), rtol=0, atol=0)
    layer(case.input()).sum().backward()
    assert max(float(f.grad.norm()) for f in layer.parameters() if f is not layer.bias) > 1e-3


@every_case
def test_fresh_factors_have_the_variance_of_kaiming(case: Case):
    layer = case.cls.like(case.dense(bias=True), case.ranks(4), modes=case.modes, initialize=True)
    fan_in = torch.Size(case.shape[1:]).numel()
    assert float(layer.dense_weight().detach().square().mean()) == pytest.approx(2 / fan_in, rel=1e-5)
    assert layer.bias is None or bool((layer.bias == 0).all())


@every_case
def test_unknown_executions_and_ranks_are_refused(case: Case):
    with pytest.raises(ConvertError, match=f"'sideways' is not one of {', '.join(case.format.executions)}"):
        case.layer(case.dense(), execution="sideways")
    with pytest.raises(RankError):
        case.cls.from_dense(case.dense(), [10**6] * len(case.ranks(3)), modes=case.modes)


@every_case
def test_the_printed_layer_says_what_it_is(case: Case):
    layer = case.layer(case.dense())
    text = repr(layer)
    assert "8 -> 12" in text
    assert f"ranks={list(layer.ranks)}" in text
    assert f"execution={case.format.executions[0]}" in text
