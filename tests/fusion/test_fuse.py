"""fuse: the same outputs, plain layers, and never a slower variant."""

import copy
import io
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import hodec
from hodec.errors import ConvertError
from hodec.fusion import search as module
from hodec.fusion.search import fuse
from hodec.layers.base import FactorizedLayer
from hodec.ranks import Manual, make_plan

from small_nets import SmallResNet, Tokens, Twice, assert_untouched, snapshot  # isort: skip


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    """The least rounds of measuring: which variant wins does not matter here."""
    monkeypatch.setattr(module, "LAYER_SECONDS", 0.0)
    monkeypatch.setattr(module, "NET_SECONDS", 0.0)


def compressed(net: nn.Module, x: torch.Tensor, ranks: object = 3, **settings: object) -> nn.Module:
    """A converted net whose norms have statistics."""
    for norm in net.modules():
        if isinstance(norm, nn.BatchNorm2d):
            nn.init.uniform_(norm.weight, 0.5, 2.0)
            nn.init.normal_(norm.bias)
            nn.init.normal_(norm.running_mean)
            nn.init.uniform_(norm.running_var, 0.5, 2.0)
    return hodec.convert(net, make_plan(net, Manual(ranks), example_input=x, **settings))


IMAGES = torch.randn(2, 6, 12, 12, generator=torch.Generator().manual_seed(0))


def slowed(monkeypatch, slow: str) -> None:
    """Measuring finds this variant slowest and all others equal, in the order they are offered."""

    def medians(works, **_):
        return {name: 9.0 if name == slow else 1.0 + 0.1 * at for at, name in enumerate(works)}

    monkeypatch.setattr(module, "medians_ms", medians)


@pytest.mark.parametrize(
    ("method", "target"),
    [
        pytest.param(method, target, marks=[pytest.mark.slow] if target == "latency" and method != "tt" else [])
        for method in hodec.METHODS
        for target in ("latency", "macs")
    ],
)
def test_outputs_stay_and_the_given_model_too(method, target):
    small = compressed(SmallResNet(), IMAGES, method=method)
    before = snapshot(small)
    fused = fuse(small, example_input=IMAGES, target=target)
    assert_untouched(small, before)
    small.eval()
    for x in (IMAGES, IMAGES[:1], torch.randn(3, 6, 12, 12)):
        torch.testing.assert_close(fused(x), small(x), rtol=1e-4, atol=1e-4)
    assert not fused.training
    assert not any(p.requires_grad for p in fused.parameters())


def test_layers_become_plain_and_norms_vanish(monkeypatch):
    slowed(monkeypatch, "dense")
    small = compressed(SmallResNet(), IMAGES)
    fused = fuse(small, example_input=IMAGES)
    kinds = {type(m) for m in fused.modules()}
    assert not any(issubclass(kind, FactorizedLayer) for kind in kinds)
    assert nn.BatchNorm2d not in kinds
    assert type(fused) is SmallResNet
    assert [type(m) for m in fused.layer1["conv2"]] == [nn.Conv2d] * 3
    report = fused.fuse_report
    assert {name: choice.variant for name, choice in report.layers.items()}["layer1.conv2"] == "merged"
    assert report.folded == {"bn1": "conv1", "layer1.bn1": "layer1.conv1", "layer1.bn2": "layer1.conv2"}
    assert report.error < 1e-5
    assert report.layers["layer1.conv2"].speedup == 9.0
    assert "layer1.conv2" in str(report)
    assert "merged" in str(report)


def test_dense_wins_where_nothing_is_faster(monkeypatch):
    slowed(monkeypatch, "merged")
    monkeypatch.setattr(module, "MARGIN", 0.5)  # the others are not faster by half
    fused = fuse(compressed(SmallResNet(), IMAGES), example_input=IMAGES)
    assert {choice.variant for choice in fused.fuse_report.layers.values()} == {"dense"}
    assert "no variant is faster" in fused.fuse_report.layers["conv1"].reason
    assert isinstance(fused.layer1["conv2"], nn.Conv2d)


def test_the_whole_net_counts_more_than_its_layers(monkeypatch, caplog):
    def medians(works, **_):
        slow = {"fused": 5.0, "dense": 2.0} if "fused" in works else {"dense": 5.0}
        return {name: slow.get(name, 1.0) for name in works}

    monkeypatch.setattr(module, "medians_ms", medians)
    fused = fuse(compressed(SmallResNet(), IMAGES), example_input=IMAGES)
    assert {choice.variant for choice in fused.fuse_report.layers.values()} == {"dense"}
    assert "the whole net is faster with dense layers" in caplog.text
    assert fused.fuse_report.whole_ms["fused"] == 2.0


