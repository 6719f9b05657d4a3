"""Fits: exact where a closed form is known, never worse than the projection, of the planned ranks."""

import dataclasses

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from hodec.calibration.fit import SOLVERS, as_fit, fit_layer, fittable, target_weight
from hodec.calibration.input_covariance import AxisRoot, InputCovariance, input_sizes, whitened_projection
from hodec.calibration.moments import FitMoments
from hodec.errors import ConfigError, DataError, PlanError, TrainingError
from hodec.formats.calls import CallSites
from hodec.formats.modes import Modes
from hodec.linalg.svd import sqrtm_psd
from hodec.methods import METHODS
from hodec.plan.layer import LayerPlan, Tie

RANKS = {"tt": (5, 6), "tucker": (5, 6), "tt_classical": (4, 20), "cp": (6,), "cp3": (6,)}
CASES = [
    *(
        (method, "conv2d", 1)
        for method in METHODS
        if method != "cp3" and METHODS[method].format("conv2d").min_modes < 2
    ),
    pytest.param("cp3", "conv2d", 1, marks=pytest.mark.slow),  # seconds, and much as cp
    ("tt", "conv2d", 2),
    ("tt_classical", "conv2d", 2),
    ("svd", "linear", 1),
    ("tt", "linear", 2),
    ("svd", "conv1d", 1),
    ("tucker", "conv_transpose2d", 1),
]
every_case = pytest.mark.parametrize(("method", "layer_type", "d"), CASES)


def layer_of(method: str, layer_type: str = "conv2d", d: int = 1, rank: int = 4) -> LayerPlan:
    shape = {"linear": (12, 24), "conv1d": (12, 8, 5)}.get(layer_type, (12, 8, 3, 3))
    fmt, modes = METHODS[method].format(layer_type), Modes.split(shape[1], shape[0], d)
    most = fmt.max_ranks(shape, modes)
    ranks = fmt.fit_ranks(shape, modes, [min(n, rank) for n in most])
    return LayerPlan(method, layer_type, shape, modes, ranks, CallSites(((1, (8, 8), (8, 8)),)))


def data(layer: LayerPlan, generator: torch.Generator, rows: int = 900) -> tuple[Tensor, Tensor, Tensor]:
    """A weight, correlated patches with a mean, and outputs that another net gave for them."""
    out, *inner = layer.shape
    n = torch.Size(inner).numel()
    weight, noise = (torch.randn(size, generator=generator, dtype=torch.float64) for size in ((out, n), (rows, out)))
    mix = torch.randn(n, n, generator=generator, dtype=torch.float64) / torch.arange(1, n + 1)
    x = torch.randn(rows, n, generator=generator, dtype=torch.float64) @ mix.mT + 0.5
    y = x @ weight.mT + 0.3 * x.roll(1, 1) @ weight.mT + 0.1 * noise + 2
    return weight.reshape(layer.shape), x.reshape(rows, *inner), y


def moments_of(layer: LayerPlan, x: Tensor, y: Tensor, parts: int = 3) -> FitMoments:
    moments = FitMoments(layer.shape)
    for some, wanted in zip(x.chunk(parts), y.chunk(parts), strict=True):
        moments.add(some, wanted)
    return moments


def missed(weight: Tensor, bias: Tensor, x: Tensor, y: Tensor) -> float:
    """The share of the variance of y that a layer misses, from the data themselves."""
    off = y - x.flatten(1) @ weight.flatten(1).mT - bias
    return float(off.square().sum() / (y - y.mean(0)).square().sum())


# -- moments -------------------------------------------------------------------------------------------------------


def test_moments_are_those_of_the_data(generator):
    layer = layer_of("svd")
    _, x, y = data(layer, generator)
    moments = moments_of(layer, x, y)
    xx, yx, yy = moments.centred()
    joint = torch.cov(torch.cat([x.flatten(1), y], dim=1).mT, correction=0)
    n = xx.shape[0]
    for mine, expected in ((xx, joint[:n, :n]), (yx, joint[n:, :n]), (yy, joint[n:, n:].diagonal())):
        assert_close(mine, expected, rtol=1e-9, atol=1e-9)
    assert_close(moments.means()[0], x.flatten(1).mean(0))
    single = FitMoments(layer.shape)
    single.add(x.float(), y.float())
    assert single.xx.dtype == torch.float64


