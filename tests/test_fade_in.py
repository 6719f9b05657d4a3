"""FadeIn: from the outputs of the dense net to those of the factorized one, and nothing left behind."""

import copy
import math
import pickle

import pytest
import torch
from torch import nn

import hodec
from hodec.errors import ConfigError

IMAGE, INDICES = torch.randn(2, 12, 8, 8), torch.arange(20).reshape(2, 10)
LAYERS = {
    "conv": (nn.Conv2d(12, 16, 3, stride=2, padding=1, padding_mode="reflect"), "tt", IMAGE),
    "grouped": (nn.Conv2d(12, 16, 3, groups=2), "tucker", IMAGE),
    "transposed": (nn.ConvTranspose2d(12, 16, 3, stride=2, output_padding=1), "tucker", IMAGE),
    "cp": (nn.Conv2d(12, 16, 3, bias=False), "cp", IMAGE),
    "linear": (nn.Linear(8, 16), "svd", IMAGE),
    "embedding": (nn.Embedding(32, 16), "svd", INDICES),
    "weight_norm": (nn.utils.parametrizations.weight_norm(nn.Conv2d(12, 16, 3)), "tucker", IMAGE),
}


@pytest.fixture
def nets() -> tuple[nn.Module, nn.Module, torch.Tensor]:
    """A factorized net, the dense one it is made from, and an input."""
    torch.manual_seed(0)
    dense = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.Flatten(), nn.Linear(128, 6)
    )
    x = torch.randn(4, 3, 8, 8)
    return hodec.convert(dense, hodec.make_plan(dense, 3, method="tucker", example_input=x)), dense, x


@pytest.mark.parametrize("kind", LAYERS)
def test_each_layer_applies_what_is_between_the_two_weights(kind):
    layer, method, x = LAYERS[kind]
    dense = nn.Sequential(layer)
    small = hodec.convert(dense, hodec.make_plan(dense, 2, method=method, example_input=x))
    plain, wanted = small(x).detach(), dense(x).detach()
    assert not torch.allclose(plain, wanted, atol=1e-2)
    fade = hodec.FadeIn(small, dense)
    torch.testing.assert_close(small(x), wanted, atol=1e-4, rtol=1e-4)
    for share in (0.75, 0.25):
        fade.step(share)
        torch.testing.assert_close(small(x), plain + share * (wanted - plain), atol=1e-4, rtol=1e-4)
    fade.step(0)
    assert torch.equal(small(x), plain)


def test_nothing_is_left_behind(nets):
    small, dense, x = nets
    before, keys = small(x).detach(), list(small.state_dict())
    fade = hodec.FadeIn(small, dense)
    assert fade.layers == list(small.hodec_plan)
    assert list(small.state_dict()) == keys
    twin = copy.deepcopy(small)
    fade.remove()
    assert torch.equal(small(x), before)
    assert torch.equal(twin(x), before)
    assert not any(module._forward_hooks for module in small.modules())


def test_the_factors_are_trained_and_the_rest_of_the_weight_is_not(nets):
    """In any loop: at s the gradient is that of the factors of a net with the weights Z + s (W - Z)."""
    small, dense, x = nets
    weights = [module.weight.clone() for module in dense if hasattr(module, "weight")]
    fade, optimizer = hodec.FadeIn(small, dense), hodec.FactorSGD(small, lr=0.01, factors="muon")
    for step in range(4):
        fade.step(1 - step / 3)
        optimizer.zero_grad()
        small(x).square().mean().backward()
        assert all(p.grad is not None and p.grad.abs().max() > 0 for p in small[0].parameters())
        optimizer.step()
    assert fade.share == 0
    for before, module in zip(weights, [m for m in dense if hasattr(m, "weight")], strict=True):
        assert torch.equal(before, module.weight)
    trained = small(x).detach()
    fade.remove()
    assert torch.equal(small(x), trained)


def test_what_the_factors_lack_stays_as_it_was(nets):
    """Once trained, Z is another, and W - Z that of the beginning."""
    small, dense, _ = nets
    fade, layer, x = hodec.FadeIn(small, dense), small[5], torch.randn(4, 128)
    start = layer.dense_weight().detach()
    with torch.no_grad():
        for factor in layer.factors():
            factor.mul_(1.1)
    fade.step(0.5)
    weight = layer.dense_weight() + 0.5 * (dense[5].weight - start)
    torch.testing.assert_close(layer(x), nn.functional.linear(x, weight, layer.bias), atol=1e-5, rtol=1e-4)