def test_memory_format_is_the_faster_one(monkeypatch):
    small = compressed(SmallResNet(), IMAGES)
    for slow, other in (("contiguous", "channels_last"), ("channels_last", "contiguous")):
        slowed(monkeypatch, slow)
        assert fuse(small, example_input=IMAGES).fuse_report.memory_format == other
        asked = fuse(small, example_input=IMAGES, memory_format=slow)
        assert asked.fuse_report.memory_format == slow


def test_nets_of_three_dimensions_have_a_memory_format_too():
    clip = torch.randn(1, 4, 3, 8, 8)
    net = nn.Sequential(nn.Conv3d(4, 8, 3, padding=1), nn.BatchNorm3d(8), nn.Flatten(2), nn.Unflatten(2, (12, 16)),
                        nn.Conv2d(8, 8, 3)).eval()  # fmt: skip
    small = hodec.convert(net, make_plan(net, Manual(3), example_input=clip))
    for settings in ({}, {"target": "macs", "memory_format": "channels_last"}):
        fused = fuse(small, example_input=clip, **settings)
        torch.testing.assert_close(fused(clip), small(clip), rtol=1e-3, atol=1e-4)
    assert fused[4][0].weight.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("wrap", [nn.utils.spectral_norm, nn.utils.weight_norm])
@pytest.mark.filterwarnings("ignore:.*weight_norm.*is deprecated:FutureWarning")
def test_a_weight_with_a_history_is_no_hindrance(wrap):
    net = nn.Sequential(wrap(nn.Linear(16, 16)), nn.ReLU(), nn.Linear(16, 16))
    net(torch.randn(2, 16)).sum().backward()
    fused = fuse(net, example_input=torch.randn(2, 16), target="macs")
    assert not fused.training
    assert net.training
    assert not net[0].weight.is_leaf


def test_norms_are_left_alone_when_asked():
    fused = fuse(compressed(SmallResNet(), IMAGES), example_input=IMAGES, fold_batchnorm=False)
    assert isinstance(fused.bn1, nn.BatchNorm2d)
    assert fused.fuse_report.folded == {}