def test_moments_of_wide_patches_are_those_of_the_data(generator):
    """Products are summed in blocks, the lower half of them."""
    x, y = (torch.randn(40, n, generator=generator, dtype=torch.float64) for n in (600, 3))
    moments = FitMoments((3, 600))
    for some, wanted in ((x[:30], y[:30]), (x[30:], y[30:])):
        moments.add(some, wanted)
    found = moments.covariance()
    assert_close(found, torch.cov(x.mT, correction=0), rtol=1e-9, atol=1e-9)
    single = FitMoments((3, 600))
    single.add(x.float(), y.float())
    rows, mean = x.float(), x.float().sum(0).double() / 40
    whole = (rows.mT @ rows).double() / 40 - torch.outer(mean, mean)
    assert_close(single.covariance(), whole, rtol=1e-6, atol=1e-6)


def test_rows_that_do_not_fit_are_refused(generator):
    layer = layer_of("svd")
    _, x, y = data(layer, generator)
    moments = FitMoments(layer.shape)
    for wrong in ((x[:, :4], y), (x, y[:, :4]), (x[1:], y)):
        with pytest.raises(DataError, match=r"patches \(M, 8, 3, 3\) and outputs \(M, 12\)"):
            moments.add(*wrong)
    with pytest.raises(DataError, match="never calls it"):
        moments.centred()
    moments.add(x / 0, y)
    with pytest.raises(TrainingError, match="NaN or Inf"):
        fit_layer(layer, torch.zeros(layer.shape), moments)


# -- the best weight of any rank -----------------------------------------------------------------------------------


def test_the_target_is_the_ridge_regression_towards_the_trained_weight(generator):
    layer = layer_of("svd")
    weight, x, y = data(layer, generator)
    moments, rows = moments_of(layer, x, y), x.flatten(1)
    centred, wanted = rows - rows.mean(0), y - y.mean(0)
    more = 0.01 * centred.square().mean()  # damping times the mean eigenvalue, which is the mean of the diagonal
    stacked = torch.cat([centred / len(rows) ** 0.5, more.sqrt() * torch.eye(rows.shape[1], dtype=torch.float64)])
    targets = torch.cat([wanted / len(rows) ** 0.5, more.sqrt() * weight.flatten(1).mT])
    expected = torch.linalg.lstsq(stacked, targets).solution.mT
    assert_close(target_weight(weight, moments, 0.01).flatten(1), expected, rtol=1e-7, atol=1e-9)


def test_little_data_leaves_the_trained_weight_and_much_damping_too(generator):
    layer = layer_of("svd")
    weight, x, y = data(layer, generator)
    one = FitMoments(layer.shape)
    one.add(x[:1], y[:1])
    assert_close(target_weight(weight, one), weight, rtol=1e-6, atol=1e-6)
    assert_close(target_weight(weight, moments_of(layer, x, y), 1e9), weight, rtol=1e-6, atol=1e-6)


def test_a_mean_that_buries_what_varies_about_it_is_fitted_to_what_is_left():
    x, weight = 1000 + 0.01 * torch.randn(64, 400), torch.randn(8, 400)
    moments = FitMoments((8, 400))
    moments.add(x, x @ weight.mT)
    assert_close(target_weight(weight, moments), weight.double(), rtol=0, atol=0.2)


# -- the fit -------------------------------------------------------------------------------------------------------


def test_svd_is_reduced_rank_regression(generator):
    """Its closed form: the regression, then its fitted values projected onto their own leading directions."""
    layer = layer_of("svd")
    weight, x, y = data(layer, generator)
    fit = fit_layer(layer, weight, moments_of(layer, x, y), damping=1e-9)
    rows = torch.cat([x.flatten(1), torch.ones(len(x), 1, dtype=torch.float64)], dim=1)
    fitted = rows @ torch.linalg.lstsq(rows, y).solution
    mean = fitted.mean(0)
    directions = torch.linalg.svd(fitted - mean, full_matrices=False).Vh[: layer.ranks[0]]
    expected = (fitted - mean) @ directions.mT @ directions + mean
    assert_close(x.flatten(1) @ fit.weight.flatten(1).mT + fit.bias, expected, rtol=1e-5, atol=1e-5)
    assert_close(fit.error, missed(fit.weight, fit.bias, x, y), rtol=1e-6, atol=0)


