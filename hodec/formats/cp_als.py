"""CP by alternating least squares: sums of ``rank`` outer products of vectors, batched, in float64, without luck.

Random numbers come from a seed of its own, the same every time; no element of a batch depends on the others.
"""

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from hodec.linalg import leading_vectors, truncate

log = logging.getLogger(__name__)

# Sweeps are run in rounds; a round that lowers the squared error by less than this share of it is the last.
SWEEPS_PER_ROUND, ROUNDS, ENOUGH = 10, 15, 2e-4
# Error of a fit that is exact but for rounding, relative to the tensor.
EXACT = 1e-11
# Weight of the previous factor in each least squares problem: lifts singular ones, and moves no solution.
PROXIMAL = 1e-13
# Norms of the components over that of the tensor: above LIMIT they cancel each other, and are computed again with
# DAMPING, which keeps them below sqrt(1 + 1 / DAMPING) = 32.
LIMIT, DAMPING = 50.0, 1e-3
# What a tensor may have outside of its leading ``rank`` directions to be tried as one of exactly that rank.
OUTSIDE = 1e-4
# The start is moved by this share of a unit vector: exactly symmetric tensors have saddle points there.
MOVED = 0.02
# First step, growth after a step that helped, and shrinkage after one that did not, of the extrapolation.
STEP, LONGER, SHORTER = 0.5, 1.1, 2.0


@dataclass(frozen=True)
class Components:
    """A batch of sums of outer products: unit ``columns[k]`` (B, n_k, R) times ``weights`` (B, R), at least 0."""

    columns: list[Tensor]
    weights: Tensor

    def pick(self, index: Tensor) -> "Components":
        """Some elements of the batch."""
        return Components([c[index] for c in self.columns], self.weights[index])

    def put(self, index: Tensor, other: "Components") -> "Components":
        """A copy in which ``other`` takes the place of some elements."""
        columns = [c.index_copy(0, index, o) for c, o in zip(self.columns, other.columns, strict=True)]
        return Components(columns, self.weights.index_copy(0, index, other.weights))

    def where(self, mask: Tensor, other: "Components") -> "Components":
        """These where ``mask`` (B,) holds, the other ones elsewhere."""
        pairs = zip(self.columns, other.columns, strict=True)
        columns = [torch.where(mask[:, None, None], mine, theirs) for mine, theirs in pairs]
        return Components(columns, torch.where(mask[:, None], self.weights, other.weights))

    def spread(self) -> list[Tensor]:
        """Factors (B, n_k, R) with each component's weight in equal shares; a weight of zero is in the first."""
        share = self.weights ** (1 / len(self.columns))
        others = torch.where(share > 0, share, torch.ones_like(share))
        first, *rest = self.columns
        return [first * share[:, None], *(c * others[:, None] for c in rest)]

    def growth(self) -> Tensor:
        """Norm of the weights, (B,): at most 1 for orthogonal components of a unit tensor."""
        return self.weights.norm(dim=1)

    def residual(self, tensors: Tensor) -> Tensor:
        """Norm of what the sum leaves of the tensors (B, n_1, ..), (B,)."""
        first, *rest = self.columns
        return (tensors.flatten(2) - (first * self.weights[:, None]) @ khatri_rao(rest).mT).flatten(1).norm(dim=1)


