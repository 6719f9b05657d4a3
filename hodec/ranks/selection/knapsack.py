"""One option a layer, so that a few limits hold and the least is lost: a multiple-choice knapsack.

Lagrange multipliers of the limited costs are searched by bisection; at given multipliers each layer's best option
depends on no other layer. That gives a choice within the limits and a bound on what any choice must lose. Options
that the bound rules out are dropped, and the rest is improved two layers at a time until no pair can do better.

Source: Everett, Generalized Lagrange Multiplier Method, Operations Research 11(3), 1963; Kellerer, Pferschy,
Pisinger, Knapsack Problems, 2004: chapter 11.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
from numpy.typing import NDArray

Numbers = NDArray[np.float64]
Picks = NDArray[np.int64]


@dataclass(frozen=True)
class Solution:
    """What ``solve`` found.

    Attributes:
        picks: number of the chosen option, layer by layer.
        multipliers: loss that one unit of each limited cost is worth there, shape (limits,).
        loss: sum over layers.
        bound: no choice within the limits loses less.
    """

    picks: list[int]
    multipliers: Numbers
    loss: float
    bound: float


def solve(
    losses: Sequence[Numbers], costs: Sequence[Numbers], limits: Sequence[float], *, pairs: bool = True
) -> Solution | None:
    """Choose one option a layer.

    Args:
        losses: of each layer, the loss of its options, shape (options,), >= 0.
        costs: of each layer, the costs of its options, shape (options, limits), >= 0.
        limits: the most that the chosen costs may sum to, 1..3 of them.
        pairs: improve what the multipliers give; without, they are as good and the choice is not.

    Returns:
        The best choice found, or None if none was found that keeps the limits.
    """
    search = _Search(losses, costs, np.asarray(limits, dtype=np.float64))
    search.least_multipliers(np.zeros(len(limits)), 0)
    if search.best is None:
        search.try_cheapest()
    if search.best is None:
        return None
    if pairs:
        search.improve_pairs()
    picks = [int(pick) for pick in search.best[:-1]]
    return Solution(picks, search.multipliers, search.loss, search.bound)


def within_slack(
    losses: Sequence[Numbers],
    costs: Sequence[Numbers],
    limits: Sequence[float],
    floors: Sequence[float],
    *,
    picks: Sequence[int],
) -> list[int] | None:
    """The best change of one or two layers after which the limits hold and one cost reaches its floor.

    Args:
        losses, costs, limits: as for ``solve``.
        floors: at least one of the summed costs is to reach its own.
        picks: the choice to change.

    Returns:
        The changed picks, or None if no change of two layers gets there.
    """
    search = _Search(losses, costs, np.asarray(limits, dtype=np.float64))
    start = np.array([*picks, 0])
    best, found = np.inf, None
    for a, b in combinations(search.rows.tolist(), 2):
        rest = search.used(start) - search.costs[a, start[a]] - search.costs[b, start[b]]
        sums = rest + search.costs[a][:, None] + search.costs[b][None]
        total = search.losses[a][:, None] + search.losses[b][None]
        total = total + search.lost(start) - search.losses[a, start[a]] - search.losses[b, start[b]]
        total[~((sums <= search.limits).all(-1) & (sums >= floors).any(-1))] = np.inf
        at = int(total.argmin())
        if total.flat[at] < best:
            best, found = float(total.flat[at]), start.copy()
            found[a], found[b] = divmod(at, total.shape[1])
    return None if found is None else [int(pick) for pick in found[:-1]]


def not_dominated(losses: Numbers, costs: Numbers) -> Picks:
    """Numbers of the options that no other beats in loss (options,) and all costs (options, limits)."""
    all_of = np.column_stack([losses, costs])
    order = np.lexsort(all_of.T[::-1])
    all_of = all_of[order]
    no_worse = (all_of[:, None] <= all_of[None]).all(-1)  # [i, j]: i is no worse than j
    same = no_worse & no_worse.T
    beaten = (no_worse & ~same).any(0) | np.triu(same, 1).any(0)
    return np.sort(order[~beaten])


class _Search:
    """State of one search: the options padded to a table, and the best that was seen.

    A last layer with one free option is added, so that a single layer's move is a pair's move too.
    """

    def __init__(self, losses: Sequence[Numbers], costs: Sequence[Numbers], limits: Numbers) -> None:
        layers, options = len(losses) + 1, max(len(loss) for loss in losses)
        self.losses = np.full((layers, options), np.inf)
        self.costs = np.zeros((layers, options, len(limits)))
        self.losses[-1, 0] = 0.0
        for row, (loss, cost) in enumerate(zip(losses, costs, strict=True)):
            self.losses[row, : len(loss)], self.costs[row, : len(loss)] = loss, cost
        self.limits = limits
        self.rows = np.arange(layers)
        self.best: Picks | None = None
        self.loss, self.bound = np.inf, -np.inf
        self.multipliers = np.zeros(len(limits))

    def used(self, picks: Picks) -> Numbers:
        """Sums of the costs, shape (limits,)."""
        total: Numbers = self.costs[self.rows, picks].sum(0)
        return total

    def lost(self, picks: Picks) -> float:
        """Sum of the losses."""
        return float(self.losses[self.rows, picks].sum())

    def relaxed(self, multipliers: Numbers) -> Numbers:
        """Costs of what each layer prefers at these multipliers; remembers a better choice and a better bound."""
        values = self.losses + self.costs @ multipliers
        picks = values.argmin(1)
        self.offer(picks)
        bound = float(values[self.rows, picks].sum() - multipliers @ self.limits)
        if bound > self.bound:
            self.bound, self.multipliers = bound, multipliers.copy()
        return self.used(picks)

    def offer(self, picks: Picks) -> None:
        """Keep this choice if it is within the limits and the best so far."""
        loss = self.lost(picks)
        if loss < self.loss and bool((self.used(picks) <= self.limits).all()):
            self.best, self.loss = picks, loss

    def least_multipliers(self, multipliers: Numbers, level: int) -> Numbers:
        """The least multipliers from ``level`` on at which their limits hold, given those before it.

        A multiplier grows 16-fold, at most 40 times, until its limit holds; then the bracket is halved, less often
        where searches are nested in one another.
        """

        def attempt(multiplier: float) -> tuple[bool, Numbers]:
            tried = multipliers.copy()
            tried[level] = multiplier
            if level + 1 < len(multipliers):
                tried = self.least_multipliers(tried, level + 1)
            return bool(self.relaxed(tried)[level] <= self.limits[level]), tried

        holds, found = attempt(0.0)
        if holds:
            return found
        finite = self.losses[np.isfinite(self.losses)]
        low, high = 0.0, 1e-6 * max(float(finite.max()), 1e-30) / max(float(self.limits[level]), 1e-30)
        for _ in range(40):
            holds, found = attempt(high)
            if holds:
                break
            low, high = high, high * 16.0
        for _ in range((40, 20, 12)[len(multipliers) - 1] if holds else 0):
            middle = (low * high) ** 0.5 if low else high / 2
            holds, tried = attempt(middle)
            low, high, found = (low, middle, tried) if holds else (middle, high, found)
        return found

    def try_cheapest(self) -> None:
        """Offer what is cheapest by each cost, and by their shares of the limits together."""
        shares = self.costs / np.maximum(self.limits, 1e-30)
        for measure in (*np.moveaxis(shares, -1, 0), shares.sum(-1), shares.max(-1)):
            self.offer(np.where(np.isfinite(self.losses), measure, np.inf).argmin(1))

    def improve_pairs(self, sweeps: int = 4, enough: float = 0.02) -> None:
        """Choose the options of two layers anew, given all others, until that helps nowhere.

        Args:
            sweeps: the most sweeps over all pairs.
            enough: they end when one closes less than this share of the gap to the bound.
        """
        for _ in range(sweeps if self.best is not None else 0):
            before, core = self.loss, self._core()
            for a, b in combinations(self.rows.tolist(), 2):
                if len(core[a]) > 1 or len(core[b]) > 1:
                    self._improve(a, b, core)
            if not self.loss < before - enough * (before - self.bound):
                return

    def _core(self) -> list[Picks]:
        """Options of each layer that a better choice can hold: taking any other loses more than the gap."""
        values = self.losses + self.costs @ self.multipliers
        extra = values - values.min(1, keepdims=True)
        keep = extra <= (self.loss - self.bound) * (1 + 1e-9)
        if self.best is not None:
            keep[self.rows, self.best] = True
        return [np.flatnonzero(row) for row in keep]

    def _improve(self, a: int, b: int, core: list[Picks]) -> None:
        if self.best is None:
            return
        i, j = core[a], core[b]
        now = self.costs[a, self.best[a]] + self.costs[b, self.best[b]]
        room = self.limits - self.used(self.best) + now
        total = self.losses[a, i][:, None] + self.losses[b, j][None]
        for k, most in enumerate(room):
            total[self.costs[a, i, k][:, None] + self.costs[b, j, k][None] > most] = np.inf
        at = int(total.argmin())
        if total.flat[at] < self.losses[a, self.best[a]] + self.losses[b, self.best[b]]:
            picks = self.best.copy()
            picks[a], picks[b] = i[at // len(j)], j[at % len(j)]
            self.offer(picks)
