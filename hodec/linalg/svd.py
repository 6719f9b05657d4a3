"""Truncated factorizations of matrices, batched; NaN and non-convergence are handled here and nowhere else."""

import hashlib
import logging
import math
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import cast

import torch
from torch import Tensor

from hodec.errors import MachineError, TrainingError, Use, literal
from hodec.linalg import eigh

log = logging.getLogger(__name__)

# Sides of a Gram matrix, on a CPU; benchmarks/decompose.py and big.py time what they lead to.
# Up to this side the float64 Gram matrix costs 1.3x the float32 one and spares every accuracy check.
FLOAT64_SIDE = 128
# From this side on all singular values of a float32 matrix come from its own type: twice as fast, half the memory.
FLOAT32_SIDE = 4096
# Bytes that ``sharing`` holds at most: those of one float32 matrix of side 2^14.
SHARED_BYTES = 2**30

_shared: ContextVar[dict[bytes, eigh.Tridiagonal] | None] = ContextVar("shared", default=None)


def check_finite(x: Tensor, what: str) -> None:
    """Refuse NaN and Inf before any factorization: SVDs answer them with garbage or not at all.

    Raises:
        TrainingError: naming ``what`` (a layer) and how many numbers are not finite.
    """
    if not math.isfinite(largest_magnitude(x)):
        bad = int((~torch.isfinite(x)).sum())
        raise TrainingError(
            f"{literal(what)}: {bad} of {x.numel()} weights are NaN or Inf, so it cannot be decomposed. Training broke "
            "down before this point: lower {lr}, or start from the last good checkpoint.",
            lr=Use("optimizer.lr"),
        )


def largest_magnitude(x: Tensor) -> float:
    """The largest absolute value; NaN or Inf where there is one. A tenth of the time of ``isfinite``, and one wait."""
    low, high = torch.aminmax(x.detach())
    return float(torch.maximum(-low, high))


def norm(x: Tensor) -> float:
    """Frobenius norm, summed in float64: a plain sum over the largest kernels is off by a percent in float32."""
    pieces = x.detach().reshape(-1).split(2**20)
    return math.sqrt(sum(float(torch.linalg.vector_norm(piece, dtype=torch.float64)) ** 2 for piece in pieces))


@contextmanager
def naming(what: str) -> Iterator[None]:
    """Errors of the factorizations within name ``what`` (a layer); too little memory becomes such an error.

    Raises:
        TrainingError: whatever went wrong.
    """
    try:
        yield
    except TrainingError as error:
        raise error if what in str(error) else error.prefixed(f"{what}: ") from error
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError | torch.OutOfMemoryError) and "can't allocate memory" not in str(error):
            raise
        raise MachineError(
            f"{literal(what)}: too little memory to factorize it ({literal(str(error).splitlines()[0])}); leave it "
            "dense with {exclude}, or free memory",
            exclude=Use("exclude", "[LAYER]"),
        ) from error


def truncated_svd(m: Tensor, rank: int, *, orthonormal: bool = True) -> tuple[Tensor, Tensor]:
    """Best rank-``rank`` approximation of each matrix, as a product with an orthonormal left factor.

    Works on the Gram matrix of the shorter side (eigenvalues are squared singular values), which is several
    times faster than an SVD, and falls back to float64 or an SVD where the kept tail is too small for it.

    Args:
        m: matrices, shape (..., rows, cols), float32 or float64, finite.
        rank: singular values to retain, 1..min(rows, cols).
        orthonormal: whether the left factor must be so; where only the product counts, a QR can be spared.

    Returns:
        U (..., rows, rank), with orthonormal columns, and S Vh (..., rank, cols); their product is the approximation,
        and its error is the norm of the dropped singular values.

    Source: Eckart and Young, The approximation of one matrix by another of lower rank, 1936.
    """
    if rank == min(m.shape[-2:]):
        return _all_of(m, orthonormal)
    return _truncate(m, rank, orthonormal=orthonormal)


def leading_vectors(m: Tensor, rank: int) -> Tensor:
    """U of ``truncated_svd`` alone, (..., rows, rank): up to half of the time is that of S Vh."""
    if rank == min(m.shape[-2:]):
        return _all_of(m, orthonormal=True)[0]
    return _truncate(m, rank, product=False)[0]


