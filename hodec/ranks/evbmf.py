"""Analytic variational Bayesian matrix factorization (EVBMF): how many singular values of a weight are not noise.

Source: Nakajima, Sugiyama, Babacan, Tomioka, Global analytic solution of fully-observed variational Bayesian matrix
factorization, JMLR 14, 2013: theorem 4 and section 5 (the noise variance from the data).
"""

import math

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from hodec.linalg.svd import naming, singular_values
from hodec.ranks.context import LayerContext

Array = NDArray[np.float64]


def weight_signals(layer: LayerContext) -> list[int]:
    """EVBMF's rank for each of a layer's ranks, 0 for pure noise; of several unfoldings the largest counts."""
    found = [0] * len(layer.full_ranks)
    for position, matrix in layer.format.unfoldings(layer.site.values(), layer.modes):
        with naming(f"layer {layer.name}"):
            found[position] = max(found[position], signals(singular_values(matrix), *matrix.shape))
    return found


def signals(values: Tensor, rows: int, cols: int) -> int:
    """How many singular values are above what noise explains; 0 for pure noise.

    Args:
        values: singular values of a (rows, cols) matrix, largest first; those left out count as 0.
    """
    short, long = sorted((rows, cols))
    squares = np.zeros(short)  # NumPy, whose calls cost a fourth of torch's on so few numbers
    squares[: len(values)] = values.detach().double().cpu().numpy()
    squares = np.square(squares / max(float(squares.max()), np.finfo(np.float64).tiny))
    mean = float(squares.mean())
    if not mean > 0:
        return 0
    # In units of the largest noise variance that the matrix allows, so that no tolerance depends on its scale; below
    # 1e-10 of their mean they are rounding errors, not noise to be modelled.
    squares = np.maximum(squares / mean, 1e-10)
    limit = _threshold(short / long)
    return int((squares > _noise_variance(squares, short / long) * limit).sum())


def _threshold(a: float) -> float:
    """Squared singular values above this many noise variances (times M) are signals."""
    root = 2.5129 * math.sqrt(a)  # to four digits, for every 0 < a <= 1: the equation of theorem 4 solved
    return (1 + root) * (1 + a / root)


def _noise_variance(squares: Array, a: float, *, points: int = 129, finer: int = 17, rounds: int = 4) -> float:
    """The variance at which the free energy is least, by a search on a logarithmic scale that narrows down.

    The free energy has many local minima, so the first search covers the whole interval.

    Args:
        points: of the first search; ``rounds`` narrower ones have ``finer`` points each.
    """
    most_signals = math.ceil(len(squares) / (1 + a)) - 1
    rest = squares[most_signals:]
    low, high = math.log(max(float(rest[0]) / _threshold(a), float(rest.mean()))), math.log(float(squares.mean()))
    for count in (points, *[finer] * rounds):
        grid = np.linspace(low, max(low, high), count)
        best = int(_free_energy(squares, np.exp(grid), a).argmin())
        low, high = float(grid[max(best - 1, 0)]), float(grid[min(best + 1, count - 1)])
    return math.exp(float(grid[best]))


def _free_energy(squares: Array, variances: Array, a: float) -> Array:
    """Free energy, up to a constant, at each noise variance: squares (L,), variances (n,) -> (n,)."""
    energy = squares.sum() / variances + len(squares) * np.log(variances)
    x = squares / variances[:, None]
    above = x > _threshold(a)
    signal = x[above] - (1 + a)
    tau = (signal + np.sqrt(np.maximum(np.square(signal) - 4 * a, 0))) / 2
    gain = np.zeros_like(x)
    gain[above] = np.log1p(tau) + a * np.log1p(tau / a) - tau
    total: Array = energy + gain.sum(1)
    return total
