"""Laws of every format: what its tensors must satisfy, whatever the method."""

import math

import pytest
import torch
from cases import Case, every_case, relative

from hodec.errors import RankError, TrainingError
from hodec.formats.base import project_batch
from hodec.formats.layer_types import LAYER_TYPES

PRECISION = {torch.float64: 1e-10, torch.float32: 1e-6}


@every_case
def test_exact_at_full_rank(case: Case):
    w, full = case.weight(), case.format.max_ranks(case.shape, case.modes)
    factors = case.format.decompose(w, full, case.modes)
    assert relative(case.format.reconstruct(factors, case.shape, case.modes), w) < 1e-10
    assert relative(case.format.project(w, full, case.modes), w) < 1e-10


@every_case
def test_projecting_twice_changes_nothing_and_decomposing_the_projection_loses_nothing(case: Case):
    """What ADMM projects is what the layer stores: one mode order everywhere."""
    ranks = case.ranks(3)
    for dtype, precision in PRECISION.items():
        once = case.format.project(case.weight(dtype), ranks, case.modes)
        assert relative(once, case.weight(dtype)) > 0.05, dtype  # or nothing was projected at all
        assert relative(case.format.project(once, ranks, case.modes), once) < precision, dtype
        rebuilt = case.format.reconstruct(case.format.decompose(once, ranks, case.modes), case.shape, case.modes)
        assert relative(rebuilt, once) < 1e-6, dtype
        dense = case.dense(dtype)
        dense.weight.data.copy_(LAYER_TYPES[case.layer_type].from_oihw(once))
        layer = case.cls.from_dense(dense, ranks, modes=case.modes)
        assert relative(layer.dense_weight(), LAYER_TYPES[case.layer_type].from_oihw(once)) < 1e-6, dtype


