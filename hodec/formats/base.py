"""Format: the mathematics of one factorization of a weight, without modules and files."""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from hodec.errors import RankError
from hodec.formats.calls import CallSites
from hodec.formats.modes import Modes
from hodec.formats.ops import Op, Shape, spatial_axes, total_macs, total_params
from hodec.linalg.svd import check_finite, largest_magnitude, singular_values

Ranks = tuple[int, ...]


class Core(NamedTuple):
    """A factor as a member of a chain in which each has its rank in common with the next one.

    Attributes:
        values: (B, r, n.., s), a view of the factor: B weights side by side, the ranks r before it and s behind it, 1
            at the ends of the chain; or (B, R, n..) of a depthwise one.
        depthwise: whether it maps each of R channels to itself, so that both ranks are one axis.
    """

    values: Tensor
    depthwise: bool = False


class Format(ABC):
    """One weight layout of one factorization, e.g. a tensor train of a convolution.

    ``shape`` is that of the dense weight with output channels first, (O, I, K_1, ..) or (O, I), whatever the layer
    stores; ``modes`` is how its channels split. Everything is a function of its arguments. A subclass has to define
    ``max_ranks``, ``fit_ranks``, ``decompose``, ``reconstruct``, ``unfoldings`` and ``ops``.

    Args:
        transposed: whether the dense layer is a transposed convolution, whose kernel visits input positions.
    """

    #: whether channels are split into modes; where not, each side is one mode
    uses_modes: bool = True
    #: fewest modes per side with which there is anything to factorize
    min_modes: int = 1
    #: executions the layer offers, the default while training first; the last one runs the factors as they are stored
    executions: tuple[str, ...] = ("merged",)
    #: multiply-adds per second of the other executions, relative to the first
    rate: float = 1.0
    #: whether factors are found by iteration, so that those of an earlier weight nearby are worth starting from
    iterative: bool = False
    #: whether all factors but one are orthonormal and that one is the weight projected onto them: then the squared
    #: norms of what is retained and of what is lost add up
    orthogonal: bool = False
    #: whether model files have its ops: convolutions and products with nothing but reshapes between them
    in_graphs: bool = True
    #: groups of the convolution, each of which is factorized on its own
    conv_groups: int = 1
    #: the tensorly type that its factors are: ``tt``, ``tucker`` or ``cp``; empty where there is none
    tensorly_type: str = ""

    def __init__(self, *, transposed: bool = False) -> None:
        self.transposed = transposed

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
        """Dense weight -> factors, improved from ``init_factors`` where the format is ``iterative``."""
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
        """The losses of ranks: (position in ranks, singular values, largest first) each.

        Squares cut off by a rank are what it loses of the weight's squared norm, at the most; exactly so where there
        is one spectrum and the format is not ``iterative``.
        """
        return [(position, singular_values(matrix)) for position, matrix in self.unfoldings(weight, modes)]

    @abstractmethod
    def ops(self, shape: Shape, ranks: Sequence[int], modes: Modes, *, execution: str) -> list[Op]:
        """The ops that an execution runs, in order; in the last execution, op k runs factor k."""

    def kernel(self, factor: Tensor, op: Op) -> Tensor:
        """The kernel, of shape ``op.kernel``, of an op that runs one factor as it is stored."""
        return factor

    def core(self, factor: Tensor, op: Op) -> Tensor:
        """The factor of an op that contracts, as (r, o, i, s): rank, output mode, input mode, rank."""
        if factor.ndim == 4:
            return factor
        return factor.reshape(factor.shape[0], max(1, op.gives), max(1, op.takes), factor.shape[-1])

    def kernels(self, factors: Sequence[Tensor], shape: Shape, modes: Modes, *, execution: str) -> list[Tensor]:
        """The kernels of the ops of an execution; by default each op has one factor.

        Args:
            factors: as ``decompose`` gives them; axes that it flattens may be unflattened.
        """
        ops = self.ops(shape, self.ranks(factors), modes, execution=execution)
        return [self.kernel(factor, op) for factor, op in zip(factors, ops, strict=True)]

    def cores(self, factors: Sequence[Tensor]) -> list[Core]:
        """The factors as a chain; by default they are stored as (r, n.., s).

        Args:
            factors: as ``decompose`` gives them; axes that it flattens may be unflattened.
        """
        return [Core(factor.unsqueeze(0)) for factor in factors]

    def ranks(self, factors: Sequence[Tensor]) -> Ranks:
        """The ranks that factors have; by default all but the last factor have one each, as their first side."""
        return tuple(factor.shape[0] for factor in factors[:-1])

    def params(self, shape: Shape, ranks: Sequence[int], modes: Modes) -> int:
        """Elements of the factors; a bias is not counted."""
        return total_params(self.ops(shape, ranks, modes, execution=self.executions[-1]))

    def macs(self, shape: Shape, ranks: Sequence[int], modes: Modes, *, call_sites: CallSites, execution: str) -> int:
        """Multiply-adds of one image that calls the layer at ``call_sites``."""
        return total_macs(self.ops(shape, ranks, modes, execution=execution), call_sites, transposed=self.transposed)

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
        """The execution that inference should use at these sizes: the first, or the last if that is faster."""
        if len(self.executions) == 1:
            return self.executions[0]
        first, last = (
            self.macs(shape, ranks, modes, call_sites=call_sites, execution=self.executions[k]) for k in (0, -1)
        )
        return self.executions[-1] if last < self.rate * first else self.executions[0]

    def tensorly_shape(self, shape: Shape, modes: Modes) -> tuple[int, ...]:
        """The shape of the tensorly tensor of a weight, whose type is ``tensorly_type``."""
        return tuple(shape)

    def to_tensorly(self, factors: Sequence[Tensor], shape: Shape) -> tuple[Tensor | None, list[Tensor]]:
        """The parts of the tensorly tensor: core (Tucker), weights (CP) or None (TT), and its factors."""
        return None, list(factors)

    def from_tensorly(self, first: Tensor | None, factors: Sequence[Tensor], shape: Shape) -> list[Tensor]:
        """Inverse of ``to_tensorly``."""
        return list(factors)

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
    """``fmt.project`` over a batch (B, O, I, ...): full precision inside, the weights' own type outside."""
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
    # beyond 1e15, sums of squares of float32 numbers come near the end of their range, 3.4e38
    return weights.double() if largest > 1e15 or weights.dtype == torch.float64 else weights.float()


def channels_and_kernel(shape: Shape, split: int = 1) -> list[tuple[int, ...]]:
    """``Format.mixable`` where each of ``split`` channel modes is a side of its own, and the whole kernel one more."""
    kernel = tuple(split + axis for axis in spatial_axes(shape))
    return [*((axis,) for axis in range(split)), *([kernel] if kernel else [])]
