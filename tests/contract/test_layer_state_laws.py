"""Laws of every factorized layer about its state: copies are exact, and what inference remembers is never stale."""

import copy
import pickle
from collections.abc import Callable

import torch
from cases import Case, every_case, every_execution, relative
from safetensors.torch import load, save
from torch import Tensor, nn

from hodec.layers.base import FactorizedLayer

# -- copies ----------------------------------------------------------------------------------------------------


def _through_state_dict(layer: FactorizedLayer, dense: nn.Module) -> nn.Module:
    other = type(layer).like(dense, layer.ranks, modes=layer.modes, execution=layer.execution).eval()
    assert other.load_state_dict(layer.state_dict()).missing_keys == []
    return other


def _through_safetensors(layer: FactorizedLayer, dense: nn.Module) -> nn.Module:
    other = type(layer).like(dense, layer.ranks, modes=layer.modes, execution=layer.execution).eval()
    other.load_state_dict(load(save(layer.state_dict())))
    return other


COPIES: dict[str, Callable[[FactorizedLayer, nn.Module], nn.Module]] = {
    "state_dict": _through_state_dict,
    "safetensors": _through_safetensors,
    "deepcopy": lambda layer, dense: copy.deepcopy(layer),
    "pickle": lambda layer, dense: pickle.loads(pickle.dumps(layer)),
}


@every_execution
@torch.no_grad()
def test_a_copy_answers_bit_for_bit_the_same(case: Case, execution: str):
    dense = case.dense(torch.float32)
    layer, x = case.layer(dense, execution=execution).eval(), case.input(torch.float32)
    expected = layer(x)  # merges are remembered now, and must not get in the way
    for way, copied in COPIES.items():
        other = copied(layer, dense)
        assert torch.equal(other(x), expected), way
        for p in other.parameters():
            p.add_(1)
        assert torch.equal(layer(x), expected), way  # nothing is shared
        assert relative(other(x), expected) > 0.1, way


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


def _data_in_place(layer: FactorizedLayer) -> None:
    for p in layer.parameters():
        p.data.copy_(p.data * 1.5)


def _through_numpy(layer: FactorizedLayer) -> None:
    for p in layer.parameters():
        p.detach().numpy()[...] *= 1.5


def _swapped(layer: FactorizedLayer) -> None:
    for p in layer.parameters():
        torch.utils.swap_tensors(p, nn.Parameter(p * 1.5))


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
    "data_in_place": _data_in_place,
    "through_numpy": _through_numpy,
    "swap_tensors": _swapped,
    "new_parameters": _new_parameters,
    "train_eval": _data_edited_between_training_steps,
    "to_dtype": lambda layer: layer.to(torch.float32),
}


@every_execution
@torch.no_grad()
def test_output_follows_the_weights(case: Case, execution: str):
    dense = case.dense()
    converted = case.layer(dense, execution=execution).eval()
    for change, apply in CHANGES.items():
        layer = copy.deepcopy(converted)
        before = layer(case.input())
        apply(layer)
        dtype = next(layer.parameters()).dtype
        after = layer(case.input(dtype))
        fresh = type(layer).like(dense, layer.ranks, modes=case.modes, execution=execution).eval().to(dtype)
        fresh.load_state_dict(layer.state_dict())
        assert torch.equal(after, fresh(case.input(dtype))), change
        assert after.dtype == dtype, change
        assert change == "to_dtype" or relative(after, before) > 0.1, change


@every_execution
def test_training_follows_its_own_steps(case: Case, execution: str):
    layer, x = case.layer(case.dense(), execution=execution), case.input()
    with torch.no_grad():
        before = layer(x)
        if layer.bias is not None:
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
def test_autocast_gives_the_type_that_torchs_layer_gives(case: Case, execution: str):
    layer = case.layer(case.dense(torch.float32), execution=execution)
    for training in (True, False):
        with torch.autocast("cpu", torch.bfloat16):
            low = layer.train(training)(case.input(torch.float32))
        assert low.dtype == torch.bfloat16 or case.layer_type == "embedding"  # which torch looks up in float32


@every_execution
def test_inference_mode_before_and_after_other_modes(case: Case, execution: str):
    layer, x = case.layer(case.dense(), execution=execution).eval(), case.input()
    with torch.inference_mode():
        expected = layer(x).clone()
    with torch.no_grad():
        torch.testing.assert_close(layer(x), expected, rtol=0, atol=0)
    layer(x).sum().backward()  # with gradients on, nothing remembered may be used
    assert all(p.grad is not None for p in layer.parameters())
    with torch.inference_mode():
        made_here = case.layer(case.dense(), execution=execution).eval()
        before = made_here(x)
        next(made_here.parameters()).mul_(2)
        assert relative(made_here(x), before) > 0.1