@pytest.mark.parametrize("solver", SOLVERS)
@every_case
def test_a_fit_has_the_planned_ranks(method: str, layer_type: str, d: int, solver: str, generator):
    layer = layer_of(method, layer_type, d)
    weight, x, y = data(layer, generator)
    fit = fit_layer(layer, weight, moments_of(layer, x, y), solver=solver)
    again = layer.format.project(fit.weight, layer.ranks, layer.modes)
    assert float((again - fit.weight).norm() / again.norm()) < (1e-6 if layer.format.iterative else 1e-10)
    assert fit.weight.shape == layer.shape
    assert_close(fit.error, missed(fit.weight, fit.bias, x, y), rtol=1e-6, atol=0)


@every_case
def test_refinement_misses_less_than_the_projection_and_less_than_the_weights_alone(
    method: str, layer_type: str, d: int, generator
):
    layer = layer_of(method, layer_type, d)
    weight, x, y = data(layer, generator)
    moments = moments_of(layer, x, y)
    roots = []
    split = x.reshape(len(x), *input_sizes(layer))
    for axes in layer.format.mixable(layer.shape, layer.modes):
        moved = split.movedim([1 + axis for axis in axes], tuple(range(-len(axes), 0))).flatten(-len(axes))
        flat = moved.reshape(-1, moved.shape[-1])
        roots.append(AxisRoot(axes, *sqrtm_psd(flat.mT @ flat, 1e-4)))
    white = whitened_projection(
        dataclasses.replace(layer, layer_type="conv2d") if layer_type == "conv_transpose2d" else layer,
        weight,
        InputCovariance(input_sizes(layer), tuple(roots)),
    )
    errors = {solver: fit_layer(layer, weight, moments, solver=solver).error for solver in SOLVERS}
    assert errors["als"] <= errors["none"] + 1e-12
    assert errors["admm"] <= errors["none"] + 1e-12
    assert errors["als"] <= as_fit(white, moments).error
    projected = layer.format.project(weight, layer.ranks, layer.modes)
    assert errors["als"] < as_fit(projected, moments).error


@pytest.mark.parametrize("method", METHODS)
def test_a_weight_of_the_planned_ranks_is_found_again(method: str, generator):
    layer = layer_of(method, d=METHODS[method].format("conv2d").min_modes)
    weight, x, _ = data(layer, generator)
    planted = layer.format.project(weight, layer.ranks, layer.modes)
    y = x.flatten(1) @ planted.flatten(1).mT + 1
    fit = fit_layer(layer, planted, moments_of(layer, x, y), damping=1e-6)
    assert fit.error < 1e-6
    assert_close(fit.bias, torch.ones_like(fit.bias), rtol=0.05, atol=0.05)


@pytest.mark.parametrize("method", ["svd", "tucker", "spatial_svd"])
def test_outputs_that_count_more_are_met_better(method: str, generator):
    layer = layer_of(method)
    weight, x, y = data(layer, generator)
    moments = moments_of(layer, x, y)
    counts = torch.ones(12, dtype=torch.float64)
    counts[:3] = 20
    plain, weighted = (fit_layer(layer, weight, moments, output_root=r) for r in (None, torch.diag(counts)))

    def off(fit, k):
        return float((y - x.flatten(1) @ fit.weight.flatten(1).mT - fit.bias)[:, k].square().sum())

    assert off(weighted, slice(0, 3)) < 0.9 * off(plain, slice(0, 3))
    assert weighted.error > plain.error


def test_bad_settings_are_refused(generator):
    layer = layer_of("svd")
    weight, x, y = data(layer, generator)
    moments = moments_of(layer, x, y)
    with pytest.raises(ConfigError, match="solver: 'newton' given; allowed: als, admm, none"):
        fit_layer(layer, weight, moments, solver="newton")
    with pytest.raises(ConfigError, match="damping: 0 given"):
        fit_layer(layer, weight, moments, damping=0)
    with pytest.raises(PlanError, match="cannot be fitted"):
        fit_layer(layer, weight, FitMoments((3, 3)))
    assert fittable(layer)
    assert not fittable(dataclasses.replace(layer, groups=2))
    assert not fittable(dataclasses.replace(layer, ties=(Tie("other", "conv2d", layer.call_sites),)))


def test_few_rows_of_one_strong_direction_fall_back_to_float64(generator, monkeypatch):
    monkeypatch.setattr("hodec.calibration.fit.FLOAT64_SIDE", 16)
    layer = layer_of("svd")
    weight, x, y = data(layer, generator)
    moments = moments_of(layer, 1e-2 * x + 100 * x[:, :1, :1, :1], y)
    assert fit_layer(layer, weight, moments, damping=1e-9).weight.isfinite().all()
