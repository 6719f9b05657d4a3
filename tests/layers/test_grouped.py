"""Grouped convolutions: every group by factors of its own, at common ranks."""

import copy
import pickle

import pytest
import torch
from small_nets import dense_layer
from swaps import factorized, planned
from torch import Tensor, nn

from hodec.admm.core import Admm
from hodec.calibration.input_covariance import collect_covariances
from hodec.conversion.swap import convert, merge
from hodec.cost.count import count_cost
from hodec.cost.probe import probes_of
from hodec.errors import PlanError
from hodec.export.checkpoint import load, save
from hodec.formats.modes import Modes
from hodec.fusion.search import fuse
from hodec.methods import METHODS
from hodec.plan.plan import Plan
from hodec.ranks import Energy, make_plan

GROUPS = 4
X = torch.randn(2, 16, 9, 10, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
NAMES = [name for name, method in METHODS.items() if "conv2d" in method.grouped]


def net(**settings: object) -> nn.Module:
    """A grouped convolution with unequal channel counts, a norm and a plain convolution behind it; float64."""
    grouped = nn.Conv2d(16, 24, 3, groups=GROUPS, **{"padding": 1, "stride": 2, **settings})
    return nn.Sequential(grouped, nn.BatchNorm2d(24), nn.ReLU(), nn.Conv2d(24, 8, 3)).double().eval()


def low_rank(method: str, cap: int = 2) -> tuple[nn.Module, Plan, nn.Module]:
    """A net, its plan at low ranks, and what it is converted to."""
    model = net()
    plan = planned(model, cap, X, method=method, allow_larger=True, include=["0"])
    return model, plan, convert(model, plan)


def test_all_methods_with_staged_layers_have_them():
    assert NAMES == ["tt", "tucker", "cp", "cp3", "svd", "weight_svd", "spatial_svd"]


@pytest.mark.parametrize("method", NAMES)
@pytest.mark.parametrize(
    "settings", [{}, {"dilation": 2, "padding_mode": "circular"}, {"padding": "same", "stride": 1}]
)
def test_equal_at_full_ranks(method: str, settings: dict[str, object]):
    model = net(**settings)
    plan = planned(model, 10**6, X, method=method, allow_larger=True)
    assert plan["0"].groups == GROUPS
    torch.testing.assert_close(convert(model, plan)(X), model(X), rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("dims", [1, 3])
def test_other_dimensions(dims: int):
    x = torch.randn(2, 8, *(7, 6, 5)[:dims], dtype=torch.float64)
    model = nn.Sequential(dense_layer(f"conv{dims}d", 8, 8, 3, groups=2), nn.ReLU()).double()
    small = convert(model, planned(model, 10**6, x, method="tucker", allow_larger=True))
    torch.testing.assert_close(small(x), model(x), rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("method", NAMES)
def test_the_projection_is_that_of_each_group_and_what_the_layer_has(method: str):
    model, plan, small = low_rank(method)
    weight, layer = model[0].weight.detach(), plan["0"]
    near = layer.project(weight)
    one = METHODS[method].grouped["conv2d"].format
    modes = Modes.split(4, 6, 1)
    each = [one.project(w, layer.ranks, modes) for w in weight.chunk(GROUPS)]
    torch.testing.assert_close(near, torch.cat(each), rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(small[0].dense_weight(), near, rtol=1e-6, atol=1e-8)
    assert 0.05 < (near - weight).norm() / weight.norm() < 1
    dense = copy.deepcopy(model)
    dense[0].weight.data.copy_(near)
    torch.testing.assert_close(small(X), dense(X), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("method", NAMES)
def test_costs_are_what_is_counted(method: str):
    model, plan, small = low_rank(method)
    assert count_cost(model, X).macs == plan.macs_before
    assert count_cost(small, X).macs == plan.macs_after
    assert sum(p.numel() for p in small.parameters()) == plan.params_after
    assert Plan.from_dict(plan.to_dict()) == plan


@pytest.mark.parametrize("method", NAMES)
def test_fused_in_all_its_variants_it_stays_the_same(method: str):
    from hodec.fusion.batchnorm import Call
    from hodec.fusion.variants import variants_of

    _, _, small = low_rank(method)
    torch.testing.assert_close(fuse(small, example_input=X, target="macs")(X), small(X), rtol=1e-6, atol=1e-8)
    layer = small[0]
    made = layer(X)
    variants = variants_of(layer, [Call(tuple(X.shape), tuple(made.shape))], None)
    assert {"dense", "merged"} <= set(variants)
    for one in variants.values():
        torch.testing.assert_close(one.build()(X), made, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("method", ["tucker", "svd"])
def test_it_is_saved_copied_pickled_and_merged(method: str, tmp_path):
    model, _, small = low_rank(method)
    save(small, tmp_path / "small.safetensors")
    for again in (load(tmp_path / "small.safetensors", model), copy.deepcopy(small), pickle.loads(pickle.dumps(small))):
        assert type(again[0]) is type(small[0])
        torch.testing.assert_close(again(X), small(X), rtol=0, atol=0)
    merged = merge(small)
    assert (type(merged[0]), merged[0].groups) == (nn.Conv2d, GROUPS)
    torch.testing.assert_close(merged(X), small(X), rtol=1e-9, atol=1e-9)
    assert repr(small[0]).split("\n")[1].strip().startswith("16 -> 24")
    assert f"groups={GROUPS}" in repr(small[0])


def test_random_factors_have_the_variance_of_kaimings_initialization():
    model = net()
    plan = planned(model, 3, X, method="tucker", allow_larger=True, include=["0"])
    layer = METHODS["tucker"].layer("conv2d", GROUPS).like(model[0], plan["0"].ranks, initialize=True)
    torch.testing.assert_close(layer.dense_weight().square().mean().item(), 2 / (4 * 9), rtol=0.05, atol=0)


def test_energy_keeps_that_share_of_all_groups_together():
    model = net()
    plan = make_plan(model, Energy(0.7), method="svd", example_input=X, allow_larger=True, include=["0"])
    weight = model[0].weight.detach()

    def lost(rank: int) -> float:
        layer = plan.replace("0", ranks=[rank])["0"]
        return float(((weight - layer.project(weight)).norm() / weight.norm()) ** 2)

    (rank,) = plan["0"].ranks
    assert lost(rank) <= 0.3 < lost(rank - 1)


@pytest.mark.parametrize("method", ["tucker", "cp", "svd"])
def test_admm_pulls_it_to_its_ranks(method: str):
    model = net().train()
    plan = planned(model, 2, X, method=method, allow_larger=True, include=["0"])
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    admm = Admm(model, plan, optimizer, rho=1.0)
    (0.0 * model(X).sum()).backward()
    admm.before_step()
    weight = model[0].weight
    assert weight.grad.norm() > 0
    admm.states["0"].u.zero_()
    weight.data.copy_(admm.states["0"].z)
    torch.testing.assert_close(admm.convert()[0].dense_weight(), weight.detach(), rtol=1e-4, atol=1e-5)


def test_whitening_loses_less_of_the_output():
    torch.manual_seed(0)
    model = net()
    x = torch.randn(8, 16, 9, 10, dtype=torch.float64) * torch.tensor([3.0, 1, 0.3, 0.1] * 4).reshape(1, -1, 1, 1)
    plan = planned(model, 2, x[:2], method="svd", allow_larger=True, include=["0"])
    whitened = convert(model, plan, covariances=collect_covariances(model, plan, [x], positions=None))

    def lost(small: nn.Module) -> float:
        return (small[0](x) - model[0](x)).norm().item()

    assert lost(whitened) < 0.95 * lost(convert(model, plan))


@pytest.mark.parametrize("method", ["tt", "svd", "weight_svd"])
def test_depthwise_convolutions_stay_dense_where_factors_would_be_no_smaller(method: str):
    model = nn.Sequential(nn.Conv2d(16, 16, 3, groups=16), nn.Conv2d(16, 32, 3)).double()
    plan = planned(model, 2, X, method=method)
    assert plan.skipped["0"].startswith("depthwise convolution (groups=16): a 3x3 kernel of one channel in and one out")


@pytest.mark.parametrize(("method", "params"), [("spatial_svd", 2 * 7), ("cp", 1 + 7 + 7 + 1)])
def test_depthwise_convolutions_are_factorized_along_the_kernels_axes(method: str, params: int):
    model = nn.Sequential(nn.Conv2d(16, 16, 7, padding=3, groups=16)).double()
    plan = planned(model, 1, X, method=method)
    small = convert(model, plan)
    assert plan.params_after == 16 * params + 16 == sum(p.numel() for p in small.parameters())
    assert count_cost(small, X).macs == plan.macs_after == 16 * params * 9 * 10
    full = convert(model, planned(model, 7, X, method="spatial_svd", allow_larger=True))
    torch.testing.assert_close(full(X), model(X))


def test_transposed_ones_and_methods_without_a_layer_stay_dense_with_the_reason():
    model = nn.Sequential(nn.ConvTranspose2d(16, 16, 3, groups=4), nn.Conv2d(16, 16, 3)).double()
    reason = "method svd has no layer for a grouped ConvTranspose2d (groups=4)"
    assert planned(model, 2, X, method="svd").skipped["0"] == reason
    model[0] = nn.Conv2d(16, 16, 3, groups=4).double()
    reason = "method tt_classical has no layer for a grouped Conv2d (groups=4)"
    assert planned(model, 1, X, method="tt_classical", allow_larger=True, n_modes=1).skipped["0"] == reason


def test_modes_and_chains_are_for_the_others_and_a_note_says_so():
    model = net()
    split = Modes((4, 4), (4, 6))
    plan = planned(model, 2, X, execution="chain", allow_larger=True, modes={"0": split}, n_modes=2)
    assert plan["0"].notes[:2] == tuple(
        f"a grouped convolution: {what} does not apply" for what in ("modes", "execution chain")
    )
    assert (plan["0"].resolved_execution, plan["3"].resolved_execution) == ("merged", "chain")


def test_a_plan_for_other_groups_is_refused():
    model = net()
    plan = planned(model, 2, X, method="svd", include=["0"], allow_larger=True)
    other = net()
    other[0] = nn.Conv2d(8, 24, 3, groups=2).double()
    with pytest.raises(PlanError, match=r"weight \(24, 4, 3, 3\) in 4 groups, this model has Conv2d .* in 2 groups"):
        convert(other, plan)


def test_it_trains():
    _, _, small = low_rank("tucker")
    before: Tensor = small[0].dense_weight().detach()
    small.train()(X).square().mean().backward()
    assert all(p.grad is not None and p.grad.norm() > 0 for p in small[0].kernels)
    torch.optim.SGD(small.parameters(), 0.1).step()
    assert not torch.equal(small[0].dense_weight(), before)
    assert set(factorized(small)) == {"0"}


@pytest.mark.parametrize("method", NAMES)
def test_latency_is_that_of_grouped_convolutions(method: str):
    _, plan, _ = low_rank(method)
    for dense in (True, False):
        probes = [probe for _, probe in probes_of(plan["0"], dense=dense)]
        made = [probe.build() for probe in probes]
        assert all(module.groups in (GROUPS, module.in_channels) for module in made)
        assert len({probe.key for probe in probes}) == len(probes)
        for probe, module in zip(probes, made, strict=True):
            assert module(probe.example(2)).shape[2:] == probe.out_size
            assert all(corner.op.kernel == probe.op.kernel for _, corner in probe.corners())
    plain = planned(nn.Sequential(nn.Conv2d(4, 24, 3).double()), 2, X[:, :4], allow_larger=True)
    assert not {p.key for _, p in probes_of(plain["0"], dense=True)} & {p.key for p in probes}


def test_onnx_has_grouped_convolutions(tmp_path):
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package)
    from hodec.export.onnx import to_onnx

    _, plan, small = low_rank("tucker")
    written = to_onnx(small.float(), tmp_path / "net.onnx", example_input=X.float())
    assert written.error < 1e-5
    assert written.nodes["Conv"] == len(plan["0"].format.ops((24, 4, 3, 3), (2, 2), plan["0"].modes, execution="")) + 1