def factorize(tensors: Tensor, rank: int, start: Sequence[Tensor] | None = None) -> list[Tensor]:
    """CP of a batch of tensors.

    Starts from the largest singular triplets of all slices of the tensor along its short sides, which are orthogonal
    to each other and exact once there are as many as in every slice, and improves them by extrapolated ALS. Components
    that grow and cancel (where no best approximation exists) are computed again with their norms bounded. A tensor of
    exactly this rank is recovered where ``rank`` fits both one of its sides and a product of others.

    Args:
        tensors: (B, n_1, .., n_m), finite.
        rank: number of components, at least 1.
        start: factors (B, n_k, rank), one per side, to improve instead; the result is at least as near as they are.

    Returns:
        float64 factors (B, n_k, rank), one per side.

    Source: Kolda and Bader, Tensor Decompositions and Applications, SIAM Review 51(3), 2009: section 3.4;
    extrapolation: Ang, Cohen, Hien, Gillis, Extrapolated alternating algorithms for approximate CP, ICASSP 2020;
    bounded norms: Phan et al., Stable Low-rank Tensor Decomposition for Compression of CNNs, ECCV 2020.
    """
    work = tensors.detach().double()
    norms = work.flatten(1).norm(dim=1)
    work = work / torch.where(norms > 0, norms, 1).reshape(-1, *(1 for _ in work.shape[1:]))
    # large sides first; those of size 1 are of no use
    order = sorted(range(1, work.ndim), key=lambda k: -work.shape[k])
    long = [k for k in order if work.shape[k] > 1] or order[:1]
    long += [k for k in order if k not in long][: max(0, 2 - len(long))]
    short = [k for k in order if k not in long]
    label = "x".join(map(str, work.shape[1:]))
    near = None if start is None else _components(start, norms, long=long, short=short)
    parts = _fit(work.permute(0, *long, *short).flatten(len(long)), rank, near=near, label=label)
    fitted = dict(zip(long, replace(parts, weights=parts.weights * norms[:, None]).spread(), strict=True))
    one = parts.weights.new_ones(len(work), 1, rank)
    return [fitted.get(k, one) for k in range(1, work.ndim)]


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
    return torch.linalg.svdvals(slices).flatten().sort(descending=True).values


def recoverable(sides: Sequence[int], rank: int) -> bool:
    """Whether a tensor of these sides that is exactly of this rank is recovered, coincidences aside."""
    longest_first = sorted((n for n in sides if n > 1), reverse=True)
    return len(longest_first) <= 2 or _split(longest_first, rank) is not None


def khatri_rao(factors: list[Tensor]) -> Tensor:
    """(B, n_k, R) each -> (B, n_1 n_2 .., R), the last index moving fastest."""
    product = factors[0]
    for factor in factors[1:]:
        product = (product[:, :, None] * factor[:, None]).flatten(1, 2)
    return product


def _components(factors: Sequence[Tensor], norms: Tensor, *, long: list[int], short: list[int]) -> Components:
    """Factors of tensors of these norms as components of the unit tensors; sides ``short`` are of size 1."""
    given = {k: f.double() for k, f in enumerate(factors, start=1)}
    weights = torch.stack([given[k][:, 0] for k in short] or [torch.ones_like(given[1][:, 0])]).prod(0)
    weights = weights / torch.where(norms > 0, norms, 1)[:, None]
    columns = []
    for k in long:
        lengths = given[k].norm(dim=1)
        columns.append(_unit(given[k], lengths))
        weights = weights * lengths
    columns[0] = columns[0] * torch.where(weights < 0, -1.0, 1.0)[:, None]
    return Components(columns, weights.abs())


def _fit(tensors: Tensor, rank: int, *, near: Components | None, label: str) -> Components:
    """Components of unit tensors (B, n_1 >= n_2 >= ..), from ``near`` if given; ``label`` names them in warnings."""
    if tensors.ndim == 3:  # matrices: the start is the truncated SVD
        return _orthogonal_start(tensors, rank)
    found = _searched(tensors, rank) if near is None else _alternate(tensors, near)[0]
    index = (found.growth() > LIMIT).nonzero()[:, 0]
    if len(index):
        log.warning(
            "CP of %s at rank %d: components that cancel each other grow to %.0f times the norm of the weight "
            "(in %d of %d weights); computing them again with bounded norms",
            label, rank, float(found.growth().max()), len(index), len(tensors),
        )  # fmt: skip
        again = _moved(_orthogonal_start(tensors[index], rank))
        found = found.put(index, _alternate(tensors[index], again, damping=DAMPING)[0])
    return _best_length(tensors, found)


def _searched(tensors: Tensor, rank: int) -> Components:
    """The better of two starts, each improved."""
    start = _orthogonal_start(tensors, rank)
    found, done = _recover(tensors, start, rank)
    index = (~done).nonzero()[:, 0]
    if len(index):
        other, error = _alternate(tensors[index], _moved(start.pick(index)))
        mine = found.pick(index)
        found = found.put(index, other.where(error < mine.residual(tensors[index]), mine))
    return found