def singular_values(m: Tensor) -> Tensor:
    """All singular values of a matrix, largest first, float64, shape (min(rows, cols),).

    From the Gram matrix of the shorter side, tens of times faster than an SVD. In float64: values below about 1e-7 of
    the largest are noise, and are given as 0. From side 4096 on a float32 matrix keeps its type, and that is so below
    about 2e-3: a spectrum of as many values is not decided by those.

    Raises:
        TrainingError: no convergence.
    """
    dtype = torch.float64
    if min(m.shape) >= FLOAT32_SIDE:
        check_finite(m, "a matrix")
        # beyond these, squares leave the range of float32
        dtype = m.dtype if 1e-12 < largest_magnitude(m) < 1e12 else torch.float64
    squares = _eigenvalues(m.detach(), dtype).double().flip(0).clamp_min(0)
    grain = torch.finfo(dtype).eps
    damping = squares[:1] * grain * (max(m.shape) if dtype == torch.float64 else min(m.shape) ** 0.5)
    return torch.where(squares > damping, squares, 0).sqrt()


@contextmanager
def sharing() -> Iterator[None]:
    """Keep the tridiagonal forms that ``singular_values`` makes of wide CPU matrices until ``truncated_svd`` uses them.

    That halves the time of choosing a rank and truncating to it. At most ``SHARED_BYTES`` are held.
    """
    token = _shared.set({})
    try:
        yield
    finally:
        _shared.reset(token)


def _eigenvalues(m: Tensor, dtype: torch.dtype) -> Tensor:
    """Eigenvalues of the Gram matrix in this type, ascending."""
    shared = _shared.get()
    try:
        if shared is None or dtype != m.dtype or not _is_shareable(m):
            return cast(Tensor, torch.linalg.eigvalsh(eigh.gram(m, dtype)))
        form = eigh.Tridiagonal(eigh.gram(m))
        if sum(held.nbytes for held in shared.values()) + form.nbytes <= SHARED_BYTES:
            shared[_digest(m)] = form
        return form.eigenvalues()
    except torch.linalg.LinAlgError as error:
        raise TrainingError(f"the singular values of a {tuple(m.shape)} matrix did not converge ({error})") from error


def _all_of(m: Tensor, orthonormal: bool) -> tuple[Tensor, Tensor]:
    """The factorization at full rank, where nothing is cut off."""
    rows, cols = m.shape[-2:]
    if rows > cols and orthonormal:
        return cast(tuple[Tensor, Tensor], torch.linalg.qr(m))
    one = torch.eye(min(rows, cols), dtype=m.dtype, device=m.device).expand(*m.shape[:-2], -1, -1).contiguous()
    return (one, m.clone()) if rows <= cols else (m.clone(), one)


def _is_shareable(m: Tensor) -> bool:
    return m.ndim == 2 and min(m.shape) >= FLOAT32_SIDE and m.device.type == "cpu" and m.dtype == torch.float32


def _digest(m: Tensor) -> bytes:
    digest = hashlib.sha256(repr(tuple(m.shape)).encode())
    digest.update(m.detach().contiguous().numpy().data)
    return digest.digest()


