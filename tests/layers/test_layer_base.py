"""What the factorized layers share: the remembered merge, balanced factors, draws that move no one's numbers."""

import pytest
import torch
from torch import nn

from hodec.formats import tt
from hodec.layers.base import equalize_norms, same_random_state
from hodec.layers.tt import TTConv2d, TTLinear


class Counted:
    """Counts how often a layer merges."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.count, real = 0, tt.merged_cores

        def merge(cores: list[torch.Tensor]) -> torch.Tensor:
            self.count += 0.5  # once each for inputs and outputs
            return real(cores)

        monkeypatch.setattr(tt, "merged_cores", merge)


@pytest.fixture
def layer() -> TTConv2d:
    return TTConv2d(8, 12, 3, ranks=(2, 3, 3, 4)).eval()


def test_serving_merges_once_per_weights(layer: TTConv2d, monkeypatch: pytest.MonkeyPatch):
    merges, x = Counted(monkeypatch), torch.randn(1, 8, 5, 5)
    with torch.no_grad():
        for _ in range(3):
            layer(x)
        assert merges.count == 1
        layer.kernel.mul_(2)
        for _ in range(3):
            layer(x)
        assert merges.count == 2
    with torch.inference_mode():
        layer(x)
    assert merges.count == 2


def test_what_is_remembered_shares_no_memory_with_the_weights(layer: TTConv2d):
    x, old = torch.randn(1, 8, 5, 5), layer.kernel.data
    with torch.no_grad():
        expected = layer(x)
        layer.kernel.data = old.clone()
        old.mul_(2)  # nobody's memory by now
        torch.testing.assert_close(layer(x), expected, rtol=0, atol=0)


def test_training_and_gradients_merge_every_time(layer: TTConv2d, monkeypatch: pytest.MonkeyPatch):
    merges, x = Counted(monkeypatch), torch.randn(1, 8, 5, 5)
    layer(x)
    layer(x)
    assert merges.count == 2
    layer.train()
    with torch.no_grad():
        layer(x)
        layer(x)
    assert merges.count == 4


def test_the_chain_never_merges(monkeypatch: pytest.MonkeyPatch):
    layer = TTConv2d(8, 12, 3, ranks=(2, 3, 3, 4), execution="chain")
    merges, x = Counted(monkeypatch), torch.randn(1, 8, 5, 5)
    layer.eval()(x)
    assert merges.count == 0
    layer.train()(x)  # training runs the format's first execution
    assert merges.count == 1


def test_balance_keeps_the_product_and_equals_the_sizes(generator: torch.Generator):
    factors = [torch.randn(4, 4, generator=generator).double() * scale for scale in (1e-6, 3.0, 1e9)]
    even = equalize_norms(factors)
    torch.testing.assert_close(even[0] @ even[1] @ even[2], factors[0] @ factors[1] @ factors[2])
    sizes = torch.stack([f.square().mean().sqrt() for f in even])
    torch.testing.assert_close(sizes, sizes[:1].expand(3))


def test_balance_leaves_a_zero_product_as_it_is():
    factors = [torch.ones(2, 2), torch.zeros(2, 2)]
    for given, kept in zip(factors, equalize_norms(factors)):
        torch.testing.assert_close(kept, given, rtol=0, atol=0)


def test_same_random_state_gives_the_same_numbers_again():
    before = torch.get_rng_state()
    with same_random_state([torch.ones(1)]):
        torch.rand(5)
    assert torch.equal(torch.get_rng_state(), before)


def test_there_and_back_nothing_is_drawn_but_a_new_layer_draws():
    before = torch.get_rng_state()
    dense = nn.Linear(8, 12)
    moved = torch.get_rng_state()
    assert not torch.equal(before, moved)
    made = TTLinear.from_dense(dense, (3,)).to_dense()
    assert torch.equal(torch.get_rng_state(), moved)
    assert made.weight.requires_grad
    TTLinear(8, 12, ranks=(3,))
    assert not torch.equal(torch.get_rng_state(), moved)


def test_a_seed_fixes_fresh_factors():
    torch.manual_seed(3)
    one = TTConv2d(8, 12, 3, ranks=(2, 3, 3, 4))
    torch.manual_seed(3)
    two = TTConv2d(8, 12, 3, ranks=(2, 3, 3, 4))
    torch.testing.assert_close(list(one.parameters()), list(two.parameters()), rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_fresh_half_precision_factors_are_finite_at_large_ranks(dtype: torch.dtype):
    layer = TTConv2d(256, 256, 3, ranks=(16, 200, 200, 16), dtype=dtype)
    assert all(bool(p.isfinite().all()) for p in layer.parameters())
    assert layer.dense_weight().float().std().item() == pytest.approx((2 / (256 * 9)) ** 0.5, rel=0.05)


def test_one_channel_to_one_channel():
    layer = TTConv2d(1, 1, 1, ranks=(1, 1, 1, 1))
    assert bool(layer.dense_weight().isfinite().all())


def test_factors_on_the_meta_device_cost_nothing():
    layer = TTLinear(64, 64, ranks=(8,), device="meta")
    assert {p.device.type for p in layer.parameters()} == {"meta"}
