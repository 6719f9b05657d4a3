"""Analytic variational Bayesian matrix factorization (EVBMF): how many singular values of a weight are not noise.

Source: Nakajima, Sugiyama, Babacan, Tomioka, Global analytic solution of fully-observed variational Bayesian matrix
factorization, JMLR 14, 2013: theorem 4 and section 5 (the noise variance from the data). Calibration ratio: NetsPresso
documentation, recommendation ratio.
"""

import logging
import math
from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
from torch import Tensor

from hodec.errors import ConfigError, PlanError
from hodec.linalg.svd import check_finite, naming, singular_values
from hodec.ranks.base import Candidate, Choice
from hodec.ranks.rounding import Rounding

Array = npt.NDArray[np.float64]

log = logging.getLogger(__name__)

# The root of the equation that defines the threshold is this times sqrt(a) to four digits, for every 0 < a <= 1.
THRESHOLD = 2.5129
# Squared singular values below this share of their mean are rounding errors, not noise to be modelled.
FLOOR = 1e-10
# Points of the first search over the noise variance, then of each narrower one.
SEARCH = (129, 17, 17, 17, 17)


class Vbmf:
    """Per unfolding, the number of singular values that the weight's own noise cannot explain.

    As published for ``svd``, ``weight_svd`` (one matrix) and ``tucker`` (the unfoldings along its two channel axes);
    every unfolding of ``tt``, ``spatial_svd`` and ``cp`` is our own extension. Where several unfoldings decide one
    rank, the largest counts. The answer does not depend on the scale of the weight.

    Args:
        calibration: -1..1. Above 0 gives back that share of the ranks found to be noise, below 0 cuts as many more.
        round_to, min_rank, max_rank: see ``Rounding``.

    Raises:
        ConfigError: a setting out of range.
    """

    name = "vbmf"
    reads_weights = True

    def __init__(
        self, calibration: float = 0.0, *, round_to: int = 1, min_rank: int = 1, max_rank: int | None = None
    ) -> None:
        self.calibration = _check_calibration(calibration)
        self.rounding = Rounding(round_to, min_rank, max_rank)

    def choose(self, candidates: Mapping[str, Candidate]) -> dict[str, Choice]:
        """One choice a layer; none stays dense here, and a layer of pure noise has rank 1 and a note."""
        return {name: self._one(name, candidate) for name, candidate in candidates.items()}

    def _one(self, name: str, candidate: Candidate) -> Choice:
        most = candidate.most
        found = [0] * len(most)
        for position, matrix in candidate.format.unfoldings(candidate.site.weight, candidate.modes):
            with naming(f"layer {name}"):
                found[position] = max(found[position], signals(singular_values(matrix), *matrix.shape))
        notes = _noise_note(name, found)
        kept = [min(max(1, rank), full) for rank, full in zip(found, most, strict=True)]
        ranks = [calibrate(rank, full, self.calibration) for rank, full in zip(kept, most, strict=True)]
        if ranks != kept:
            notes = (*notes, f"VBMF's ranks {kept} became {ranks} by calibration {self.calibration:g}")
        final, more = self.rounding.apply(candidate, ranks)
        return Choice(final, (*notes, *more))


def vbmf_rank(matrix: Tensor) -> int:
    """Rank that EVBMF gives a matrix (rows, cols), 1..min(rows, cols); pure noise has 1.

    Never more than about L / (1 + L / M), with L <= M the two sides: EVBMF takes the smallest singular values for
    noise, so a weight of full rank needs a calibration above 0 or another rule.

    Raises:
        PlanError: not a matrix.
        TrainingError: NaN or Inf in it.
    """
    if matrix.ndim != 2 or not matrix.numel():
        raise PlanError(f"VBMF needs a matrix (rows, cols), got shape {tuple(matrix.shape)}; unfold the weight first")
    check_finite(matrix, "a matrix for VBMF")
    return max(1, signals(singular_values(matrix), *matrix.shape))


def calibrate(rank: int, full: int, c: float) -> int:
    """VBMF's rank with the share ``c`` of what it removed given back (c > 0), or as much more removed (c < 0).

    Args:
        rank: VBMF's, 1..full.
        full: rank of the unfactorized matrix.
        c: -1..1.

    Returns:
        rank + trunc(c (full - rank)), brought into 1..full.

    Raises:
        ConfigError: c out of range.
    """
    change = _check_calibration(c) * (full - rank)
    return min(max(1, rank + math.trunc(round(change, 6))), full)  # 0.29 * 100 is 28.999999999999996


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
    # In units of the largest noise variance that the matrix allows, so that no tolerance depends on its scale.
    squares = np.maximum(squares / mean, FLOOR)
    limit = _threshold(short / long)
    return int((squares > _noise_variance(squares, short / long) * limit).sum())


def _threshold(a: float) -> float:
    """Squared singular values above this many noise variances (times M) are signals."""
    root = THRESHOLD * math.sqrt(a)
    return (1 + root) * (1 + a / root)


def _noise_variance(squares: Array, a: float) -> float:
    """The variance at which the free energy is least, by a search on a logarithmic scale that narrows down.

    The free energy has many local minima, so the first search covers the whole interval.
    """
    most_signals = math.ceil(len(squares) / (1 + a)) - 1
    rest = squares[most_signals:]
    low, high = math.log(max(float(rest[0]) / _threshold(a), float(rest.mean()))), math.log(float(squares.mean()))
    for points in SEARCH:
        grid = np.linspace(low, max(low, high), points)
        best = int(_free_energy(squares, np.exp(grid), a).argmin())
        low, high = float(grid[max(best - 1, 0)]), float(grid[min(best + 1, points - 1)])
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
    return energy + gain.sum(1)  # type: ignore[no-any-return]


def _noise_note(name: str, found: list[int]) -> tuple[str, ...]:
    empty = [position for position, rank in enumerate(found) if rank == 0]
    if not empty:
        return ()
    log.warning("%s: VBMF finds only noise; are its weights trained?", name)
    return (f"VBMF finds only noise for rank {', '.join(str(p + 1) for p in empty)} of {len(found)}: kept at 1",)


def _check_calibration(c: float) -> float:
    if isinstance(c, bool) or not isinstance(c, int | float) or not -1 <= c <= 1:
        raise ConfigError(f"ranks.calibration={c!r} is not a number from -1 to 1; 0 gives VBMF's own ranks")
    return float(c)
