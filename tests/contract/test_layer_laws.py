"""Laws of every factorized layer: it is the dense layer whose weight it shows, only stored differently."""

import copy
import io
import pickle
from collections.abc import Callable

import pytest
import torch
from cases import Case, every_case, every_execution, relative
from safetensors.torch import load, save
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from hodec.errors import ConvertError, RankError, TrainingError
from hodec.layers.base import FactorizedLayer

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
    "linear": [{}],
}


@torch.no_grad()
def dense_twin(dense: nn.Module, layer: FactorizedLayer) -> nn.Module:
    """The dense layer with the weight that the factorized one stands for."""
    twin = copy.deepcopy(dense)
    twin.weight.copy_(layer.dense_weight())
    return twin


@every_execution
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])
def test_equals_the_dense_layer_of_its_weight(case: Case, execution: str, bias: bool):
    for settings in SETTINGS[case.kind]:
        for dtype, tolerance in PRECISION.items():
            dense = case.dense(dtype, bias=bias, **settings)
            layer = case.layer(dense, execution=execution).eval()
            x = case.input(dtype)
            expected = dense_twin(dense, layer)(x)
            assert layer.ranks == case.form.max_ranks(layer.shape, layer.modes) or (
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
def test_rows_14_the_dense_layer_is_left_alone_and_its_mode_kept(case: Case):
    dense = case.dense().eval()
    before, state = copy.deepcopy(dense.state_dict()), torch.get_rng_state()
    layer = case.layer(dense)
    assert not layer.training
    assert case.layer(dense.train()).training
    torch.testing.assert_close(dict(dense.state_dict()), dict(before), rtol=0, atol=0)
    torch.testing.assert_close(layer.bias, dense.bias, rtol=0, atol=0)
    assert layer.bias is not dense.bias
    assert torch.equal(torch.get_rng_state(), state)


@every_case
def test_params_are_the_modules_numbers(case: Case):
    layer = case.layer(case.dense(bias=False))
    assert sum(p.numel() for p in layer.parameters()) == case.form.params(case.shape, layer.ranks, case.modes)
    with_bias = case.layer(case.dense(bias=True))
    assert sum(p.numel() for p in with_bias.parameters()) == (
        case.form.params(case.shape, layer.ranks, case.modes) + case.shape[0]
    )


@every_execution
def test_macs_are_torchs_own_count(case: Case, execution: str):
    for settings in [{}, {"stride": 2, "padding": 1}] if case.kind == "conv2d" else [{}]:
        layer, x = case.layer(case.dense(**settings), execution=execution).eval(), case.input()
        with torch.no_grad():
            y = layer(x)  # merges once
            with FlopCounterMode(display=False) as counter:
                layer(x)
        inp, out = case.shape[1], case.shape[0]
        pixels = (x.numel() // inp, y.numel() // out)
        macs = case.form.macs(case.shape, layer.ranks, case.modes, pixels=pixels, execution=execution)
        assert macs == counter.get_total_flops() / 2


@every_case
def test_the_chosen_execution_is_never_the_costlier_one(case: Case):
    for cap in (2, 3, 6, 10**6):
        ranks = case.ranks(cap)
        chosen = case.form.choose_execution(case.shape, ranks, case.modes, pixels=(64, 64))
        macs = {e: case.form.macs(case.shape, ranks, case.modes, pixels=(64, 64), execution=e)
                for e in case.form.executions}  # fmt: skip
        # the chain runs at a lower rate, so it must save some; a quarter at most is given away for it
        assert macs[chosen] <= min(macs.values()) / 0.75
        assert chosen in case.form.executions


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
    x = case.input()[:1, ..., :4] if case.kind == "conv2d" else case.input()[:1, :2]
    x = x.clone().requires_grad_()

    def run(x: Tensor, *values: Tensor) -> Tensor:
        return torch.func.functional_call(layer, dict(zip(names, values)), (x,))

    assert torch.autograd.gradcheck(run, (x, *values), fast_mode=True)


@every_execution
def test_training_lowers_the_loss(case: Case, execution: str):
    x = case.input(torch.float32)
    target = case.dense(torch.float32)(x).detach()
    layer = case.layer(case.dense(torch.float32), execution=execution)
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.02)
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        loss = (layer(x) - target).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]


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


# -- copies ----------------------------------------------------------------------------------------------------