@every_case
def test_error_does_not_grow_with_rank(case: Case):
    most = max(case.format.max_ranks(case.shape, case.modes))
    # iterating to the end takes its time
    caps = sorted({1, 2, 3, 5, 8, most} if case.format.iterative else {*range(1, 13), most // 2, most})
    slack = 0.02 if case.format.iterative else 0  # local optima
    w = case.weight()
    errors = [relative(case.format.project(w, case.ranks(cap), case.modes), w) for cap in caps]
    assert all(after <= before + slack + 1e-12 for before, after in zip(errors, errors[1:]))
    assert errors[-1] < 1e-10 < 0.1 < errors[0] <= 1


@every_case
def test_a_projection_is_no_longer_than_its_weight(case: Case):
    w = case.weight()
    projected = case.format.project(w, case.ranks(2), case.modes)
    # orthogonal to what it drops
    torch.testing.assert_close(projected.norm() ** 2 + (w - projected).norm() ** 2, w.norm() ** 2)


@every_case
def test_norms_of_orthogonal_factors_say_what_is_kept(case: Case):
    w, ranks = case.weight(), case.ranks(3)
    factors = case.format.decompose(w, ranks, case.modes)
    kept = case.format.reconstruct(factors, case.shape, case.modes).norm()
    product = math.prod(factor.norm() for factor in factors) / math.prod(ranks) ** 0.5
    assert case.format.orthogonal == (abs(product / kept - 1) < 1e-10)


@every_case
def test_leading_rows_are_those_of_the_whole(case: Case):
    factors = case.format.decompose(case.weight(), case.ranks(3), case.modes)
    whole = case.format.reconstruct(factors, case.shape, case.modes)
    for count in (1, 5, 100):
        rows = case.format.leading(factors, count, case.shape, case.modes)
        assert rows is not None or case.method not in ("svd", "weight_svd", "spatial_svd", "tucker")
        if rows is not None:
            assert 1 <= len(rows) <= max(count, case.shape[0] // 2)
            assert relative(rows, whole[: len(rows)]) < 1e-12


@every_case
def test_a_batch_is_projected_one_by_one(case: Case):
    for dtype, precision in PRECISION.items():
        batch = torch.stack([case.weight(dtype, seed) * 10**seed for seed in range(3)])
        together = project_batch(case.format, batch, case.ranks(3), case.modes)
        for w, z in zip(batch, together):
            assert relative(z, case.format.project(w, case.ranks(3), case.modes)) < precision, dtype


@every_case
def test_projecting_leaves_the_weight_alone_and_keeps_no_graph(case: Case):
    w = case.weight().requires_grad_()
    before = w.detach().clone()
    projected = case.format.project(w, case.ranks(3), case.modes)
    assert projected.shape == w.shape
    assert not projected.requires_grad
    torch.testing.assert_close(w.detach(), before, rtol=0, atol=0)


@every_case
def test_params_are_the_factors_numbers(case: Case):
    ranks = case.ranks(3)
    factors = case.format.decompose(case.weight(), ranks, case.modes)
    assert case.format.params(case.shape, ranks, case.modes) == sum(f.numel() for f in factors)


@every_case
def test_row_5_half_precision_projects_in_float32_and_comes_back_in_its_own_type(case: Case):
    for dtype in (torch.bfloat16, torch.float16):
        w, ranks = case.weight(dtype), case.ranks(3)
        projected = case.format.project(w, ranks, case.modes)
        assert projected.dtype == dtype
        expected = case.format.project(w.float(), ranks, case.modes).to(dtype)
        torch.testing.assert_close(projected, expected, rtol=0, atol=0)


@every_case
def test_row_7_autocast_changes_no_projection(case: Case):
    w, ranks = case.weight(torch.float32), case.ranks(3)
    outside = case.format.project(w, ranks, case.modes)
    with torch.autocast("cpu", torch.bfloat16):
        inside = case.format.project(w, ranks, case.modes)
    torch.testing.assert_close(inside, outside, rtol=0, atol=0)


@every_case
def test_rows_1_and_2_nan_and_inf_are_refused_before_any_factorization(case: Case):
    for bad in (math.nan, math.inf, -math.inf):
        w = case.weight(torch.float32)
        w.view(-1)[7] = bad
        with pytest.raises(TrainingError, match=f"1 of {w.numel()} weights are NaN or Inf"):
            case.format.project(w, case.ranks(3), case.modes)


@every_case
def test_row_4_huge_and_tiny_weights_project_as_well_as_others(case: Case):
    w = case.weight(torch.float32)
    w = w / w.abs().max()
    expected = case.format.project(w, case.ranks(3), case.modes)
    for scale in (1e38, 1e-30):
        projected = case.format.project(w * scale, case.ranks(3), case.modes)
        assert bool(projected.isfinite().all()), scale
        assert relative(projected / scale, expected) < 1e-5, scale


@every_case
def test_a_zero_weight_projects_to_zero(case: Case):
    zero = torch.zeros(case.shape)
    torch.testing.assert_close(case.format.project(zero, case.ranks(3), case.modes), zero, rtol=0, atol=0)


@every_case
def test_fitted_ranks_are_the_most_that_can_be_used(case: Case):
    most = case.format.max_ranks(case.shape, case.modes)
    assert case.format.fit_ranks(case.shape, case.modes, most) == most
    assert case.format.check_ranks(case.shape, case.modes, list(most)) == most
    for cap in range(1, max(most) + 2):
        fit = case.ranks(cap)
        assert all(1 <= rank <= min(cap, top) for rank, top in zip(fit, most, strict=True))
        assert case.format.check_ranks(case.shape, case.modes, fit) == fit
        # one more anywhere is more than the cap or than can be used
        for k in range(len(fit)):
            more = [*fit]
            more[k] += 1
            assert more[k] > cap or case.format.fit_ranks(case.shape, case.modes, more) != tuple(more)


@every_case
def test_ranks_that_do_not_fit_are_refused(case: Case):
    most = case.format.max_ranks(case.shape, case.modes)
    wrong = [[*most, 1], [most[0] + 1, *most[1:]], [0, *most[1:]], [-1, *most[1:]], [2.0, *most[1:]], [True, *most[1:]]]
    for ranks in (*wrong, ["2", *most[1:]], []):
        with pytest.raises(RankError):
            case.format.check_ranks(case.shape, case.modes, ranks)
