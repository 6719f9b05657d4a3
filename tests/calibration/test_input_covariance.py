"""Projection in the covariance of the input: least output error, the same ranks, no trouble without data."""

import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F
from small_nets import IMAGE, KERNELS, SmallResNet, Twice, assert_untouched, dense_layer, snapshot
from swaps import planned
from torch import Tensor, nn
from torch.testing import assert_close

from hodec.calibration.input_covariance import AxisRoot, InputCovariance, collect_covariances, whitened_projection
from hodec.conversion.swap import convert
from hodec.errors import ConfigError, DataError, PlanError, TrainingError
from hodec.formats.layer_types import LAYER_TYPES, layer_type_of
from hodec.linalg.svd import sqrtm_psd
from hodec.methods import METHODS
from hodec.plan.plan import Plan

SVDS = ("svd", "weight_svd", "spatial_svd")
CASES = [
    (method, layer_type, d)
    for method, how in METHODS.items()
    for layer_type in how.layers
    for d in (range(how.format(layer_type).min_modes, 3) if how.format(layer_type).uses_modes else (1,))
]
every_case = pytest.mark.parametrize(("method", "layer_type", "d"), CASES)


def planted(layer_type: str, generator: torch.Generator, channels: int = 8, images: int = 16) -> Tensor:
    """Inputs whose neighbours are alike, and whose channels are correlated and of very different sizes.

    The covariance of the channels is a Kronecker product of those of modes 2 and channels / 2, so that covariances of
    split channels hold it too.
    """
    dims = LAYER_TYPES[layer_type].dims
    if layer_type == "embedding":
        return (24 * torch.rand(images, 20, generator=generator) ** 3).long()
    sides = (torch.randn(n, n, generator=generator, dtype=torch.float64) for n in (2, channels // 2))
    mix = torch.kron(*(side * 4.0 ** -torch.arange(len(side), dtype=torch.float64) for side in sides))
    shape = (images, channels, *(9, 8, 7)[:dims])
    x = torch.randn(shape, generator=generator, dtype=torch.float64)
    for axis in range(2, 2 + dims):
        x = x + x.roll(1, axis)
    mixed = torch.einsum("oi,ni...->no...", mix, x)
    return mixed if dims else mixed.reshape(images, channels)


def one_layer(  # noqa: PLR0913
    method: str, layer_type: str, generator: torch.Generator, *, d: int = 1, rank: int = 3, **settings: object
) -> tuple[nn.Sequential, Plan, Tensor]:
    """A net of one layer, its plan, and planted inputs."""
    sizes = (24, 8) if layer_type == "embedding" else (8, 12)
    net = nn.Sequential(dense_layer(layer_type, *sizes, **settings)).double().eval()
    x = planted(layer_type, generator)
    return net, planned(net, rank, x[:2], method=method, n_modes=d, allow_larger=True), x


def with_weight(net: nn.Sequential, weight: Tensor, x: Tensor) -> Tensor:
    """The net's output with another weight in its layer."""
    return torch.func.functional_call(net, {"0.weight": weight}, (x,)).detach()


def output_error(net: nn.Sequential, weight: Tensor, x: Tensor) -> float:
    return float((with_weight(net, weight, x) - net(x).detach()).norm())


# -- roots ---------------------------------------------------------------------------------------------------------


def test_roots_multiply_to_the_moment_scaled_to_a_mean_eigenvalue_of_one(generator):
    x = torch.randn(50, 6, generator=generator, dtype=torch.float64)
    moment = x.mT @ x
    root, inverse = sqrtm_psd(moment, 1e-6)
    assert_close(root @ root, 6 * moment / moment.trace())
    assert_close(root, root.mT)
    assert_close(root @ inverse, torch.eye(6, dtype=torch.float64))
    diagonal, its_inverse = sqrtm_psd(moment.diagonal(), 1e-6)
    assert_close(diagonal**2, 6 * moment.diagonal() / moment.trace())
    assert_close(diagonal * its_inverse, torch.ones(6, dtype=torch.float64))


@pytest.mark.parametrize("samples", [0, 1, 3])
def test_directions_without_data_get_the_floor(samples: int, generator):
    x = torch.randn(samples, 6, generator=generator, dtype=torch.float64) * 1e-20
    root, inverse = sqrtm_psd(x.mT @ x, 1e-4)
    values = torch.linalg.eigvalsh(root)
    assert_close(root @ inverse, torch.eye(6, dtype=torch.float64))
    damping = torch.full((6 - samples,), 1e-2 if samples else 1.0, dtype=torch.float64)
    assert_close(values[: 6 - samples], damping)


# -- covariances -------------------------------------------------------------------------------------------------------


def test_roots_act_on_their_own_axes_only(generator):
    weight = torch.randn(5, 6, 3, 2, generator=generator, dtype=torch.float64)
    joint, alone = (torch.randn(n, n, generator=generator, dtype=torch.float64) for n in (6, 3))
    joint, alone = joint @ joint.mT, alone @ alone.mT
    scale = torch.rand(2, generator=generator, dtype=torch.float64) + 1
    roots = (
        AxisRoot((0, 3), joint, joint.inverse()),  # modes 3 and kernel side 2, which are not neighbours
        AxisRoot((2,), alone, alone.inverse()),
        AxisRoot((1,), scale, 1 / scale),
    )
    covariance = InputCovariance((3, 2, 3, 2), roots)
    four = joint.reshape(3, 2, 3, 2)
    expected = torch.einsum("oabkl,alcm,b,kn->ocbnm", weight.reshape(5, 3, 2, 3, 2), four, scale, alone)
    assert_close(covariance.apply(weight), expected.reshape(weight.shape))
    assert_close(covariance.undo(covariance.apply(weight)), weight)
    both = torch.stack([weight, 2 * weight])
    assert_close(covariance.apply(both)[1], 2 * covariance.apply(weight))
    assert covariance.apply(weight.float()).dtype == torch.float64
    assert_close(covariance.to("cpu").apply(weight), covariance.apply(weight), rtol=0, atol=0)


@pytest.mark.parametrize("side", [6, 60])  # narrow and wide: products are in another order
def test_a_triangular_root_needs_no_inverse(generator, side):
    weight = torch.randn(5, side, side, generator=generator, dtype=torch.float64)
    root = torch.linalg.cholesky(weight[0] @ weight[0].mT + torch.eye(side, dtype=torch.float64))
    for axes in ((0,), (1,)):
        solved = InputCovariance((side, side), (AxisRoot(axes, root),))
        assert_close(solved.undo(solved.apply(weight)), weight)
        assert_close(solved.inverted().undo(weight), solved.undo(weight))
        assert_close(solved.to("cpu").undo(weight), solved.undo(weight), rtol=0, atol=0)


@every_case
def test_the_result_has_the_planned_ranks(method: str, layer_type: str, d: int, generator):
    """So that decomposing it loses nothing."""
    net, plan, x = one_layer(method, layer_type, generator, d=d)
    layer, weight = plan["0"], net[0].weight.detach()
    covariance = collect_covariances(net, plan, [x])["0"]
    nearest = whitened_projection(layer, weight, covariance)
    assert nearest.shape == weight.shape
    plain = layer.project(weight)
    assert float((nearest - plain).norm() / plain.norm()) > 1e-2
    assert float((layer.project(nearest) - nearest).norm() / nearest.norm()) < (
        1e-6 if layer.format.iterative else 1e-10
    )
    full = dataclasses.replace(layer, ranks=layer.format.max_ranks(layer.shape, layer.modes))
    assert_close(whitened_projection(full, weight, covariance), weight)


@pytest.mark.parametrize("layer_type", ["conv2d", "conv_transpose2d", "linear", "embedding"])
@pytest.mark.parametrize("method", SVDS)
def test_svd_methods_lose_the_least_possible_in_the_metric(method: str, layer_type: str, generator):
    if layer_type not in METHODS[method].layers:
        pytest.skip(f"{method} has no {layer_type}")
    net, plan, x = one_layer(method, layer_type, generator)
    layer, canonical = plan["0"], LAYER_TYPES[layer_type].to_oihw
    covariance = collect_covariances(net, plan, [x])["0"]
    weight = canonical(net[0].weight.detach())
    nearest = canonical(whitened_projection(layer, net[0].weight.detach(), covariance))
    ((_, matrix),) = layer.format.unfoldings(covariance.apply(weight), layer.modes)
    dropped = torch.linalg.svdvals(matrix)[layer.ranks[0] :]
    assert_close(covariance.apply(weight - nearest).norm(), dropped.norm())


@pytest.mark.parametrize("layer_type", ["conv1d", "conv2d", "conv3d", "conv_transpose2d", "linear", "embedding"])
def test_svd_loses_the_least_possible_of_the_output(layer_type: str, generator):
    """Its covariance covers the whole patch: the output error is the best rank-r approximation's."""
    settings = {} if layer_type in ("linear", "linear_in_first", "embedding") else {"stride": 2, "padding": 1}
    net, plan, x = one_layer("svd", layer_type, generator, **settings)
    covariances = collect_covariances(net, plan, [x[:5], x[5:]], damping=1e-12, positions=None)
    weight = net[0].weight.detach()
    nearest = whitened_projection(plan["0"], weight, covariances["0"])
    bias = 0 if layer_type == "embedding" else with_weight(net, torch.zeros_like(weight), x)
    output = net(x).detach() - bias
    rows = output if layer_type in ("linear", "linear_in_first", "embedding") else output.movedim(1, -1)
    least = torch.linalg.svdvals(rows.reshape(-1, rows.shape[-1]))[3:].norm()
    assert_close(torch.tensor(output_error(net, nearest, x), dtype=torch.float64), least, rtol=1e-6, atol=1e-9)


@every_case
def test_the_output_error_is_below_that_of_the_plain_projection(method: str, layer_type: str, d: int, generator):
    net, plan, x = one_layer(method, layer_type, generator, d=d)
    weight, covariance = net[0].weight.detach(), collect_covariances(net, plan, [x])["0"]
    layer, canonical = plan["0"], LAYER_TYPES[layer_type].to_oihw
    nearest, plain = whitened_projection(layer, weight, covariance), layer.project(weight)
    in_metric = [float(covariance.apply(canonical(weight - w)).norm()) for w in (nearest, plain)]
    assert in_metric[0] < in_metric[1]
    assert output_error(net, nearest, x) < 0.9 * output_error(net, plain, x)


CONV2D_SETTINGS = [
    {},
    {"stride": 2, "padding": 1},
    {"padding": "same", "padding_mode": "reflect"},
    {"padding": 2, "dilation": 2},
]


@pytest.mark.parametrize("settings", CONV2D_SETTINGS, ids=str)
@pytest.mark.parametrize("method", METHODS)
def test_convolutions_of_all_settings(method: str, settings: dict[str, object], generator):
    net, plan, x = one_layer(method, "conv2d", generator, **settings)
    weight, covariance = net[0].weight.detach(), collect_covariances(net, plan, [x])["0"]
    errors = [
        output_error(net, w, x) for w in (whitened_projection(plan["0"], weight, covariance), plan["0"].project(weight))
    ]
    assert errors[0] < 0.9 * errors[1]


@every_case
def test_an_identity_is_the_plain_projection(method: str, layer_type: str, d: int, generator):
    net, plan, x = one_layer(method, layer_type, generator, d=d)
    layer, weight = plan["0"], net[0].weight.detach()
    one = InputCovariance((*layer.modes.inputs, *layer.shape[2:]), ())
    assert_close(whitened_projection(layer, weight, one), layer.project(weight))
    flat = collect_covariances(net, plan, [x], damping=1.0)["0"]  # nothing is below the mean then, and the rest stays
    assert flat.check("0", layer) is flat


def test_frequent_tokens_are_kept_best(generator):
    net = nn.Sequential(nn.Embedding(24, 8)).double()
    tokens = torch.cat([torch.full((1, 1000), 5), torch.arange(24)[None]], dim=1)
    plan = planned(net, 3, tokens, method="svd", allow_larger=True)
    covariance = collect_covariances(net, plan, [tokens])["0"]
    weight = net[0].weight.detach()
    error = (whitened_projection(plan["0"], weight, covariance) - weight).norm(dim=1) / weight.norm(dim=1)
    assert error[5] < 0.01 < 0.1 < error.median()
    assert covariance.roots[0].root.shape == (24,)


# -- few data ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_dead_channels_and_fewer_samples_than_channels_are_no_trouble(method: str, generator):
    net, plan, x = one_layer(method, "conv2d", generator)
    x[:, 2:5] = 0
    for some in (x, x[:1, :, :3, :3], torch.zeros_like(x)):  # 3 x 3: a single position
        nearest = whitened_projection(plan["0"], net[0].weight.detach(), collect_covariances(net, plan, [some])["0"])
        assert bool(nearest.isfinite().all())
        tolerance = 1e-5 if plan["0"].format.iterative else 1e-9
        assert float((plan["0"].project(nearest) - nearest).norm() / nearest.norm()) < tolerance
    # one image has far fewer dimensions than a patch, and yet: its own output is nearly kept
    few = collect_covariances(net, plan, [x[:1]])["0"]
    weight = net[0].weight.detach()
    errors = [
        output_error(net, w, x[:1]) for w in (whitened_projection(plan["0"], weight, few), plan["0"].project(weight))
    ]
    assert errors[0] < errors[1]


def test_large_groups_are_split_and_large_axes_keep_their_diagonal(generator, monkeypatch):
    net, plan, x = one_layer("svd", "conv2d", generator)
    assert [r.axes for r in collect_covariances(net, plan, [x])["0"].roots] == [(0, 1, 2)]
    covariance = collect_covariances(net, plan, [x], largest=71)["0"]
    assert [(r.axes, tuple(r.root.shape)) for r in covariance.roots] == [((0,), (8, 8)), ((1, 2), (9, 9))]
    monkeypatch.setattr("hodec.calibration.input_covariance.LARGEST_AXIS", 8)
    diagonal = collect_covariances(net, plan, [x], largest=71)["0"]
    assert [tuple(r.root.shape) for r in diagonal.roots] == [(8, 8), (9,)]
    square = covariance.roots[1].root @ covariance.roots[1].root
    assert_close(diagonal.roots[1].root ** 2, square.diagonal())


# -- collecting ----------------------------------------------------------------------------------------------------


def test_collecting_leaves_the_model_alone_and_is_the_same_every_time():
    net, x = SmallResNet(), torch.randn(IMAGE)
    plan = planned(net, 4, x)
    before = snapshot(net)
    first, again = (collect_covariances(net, plan, [x, x], positions=20) for _ in range(2))
    assert_untouched(net, before)
    assert list(first) == list(plan)
    for name in plan:
        for mine, other in zip(first[name].roots, again[name].roots, strict=True):
            assert_close(mine.root, other.root, rtol=0, atol=0)


def test_batches_come_as_tensors_tuples_or_with_labels(generator):
    class Sum(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(8, 12), nn.Linear(8, 12)

        def forward(self, a: Tensor, b: Tensor) -> Tensor:
            return self.one(a) + self.two(b)

    a, b = (torch.randn(4, 8, generator=generator) for _ in range(2))
    both = Sum()
    plan = planned(both, 3, (a, b), method="svd", allow_larger=True)
    roots = collect_covariances(both, plan, [(a, b, torch.zeros(4)), [a, b]])
    alone = nn.Sequential(both.two)
    single = planned(alone, 3, b, method="svd", allow_larger=True)
    for batch in (b, (b,), (b, torch.zeros(4)), [b, torch.zeros(4, dtype=torch.long)]):
        assert_close(collect_covariances(alone, single, [batch])["0"].roots[0].root, roots["two"].roots[0].root)


def test_a_layer_called_twice_sees_both_inputs(generator):
    net = Twice().double()
    x = torch.randn(3, 6, 8, 8, generator=generator, dtype=torch.float64)
    plan = planned(net, 3, x, method="weight_svd", allow_larger=True)
    covariance = collect_covariances(net, plan, [x], positions=None, damping=1e-12)["again"]
    patches = [F.unfold(y, 3, padding=1).reshape(3, 6, -1) for y in (x, F.max_pool2d(net.again(x), 2))]
    moment = sum(torch.einsum("nap,nbp->ab", p, p) for p in patches).detach()
    assert_close(covariance.roots[0].root, sqrtm_psd(moment, 1e-12)[0])


class Other(nn.Module):
    """Its second layer is used only when asked to."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.ask = nn.Linear(8, 12), nn.Linear(8, 12), True

    def forward(self, x: Tensor) -> Tensor:
        return self.one(x) + (self.two(x) if self.ask else 0)


def test_what_cannot_be_collected_is_refused(generator, monkeypatch):
    net, x = Other(), torch.randn(4, 8, generator=generator)
    plan = planned(net, 3, x, method="svd", allow_larger=True)
    for wrong in (0, -1, 1.5, math.nan):
        with pytest.raises(ConfigError, match="damping: .* given; allowed: a number above 0 and at most 1"):
            collect_covariances(net, plan, [x], damping=wrong)
    with pytest.raises(ConfigError, match="positions: 0 given"):
        collect_covariances(net, plan, [x], positions=0)
    with pytest.raises(DataError, match="no batch"):
        collect_covariances(net, plan, [])
    with pytest.raises(PlanError, match="names layer one, which this model lacks"):
        collect_covariances(nn.Sequential(nn.Linear(8, 12)), plan, [x])
    with pytest.raises(TrainingError, match="layer one: its input holds NaN or Inf"):
        collect_covariances(net, plan, [x, x / 0])
    net.ask = False
    with pytest.raises(PlanError, match="two: the model never calls it"):
        collect_covariances(net, plan, [x])
    monkeypatch.setattr(type(plan["one"].format), "mixable", lambda *_: [])
    with pytest.raises(PlanError, match="one: method svd has no projection in a covariance"):
        collect_covariances(net, plan, [x])


def test_a_metric_of_another_plan_is_refused(generator):
    net, plan, x = one_layer("svd", "conv2d", generator)
    covariances = collect_covariances(net, plan, [x])
    other = plan.replace("0", method="weight_svd")
    with pytest.raises(
        PlanError, match="0: its covariance acts on axes .*method weight_svd .*collect the covariances with this"
    ):
        convert(net, other, covariances=covariances)
    convert(net, plan, covariances=collect_covariances(net, other, [x]))  # apart is a case of together
    with pytest.raises(PlanError, match="covariance for 1, which is not in the plan"):
        convert(net, plan, covariances={"1": covariances["0"]})


def test_kinds_of_the_cases_are_right():
    for layer_type in KERNELS:
        assert layer_type_of(dense_layer(layer_type, 8, 12)).name == layer_type
