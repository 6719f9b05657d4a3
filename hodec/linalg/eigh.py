"""Gram matrices and their largest eigenvectors by the fastest engine for the size: torch, or LAPACK through SciPy.

A wide symmetric matrix on the CPU is brought to tridiagonal form once; its eigenvalues and a part of its eigenvectors
then cost little more.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache

import numpy as np
import torch
from threadpoolctl import ThreadpoolController
from torch import Tensor

# All of these are the side of a symmetric matrix, on a CPU; benchmarks/decompose.py and big.py time what they lead to.
# From this side on OpenBLAS' half product (SYRK) is 1.9 times as fast as torch's whole one.
SYRK_SIDE = 256
# From this side on, and up to a quarter of the vectors, the tridiagonal form is faster than torch's eigh.
PARTIAL_SIDE = 1024
# From this side on, and up to 1/32 of the vectors, subspace iteration is worth a try: where the spectrum falls it takes
# a tenth to a third of the time of the tridiagonal form, where it is flat the try costs a third more.
ITERATION_SIDE = 2048


def gram(m: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Inner products along the longer side of each matrix: (..., rows, cols) -> (..., n, n), n = min(rows, cols).

    Args:
        dtype: type of the result, in which it is also computed; by default that of ``m``.
    """
    wide = m if m.shape[-2] <= m.shape[-1] else m.mT
    if dtype in (None, m.dtype):
        return _products(wide)
    # 2^22 elements at a time: in float64 the largest kernels are gigabytes
    pieces = wide.split(max(1, 2**22 // max(1, math.prod(wide.shape[:-1]))), dim=-1)
    total = _products(pieces[0].to(dtype))
    for piece in pieces[1:]:
        total += _products(piece.to(dtype))
    return total


def _products(wide: Tensor) -> Tensor:
    if len(wide) <= SYRK_SIDE or not _is_lapack_matrix(wide):
        return wide @ wide.mT
    a = wide.detach().numpy()
    with _torch_threads(), np.errstate(over="ignore", invalid="ignore"):  # callers look at what comes out
        return torch.from_numpy(a @ a.T)


def eigh_topk(symmetric: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The ``count`` largest eigenvalues (..., count), ascending, and their eigenvectors (..., n, count).

    Args:
        symmetric: (..., n, n), finite; it may be overwritten.
        count: 1..n.

    Raises:
        torch.linalg.LinAlgError: no convergence.
    """
    side = symmetric.shape[-1]
    if side >= PARTIAL_SIDE and count <= side / 4 and _is_lapack_matrix(symmetric):
        return Tridiagonal(symmetric).topk(count)
    return eigh_all(symmetric, count)


def eigh_all(symmetric: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """``eigh_topk`` by way of all eigenvectors."""
    values, vectors = torch.linalg.eigh(symmetric)
    return values[..., -count:], vectors[..., -count:]


def subspace_iteration(m: Tensor, count: int, *, tol: float = 1e-4, max_iter: int = 12) -> tuple[Tensor, Tensor] | None:
    """``eigh_topk`` of the Gram matrix of a wide matrix, without forming it, by randomized subspace iteration.

    Args:
        m: (rows, cols), rows <= cols, float32 or float64.
        count: eigenvectors wanted.
        tol: the squared error of truncating to these vectors may be larger than the least one by this ratio. The
            residuals r of G v = t v bound it: what is missed is at most the sum of |r_i|^2 / (t_i - t_next), for
            t_next the largest eigenvalue beside them.
        max_iter: passes over ``m`` before it is given up.

    Returns:
        Eigenvalues and vectors; None where it does not pay, or the bound is not reached.

    Source: Halko, Martinsson, Tropp, Finding structure with randomness, SIAM Review 53(2), 2011: algorithm 4.4;
    Parlett, The Symmetric Eigenvalue Problem, 1980: section 11.7 (the bound).
    """
    if m.ndim != 2 or len(m) < ITERATION_SIDE or count > len(m) / 32:
        return None
    seeded = torch.Generator().manual_seed(0)
    x = torch.randn(m.shape[1], count + max(16, count // 2), generator=seeded, dtype=m.dtype).to(m.device)
    total, found = float(torch.linalg.vector_norm(m, dtype=torch.float64)) ** 2, None
    for _ in range(max_iter):
        y = m @ x
        if found is not None:
            q, values, turn = found
            top, vectors = values[-count:], q @ turn[:, -count:]
            residuals = y @ turn[:, -count:] - vectors * top
            gaps = (top - values[-count - 1]).clamp_min(torch.finfo(m.dtype).tiny)
            missed = float((residuals.square().sum(0) / gaps).double().sum())
            rest = total - float(top.double().sum())
            if rest < 1e-5 * total:  # captured energies of float32 numbers do not tell so small a rest
                return None
            if missed <= tol * rest:
                return top, vectors
        q, _ = torch.linalg.qr(y)
        x = m.mT @ q
        found = (q, *torch.linalg.eigh(x.mT @ x))
    return None


class Tridiagonal:
    """A symmetric matrix as Q T Q^T: T tridiagonal, Q kept as reflectors.

    Args:
        symmetric: (n, n) on the CPU, float32 or float64, n >= 2, finite; it is overwritten.

    Raises:
        torch.linalg.LinAlgError: numbers that are not finite.

    Source: Golub and Van Loan, Matrix Computations, section 8.3; LAPACK's sytrd, stemr and ormqr.
    """

    def __init__(self, symmetric: Tensor) -> None:
        a = symmetric.detach().numpy().T  # column-major, and the matrix is its own transpose
        reduce = _routine("sytrd", a)
        room, _ = _routine("sytrd_lwork", a)(len(a), lower=1)
        with _torch_threads():
            reduced, diagonal, beside, self._scales, _ = reduce(a, lower=1, lwork=int(room), overwrite_a=1)
        if not (np.isfinite(diagonal).all() and np.isfinite(beside).all()):
            raise torch.linalg.LinAlgError("its tridiagonal form is not finite")
        self._reflectors = np.asfortranarray(reduced[1:, :-1])
        self._band = diagonal.astype(np.float64), beside.astype(np.float64)

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return int(self._reflectors.nbytes)

    def eigenvalues(self) -> Tensor:
        """All eigenvalues (n,), ascending, float64."""
        from scipy.linalg import eigvalsh_tridiagonal

        with _as_torch_error():
            return torch.from_numpy(eigvalsh_tridiagonal(*self._band))

    def topk(self, count: int) -> tuple[Tensor, Tensor]:
        """The ``count`` largest eigenvalues, ascending, and their eigenvectors (n, count), in the matrix's type."""
        from scipy.linalg import eigh_tridiagonal

        side = len(self._band[0])
        # in float64 whatever the matrix: the solver's relatively robust forms often break down in float32
        with _as_torch_error():
            values, inner = eigh_tridiagonal(
                *self._band, select="i", select_range=(side - count, side - 1), lapack_driver="stemr"
            )
        vectors = np.asfortranarray(inner, dtype=self._reflectors.dtype)
        turn = _routine("ormqr", vectors)
        with _torch_threads():
            vectors[1:] = turn("L", "N", self._reflectors, self._scales, vectors[1:], lwork=64 * count)[0]
        return torch.from_numpy(values.astype(vectors.dtype)), torch.from_numpy(vectors)


def _is_lapack_matrix(m: Tensor) -> bool:
    return m.device.type == "cpu" and m.dtype in (torch.float32, torch.float64) and m.ndim == 2


def _routine(name: str, like: np.ndarray) -> Callable[..., tuple[np.ndarray, ...]]:
    """LAPACK's routine in the precision of an array."""
    from scipy.linalg import lapack

    routine: Callable[..., tuple[np.ndarray, ...]] = getattr(lapack, ("s" if like.dtype == np.float32 else "d") + name)
    return routine


@contextmanager
def _torch_threads() -> Iterator[None]:
    """Hold NumPy's and SciPy's BLAS to as many threads as torch may use."""
    with _thread_pools().limit(limits=torch.get_num_threads(), user_api="blas"):
        yield


@cache
def _thread_pools() -> ThreadpoolController:
    import scipy.linalg  # noqa: F401  so that its BLAS is among the pools found

    return ThreadpoolController()


@contextmanager
def _as_torch_error() -> Iterator[None]:
    try:
        yield
    except np.linalg.LinAlgError as error:
        raise torch.linalg.LinAlgError(str(error)) from error