def _recover(tensors: Tensor, start: Components, rank: int) -> tuple[Components, Tensor]:
    """``start``, or what is better where a tensor may be exactly of this rank; and whether it was, (B,)."""
    index = _of_this_rank(tensors, rank).nonzero()[:, 0]
    done = start.residual(tensors) <= EXACT
    if len(index):
        part = tensors[index]
        other, error = _alternate(part, _eigen_start(part, rank))
        mine = start.pick(index)
        better = (error < mine.residual(part)) & (other.growth() < LIMIT)
        start = start.put(index, other.where(better, mine))
        done = done.index_copy(0, index, done[index] | (better & (error < OUTSIDE)))
    return start, done


def _best_length(tensors: Tensor, found: Components) -> Components:
    """Scale each sum so that it is orthogonal to what it leaves."""
    first, *rest = found.columns
    whole = ((first * found.weights[:, None]) @ khatri_rao(rest).mT).flatten(1)
    square = whole.square().sum(1)
    scale = torch.where(square > 0, (whole * tensors.flatten(1)).sum(1) / square, 1)
    return replace(found, weights=found.weights * scale.clamp_min(0)[:, None])


# -- where to start ------------------------------------------------------------------------------------------------


def _orthogonal_start(tensors: Tensor, rank: int) -> Components:
    """The ``rank`` largest singular triplets of all slices (n_1, n_2), after turning the other sides to their axes.

    All are orthogonal to each other: the squared error is 1 - |weights|^2.
    """
    small = tensors.shape[3:]
    slices, turns = _turned_slices(tensors)
    values, right = torch.linalg.eigh(slices.mT @ slices)
    index = values.flatten(1).topk(rank, dim=1).indices  # (B, R)
    left = _columns(slices @ right, index)
    weights = left.norm(dim=1)
    columns = [_unit(left, weights), _columns(right, index)]
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


def _moved(start: Components) -> Components:
    """A start near this one, by numbers that are the same every time."""
    generator = torch.Generator().manual_seed(0)
    columns = []
    for c in start.columns:
        noise = torch.randn(c.shape[1:], generator=generator, dtype=c.dtype).to(c.device)
        moved = c + MOVED * noise / c.shape[1] ** 0.5
        columns.append(_unit(moved, moved.norm(dim=1)))
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


def _of_this_rank(tensors: Tensor, rank: int) -> Tensor:
    """Whether each tensor could be exactly of this rank and recovered, (B,)."""
    split = _split(tensors.shape[1:], rank)
    if split is None:
        return torch.zeros(len(tensors), dtype=torch.bool, device=tensors.device)
    rows = tensors.flatten(2)
    cols = tensors.flatten(split + 1).flatten(2, split).permute(0, 2, 1, 3).flatten(2)
    kept = [truncate(m, rank)[1].flatten(1).square().sum(1) for m in (rows, cols)]
    return (1 - torch.minimum(*kept)) < OUTSIDE**2


def _eigen_start(tensors: Tensor, rank: int) -> Components:
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
    first = _unit(first, first.norm(dim=1))
    rest = (torch.linalg.pinv(first) @ tensors.flatten(2)).unflatten(2, tensors.shape[2:])  # (B, R, n_2, ..)
    columns = [first]
    for k in range(2, rest.ndim):
        columns.append(leading_vectors(rest.movedim(k, 2).flatten(3), 1)[..., 0].mT.contiguous())
    weights = rest.flatten(2).norm(dim=2)
    return Components(columns, weights)


def _unit(columns: Tensor, lengths: Tensor, other: Tensor | None = None) -> Tensor:
    """Columns over their lengths; those of length 0 become ``other``'s, by default equal entries."""
    if other is None:
        other = torch.full_like(columns, columns.shape[1] ** -0.5)
    empty = (lengths <= 1e-150)[:, None]
    return torch.where(empty, other, columns / torch.where(empty, 1, lengths[:, None]))


# -- improving a start ---------------------------------------------------------------------------------------------


def _alternate(tensors: Tensor, start: Components, *, damping: float = 0.0) -> tuple[Components, Tensor]:
    """Rounds of sweeps until they no longer help; with each element's error, (B,)."""
    result, error = start, start.residual(tensors)
    active = (error > EXACT).nonzero()[:, 0]
    part, x = result.pick(active), tensors[active]
    before = error[active].square() + damping * part.growth().square()
    for _ in range(ROUNDS):
        if not len(active):
            break
        part = _round(x, part, damping=damping)
        left = part.residual(x)
        goal = left.square() + damping * part.growth().square()
        result, error = result.put(active, part), error.index_copy(0, active, left)
        on = (before - goal > ENOUGH * goal) & (left > EXACT)
        on &= part.growth() <= 2 * LIMIT  # else the damped run decides
        active, part, x, before = active[on], part.pick(on), x[on], goal[on]
    return result, error


