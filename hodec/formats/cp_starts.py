"""Starts of a CP: components that are orthogonal, exact, or moved a little, and the spectrum that they give."""

import math
from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor

from hodec.formats.cp_components import Components, unit
from hodec.linalg.svd import leading_vectors, truncated_svd


def start_values(tensor: Tensor) -> Tensor:
    """Norms of all components of the orthogonal start, largest first, float64.

    Squares of those that a rank cuts off bound what it loses: iteration only lowers it.
    """
    work = tensor.detach().double()[None]
    sides = sorted((k for k in range(1, work.ndim) if work.shape[k] > 1), key=lambda k: -work.shape[k])
    while len(sides) < 2:
        sides.append(next(k for k in range(1, work.ndim) if k not in sides))
    rest = [k for k in range(1, work.ndim) if k not in sides]
    slices, _ = _turned_slices(work.permute(0, *sides, *rest).flatten(len(sides)))
    return cast(Tensor, torch.linalg.svdvals(slices).flatten().sort(descending=True).values)


def orthogonal_start(tensors: Tensor, rank: int) -> Components:
    """The ``rank`` largest singular triplets of all slices (n_1, n_2), after turning the other sides to their axes.

    All are orthogonal to each other: the squared error is 1 - |weights|^2.
    """
    small = tensors.shape[3:]
    slices, turns = _turned_slices(tensors)
    values, right = torch.linalg.eigh(slices.mT @ slices)
    index = values.flatten(1).topk(rank, dim=1).indices  # (B, R)
    left = _columns(slices @ right, index)
    weights = left.norm(dim=1)
    columns = [unit(left, weights), _columns(right, index)]
    where = torch.div(index, right.shape[-1], rounding_mode="floor")
    for turn, at in zip(turns, _unravel(where, small), strict=True):
        columns.append(turn.gather(2, at[:, None].expand(-1, turn.shape[1], -1)))
    return Components(columns, weights)


def _turned_slices(tensors: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Slices (B, S, n_1, n_2) along the short sides, each turned to its principal axes; and the turns, one a side."""
    small = tensors.shape[3:]
    turned, turns = tensors, []
    for k, side in enumerate(small, start=3):
        turns.append(leading_vectors(tensors.movedim(k, 1).flatten(2), side))
        turned = torch.einsum("b...i,bij->b...j", turned.movedim(k, -1), turns[-1]).movedim(-1, k)
    return (turned.flatten(3).movedim(3, 1) if small else turned[:, None]), turns


def moved(start: Components, *, size: float = 0.02) -> Components:
    """A start near this one, moved by seeded numbers: exactly symmetric tensors have saddle points there.

    Args:
        size: norm of the move of each column, which is a unit vector.
    """
    generator = torch.Generator().manual_seed(0)
    columns = []
    for c in start.columns:
        noise = torch.randn(c.shape[1:], generator=generator, dtype=c.dtype).to(c.device)
        moved = c + size * noise / c.shape[1] ** 0.5
        columns.append(unit(moved, moved.norm(dim=1)))
    return Components(columns, start.weights)


def _columns(matrices: Tensor, index: Tensor) -> Tensor:
    """Columns ``index`` (B, R) among all columns of the matrices (B, S, n, m) -> (B, n, R)."""
    flat = matrices.transpose(1, 2).flatten(2)
    return flat.gather(2, index[:, None].expand(-1, flat.shape[1], -1))


def _unravel(index: Tensor, sides: torch.Size) -> list[Tensor]:
    result = []
    for side in reversed(sides):
        result.append(index % side)
        index = torch.div(index, side, rounding_mode="floor")
    return result[::-1]


def _split(shape: Sequence[int], rank: int) -> int | None:
    """Sides of (n_1, ..): up to which one their product, without n_1, reaches the rank and leaves another side."""
    if shape[0] < rank:
        return None
    fits = [k for k in range(2, len(shape)) if math.prod(shape[1:k]) >= rank]
    return fits[0] if fits else None


def of_this_rank(tensors: Tensor, rank: int, *, tol: float) -> Tensor:
    """Whether each unit tensor is of this rank but for ``tol`` of it, and could be recovered, (B,)."""
    split = _split(tensors.shape[1:], rank)
    if split is None:
        return torch.zeros(len(tensors), dtype=torch.bool, device=tensors.device)
    rows = tensors.flatten(2)
    cols = tensors.flatten(split + 1).flatten(2, split).permute(0, 2, 1, 3).flatten(2)
    retained = [truncated_svd(m, rank)[1].flatten(1).square().sum(1) for m in (rows, cols)]
    return (1 - torch.minimum(*retained)) < tol**2


def eigen_start(tensors: Tensor, rank: int) -> Components:
    """Components of a tensor of exactly this rank, from the eigenvectors that its slices have in common.

    Source: Leurgans, Ross, Abel, A decomposition for three-way arrays, SIAM J. Matrix Anal. Appl. 14(4), 1993.
    """
    split = _split(tensors.shape[1:], rank) or 2
    three = tensors.flatten(split + 1).flatten(2, split)  # (B, rows, cols, third)
    rows = leading_vectors(three.flatten(2), rank)
    cols = leading_vectors(three.transpose(1, 2).flatten(2), rank)
    third = leading_vectors(three.movedim(3, 1).flatten(2), 2)
    core = torch.einsum("bijk,bir,bjs,bkt->btrs", three, rows, cols, third)
    # mixed, since slices of a tensor with zeros in it can be singular where their sum is not
    one, two = core[:, 0] + 0.37 * core[:, 1], core[:, 1] - 0.61 * core[:, 0]
    values, vectors = torch.linalg.eig((one @ torch.linalg.pinv(two)).cpu())  # not every GPU build has it
    # pairs that rounding or noise made complex: real and imaginary part span the same plane
    first = rows @ torch.where(values.imag[:, None] < 0, vectors.imag, vectors.real).to(rows.device)
    first = unit(first, first.norm(dim=1))
    rest = (torch.linalg.pinv(first) @ tensors.flatten(2)).unflatten(2, tensors.shape[2:])  # (B, R, n_2, ..)
    columns = [first]
    for k in range(2, rest.ndim):
        columns.append(leading_vectors(rest.movedim(k, 2).flatten(3), 1)[..., 0].mT.contiguous())
    weights = rest.flatten(2).norm(dim=2)
    return Components(columns, weights)