def _through_state_dict(layer: FactorizedLayer, dense: nn.Module) -> nn.Module:
    other = type(layer).like(dense, layer.ranks, modes=layer.modes, execution=layer.execution).eval()
    assert other.load_state_dict(layer.state_dict()).missing_keys == []
    return other


def _through_safetensors(layer: FactorizedLayer, dense: nn.Module) -> nn.Module:
    other = type(layer).like(dense, layer.ranks, modes=layer.modes, execution=layer.execution).eval()
    other.load_state_dict(load(save(layer.state_dict())))
    return other


def _through_torch_save(layer: FactorizedLayer, dense: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES: dict[str, Callable[[FactorizedLayer, nn.Module], nn.Module]] = {
    "state_dict": _through_state_dict,
    "safetensors": _through_safetensors,
    "deepcopy": lambda layer, dense: copy.deepcopy(layer),
    "pickle": lambda layer, dense: pickle.loads(pickle.dumps(layer)),
    "torch_save": _through_torch_save,
}


@every_execution
@pytest.mark.parametrize("way", COPIES)
def test_a_copy_answers_bit_for_bit_the_same(case: Case, execution: str, way: str):
    dense = case.dense(torch.float32)
    layer, x = case.layer(dense, execution=execution).eval(), case.input(torch.float32)
    with torch.no_grad():
        expected = layer(x)  # merges are remembered now, and must not get in the way
        other = COPIES[way](layer, dense)
        torch.testing.assert_close(other(x), expected, rtol=0, atol=0)
        for p in other.parameters():
            p.add_(1)
        torch.testing.assert_close(layer(x), expected, rtol=0, atol=0)  # nothing is shared
        assert relative(other(x), expected) > 0.1


@every_case
def test_what_is_remembered_is_neither_saved_nor_copied(case: Case):
    layer = case.layer(case.dense()).eval()
    keys, size = list(layer.state_dict()), len(pickle.dumps(layer))
    with torch.no_grad():
        layer(case.input())
    assert list(layer.state_dict()) == keys
    assert len(pickle.dumps(layer)) == size


# -- what inference remembers --------------------------------------------------------------------------------------


def _other_state(layer: FactorizedLayer) -> dict[str, Tensor]:
    return {key: value * 1.5 + 0.1 for key, value in layer.state_dict().items()}


def _in_place(layer: FactorizedLayer) -> None:
    for p in layer.parameters():
        p.mul_(1.5)


def _optimizer_step(layer: FactorizedLayer) -> None:
    for p in layer.parameters():
        p.grad = torch.ones_like(p)
    torch.optim.SGD(layer.parameters(), lr=0.1).step()


def _new_data_twice(layer: FactorizedLayer) -> None:
    for p in layer.parameters():
        for _ in range(2):  # the second one may get the first one's memory
            p.data = p.data * 1.5


def _new_parameters(layer: FactorizedLayer) -> None:
    for module in layer.modules():
        for name, p in list(module._parameters.items()):
            if p is not None:
                module.register_parameter(name, nn.Parameter(p * 1.5))


def _data_edited_between_training_steps(layer: FactorizedLayer) -> None:
    layer.train()
    for p in layer.parameters():
        p.data.mul_(1.5)
    layer.eval()


CHANGES: dict[str, Callable[[FactorizedLayer], object]] = {
    "in_place": _in_place,
    "load_state_dict": lambda layer: layer.load_state_dict(_other_state(layer)),
    "load_state_dict_assign": lambda layer: layer.load_state_dict(_other_state(layer), assign=True),
    "load_factors": lambda layer: layer.load_factors([f * 1.5 for f in layer.factors()]),
    "reset_parameters": lambda layer: layer.reset_parameters(),
    "optimizer_step": _optimizer_step,
    "new_data": _new_data_twice,
    "new_parameters": _new_parameters,
    "train_eval": _data_edited_between_training_steps,
    "to_dtype": lambda layer: layer.to(torch.float32),
}


@every_execution
@pytest.mark.parametrize("change", CHANGES)
def test_output_follows_the_weights(case: Case, execution: str, change: str):
    dense = case.dense()
    layer = case.layer(dense, execution=execution).eval()
    with torch.no_grad():
        before = layer(case.input())
        CHANGES[change](layer)
        dtype = next(layer.parameters()).dtype
        after = layer(case.input(dtype))
        fresh = type(layer).like(dense, layer.ranks, modes=case.modes, execution=execution).eval().to(dtype)
        fresh.load_state_dict(layer.state_dict())
        torch.testing.assert_close(after, fresh(case.input(dtype)), rtol=0, atol=0)
    assert after.dtype == dtype
    assert change == "to_dtype" or relative(after, before) > 0.1


@every_execution
def test_training_follows_its_own_steps(case: Case, execution: str):
    layer, x = case.layer(case.dense(), execution=execution), case.input()
    with torch.no_grad():
        before = layer(x)
        layer.bias.add_(1)
        for f in layer.parameters():
            f.mul_(1.1)
        assert relative(layer(x), before) > 0.1


@every_execution
def test_row_7_what_autocast_merged_serves_nobody_else(case: Case, execution: str):
    layer, x = case.layer(case.dense(torch.float32), execution=execution).eval(), case.input(torch.float32)
    with torch.no_grad():
        expected = copy.deepcopy(layer)(x)
        with torch.autocast("cpu", torch.bfloat16):
            low = layer(x)
        torch.testing.assert_close(layer(x), expected, rtol=0, atol=0)
    assert relative(low.float(), expected) < 0.03


@every_execution
def test_inference_mode_before_and_after_other_modes(case: Case, execution: str):
    layer, x = case.layer(case.dense(), execution=execution).eval(), case.input()
    with torch.inference_mode():
        expected = layer(x).clone()
    with torch.no_grad():
        torch.testing.assert_close(layer(x), expected, rtol=0, atol=0)
    layer(x).sum().backward()  # with gradients on, nothing remembered may be used
    assert all(p.grad is not None for p in layer.parameters())
    with torch.inference_mode():  # parameters made here do not count their changes
        made_here = case.layer(case.dense(), execution=execution).eval()
        before = made_here(x)
        next(made_here.parameters()).mul_(2)
        assert relative(made_here(x), before) > 0.1


# -- precision and bad input ---------------------------------------------------------------------------------------


@every_execution
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_row_5_a_half_precision_layer_is_factorized_in_float32(case: Case, execution: str, dtype: torch.dtype):
    dense = case.dense(dtype)
    layer = case.layer(dense, execution=execution).eval()
    exact = case.layer(copy.deepcopy(dense).float(), execution=execution)
    assert {p.dtype for p in layer.parameters()} == {dtype}
    for mine, full in zip(layer.parameters(), exact.parameters()):
        torch.testing.assert_close(mine, full.to(dtype), rtol=0, atol=0)
    with torch.no_grad():
        y = layer(case.input(dtype))
    assert y.dtype == dtype
    assert relative(y.float(), exact.eval()(case.input(dtype).float())) < 0.05


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
        like_any_other = case.form.project(dense.weight, case.ranks(3), case.modes)
        dense.weight.mul_(1e38)
        layer = case.layer(dense)
    assert max(p.detach().abs().max().item() for p in layer.factors()) < 1e20  # balanced: none near its end
    assert relative(layer.dense_weight() / 1e38, like_any_other) < 1e-5


@every_case
def test_a_zero_weight_can_still_learn(case: Case):
    dense = case.dense()
    nn.init.zeros_(dense.weight)
    layer = case.layer(dense)
    torch.testing.assert_close(layer.dense_weight(), torch.zeros(case.shape).double(), rtol=0, atol=0)
    layer(case.input()).sum().backward()
    assert max(float(f.grad.norm()) for f in layer.parameters() if f is not layer.bias) > 1e-3


@every_case
def test_fresh_factors_have_the_variance_of_kaiming(case: Case):
    layer = case.cls.like(case.dense(bias=True), case.ranks(4), modes=case.modes)
    fan_in = torch.Size(case.shape[1:]).numel()
    assert float(layer.dense_weight().detach().square().mean()) == pytest.approx(2 / fan_in, rel=1e-5)
    assert bool((layer.bias == 0).all())


@every_case
def test_unknown_executions_and_ranks_are_refused(case: Case):
    with pytest.raises(ConvertError, match=f"'sideways' is not one of {', '.join(case.form.executions)}"):
        case.layer(case.dense(), execution="sideways")
    with pytest.raises(RankError):
        case.cls.from_dense(case.dense(), [10**6] * len(case.ranks(3)), modes=case.modes)


@every_case
def test_the_printed_layer_says_what_it_is(case: Case):
    layer = case.layer(case.dense())
    text = repr(layer)
    assert "8 -> 12" in text
    assert f"ranks={list(layer.ranks)}" in text
    assert f"execution={case.form.executions[0]}" in text
