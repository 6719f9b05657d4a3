"""Truncated factorizations of matrices, batched; NaN and non-convergence are handled here and nowhere else."""

import logging

import torch
from torch import Tensor

from hodec.errors import TrainingError

log = logging.getLogger(__name__)

# Up to this side the float64 Gram matrix costs 1.3x the float32 one and spares every accuracy check.
FLOAT64_SIDE = 256
# Eigenvalues are squared singular values: below this share of the largest a Gram matrix of that type is blurred.
TAIL = {torch.float32: 1e-4, torch.float64: 1e-10}


def check_finite(x: Tensor, what: str) -> None:
    """Refuse NaN and Inf before any factorization: SVDs answer them with garbage or not at all.

    Raises:
        TrainingError: naming ``what`` (a layer) and how many numbers are not finite.
    """
    if not bool(torch.isfinite(x).all()):
        bad = int((~torch.isfinite(x)).sum())
        raise TrainingError(
            f"{what}: {bad} of {x.numel()} weights are NaN or Inf, so it cannot be decomposed. "
            "Training broke down before this point: lower optimizer.lr, or start from the last good checkpoint."
        )


def truncate(m: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Best rank-``rank`` approximation of each matrix, as a product with an orthonormal left factor.

    Works on the Gram matrix of the shorter side (eigenvalues are squared singular values), which is several
    times faster than an SVD, and falls back to float64 or an SVD where the kept tail is too small for it.

    Args:
        m: matrices, shape (..., rows, cols), float32 or float64, finite.
        rank: numbers to keep, 1..min(rows, cols).

    Returns:
        ``u`` (..., rows, rank) with orthonormal columns and ``rest`` (..., rank, cols); ``u @ rest`` is the
        approximation, and its error is the norm of the dropped singular values.

    Source: Eckart and Young, The approximation of one matrix by another of lower rank, 1936.
    """
    try:
        return _truncate_gram(m, rank)
    except torch.linalg.LinAlgError:
        log.warning("eigenvalues of a %s matrix did not converge; trying an SVD in float64", tuple(m.shape))
        return _truncate_svd(m, rank)


def singular_values(m: Tensor) -> Tensor:
    """All singular values of a matrix, largest first, float64, shape (min(rows, cols),).

    From the Gram matrix of the shorter side, in float64: values below 1e-8 of the largest are noise, and are given
    as 0. Tens of times faster than an SVD.
    """
    work = m.detach().double()
    gram = work @ work.mT if work.shape[0] <= work.shape[1] else work.mT @ work
    squares = torch.linalg.eigvalsh(gram).flip(0).clamp_min(0)
    floor = squares[:1] * max(m.shape) * torch.finfo(torch.float64).eps
    return torch.where(squares > floor, squares, 0).sqrt()


def _truncate_gram(m: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    wide = m.shape[-2] <= m.shape[-1]
    side = min(m.shape[-2:])
    work = m.double() if side <= FLOAT64_SIDE else m
    values, vectors = torch.linalg.eigh(work @ work.mT if wide else work.mT @ work)
    if _tail_is_blurred(values, rank, m.dtype, work.dtype):
        if work.dtype == torch.float64:
            return _truncate_svd(m, rank)
        work = m.double()
        vectors = torch.linalg.eigh(work @ work.mT if wide else work.mT @ work)[1]
    basis = vectors[..., -rank:].flip(-1).to(m.dtype)
    if wide:
        return basis, basis.mT @ m
    u, r = torch.linalg.qr(m @ basis)  # orthonormal even where kept singular values are zero
    return u, r @ basis.mT


def _tail_is_blurred(values: Tensor, rank: int, wanted: torch.dtype, used: torch.dtype) -> bool:
    if used == torch.float64 and wanted != torch.float64:
        return False  # float64 resolves all that float32 numbers can say
    kept = values[..., -rank] / values[..., -1].clamp_min(torch.finfo(values.dtype).tiny)
    return not bool((kept >= TAIL[used]).all())  # so that a Gram matrix that overflowed (NaN) counts too


def _truncate_svd(m: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    scale = m.abs().amax(dim=(-2, -1), keepdim=True).double().clamp_min(1e-300)
    try:
        u, s, vh = torch.linalg.svd(m.double() / scale, full_matrices=False)
    except torch.linalg.LinAlgError as error:
        raise TrainingError(f"the SVD of a {tuple(m.shape)} matrix did not converge ({error})") from error
    rest = (s * scale[..., 0])[..., :rank, None] * vh[..., :rank, :]
    return u[..., :rank].to(m.dtype), rest.to(m.dtype)


def square_roots(moment: Tensor, floor: float) -> tuple[Tensor, Tensor]:
    """Symmetric square root of a positive semidefinite matrix, and its inverse.

    Eigenvalues below ``floor`` times their mean count as that much: directions in which there are no data, or too few
    to tell, have no inverse. Eigenvalues and not a Cholesky factor, whose inverse is full of noise there.

    Args:
        moment: (n, n), or (n,) for the diagonal of a diagonal one; float64, finite.
        floor: share of the mean eigenvalue, above 0.

    Returns:
        Root and inverse root in the shape of ``moment``, for the matrix scaled to a mean eigenvalue of 1; a zero
        matrix counts as the identity.
    """
    mean = (moment if moment.ndim == 1 else moment.diagonal()).mean()
    if mean <= 0:
        one = torch.ones_like(moment) if moment.ndim == 1 else torch.eye(len(moment)).to(moment)
        return one, one
    if moment.ndim == 1:
        values = (moment / mean).clamp_min(floor)
        return values.sqrt(), values.rsqrt()
    try:
        values, vectors = torch.linalg.eigh((moment + moment.mT) / (2 * mean))
    except torch.linalg.LinAlgError as error:
        raise TrainingError(f"the eigenvalues of a {tuple(moment.shape)} moment did not converge ({error})") from error
    values = values.clamp_min(floor)
    return (vectors * values.sqrt()) @ vectors.mT, (vectors * values.rsqrt()) @ vectors.mT