def _round(x: Tensor, start: Components, *, damping: float) -> Components:
    """Sweeps, each from a point beyond the last two; one that is worse than the last is taken back."""
    last, last_goal = _sweep(x, start, damping=damping)
    before = start
    step = torch.full_like(last_goal, STEP)
    for _ in range(SWEEPS_PER_ROUND - 1):
        trial, goal = _sweep(x, _beyond(before, last, step), damping=damping)
        good = goal <= last_goal
        step = torch.where(good, step * LONGER, step / SHORTER)
        # after a failure the next sweep starts a shorter step beyond the same two
        before, last = last.where(good, before), trial.where(good, last)
        last_goal = torch.where(good, goal, last_goal)
    return _sweep(x, last, damping=damping)[0]


def _beyond(before: Components, last: Components, step: Tensor) -> Components:
    """The point that lies ``step`` (B,) times their distance beyond two sweeps."""
    far = [a + step[:, None, None] * (a - b) for a, b in zip(last.spread(), before.spread(), strict=True)]
    lengths = [f.norm(dim=1) for f in far]
    columns = [_unit(f, n, c) for f, n, c in zip(far, lengths, last.columns, strict=True)]
    return Components(columns, torch.stack(lengths).prod(0))


def _sweep(x: Tensor, start: Components, *, damping: float) -> tuple[Components, Tensor]:
    """Every factor once by least squares, the others held; with the goal |x - sum|^2 + damping |weights|^2, (B,)."""
    columns, weights = list(start.columns), start.weights
    grams = [c.mT @ c for c in columns]
    half = rest = target = gram = factor = x.new_empty(0)
    for k in range(len(columns)):
        if k == 0:
            target = x.flatten(2) @ khatri_rao(columns[1:])
        elif k == 1:
            half = (x.flatten(2).mT @ columns[0]).unflatten(1, (x.shape[2], -1))  # (B, n_2, S, R)
            target = (half * khatri_rao(columns[2:])[:, None]).sum(2)
        else:
            if k == 2:
                rest = (half * columns[1][:, :, None]).sum(1).unflatten(1, x.shape[3:])
            target = _along(rest, columns[2:], k - 2)
        gram = torch.stack([g for j, g in enumerate(grams) if j != k]).prod(0)
        factor = _solve(gram, target, old=columns[k] * weights[:, None], damping=damping)
        weights = factor.norm(dim=1)
        columns[k] = _unit(factor, weights, columns[k])
        grams[k] = columns[k].mT @ columns[k]
    square = torch.einsum("br,brs,bs->b", weights, gram * grams[-1], weights)
    goal = 1 - 2 * (factor * target).flatten(1).sum(1) + square + damping * weights.square().sum(1)
    return Components(columns, weights), goal


def _along(rest: Tensor, columns: list[Tensor], keep: int) -> Tensor:
    """(B, s_1, .., s_m, R) contracted with all columns (B, s_k, R) but one -> (B, s_keep, R)."""
    for k in reversed(range(len(columns))):
        if k != keep:
            shape = [1] * rest.ndim
            shape[0], shape[k + 1], shape[-1] = columns[k].shape
            rest = (rest * columns[k].reshape(shape)).sum(k + 1, keepdim=True)
    return rest.flatten(1, -2)


def _solve(gram: Tensor, target: Tensor, *, old: Tensor, damping: float) -> Tensor:
    """Minimizer of |x - sum|^2 + damping |factor|^2 + proximal |factor - old|^2."""
    eye = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    lower, failed = torch.linalg.cholesky_ex(gram + (damping + PROXIMAL) * eye)
    near = torch.full_like(gram[:, :1, :1], PROXIMAL)
    if bool(failed.any()):
        near = torch.where((failed > 0)[:, None, None], 1e-6, near)
        lower = torch.linalg.cholesky(gram + (damping + near) * eye)
    return torch.cholesky_solve((target + near * old).mT, lower).mT