def test_other_hooks_see_the_whole_output(nets):
    small, dense, x = nets
    features = hodec.FeatureDistillation(small.train(), dense)
    fade = hodec.FadeIn(small, dense)
    dense(x), small(x)
    assert float(features.loss().detach()) == pytest.approx(0, abs=1e-6)
    fade.remove()
    dense(x), small(x)
    assert float(features.loss().detach()) > 0.01


def test_it_follows_the_net_to_another_type(nets):
    small, dense, x = nets
    fade = hodec.FadeIn(small, dense)
    wanted = dense.double()(x.double())
    torch.testing.assert_close(small.double()(x.double()), wanted, atol=1e-5, rtol=1e-4)
    fade.remove()


def test_tied_layers_fade_alike():
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding, self.head = nn.Embedding(32, 16), nn.Linear(16, 32, bias=False)
            self.head.weight = self.embedding.weight

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(self.embedding(x))

    dense = Tied()
    small = hodec.convert(dense, hodec.make_plan(dense, 2, method="svd", example_input=INDICES))
    fade = hodec.FadeIn(small, dense)
    assert fade.layers == ["embedding", "head"]
    torch.testing.assert_close(small(INDICES), dense(INDICES), atol=1e-4, rtol=1e-4)


def test_weights_that_a_parent_reads_are_left_out():
    dense = nn.Sequential(nn.TransformerEncoderLayer(32, 4, 64, batch_first=True), nn.Linear(32, 8)).eval()
    plan = hodec.make_plan(dense, 4, method="svd", example_input=torch.zeros(2, 5, 32))
    assert "0.self_attn.in_proj_weight" in plan
    assert hodec.FadeIn(hodec.convert(dense, plan), dense).layers == ["0.linear1", "0.linear2", "1"]


def test_what_cannot_fade_is_refused(nets):
    small, dense, _ = nets
    with pytest.raises(ConfigError, match="no factorized layer whose name the dense net has"):
        hodec.FadeIn(dense, dense)
    with pytest.raises(ConfigError, match=r"layer 0: a weight of \(9, 3, 3, 3\) in the dense net, \(8, 3, 3, 3\) in"):
        hodec.FadeIn(small, nn.Sequential(nn.Conv2d(3, 9, 3)))
    with pytest.raises(ConfigError, match="layer 0: ReLU in the dense net"):
        hodec.FadeIn(small, nn.Sequential(nn.ReLU()))
    fade = hodec.FadeIn(small, dense)
    for share in (-0.1, 1.1, math.nan):
        with pytest.raises(ConfigError, match="share: .* given; allowed: 0"):
            fade.step(share)


def test_a_second_one_takes_the_place_of_the_first(nets):
    small, dense, x = nets
    factorized = small(x)
    first = hodec.FadeIn(small, dense)
    first.step(0.5)
    second = hodec.FadeIn(small, dense)
    torch.testing.assert_close(small(x), dense(x), atol=1e-5, rtol=1e-4)
    first.remove()
    torch.testing.assert_close(small(x), dense(x), atol=1e-5, rtol=1e-4)
    second.remove()
    assert torch.equal(small(x), factorized)


def test_a_copy_may_fade_by_itself_and_a_file_holds_the_factorized_net(nets):
    small, dense, x = nets
    factorized = small(x)
    fade = hodec.FadeIn(small, dense)
    again, averaged = copy.deepcopy(small), torch.optim.swa_utils.AveragedModel(small)
    assert torch.equal(pickle.loads(pickle.dumps(small))(x), factorized)
    torch.testing.assert_close(averaged(x), dense(x), atol=1e-5, rtol=1e-4)
    other = hodec.FadeIn(again, dense)
    other.step(0.0)
    assert torch.equal(again(x), factorized)
    torch.testing.assert_close(small(x), dense(x), atol=1e-5, rtol=1e-4)
    fade.remove()


def test_wrapped_nets_fade(nets):
    small, dense, x = nets
    fade = hodec.FadeIn(torch.compile(small, backend="eager"), nn.DataParallel(dense))
    torch.testing.assert_close(small(x), dense(x), atol=1e-5, rtol=1e-4)
    fade.remove()
