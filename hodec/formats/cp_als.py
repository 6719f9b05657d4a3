"""CP by alternating least squares: sums of ``rank`` outer products of vectors, batched, in float64.

The answer is the same every time, and no element of a batch depends on the others.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from hodec.formats.cp_components import Components, khatri_rao, unit
from hodec.formats.cp_starts import eigen_start, moved, of_this_rank, orthogonal_start


@dataclass(frozen=True)
class Als:
    """Alternating least squares and its settings; benchmarks/cp.py measures what the defaults give.

    The goal is |x - sum|^2 + damping |norms of the components|^2, for unit tensors x. Components that are kept small at
    first do not run into the optima where large ones cancel each other, which are hardly nearer if at all, and where a
    small step in the factors is a large one in the sum.

    Attributes:
        dampings: (damping, most rounds) one after the other; a start that is near leaves out the first three.
        sweeps: sweeps in one round.
        tol: a round that lowers the goal by less than this ratio of it is the last.
        max_rounds: most rounds without damping.
        exact: error of a fit that is exact but for rounding, relative to the tensor.
        outside: what a tensor may have outside of its leading ``rank`` directions to be tried as one of exactly that
            rank, relative to it.
        max_congruence: components of a larger cosine are taken for copies of one: copies have smaller norms than the
            component, at the price of others that are then missing.
        small_penalty: where the goal's second term is at most this ratio of the first, less damping would hardly bring
            the sum nearer.
        max_norm: degeneracy bound: norm of the components' norms, over that of the tensor, beyond which a weaker
            damping is not followed.
    """

    dampings: Sequence[tuple[float, int]] = (
        (3e-2, 3), (1e-2, 3), (3e-3, 3), (1e-3, 15), (1e-4, 15), (1e-5, 15), (0.0, 15),
    )  # fmt: skip
    sweeps: int = 10
    tol: float = 2e-4
    max_rounds: int = 15
    exact: float = 1e-11
    outside: float = 1e-4
    max_congruence: float = 0.9
    small_penalty: float = 0.03
    max_norm: float = 50.0

    def factorize(self, tensors: Tensor, rank: int, start: Sequence[Tensor] | None = None) -> list[Tensor]:
        """CP of a batch of tensors.

        It starts from the largest singular triplets of all slices of the tensor along its short sides, which are
        orthogonal to each other and exact once there are as many as in every slice, and improves them by extrapolated
        ALS. The components' norms are held down, less and less, until that no longer matters to the error: of sums
        about as near it finds one of small components, which trains well, and there is one where no best approximation
        exists. A tensor of exactly this rank is recovered where ``rank`` fits both one of its sides and a product of
        others.

        Args:
            tensors: (B, n_1, .., n_m), finite.
            rank: number of components, at least 1.
            start: factors (B, n_k, rank), one per side, to improve instead; the result is at least as near as they are,
                unless their norms are beyond all bounds.

        Returns:
            float64 factors (B, n_k, rank), one per side.

        Source: Kolda and Bader, Tensor Decompositions and Applications, SIAM Review 51(3), 2009: section 3.4;
        extrapolation: Ang, Cohen, Hien, Gillis, Extrapolated alternating algorithms for approximate CP, ICASSP 2020;
        small components: after Phan et al., Stable Low-rank Tensor Decomposition for Compression of CNNs, ECCV 2020.
        """
        work = tensors.detach().double()
        norms = work.flatten(1).norm(dim=1)
        work = work / torch.where(norms > 0, norms, 1).reshape(-1, *(1 for _ in work.shape[1:]))
        # large sides first; those of size 1 are of no use
        order = sorted(range(1, work.ndim), key=lambda k: -work.shape[k])
        long = [k for k in order if work.shape[k] > 1] or order[:1]
        long += [k for k in order if k not in long][: max(0, 2 - len(long))]
        short = [k for k in order if k not in long]
        near = None if start is None else _components(start, norms, long=long, short=short)
        parts = self._fit(work.permute(0, *long, *short).flatten(len(long)), rank, near=near)
        fitted = dict(zip(long, replace(parts, weights=parts.weights * norms[:, None]).spread(), strict=True))
        one = parts.weights.new_ones(len(work), 1, rank)
        return [fitted.get(k, one) for k in range(1, work.ndim)]

    def _fit(self, tensors: Tensor, rank: int, *, near: Components | None) -> Components:
        """Components of unit tensors (B, n_1 >= n_2 >= ..), from ``near`` if given."""
        if tensors.ndim == 3:  # matrices: the start is the truncated SVD
            return orthogonal_start(tensors, rank)
        return _best_length(tensors, self._searched(tensors, rank) if near is None else self._improved(tensors, near))

    def _searched(self, tensors: Tensor, rank: int) -> Components:
        """The better of two starts, each improved."""
        start = orthogonal_start(tensors, rank)
        found, done = self._recover(tensors, start, rank)
        index = (~done).nonzero()[:, 0]
        if len(index):
            other, error = self._descended(tensors[index], moved(start.pick(index)))
            mine = found.pick(index)
            found = found.put(index, other.where(error < mine.residual(tensors[index]), mine))
        return found

    def _descended(self, tensors: Tensor, start: Components) -> tuple[Components, Tensor]:
        """From strong to weak damping, or by none where that led to copies; with the errors, (B,)."""
        found, error = self._eased(tensors, start, self.dampings)
        index = (found.congruence() > self.max_congruence).nonzero()[:, 0]
        if len(index):
            other, left = self._alternate(tensors[index], start.pick(index))
            better = (left < error[index]) & (other.weights_norm() <= self.max_norm)
            found = found.put(index, other.where(better, found.pick(index)))
            error = error.index_copy(0, index, torch.where(better, left, error[index]))
        return found, error

    def _improved(self, tensors: Tensor, near: Components) -> Components:
        """Components nearer than ``near``, smaller where that costs nothing; found anew where they are too large."""
        found, error = self._eased(tensors, near, self.dampings[3:])
        index = (error > near.residual(tensors)).nonzero()[:, 0]
        if len(index):
            found = found.put(index, self._alternate(tensors[index], near.pick(index))[0])
        index = (found.weights_norm() > self.max_norm).nonzero()[:, 0]
        if len(index):
            found = found.put(index, self._searched(tensors[index], near.weights.shape[1]))
        return found

    def _recover(self, tensors: Tensor, start: Components, rank: int) -> tuple[Components, Tensor]:
        """``start``, or what is better where a tensor may be exactly of this rank; and whether it was, (B,)."""
        index = of_this_rank(tensors, rank, tol=self.outside).nonzero()[:, 0]
        done = start.residual(tensors) <= self.exact
        if len(index):
            part = tensors[index]
            other, error = self._alternate(part, eigen_start(part, rank))
            mine = start.pick(index)
            better = (error < mine.residual(part)) & (other.weights_norm() < self.max_norm)
            start = start.put(index, other.where(better, mine))
            done = done.index_copy(0, index, done[index] | (better & (error < self.outside)))
        return start, done

    def _eased(
        self, tensors: Tensor, start: Components, dampings: Sequence[tuple[float, int]]
    ) -> tuple[Components, Tensor]:
        """Rounds under one damping after the other, while the penalty is not small; with the errors, (B,)."""
        result, error = start, start.residual(tensors)
        active = (error > self.exact).nonzero()[:, 0]
        for damping, rounds in dampings:
            if not len(active):
                break
            part, left = self._alternate(tensors[active], result.pick(active), damping=damping, rounds=rounds)
            size = part.weights_norm()
            kept = size <= self.max_norm
            result = result.put(active[kept], part.pick(kept.nonzero()[:, 0]))
            error = error.index_copy(0, active[kept], left[kept])
            active = active[kept & (left > self.exact) & (damping * size.square() > self.small_penalty * left.square())]
        return result, error

    def _alternate(
        self, tensors: Tensor, start: Components, *, damping: float = 0.0, rounds: int | None = None
    ) -> tuple[Components, Tensor]:
        """Rounds of sweeps, at most so many, until they no longer help; with each element's error, (B,)."""
        result, error = start, start.residual(tensors)
        active = (error > self.exact).nonzero()[:, 0]
        part, x = result.pick(active), tensors[active]
        before = error[active].square() + damping * part.weights_norm().square()
        for _ in range(self.max_rounds if rounds is None else rounds):
            if not len(active):
                break
            part = self._round(x, part, damping=damping)
            left = part.residual(x)
            goal = left.square() + damping * part.weights_norm().square()
            result, error = result.put(active, part), error.index_copy(0, active, left)
            on = (before - goal > self.tol * goal) & (left > self.exact)
            on &= part.weights_norm() <= 2 * self.max_norm  # else it is not followed
            active, part, x, before = active[on], part.pick(on), x[on], goal[on]
        return result, error

    def _round(self, x: Tensor, start: Components, *, damping: float) -> Components:
        """Sweeps, each from a point beyond the last two; one that is worse than the last is taken back."""
        last, last_goal = _sweep(x, start, damping=damping)
        before = start
        step = torch.full_like(last_goal, 0.5)
        for _ in range(self.sweeps - 1):
            trial, goal = _sweep(x, _beyond(before, last, step), damping=damping)
            good = goal <= last_goal
            step = torch.where(good, step * 1.1, step / 2.0)
            # after a failure the next sweep starts a shorter step beyond the same two
            before, last = last.where(good, before), trial.where(good, last)
            last_goal = torch.where(good, goal, last_goal)
        return _sweep(x, last, damping=damping)[0]