class ReadsNorm(nn.Module):
    """Reads its norm's statistics beside calling it: folding would change what it computes."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(6, 12, 3), nn.BatchNorm2d(12)

    def forward(self, x):
        spread = self.norm.running_var.mean() if hasattr(self.norm, "running_var") else 0.0
        return self.norm(self.conv(x)) + spread


def test_a_net_that_folding_would_change_keeps_its_norms(caplog):
    small = compressed(ReadsNorm(), IMAGES)
    fused = fuse(small, example_input=IMAGES)
    torch.testing.assert_close(fused(IMAGES), small.eval()(IMAGES), rtol=1e-4, atol=1e-4)
    assert fused.fuse_report.kept == {"norm": "with norms folded the net gives other outputs"}
    assert "other outputs" in caplog.text


def test_linear_layers_shared_layers_and_single_layers():
    tokens = torch.randn(2, 5, 16)
    pairs = [(Tokens(), tokens), (Twice(), IMAGES)]
    for net, x in pairs:
        small = compressed(net, x, allow_larger=True)
        fused = fuse(small, example_input=x)
        torch.testing.assert_close(fused(x), small.eval()(x), rtol=1e-4, atol=1e-4)
    assert fused.first is fused.second
    layer = small.again
    alone = fuse(layer, example_input=IMAGES)
    torch.testing.assert_close(alone(IMAGES), layer(IMAGES), rtol=1e-4, atol=1e-4)
    assert list(alone.fuse_report.layers) == [""]


def test_embeddings_stay_small():
    class Words(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.head = nn.Embedding(60, 16), nn.Linear(16, 3)

        def forward(self, x):
            return self.head(self.table(x).mean(1))

    x = torch.randint(0, 60, (2, 7))
    small = compressed(Words(), x, method="svd")
    fused = fuse(small, example_input=x)
    torch.testing.assert_close(fused(x), small.eval()(x))
    assert fused.fuse_report.layers["table"].reason == "kept for its memory"


def test_nested_outputs_and_several_inputs():
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(6, 12, 3)

        def forward(self, x, y):
            return {"sum": [self.conv(x), self.conv(y)], "size": 3}

    inputs = (IMAGES, IMAGES + 1)
    small = compressed(Two(), inputs)
    fused = fuse(small, example_input=inputs)
    torch.testing.assert_close(fused(*inputs)["sum"], small.eval()(*inputs)["sum"], rtol=1e-4, atol=1e-4)


def test_hooks_go_along():
    small, seen = compressed(SmallResNet(), IMAGES), []
    small.layer1["conv2"].register_forward_hook(lambda *_: seen.append(1))
    fused = fuse(small, example_input=IMAGES)
    seen.clear()
    fused(IMAGES)
    assert seen == [1]
    assert "hooks" in fused.fuse_report.kept["layer1.bn2"]


def test_the_result_can_be_copied_pickled_and_exported():
    small = compressed(SmallResNet(), IMAGES)
    fused = fuse(small, example_input=IMAGES, target="macs")
    expected = fused(IMAGES)
    for again in (copy.deepcopy(fused), pickle.loads(pickle.dumps(fused))):
        torch.testing.assert_close(again(IMAGES), expected, rtol=0, atol=0)
    program = io.BytesIO()
    torch.export.save(torch.export.export(fused, (IMAGES,)), program)
    program.seek(0)
    torch.testing.assert_close(torch.export.load(program).module()(IMAGES), expected)


def test_fusing_again_changes_nothing():
    once = fuse(compressed(SmallResNet(), IMAGES), example_input=IMAGES)
    torch.testing.assert_close(fuse(once, example_input=IMAGES)(IMAGES), once(IMAGES), rtol=1e-5, atol=1e-5)


def test_half_precision_and_float64():
    for dtype, tolerance in ((torch.bfloat16, 0.1), (torch.float64, 1e-9)):
        small, x = compressed(SmallResNet(), IMAGES).to(dtype), IMAGES.to(dtype)
        fused = fuse(small, example_input=x)
        assert {p.dtype for p in fused.parameters()} == {dtype}
        torch.testing.assert_close(fused(x), small.eval()(x), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"target": "latencies"}, "target='latencies' is not one of latency, macs.*Did you mean: latency"),
        ({"memory_format": "nhwc"}, "memory_format='nhwc' is not one of auto, contiguous, channels_last"),
    ],
)
def test_a_wrong_setting_is_named(settings, message):
    with pytest.raises(ConvertError, match=message):
        fuse(SmallResNet(), example_input=IMAGES, **settings)


def test_a_net_that_is_random_is_refused():
    class Noisy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(6, 12, 3)
            self.calls = 0

        def forward(self, x):
            self.calls += 1
            return self.conv(x) * self.calls

    with pytest.raises(ConvertError, match="outputs differ from the given net's by"):
        fuse(compressed(Noisy(), IMAGES), example_input=IMAGES)


def test_a_parent_that_reads_a_layer_is_named():
    class Reads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(6, 12, 3)

        def forward(self, x):
            return F.relu(self.conv(x)) * len(self.conv.ranks)

    net = Reads()
    net.conv.ranks = [1]
    small = compressed(net, IMAGES)
    with pytest.raises(ConvertError, match="the fused net does not run: AttributeError"):
        fuse(small, example_input=IMAGES)


@pytest.mark.slow
def test_the_result_compiles():
    small = compressed(SmallResNet(), IMAGES)
    fused = fuse(small, example_input=IMAGES)
    torch.testing.assert_close(torch.compile(fused)(IMAGES), fused(IMAGES), rtol=1e-4, atol=1e-4)


def test_the_result_compiles_without_a_compiler_backend():
    fused = fuse(compressed(SmallResNet(), IMAGES), example_input=IMAGES)
    graph = torch.compile(fused, backend="eager", fullgraph=True)
    torch.testing.assert_close(graph(IMAGES), fused(IMAGES), rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["resnet18", "vgg11_bn", "densenet121", "mobilenet_v2", "googlenet"])
def test_torchvision_nets(name):
    import torchvision

    net = torchvision.models.get_model(name, weights=None, **({"init_weights": False} if name == "googlenet" else {}))
    x = torch.randn(1, 3, 64, 64)
    small = compressed(net.eval(), x, 16, method="tucker")
    fused = fuse(small, example_input=x)
    torch.testing.assert_close(fused(x), small.eval()(x), rtol=1e-3, atol=1e-3)
    for choice in fused.fuse_report.layers.values():
        assert choice.speedup is None or choice.speedup >= 1.0


def test_an_input_that_does_not_fit_is_one_message():
    with pytest.raises(ConvertError, match=r"does not run on example_input of shape \(2, 5, 12, 12\): ") as error:
        fuse(compressed(SmallResNet(), IMAGES), example_input=torch.randn(2, 5, 12, 12))
    assert "\n" not in str(error.value)