def _topk(m: Tensor, rank: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The largest eigenvalues of the Gram matrices in this type, ascending, and their eigenvectors."""
    same, shared = dtype == m.dtype, _shared.get()
    form = shared.pop(_digest(m), None) if shared and same and _is_shareable(m) else None
    if same and form is None and (found := eigh.subspace_iteration(m if m.shape[-2] <= m.shape[-1] else m.mT, rank)):
        return found
    try:
        return form.topk(rank) if form else eigh.eigh_topk(eigh.gram(m, dtype), rank)
    except torch.linalg.LinAlgError:
        return eigh.eigh_all(eigh.gram(m, dtype), rank)


def _truncate(m: Tensor, rank: int, *, orthonormal: bool = True, product: bool = True) -> tuple[Tensor, Tensor]:
    """``truncated_svd`` below full rank; where S Vh is not wanted it is empty."""
    try:
        return _truncate_gram(m, rank, orthonormal, product)
    except torch.OutOfMemoryError:
        log.warning("a %s matrix is too large for %s; truncating it on the CPU", tuple(m.shape), m.device)
        u, rest = _truncate_gram(m.cpu(), rank, orthonormal, product)
        return u.to(m.device), rest.to(m.device)
    except torch.linalg.LinAlgError:
        log.warning("eigenvalues of a %s matrix did not converge; trying an SVD in float64", tuple(m.shape))
        return _truncate_svd(m, rank)


def _truncate_gram(m: Tensor, rank: int, orthonormal: bool, product: bool) -> tuple[Tensor, Tensor]:
    if m.ndim > 2 and math.prod(m.shape[:-2]) == 1:
        u, rest = _truncate_gram(m.reshape(m.shape[-2:]), rank, orthonormal, product)
        return u.reshape(*m.shape[:-1], rank), rest.reshape(*m.shape[:-2], rank, -1) if product else rest
    used = torch.float64 if min(m.shape[-2:]) <= FLOAT64_SIDE else m.dtype
    values, vectors = _topk(m, rank, used)
    if _tail_is_blurred(values, m.dtype, used):
        if used == torch.float64:
            return _truncate_svd(m, rank)
        vectors = _topk(m, rank, torch.float64)[1]
    basis = vectors.flip(-1).to(m.dtype)
    if m.shape[-2] <= m.shape[-1]:
        return basis, basis.mT @ m if product else m.new_empty(0)
    if not orthonormal:
        return m @ basis, basis.mT
    u, r = torch.linalg.qr(m @ basis)  # orthonormal even where retained singular values are zero
    return u, r @ basis.mT if product else m.new_empty(0)


def _tail_is_blurred(values: Tensor, wanted: torch.dtype, used: torch.dtype) -> bool:
    if used == torch.float64 and wanted != torch.float64:
        return False  # float64 resolves all that float32 numbers hold
    ratio = values[..., 0] / values[..., -1].clamp_min(torch.finfo(values.dtype).tiny)
    # eigenvalues are squared singular values: below this ratio to the largest, a Gram matrix of that type is noise
    least = 1e-10 if used == torch.float64 else 1e-4
    return not bool((ratio >= least).all())  # so that a Gram matrix that overflowed (NaN) counts too


def _truncate_svd(m: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    scale = m.abs().amax(dim=(-2, -1), keepdim=True).double().clamp_min(1e-300)
    try:
        u, s, vh = torch.linalg.svd(m.double() / scale, full_matrices=False)
    except torch.linalg.LinAlgError as error:
        raise TrainingError(f"the SVD of a {tuple(m.shape)} matrix did not converge ({error})") from error
    rest = (s * scale[..., 0])[..., :rank, None] * vh[..., :rank, :]
    return u[..., :rank].to(m.dtype), rest.to(m.dtype)


def sqrtm_psd(moment: Tensor, damping: float) -> tuple[Tensor, Tensor]:
    """Symmetric square root of a positive semidefinite matrix, and its inverse.

    Eigenvalues below ``damping`` times their mean count as that much: directions in which there are no data, or too few
    to tell, have no inverse. Eigenvalues and not a Cholesky factor, whose inverse is full of noise there.

    Args:
        moment: (n, n), or (n,) for the diagonal of a diagonal one; float64, finite.
        damping: ratio to the mean eigenvalue, above 0.

    Returns:
        Root and inverse root in the shape of ``moment``, for the matrix scaled to a mean eigenvalue of 1; a zero
        matrix counts as the identity.
    """
    mean = (moment if moment.ndim == 1 else moment.diagonal()).mean()
    if mean <= 0:
        one = torch.ones_like(moment) if moment.ndim == 1 else torch.eye(len(moment)).to(moment)
        return one, one
    if moment.ndim == 1:
        values = (moment / mean).clamp_min(damping)
        return values.sqrt(), values.rsqrt()
    try:
        values, vectors = torch.linalg.eigh((moment + moment.mT) / (2 * mean))
    except torch.linalg.LinAlgError as error:
        raise TrainingError(f"the eigenvalues of a {tuple(moment.shape)} moment did not converge ({error})") from error
    values = values.clamp_min(damping)
    return (vectors * values.sqrt()) @ vectors.mT, (vectors * values.rsqrt()) @ vectors.mT