def _components(factors: Sequence[Tensor], norms: Tensor, *, long: list[int], short: list[int]) -> Components:
    """Factors of tensors of these norms as components of the unit tensors; sides ``short`` are of size 1."""
    given = {k: f.double() for k, f in enumerate(factors, start=1)}
    weights = torch.stack([given[k][:, 0] for k in short] or [torch.ones_like(given[1][:, 0])]).prod(0)
    weights = weights / torch.where(norms > 0, norms, 1)[:, None]
    columns = []
    for k in long:
        lengths = given[k].norm(dim=1)
        columns.append(unit(given[k], lengths))
        weights = weights * lengths
    columns[0] = columns[0] * torch.where(weights < 0, -1.0, 1.0)[:, None]
    return Components(columns, weights.abs())


def _best_length(tensors: Tensor, found: Components) -> Components:
    """Scale each sum so that it is orthogonal to what it leaves."""
    first, *rest = found.columns
    whole = ((first * found.weights[:, None]) @ khatri_rao(rest).mT).flatten(1)
    square = whole.square().sum(1)
    scale = torch.where(square > 0, (whole * tensors.flatten(1)).sum(1) / square, 1)
    return replace(found, weights=found.weights * scale.clamp_min(0)[:, None])


def _beyond(before: Components, last: Components, step: Tensor) -> Components:
    """The point that lies ``step`` (B,) times their distance beyond two sweeps."""
    far = [a + step[:, None, None] * (a - b) for a, b in zip(last.spread(), before.spread(), strict=True)]
    lengths = [f.norm(dim=1) for f in far]
    columns = [unit(f, n, c) for f, n, c in zip(far, lengths, last.columns, strict=True)]
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
        columns[k] = unit(factor, weights, columns[k])
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


def _solve(gram: Tensor, target: Tensor, *, old: Tensor, damping: float, proximal: float = 1e-13) -> Tensor:
    """Minimizer of |x - sum|^2 + damping |factor|^2 + proximal |factor - old|^2.

    The last term lifts singular problems, and moves no solution.
    """
    eye = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    lower, failed = torch.linalg.cholesky_ex(gram + (damping + proximal) * eye)
    near = torch.full_like(gram[:, :1, :1], proximal)
    if bool(failed.any()):
        near = torch.where((failed > 0)[:, None, None], 1e-6, near)
        lower = torch.linalg.cholesky(gram + (damping + near) * eye)
    return torch.cholesky_solve((target + near * old).mT, lower).mT


def factorize(tensors: Tensor, rank: int, start: Sequence[Tensor] | None = None) -> list[Tensor]:
    """``Als().factorize``."""
    return Als().factorize(tensors, rank, start)
