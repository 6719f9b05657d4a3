"""Parameters, multiply-adds and positions, counted by running the model and leaving it as it was."""

import threading

import pytest
import torch
import torch.nn.functional as F
from small_nets import IMAGE, SmallResNet, Tokens, Twice, assert_untouched, snapshot
from torch import Tensor, nn
from torch.backends import mha
from torch.utils.flop_counter import FlopCounterMode

from hodec.cost.count import Cost, count_cost, trace_call_sites
from hodec.errors import PlanError
from hodec.inference import inference
from hodec.inputs import as_input


def positions(model: nn.Module, inputs: object) -> dict[str, tuple[int, int]]:
    """Positions (input, output) of each layer."""
    return {
        name: (call_sites.in_positions, call_sites.out_positions)
        for name, call_sites in trace_call_sites(model, inputs).items()
    }


def test_a_convolution_by_hand():
    conv = nn.Conv2d(6, 12, 3, stride=2, padding=1)
    cost = count_cost(conv, torch.randn(1, 6, 12, 12))
    assert cost == Cost(params=6 * 12 * 9 + 12, macs=6 * 12 * 9 * 6 * 6)


@pytest.mark.parametrize("batch", [1, 2, 7])
def test_cost_and_positions_are_those_of_one_image(batch: int):
    model, x = SmallResNet(), torch.randn(batch, *IMAGE[1:])
    one = torch.randn(1, *IMAGE[1:])
    assert count_cost(model, x) == count_cost(model, one)
    assert positions(model, x) == positions(model, one)


def test_positions_of_each_layer():
    assert positions(SmallResNet(), torch.randn(IMAGE)) == {
        "conv1": (144, 144),
        "layer1.conv1": (144, 36),
        "layer1.conv2": (36, 36),
        "layer1.shortcut": (144, 36),
        "fc": (1, 1),
    }


def test_a_linear_layer_over_a_sequence_counts_its_positions():
    model, x = Tokens(), torch.randn(3, 5, 16)
    assert positions(model, x) == {"up": (5, 5), "down": (5, 5)}
    assert count_cost(model, x).macs == 5 * (16 * 36 + 36 * 8)


def test_a_layer_called_twice_counts_both_calls_and_a_shared_one_has_one_name():
    assert positions(Twice(), torch.randn(1, 6, 8, 8)) == {"again": (64 + 16, 64 + 16), "first": (32, 32)}


def test_unused_and_functionally_used_layers_are_absent():
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.functional, self.unused = (nn.Linear(8, 8) for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            return F.linear(self.used(x), self.functional.weight)

    assert list(positions(Odd(), torch.randn(2, 8))) == ["used"]


def test_an_input_given_by_keyword_is_seen():
    class Keyword(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(input=x)

    assert positions(Keyword(), torch.randn(1, 3, 5, 5)) == {"conv": (25, 9)}


def test_several_inputs():
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.emb, self.fc = nn.Embedding(10, 4), nn.Linear(8, 2)

        def forward(self, ids: Tensor, x: Tensor) -> Tensor:
            return self.fc(torch.cat([self.emb(ids), x], dim=-1))

    inputs = (torch.zeros(3, dtype=torch.long), torch.randn(3, 4))
    assert count_cost(Two(), inputs) == Cost(params=40 + 18, macs=16)
    assert positions(Two(), list(inputs)) == {"emb": (1, 1), "fc": (1, 1)}


@pytest.mark.parametrize("bad", [(), torch.tensor(1.0), ["x"], {"x": 1}, torch.ones(0, 3), "x", None], ids=repr)
def test_example_inputs_without_a_batch_are_refused(bad: object):
    with pytest.raises(PlanError, match="batch as its first axis"):
        as_input(bad)


def test_the_products_of_attention_are_counted_in_inference_too():
    """The fused inference path of torch's encoder hides all its products from the counter."""
    encoder, x = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True), torch.randn(2, 5, 16)
    with FlopCounterMode(display=False) as counter:
        encoder.train()(x)
    before = mha.get_fastpath_enabled()
    assert count_cost(encoder.eval(), x).macs == counter.get_total_flops() // 2 // 2 > 0
    assert mha.get_fastpath_enabled() is before


def test_threads_that_leave_in_the_order_they_came_leave_the_fused_path_as_it_was():
    net, came, leave, before = nn.Linear(2, 2), threading.Event(), threading.Event(), mha.get_fastpath_enabled()

    def other():
        with inference(net):
            came.set()
            leave.wait(10)

    thread = threading.Thread(target=other)
    with inference(net):
        thread.start()
        came.wait(10)
    assert not mha.get_fastpath_enabled()
    leave.set()
    thread.join()
    assert mha.get_fastpath_enabled() is before


def test_counting_leaves_the_model_and_the_random_numbers_alone():
    class Noisy(SmallResNet):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(F.dropout(x))  # drops in evaluation too

    model = Noisy()
    model.bn1.eval()
    before = snapshot(model)
    count_cost(model, torch.randn(IMAGE, generator=torch.Generator().manual_seed(0)))
    positions(model, torch.randn(IMAGE, generator=torch.Generator().manual_seed(0)))
    assert_untouched(model, before)


def test_modes_are_restored_even_when_the_model_fails():
    model = SmallResNet()
    model.layer1.eval()
    before = snapshot(model)
    with pytest.raises(RuntimeError):
        positions(model, torch.ones(1, 5, 12, 12))
    assert_untouched(model, before)


def test_inference_is_evaluation_without_gradients():
    model = SmallResNet()
    with inference(model):
        assert not any(m.training for m in model.modules())
        assert not torch.is_grad_enabled()
    assert all(m.training for m in model.modules())
    assert torch.is_grad_enabled()
