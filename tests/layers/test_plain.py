"""Layers that pad their input or compute their weight, by the plain layer that they amount to."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from swaps import factorized, planned
from torch import Tensor, nn
from torch.nn.utils import prune
from torch.nn.utils.parametrizations import spectral_norm, weight_norm

from hodec.admm.core import Admm
from hodec.calibration.input_covariance import collect_covariances
from hodec.conversion.swap import conversion_errors, convert, merge
from hodec.errors import PlanError, TrainingError
from hodec.export.checkpoint import load, save
from hodec.formats.same_padding import SameConv2d
from hodec.fusion.search import fuse
from hodec.layers.plain import plain_layer
from hodec.plan.plan import Plan

X = torch.randn(2, 8, 11, 14, generator=torch.Generator().manual_seed(0))
PADDINGS = [("3x3", 3, 1, 1), ("stride 2", 3, 2, 1), ("5x5 stride 3", 5, 3, 1), ("dilated", 3, 1, 2)]


def padded(x: Tensor, layer: nn.Conv2d) -> Tensor:
    """What TensorFlow documents for padding "SAME"."""
    for axis in (0, 1):
        size, step = x.shape[2 + axis], layer.stride[axis]
        reach = (layer.kernel_size[axis] - 1) * layer.dilation[axis] + 1
        total = max((math.ceil(size / step) - 1) * step + reach - size, 0)
        x = F.pad(x, [total // 2, total - total // 2, 0, 0] if axis else [0, 0, total // 2, total - total // 2])
    return x


class Same(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(padded(x, self), self.weight, self.bias, self.stride, 0, self.dilation, self.groups)


class Standardized(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        flat = self.weight.flatten(1)
        weight = ((flat - flat.mean(1, keepdim=True)) / flat.std(1, keepdim=True)).view_as(self.weight)
        return F.conv2d(x, weight, self.bias, self.stride, self.padding, self.dilation, self.groups)


class Scaled(nn.Conv2d):
    def __init__(self, *args: object, **kwargs: object) -> None:
        super().__init__(*args, **kwargs)  # type: ignore[arg-type]
        self.gain = nn.Parameter(torch.rand(self.out_channels, 1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(padded(x, self), self.gain * self.weight, self.bias)


class ByItsInput(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(x, self.weight * x.mean(), self.bias)


class AfterIt(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).relu()


class NoisyInTraining(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, F.dropout(self.weight, 0.5, self.training), self.bias)


class Plainest(nn.Conv3d):
    def __init__(self, inp: int, out: int) -> None:
        super().__init__(inp, out, 3, padding=1, bias=False)

    @staticmethod
    def get_downsample_stride(stride: int) -> tuple[int, int, int]:
        return stride, stride, stride


def _old(name: str):
    return lambda module: getattr(torch.nn.utils, name)(module)


NORMS = {
    "weight_norm": weight_norm, "spectral_norm": spectral_norm, "older weight_norm": _old("weight_norm"),
    "older spectral_norm": _old("spectral_norm"), "pruned": lambda m: prune.l1_unstructured(m, "weight", 0.5),
}  # fmt: skip
COMPUTED = {
    "standardized": lambda: Standardized(8, 12, 3, padding=1),
    "scaled": lambda: Scaled(8, 12, 3, stride=2),
    **{name: (lambda norm=norm: norm(nn.Conv2d(8, 12, 3, padding=1, padding_mode="circular")))
       for name, norm in NORMS.items()},
}  # fmt: skip
pytestmark = pytest.mark.filterwarnings("ignore:.*weight_norm.*is deprecated:FutureWarning")


def net(layer: nn.Module) -> nn.Module:
    """The layer and a plain one behind it."""
    return nn.Sequential(layer, nn.ReLU(), nn.Conv2d(12, 12, 3, padding=1)).double().eval()


def exact(model: nn.Module, **settings: object) -> tuple[Plan, nn.Module]:
    """Plan and conversion at full ranks."""
    plan = planned(model, 10**6, X.double(), allow_larger=True, **settings)
    return plan, convert(model, plan)


@pytest.mark.parametrize(("kernel", "stride", "dilation"), [p[1:] for p in PADDINGS], ids=[p[0] for p in PADDINGS])
@pytest.mark.parametrize(
    "method", ["tt", *(pytest.param(m, marks=pytest.mark.slow) for m in ("svd", "cp", "spatial_svd"))]
)
def test_padding_in_front_stays_and_follows_the_size_of_the_input(method: str, kernel: int, stride: int, dilation: int):
    model = net(Same(8, 12, kernel, stride=stride, dilation=dilation))
    plan = planned(model, 6, X.double(), allow_larger=True, method=method)
    small = convert(model, plan)
    dense = copy.deepcopy(model)
    for name, layer in factorized(small).items():
        dense.get_submodule(name).weight.data.copy_(layer.dense_weight())
    for x in (X.double(), X[..., :9, :7].double()):
        torch.testing.assert_close(small(x), dense(x), rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(fuse(small, example_input=x, target="macs")(x), dense(x), rtol=1e-6, atol=1e-6)
    merged = merge(small)
    assert type(merged[0]) is SameConv2d
    for traced in (torch.fx.symbolic_trace(small), torch.fx.symbolic_trace(merged)):
        torch.testing.assert_close(traced(X.double()), small(X.double()), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(merged(X.double()), small(X.double()), rtol=1e-9, atol=1e-9)
    assert set(planned(merged, 6, X.double(), allow_larger=True, method=method)) == {"0", "2"}


@pytest.mark.parametrize("name", COMPUTED)
def test_a_computed_weight_is_planned_as_it_is_applied_and_removed(name: str, tmp_path):
    model = net(COMPUTED[name]())
    model(X.double())
    plan, small = exact(model, method="tucker")
    torch.testing.assert_close(small(X.double()), model(X.double()), rtol=1e-9, atol=1e-9)
    assert conversion_errors(model, plan)["0"] < 1e-6
    own, bias = sum(p.numel() for p in model[0].parameters()), 12
    assert plan["0"].params_before == own - bias
    assert plan.params_after == sum(p.numel() for p in small.parameters())
    assert Plan.from_dict(plan.to_dict()) == plan
    assert any("computed from other parameters" in note for note in plan["0"].notes)
    torch.testing.assert_close(merge(small)(X.double()), model(X.double()), rtol=1e-9, atol=1e-9)
    save(small, tmp_path / "small.safetensors")
    again = load(tmp_path / "small.safetensors", model)
    torch.testing.assert_close(again(X.double()), small(X.double()), rtol=0, atol=0)


def test_the_parametrization_leaves_no_hook_and_the_users_stay():
    model = net(COMPUTED["older weight_norm"]())
    seen = []
    model[0].register_forward_hook(lambda *_: seen.append(1))
    _, small = exact(model)
    seen.clear()
    small(X.double())
    assert seen == [1]
    assert not small[0]._forward_pre_hooks


@pytest.mark.parametrize("name", COMPUTED)
def test_admm_refuses_a_computed_weight_with_the_way_out(name: str):
    model = net(COMPUTED[name]())
    plan = planned(model, 3, X.double())
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with pytest.raises(TrainingError, match=r"0: the weight is computed from other parameters.*exclude=\[0\]"):
        Admm(model, plan, optimizer, steps_per_epoch=1)
    Admm(model, planned(model, 3, X.double(), exclude=["0"]), optimizer, steps_per_epoch=1)


def test_admm_pulls_the_weight_of_a_layer_that_pads():
    model = net(Same(8, 12, 3)).train()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    admm = Admm(model, planned(model, 3, X.double()), optimizer, rho=1.0)
    (0.0 * model(X.double()).sum()).backward()
    admm.before_step()
    weight, state = model[0].weight, admm.states["0"]
    torch.testing.assert_close(weight.grad, state.rho * (weight - state.z), check_dtype=False, rtol=1e-5, atol=1e-6)
    assert weight.grad.norm() > 0


def test_covariances_are_those_of_the_padded_input():
    model = net(Same(8, 12, 3, stride=2))
    plain = net(nn.Conv2d(8, 12, 3, stride=2, padding=1))
    plain.load_state_dict(model.state_dict())
    x = X[..., :11, :13].double()  # odd sizes, where both pad alike
    one, other = (collect_covariances(m, planned(m, 3, x, method="svd"), [x]) for m in (model, plain))
    for a, b in zip(one["0"].roots, other["0"].roots, strict=True):
        torch.testing.assert_close(a.root, b.root)


@pytest.mark.parametrize("layer", [ByItsInput(8, 12, 3), AfterIt(8, 12, 3)], ids=lambda m: type(m).__name__)
def test_what_amounts_to_no_plain_layer_is_refused_with_the_way_out(layer: nn.Module):
    assert plain_layer(layer) is None
    plan = planned(net(layer), 3, X.double())
    assert plan.skipped["0"].startswith(f"{type(layer).__name__} changes what Conv2d computes, by more than")
    model = net(Same(8, 12, 3))
    plan = planned(model, 3, X.double())
    model[0] = layer.double()
    with pytest.raises(PlanError, match="^0"):
        convert(model, plan)


def test_a_weight_that_differs_in_training_is_refused():
    assert plain_layer(NoisyInTraining(8, 12)) is None


def test_a_plain_subclass_and_its_parameters_are_taken_as_they_are():
    layer = Plainest(6, 8)
    assert plain_layer(layer).layer is layer
    own = Same(8, 12, 3)
    made = plain_layer(own).layer
    assert made.weight is own.weight
    assert made.bias is own.bias


@pytest.mark.parametrize("name", ["standardized", "weight_norm", "spectral_norm"])
def test_it_is_found_without_numbers_too(name: str):
    """So does transformers build a net before it loads weights into it."""
    with torch.device("meta"):
        layer = COMPUTED[name]()
        plain = plain_layer(layer)
    assert plain.computed_from == sum(p.numel() for p in layer.parameters()) - 12
    assert plain.layer.weight.is_meta
    assert plain.layer.weight.shape == (12, 8, 3, 3)


def test_looking_changes_neither_the_layer_nor_the_random_state():
    layer = spectral_norm(nn.Conv2d(8, 12, 3)).train()
    state, random = copy.deepcopy(layer.state_dict()), torch.get_rng_state()
    assert plain_layer(layer) is not None
    torch.testing.assert_close(layer.state_dict(), state, rtol=0, atol=0)
    assert torch.equal(torch.get_rng_state(), random)
    assert layer.training
