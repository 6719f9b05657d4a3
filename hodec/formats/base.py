"""What every format answers about one weight: one set of questions, so that callers never ask for its name."""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

from hodec.errors import RankError
from hodec.formats.calls import CallSites
from hodec.formats.modes import Modes
from hodec.linalg.svd import check_finite, largest_magnitude, singular_values

Shape = Sequence[int]
Ranks = tuple[int, ...]

# Above this, squares and norms of float32 numbers come near the end of their range.
HUGE = 1e15


class Format(ABC):
    """One weight layout of one format, e.g. a tensor train of a convolution.

    ``shape`` is that of the dense weight with output channels first, (O, I, K_1, ..) or (O, I), whatever the layer
    stores; ``modes`` is how its channels split. Everything is a function of its arguments.
    """

    #: whether channels are split into modes; where not, each side is one mode
    uses_modes: bool = True
    #: fewest modes per side with which there is anything to factorize
    min_modes: int = 1
    #: executions the layer offers, the default while training first
    executions: tuple[str, ...] = ("merged",)
    #: whether factors are found by iteration, so that those of an earlier weight nearby are worth starting from
    iterative: bool = False
    #: whether all factors but one are orthonormal and that one is the weight projected onto them: then the squared
    #: norms of what is kept and of what is lost add up
    orthogonal: bool = False
    #: how much the error, relative to the weight, may grow from one rank to the next: 0 but for local optima
    rank_slack: float = 0.0

    @abstractmethod
    def max_ranks(self, shape: Shape, modes: Modes) -> Ranks:
        """Ranks at which the format is exact for every weight of this shape."""

    @abstractmethod
    def fit_ranks(self, shape: Shape, modes: Modes, ranks: Sequence[int]) -> Ranks:
        """The largest ranks that are nowhere above ``ranks`` and leave no rank that cannot be used."""

    @abstractmethod
    def decompose(self, weight: Tensor, ranks: Sequence[int], modes: Modes) -> list[Tensor]:
        """Dense weight -> factors."""

    def refine(
        self, weight: Tensor, ranks: Sequence[int], modes: Modes, init_factors: Sequence[Tensor]
    ) -> list[Tensor]:
        """Dense weight -> factors, improved from ``start`` where the format is ``iterative``."""
        return self.decompose(weight, ranks, modes)

    @abstractmethod
    def reconstruct(self, factors: Sequence[Tensor], shape: Shape, modes: Modes) -> Tensor:
        """Factors -> dense weight of ``shape``."""

    def leading(self, factors: Sequence[Tensor], count: int, shape: Shape, modes: Modes) -> Tensor | None:
        """About the first ``count`` rows (of O) of ``reconstruct``; None where they cost as much as all of them."""
        return None

    @abstractmethod
    def unfoldings(self, weight: Tensor, modes: Modes) -> list[tuple[int, Tensor]]:
        """The matrices whose ranks these are: (position in ranks, matrix) each; several may share a position.

        A rank below the rank of its matrix cuts off that matrix's smallest singular values.
        """

    def spectra(self, weight: Tensor, modes: Modes) -> list[tuple[int, Tensor]]:
        """What ranks lose: (position in ranks, singular values, largest first) each.

        Squares cut off by a rank are what it loses of the weight's squared norm, at the most; exactly so where there
        is one spectrum and the format is not ``iterative``.
        """
        return [(position, singular_values(matrix)) for position, matrix in self.unfoldings(weight, modes)]

    @abstractmethod
    def params(self, shape: Shape, ranks: Sequence[int], modes: Modes) -> int:
        """Numbers stored, bias not counted."""

    @abstractmethod
    def macs(self, shape: Shape, ranks: Sequence[int], modes: Modes, *, call_sites: CallSites, execution: str) -> int:
        """Multiply-adds of one image that runs the layer as in ``runs``."""

    def unsuitable(self, shape: Shape, modes: Modes) -> str:
        """Why a layer of this shape should stay dense at these modes; empty where there is no reason."""
        return ""

    def mixable(self, shape: Shape, modes: Modes) -> list[tuple[int, ...]]:
        """Groups of input axes whose coordinates may be mixed with each other without changing any rank.

        The axes are those of (I_1, .., I_d, K_1, ..), d modes and then the kernel, numbered from 0. None by default:
        then there is no projection in the covariance of the input.
        """
        return []

    def choose_execution(self, shape: Shape, ranks: Sequence[int], modes: Modes, *, call_sites: CallSites) -> str:
        """The execution that inference should use at these sizes."""
        return self.executions[0]

    def project_many(self, weights: Tensor, ranks: Sequence[int], modes: Modes) -> Tensor:
        """Project a batch of equal-shaped weights, (B, O, I, ...), each on its own."""
        shape = weights.shape[1:]
        return torch.stack([self.reconstruct(self.decompose(w, ranks, modes), shape, modes) for w in weights])

    def project(self, weight: Tensor, ranks: Sequence[int], modes: Modes) -> Tensor:
        """The (quasi-)nearest weight of these ranks, in dense form: the Z-step of ADMM.

        Computed in float32 (float64 for float64 weights) whatever the weight's type or an active autocast is,
        and returned in the weight's own type.
        """
        return project_batch(self, weight[None], ranks, modes)[0]

    def check_ranks(self, shape: Shape, modes: Modes, ranks: Sequence[int]) -> Ranks:
        """Ranks as a tuple, or the reason why they do not fit.

        Raises:
            RankError: wrong count, not whole numbers of at least 1, or more than the modes allow.
        """
        most = self.max_ranks(shape, modes)
        if len(ranks) != len(most):
            raise RankError(f"needs {len(most)} ranks, got {len(ranks)}: {list(ranks)}; at most {list(most)}")
        for given in ranks:
            if isinstance(given, bool) or not isinstance(given, int) or given < 1:
                raise RankError(f"rank {given!r} in {list(ranks)} is not a whole number of at least 1")
        if self.fit_ranks(shape, modes, ranks) != tuple(ranks):
            fit = list(self.fit_ranks(shape, modes, ranks))
            raise RankError(f"ranks {list(ranks)} do not fit; the most they can be is {fit}")
        return tuple(ranks)


@torch.no_grad()
def project_batch(fmt: Format, weights: Tensor, ranks: Sequence[int], modes: Modes) -> Tensor:
    """``form.project`` over a batch (B, O, I, ...): full precision inside, the weights' own type outside."""
    work = working_copy(weights)
    with torch.autocast(weights.device.type, enabled=False):
        return fmt.project_many(work, ranks, modes).to(weights.dtype)


def working_copy(weights: Tensor) -> Tensor:
    """Weights in the type to factorize them in: float32, or float64 if they are that already or huge.

    Raises:
        TrainingError: NaN or Inf among the weights.
    """
    largest = largest_magnitude(weights)
    if not math.isfinite(largest):
        check_finite(weights, "a weight to factorize")
    return weights.double() if largest > HUGE or weights.dtype == torch.float64 else weights.float()
