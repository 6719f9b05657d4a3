"""Truncated factorizations: as good as an SVD, and never silent about numbers that are not there."""

import logging

import pytest
import torch
from torch import Tensor

from hodec.errors import TrainingError
from hodec.linalg import eigh as eigen
from hodec.linalg import svd as linalg
from hodec.linalg.svd import check_finite, truncated_svd

SHAPES = [(5, 9), (9, 5), (6, 6), (1, 7), (7, 1), (3, 4, 8), (2, 3, 8, 4)]


def optimum(m: Tensor, rank: int) -> Tensor:
    """The best approximation of that rank, by torch's SVD in float64."""
    u, s, vh = torch.linalg.svd(m.double(), full_matrices=False)
    return (u[..., :rank] * s[..., None, :rank]) @ vh[..., :rank, :]


def spectrum(values: Tensor, rows: int, cols: int, generator: torch.Generator) -> Tensor:
    """A float64 matrix with these singular values."""
    u, _ = torch.linalg.qr(torch.randn(rows, len(values), generator=generator, dtype=torch.float64))
    v, _ = torch.linalg.qr(torch.randn(cols, len(values), generator=generator, dtype=torch.float64))
    return (u * values) @ v.mT


def assert_orthonormal(u: Tensor, tolerance: float) -> None:
    eye = torch.eye(u.shape[-1], dtype=u.dtype).expand(*u.shape[:-2], -1, -1)
    torch.testing.assert_close(u.mT @ u, eye, rtol=0, atol=tolerance)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_truncation_is_the_best_one(shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator):
    m = torch.randn(shape, generator=generator, dtype=dtype)
    tolerance = 1e-10 if dtype == torch.float64 else 1e-5
    for rank in range(1, min(shape[-2:]) + 1):
        u, rest = truncated_svd(m, rank)
        assert u.shape == (*shape[:-1], rank)
        assert rest.shape == (*shape[:-2], rank, shape[-1])
        assert u.dtype == rest.dtype == dtype
        assert_orthonormal(u, tolerance)
        torch.testing.assert_close(u @ rest, optimum(m, rank).to(dtype), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_only_the_product_counts_where_the_left_factor_need_not_be_orthonormal(
    shape: tuple[int, ...], generator: torch.Generator
):
    m = torch.randn(shape, generator=generator, dtype=torch.float64)
    for rank in range(1, min(shape[-2:]) + 1):
        u, rest = truncated_svd(m, rank, orthonormal=False)
        assert u.shape == (*shape[:-1], rank)
        torch.testing.assert_close(u @ rest, optimum(m, rank))


@pytest.mark.parametrize("shape", [(300, 280), (280, 300)], ids=str)
@pytest.mark.parametrize("power", [0.0, 1.0, 3.0])
def test_big_float32_matrices_are_truncated_as_well_as_by_an_svd(
    shape: tuple[int, int], power: float, generator: torch.Generator
):
    """These take the float32 Gram matrix while it sees the tail, and float64 where it does not."""
    values = torch.arange(1, 281, dtype=torch.float64) ** -power
    m = spectrum(values, *shape, generator)
    for rank in (10, 140, 279):
        u, rest = truncated_svd(m.float(), rank)
        assert_orthonormal(u, 1e-5)
        best = float(values[rank:].norm() / values.norm())
        assert float((u @ rest - m).norm() / values.norm()) <= best * (1 + 1e-4) + 2e-6


@pytest.mark.parametrize("shape", [(40, 60), (60, 40)], ids=str)
def test_row_4_ill_conditioned_float64_matrices_keep_their_small_values(
    shape: tuple[int, int], generator: torch.Generator
):
    """Squares of 1e-12 are lost beside 1: a Gram matrix alone would keep the wrong directions."""
    values = 10.0 ** -torch.linspace(0, 12, 40, dtype=torch.float64)
    m = spectrum(values, *shape, generator)
    for rank in (10, 25, 35):
        u, rest = truncated_svd(m, rank)
        assert_orthonormal(u, 1e-10)
        assert float((u @ rest - m).norm()) <= float(values[rank:].norm()) * 1.01 + 1e-14


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("shape", [(8, 20), (20, 8), (300, 270)], ids=str)
def test_ranks_above_the_matrix_own_rank(shape: tuple[int, int], dtype: torch.dtype, generator: torch.Generator):
    m = spectrum(torch.tensor([3.0, 2.0, 1.0]).double(), *shape, generator).to(dtype)
    tolerance = 1e-10 if dtype == torch.float64 else 1e-5
    for rank in (3, 6, 8):
        u, rest = truncated_svd(m, rank)
        assert_orthonormal(u, tolerance)
        torch.testing.assert_close(u @ rest, m, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("shape", [(4, 6), (6, 4)], ids=str)
def test_zero_matrices(shape: tuple[int, int]):
    for dtype in (torch.float32, torch.float64):
        u, rest = truncated_svd(torch.zeros(shape, dtype=dtype), 3)
        assert_orthonormal(u, 1e-6)
        assert float(rest.norm()) == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_batch_is_truncated_one_by_one(dtype: torch.dtype, generator: torch.Generator):
    """Also where one of the batch takes the whole batch to a finer engine."""
    batch = torch.randn(4, 10, 14, generator=generator, dtype=dtype)
    batch[1] *= 1e-12
    batch[2] = spectrum(10.0 ** -torch.arange(10).double(), 10, 14, generator).to(dtype)
    batch[3] = 0
    u, rest = truncated_svd(batch, 8)
    for k in range(4):
        alone_u, alone_rest = truncated_svd(batch[k], 8)
        expected = alone_u @ alone_rest
        scale = max(float(expected.norm()), 1e-300)
        assert float((u[k] @ rest[k] - expected).norm()) / scale < (1e-10 if dtype == torch.float64 else 1e-5)


@pytest.mark.parametrize(
    ("dtype", "scale", "shape"),
    [
        (torch.float32, 1e36, (20, 30)),
        (torch.float32, 1e25, (300, 320)),  # the float32 Gram matrix overflows
        (torch.float32, 1e-25, (300, 320)),  # and here it is zero
        (torch.float64, 1e200, (20, 30)),
        (torch.float64, 1e-200, (30, 20)),
    ],
    ids=str,
)
def test_row_4_scales_whose_squares_leave_the_type(
    dtype: torch.dtype, scale: float, shape: tuple[int, int], generator: torch.Generator
):
    m = torch.randn(shape, generator=generator, dtype=dtype)
    u, rest = truncated_svd(m * scale, 5)
    tolerance = 1e-9 if dtype == torch.float64 else 1e-4
    torch.testing.assert_close(u @ (rest / scale), optimum(m, 5).to(dtype), rtol=tolerance, atol=tolerance)


def test_row_4_eigenvalues_that_do_not_converge_fall_back_to_an_svd(monkeypatch, caplog, generator):
    def refuses(_: Tensor) -> None:
        raise torch.linalg.LinAlgError("made to fail")

    m = torch.randn(6, 9, generator=generator)
    monkeypatch.setattr(torch.linalg, "eigh", refuses)
    with caplog.at_level(logging.WARNING, logger=linalg.__name__):
        u, rest = truncated_svd(m, 4)
    assert "(6, 9)" in caplog.text
    torch.testing.assert_close(u @ rest, optimum(m, 4).float(), rtol=1e-5, atol=1e-5)


def test_row_4_when_nothing_converges_the_error_says_so():
    with pytest.raises(TrainingError, match=r"SVD of a \(3, 4\) matrix did not converge"):
        truncated_svd(torch.full((3, 4), torch.nan), 2)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_rows_1_and_2_check_finite_counts_and_names(bad: float):
    x = torch.ones(4, 5)
    check_finite(x, "layer conv1")
    x[1, 2] = x[3, 4] = bad
    with pytest.raises(TrainingError, match="layer conv1: 2 of 20 weights are NaN or Inf.*lower lr"):
        check_finite(x, "layer conv1")


# -- the engines ---------------------------------------------------------------------------------------------------


@pytest.fixture
def small_sides(monkeypatch: pytest.MonkeyPatch) -> None:
    """The engines of wide matrices take small ones too."""
    monkeypatch.setattr(eigen, "SYRK_SIDE", 0)
    monkeypatch.setattr(eigen, "PARTIAL_SIDE", 4)
    monkeypatch.setattr(linalg, "FLOAT64_SIDE", 0)
    monkeypatch.setattr(linalg, "FLOAT32_SIDE", 4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("side", [2, 3, 40])
def test_the_tridiagonal_form_has_the_eigenvalues_and_vectors_of_its_matrix(
    side: int, dtype: torch.dtype, generator: torch.Generator
):
    m = torch.randn(side, 2 * side, generator=generator, dtype=dtype)
    matrix, tolerance = m @ m.mT, 1e-10 if dtype == torch.float64 else 1e-4
    form = eigen.Tridiagonal(matrix.clone())
    wanted = torch.linalg.eigvalsh(matrix.double())
    torch.testing.assert_close(form.eigenvalues(), wanted, rtol=tolerance, atol=tolerance)
    for count in {1, side // 2, side}:
        values, vectors = form.topk(count)
        torch.testing.assert_close(values.double(), wanted[-count:], rtol=tolerance, atol=tolerance)
        assert vectors.shape == (side, count)
        assert vectors.dtype == dtype
        assert_orthonormal(vectors, tolerance)
        torch.testing.assert_close(matrix @ vectors, vectors * values, rtol=tolerance, atol=10 * tolerance)


@pytest.mark.parametrize("shape", [(60, 90), (90, 60), (60, 60), (1, 60, 90), (3, 60, 90)], ids=str)
@pytest.mark.parametrize("power", [0.0, 1.0, 6.0])
def test_every_engine_truncates_as_well_as_an_svd(
    shape: tuple[int, ...], power: float, small_sides: None, generator: torch.Generator
):
    values = torch.arange(1, 61, dtype=torch.float64) ** -power
    m = spectrum(values, *shape[-2:], generator).float().expand(shape).contiguous()
    for rank in (1, 10, 15, 40, 60):
        with linalg.sharing():
            if m.ndim == 2:
                linalg.singular_values(m)
            u, rest = truncated_svd(m, rank)
        assert u.shape == (*shape[:-1], rank)
        assert_orthonormal(u, 1e-4)
        best = float(values[rank:].norm() / values.norm())
        assert float((u @ rest - m).norm() / m.norm()) <= best * (1 + 1e-4) + 2e-6


def test_a_shared_form_is_used_once_and_only_for_its_own_matrix(
    small_sides: None, generator: torch.Generator, monkeypatch: pytest.MonkeyPatch
):
    made = []
    monkeypatch.setattr(eigen.Tridiagonal, "__init__", counting(eigen.Tridiagonal.__init__, made))
    one, other = (torch.randn(20, 30, generator=generator) for _ in range(2))
    with linalg.sharing():
        linalg.singular_values(one)
        for m, count in ((other, 2), (one, 2), (one.clone(), 3)):  # the second finds what singular_values made
            u, rest = truncated_svd(m, 4)
            torch.testing.assert_close(u @ rest, optimum(m, 4).float(), rtol=1e-4, atol=1e-4)
            assert len(made) == count
    truncated_svd(one, 4)
    assert len(made) == 4


def counting(function, calls: list):  # noqa: ANN001
    def counted(*args, **kwargs):
        calls.append(args)
        return function(*args, **kwargs)

    return counted


def test_no_more_is_shared_than_allowed(small_sides: None, generator: torch.Generator, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(linalg, "SHARED_BYTES", 2 * 4 * 19 * 19)
    with linalg.sharing():
        for _ in range(5):
            linalg.singular_values(torch.randn(20, 30, generator=generator))
        assert len(linalg._shared.get()) == 2


def test_float32_spectra_of_wide_matrices_are_those_of_float64(small_sides: None, generator: torch.Generator):
    values = torch.cat([torch.linspace(10, 1, 30), torch.zeros(10)]).double()
    found = linalg.singular_values(spectrum(values, 40, 60, generator).float())
    torch.testing.assert_close(found[:30], values[:30], rtol=1e-4, atol=0)
    assert not found[30:].any()  # rounding is not a signal


@pytest.mark.parametrize("scale", [1e-30, 1e-24, 1e18, 1e30])
def test_float32_spectra_of_wide_matrices_at_scales_whose_squares_leave_the_type(
    scale: float, small_sides: None, generator: torch.Generator
):
    m = torch.randn(40, 60, generator=generator)
    wanted = torch.linalg.svdvals(m.double())
    with linalg.sharing():
        torch.testing.assert_close(linalg.singular_values(m * scale) / scale, wanted, rtol=1e-4, atol=1e-6)
    with pytest.raises(TrainingError, match="1 of 2400 weights are NaN"):
        linalg.singular_values(torch.where(m == m.max(), torch.nan, m))


def test_sharing_takes_parameters(small_sides: None, generator: torch.Generator):
    m = torch.randn(20, 30, generator=generator).requires_grad_()
    with linalg.sharing(), torch.no_grad():
        linalg.singular_values(m)
        u, rest = truncated_svd(m, 4)
    torch.testing.assert_close(u @ rest, optimum(m.detach(), 4).float(), rtol=1e-4, atol=1e-4)


def test_an_empty_batch_has_empty_factors():
    u, rest = truncated_svd(torch.randn(0, 5, 6), 2)
    assert u.shape == (0, 5, 2)
    assert rest.shape == (0, 2, 6)


def test_engines_that_break_down_hand_over(
    small_sides: None, generator: torch.Generator, monkeypatch: pytest.MonkeyPatch
):
    def broken(*_: object) -> None:
        raise torch.linalg.LinAlgError("stemr did not converge")

    monkeypatch.setattr(eigen.Tridiagonal, "topk", broken)
    m = torch.randn(40, 60, generator=generator)
    u, rest = truncated_svd(m, 5)
    torch.testing.assert_close(u @ rest, optimum(m, 5).float(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shape", [(300, 400), (400, 300)], ids=str)
@pytest.mark.parametrize("power", [0.0, 0.5, 1.0, 4.0])
def test_iterating_on_random_vectors_is_as_good_or_says_nothing(
    shape: tuple[int, int], power: float, generator: torch.Generator, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(eigen, "ITERATION_SIDE", 100)
    values = torch.arange(1, 301, dtype=torch.float64) ** -power
    m = spectrum(values, *shape, generator).float()
    tried = []
    real = eigen.subspace_iteration
    monkeypatch.setattr(eigen, "subspace_iteration", lambda *given: tried.append(real(*given)) or tried[-1])
    for rank in (1, 4, 9):
        u, rest = truncated_svd(m, rank)
        assert_orthonormal(u, 1e-4)
        best = float(values[rank:].norm())
        assert float((u @ rest - m).norm()) <= best * (1 + 1e-4) + 2e-6 * float(values.norm())
    if power:  # float32 energies of a steep spectrum cannot tell how much is left
        assert (tried[-1] is not None) == (power <= 1)


@pytest.mark.parametrize("high", [1.3, 10.0, 100.0])
@pytest.mark.parametrize("low", [1.02, 1.1, 1.3, 2.0])
def test_what_iteration_gives_is_within_its_excess(
    high: float, low: float, generator: torch.Generator, monkeypatch: pytest.MonkeyPatch
):
    """A few large values converge at once, those just above a flat rest hardly: the slow ones must not be missed."""
    monkeypatch.setattr(eigen, "ITERATION_SIDE", 100)
    values = torch.ones(600, dtype=torch.float64)
    values[:8], values[8:16] = high, low
    m = spectrum(values, 600, 600, generator).float()
    found = eigen.subspace_iteration(m, 16)
    if found is not None:
        lost = float((m - found[1] @ (found[1].mT @ m)).double().square().sum())
        assert lost <= (1 + 1.5 * 1e-4) * float(values[16:].square().sum())
    assert (found is not None) or low < 2


def test_small_or_high_ranks_are_not_tried_by_iteration(generator: torch.Generator):
    assert eigen.subspace_iteration(torch.randn(100, 100, generator=generator), 1) is None
    assert eigen.subspace_iteration(torch.randn(2048, 2048, generator=generator), 65) is None


def test_full_rank_costs_nothing_and_shares_nothing(generator: torch.Generator, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(eigen, "eigh_topk", None)
    for shape in ((4, 9), (9, 4), (3, 4, 4)):
        m = torch.randn(shape, generator=generator)
        u, rest = truncated_svd(m, min(shape[-2:]))
        assert_orthonormal(u, 1e-5)
        torch.testing.assert_close(u @ rest, m)
        rest.zero_()
        assert m.any()  # a layer's factors must not be another layer's weight


# -- errors with names -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "error",
    [
        MemoryError("Unable to allocate 39.1 GiB"),
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_too_little_memory_names_the_layer(error: Exception):
    wanted = r"^layer head: too little memory to factorize it .*exclude"
    with pytest.raises(TrainingError, match=wanted), linalg.naming("layer head"):
        raise error


def test_errors_are_named_once_and_others_pass():
    with pytest.raises(TrainingError, match=r"^layer head: it broke$"), linalg.naming("layer head"):
        raise TrainingError("it broke")
    with pytest.raises(TrainingError, match=r"^layer head: 3 of 4"), linalg.naming("layer head"):
        raise TrainingError("layer head: 3 of 4")
    with pytest.raises(RuntimeError, match="sizes"), linalg.naming("layer head"):
        raise RuntimeError("sizes do not match")


def test_a_matrix_too_large_for_the_device_is_truncated_on_the_cpu(
    generator: torch.Generator, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    real, tries = linalg._truncate_gram, []

    def first_fails(m: Tensor, *how: object) -> tuple[Tensor, Tensor]:
        tries.append(m)
        if len(tries) == 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(m, *how)

    monkeypatch.setattr(linalg, "_truncate_gram", first_fails)
    m = torch.randn(6, 9, generator=generator)
    u, rest = truncated_svd(m, 2)
    torch.testing.assert_close(u @ rest, optimum(m, 2).float(), rtol=1e-5, atol=1e-5)
    assert "truncating it on the CPU" in caplog.text
