"""Tensor trains: of any tensor, of a convolution in HODEC's mode order, of a linear layer with paired modes.

One mode order everywhere: a convolution weight (O, I, K_h, K_w) is read as (I_1, .., I_d, K_h*K_w, O_1, .., O_d),
so what ADMM projects is exactly what the layer stores.
"""

import math
from abc import abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

from hodec.errors import RankError
from hodec.formats.base import Format, Ranks, channels_and_kernel
from hodec.formats.modes import Modes
from hodec.formats.ops import CHAIN_RATE, Op, Shape, dense_op, pointwise
from hodec.linalg.svd import truncated_svd


def max_ranks(shape: Shape) -> Ranks:
    """Inner ranks (r_1, .., r_{d-1}) at which a tensor train of ``shape`` (n_1, .., n_d) is always exact."""
    return tuple(min(math.prod(shape[:k]), math.prod(shape[k:])) for k in range(1, len(shape)))


def fit_ranks(shape: Shape, ranks: Sequence[int]) -> Ranks:
    """Lower ``ranks`` until each is at most its neighbour times the mode between them: no element is useless then."""
    fit = [1, *ranks, 1]
    for k in range(1, len(fit) - 1):
        fit[k] = min(fit[k], fit[k - 1] * shape[k - 1])
    for k in range(len(fit) - 2, 0, -1):
        fit[k] = min(fit[k], fit[k + 1] * shape[k])
    return tuple(fit[1:-1])


def decompose(x: Tensor, ranks: Sequence[int]) -> list[Tensor]:
    """Factor a dense tensor into tensor-train cores by truncated factorizations, left to right.

    The error is within sqrt(d - 1) of the best one possible at these ranks: a quasi-projection, idempotent
    but not the exact nearest point.

    Args:
        x: dense tensor, shape (n_1, .., n_d), d >= 1, float32 or float64.
        ranks: inner ranks (r_1, .., r_{d-1}); the border ranks r_0 = r_d = 1 are implied.

    Returns:
        d cores; core k has shape (r_{k-1}, n_k, r_k) and the type and device of ``x``.

    Raises:
        RankError: a rank is missing, below 1, or above what its unfolding allows.

    Source: Oseledets, Tensor-Train Decomposition, SIAM J. Sci. Comput. 33(5), 2011: Algorithm 1, Corollary 2.4.
    """
    return [core[0] for core in _decompose_many(x[None], ranks)]


def _decompose_many(x: Tensor, ranks: Sequence[int], *, orthonormal: bool = True) -> list[Tensor]:
    """``decompose`` for (B, n_1, .., n_d): cores (B, r_{k-1}, n_k, r_k); all but the last orthonormal, if wanted."""
    batch, *shape = x.shape
    if len(ranks) != len(shape) - 1:
        raise RankError(f"modes {tuple(shape)} need {len(shape) - 1} ranks, got {len(ranks)}")
    cores, rest, left, cut = [], x, 1, False
    del x  # where nobody else holds it, its memory is free after the first cut
    for k, (n, rank) in enumerate(zip(shape[:-1], ranks, strict=True), start=1):
        rest = rest.reshape(batch, left * n, -1)
        if not 1 <= rank <= min(rest.shape[1:]):
            raise RankError(f"TT-rank r_{k} = {rank} is outside 1..{min(rest.shape[1:])} for modes {tuple(shape)}")
        if rank == left * n:  # nothing to cut off, and large tensors are not copied for that
            u = torch.eye(rank, dtype=rest.dtype, device=rest.device).expand(batch, -1, -1)
        else:
            cut = True
            u, rest = truncated_svd(rest, rank, orthonormal=orthonormal or k < len(ranks))
        cores.append(u.reshape(batch, left, n, rank).contiguous())
        left = rank
    last = rest.reshape(batch, left, shape[-1], 1)
    return [*cores, last if cut else last.clone()]


def reconstruct(cores: Sequence[Tensor]) -> Tensor:
    """Cores (r_{k-1}, n_k, r_k) with r_0 = r_d = 1 -> dense tensor (n_1, .., n_d)."""
    return _reconstruct_many([core[None] for core in cores])[0]


def _reconstruct_many(cores: Sequence[Tensor]) -> Tensor:
    batch = cores[0].shape[0]
    full = cores[0].reshape(batch, -1, cores[0].shape[-1])
    for core in cores[1:]:
        full = (full @ core.reshape(batch, core.shape[1], -1)).reshape(batch, -1, core.shape[-1])
    return full.reshape(batch, *(core.shape[2] for core in cores))


def project(weight: Tensor, ranks: Sequence[int], modes: Modes | None = None) -> Tensor:
    """Dense weight of a convolution (O, I, K_h, K_w) or linear layer (O, I) whose tensor train has these ranks.

    Args:
        weight: dense weight, any floating type.
        ranks: convolution: 2d ranks of (I_1..I_d, K*K, O_1..O_d); linear: d - 1 ranks of the paired modes.
        modes: how the channels split; by default evenly into as many modes as the number of ranks asks for.

    Raises:
        RankError: ranks of the wrong number or size.
    """
    fmt: TTFormat = LINEAR if weight.ndim == 2 else CONV
    if modes is None:
        count = len(ranks) + 1 if weight.ndim == 2 else max(1, len(ranks) // 2)
        modes = Modes.split(weight.shape[1], weight.shape[0], count)
    return fmt.project(weight, fmt.check_ranks(weight.shape, modes, ranks), modes)


class TTFormat(Format):
    """A weight read as a tensor by ``tensorize``, undone by ``to_weight``, and trained as its tensor train."""

    orthogonal = True
    tensorly_type = "tt"

    @abstractmethod
    def tensor_shape(self, shape: Shape, modes: Modes) -> tuple[int, ...]:
        """Modes of the tensor that the weight is read as."""

    @abstractmethod
    def tensorize(self, weights: Tensor, modes: Modes) -> Tensor:
        """Weights (B, *shape) -> tensors (B, *tensor_shape)."""

    @abstractmethod
    def to_weight(self, tensors: Tensor, shape: Shape, modes: Modes) -> Tensor:
        """Inverse of ``tensorize``."""

    def max_ranks(self, shape: Shape, modes: Modes) -> Ranks:
        return max_ranks(self.tensor_shape(shape, modes))

    def fit_ranks(self, shape: Shape, modes: Modes, ranks: Sequence[int]) -> Ranks:
        return fit_ranks(self.tensor_shape(shape, modes), ranks)

    def decompose(self, weight: Tensor, ranks: Sequence[int], modes: Modes) -> list[Tensor]:
        return [core[0] for core in _decompose_many(self.tensorize(weight[None], modes), ranks)]

    def reconstruct(self, factors: Sequence[Tensor], shape: Shape, modes: Modes) -> Tensor:
        return self.to_weight(reconstruct(factors)[None], shape, modes)[0]

    def unfoldings(self, weight: Tensor, modes: Modes) -> list[tuple[int, Tensor]]:
        tensor = self.tensorize(weight[None], modes)[0]
        return [(k, tensor.flatten(0, k).flatten(1)) for k in range(tensor.ndim - 1)]

    def mixable(self, shape: Shape, modes: Modes) -> list[tuple[int, ...]]:
        return channels_and_kernel(shape, len(modes.inputs))

    def project_many(self, weights: Tensor, ranks: Sequence[int], modes: Modes) -> Tensor:
        cores = _decompose_many(self.tensorize(weights, modes), ranks, orthonormal=False)
        return self.to_weight(_reconstruct_many(cores), weights.shape[1:], modes)

    def tensorly_shape(self, shape: Shape, modes: Modes) -> tuple[int, ...]:
        return self.tensor_shape(shape, modes)

    def ranks(self, factors: Sequence[Tensor]) -> Ranks:
        return tuple(core.shape[-1] for core in factors[:-1])

    def kernel(self, factor: Tensor, op: Op) -> Tensor:
        if op.contracts:
            return self.core(factor, op).permute(1, 3, 0, 2).reshape(op.kernel)
        # the core of the kernel: (r, K_1 K_2 .., s) or, already split, (r, K_1, K_2, .., s)
        split = factor if factor.ndim == len(op.kernel) else factor.unflatten(1, op.kernel[2:])
        return split.movedim(-1, 0)


def paired_ops(shape: Shape, ranks: Sequence[int], modes: Modes) -> list[Op]:
    """Contractions that each turn one input mode into one output mode.

    Args:
        ranks: (r_0, .., r_d), the ranks at the border among them.
    """
    ones = [1] * (len(shape) - 2)
    return [
        Op(
            (o * ranks[k + 1], ranks[k] * i, *ones),
            takes=i,
            gives=o,
            pending=math.prod(modes.inputs[k + 1 :]),
            done=math.prod(modes.outputs[:k]),
        )
        for k, (o, i) in enumerate(zip(modes.outputs, modes.inputs, strict=True))
    ]


def merged_cores(cores: Sequence[Tensor]) -> Tensor:
    """Cores (r_0, n_1, r_1), (r_1, n_2, r_2), .. contracted with each other, (r_0, n_1 n_2 .., r_d)."""
    merged = cores[0]
    for core in cores[1:]:
        merged = torch.einsum("aib,bjc->aijc", merged, core).flatten(1, 2)
    return merged


class TTConv(TTFormat):
    """HODEC's order (I_1..I_d, K_h*K_w, O_1..O_d); d = 1 is Tucker-2.

    ``chain`` contracts one input mode at a time, convolves at the inner ranks, and makes one output mode at a time;
    ``merged`` contracts the cores of each side with each other first and runs three convolutions.

    Source: Yin, Sui, Yang, Zang, Gong, Yuan, HODEC, CVPR 2022.
    """

    executions = ("merged", "chain")
    rate = CHAIN_RATE

    def tensor_shape(self, shape: Shape, modes: Modes) -> tuple[int, ...]:
        return (*modes.inputs, math.prod(shape[2:]), *modes.outputs)

    def tensorize(self, weights: Tensor, modes: Modes) -> Tensor:
        return torch.einsum("boi...->bi...o", weights).reshape(
            len(weights), *self.tensor_shape(weights.shape[1:], modes)
        )

    def to_weight(self, tensors: Tensor, shape: Shape, modes: Modes) -> Tensor:
        out, inp, *kernel = shape
        return torch.einsum("bi...o->boi...", tensors.reshape(len(tensors), inp, *kernel, out)).contiguous()

    def leading(self, factors: Sequence[Tensor], count: int, shape: Shape, modes: Modes) -> Tensor | None:
        d, others = len(modes.inputs), math.prod(modes.outputs[1:])
        head, rest, first, *more = factors[:d], *factors[d : d + 2], *factors[d + 2 :]
        first = first[:, : max(1, count // others)]
        for core in (first, *more):  # from the narrow end, which is where the little work is
            rest = rest.reshape(-1, core.shape[0]) @ core.flatten(1)
        rest = rest.reshape(head[-1].shape[2], -1, 1)
        return self.reconstruct([*head, rest], (first.shape[1] * others, *shape[1:]), modes)

    def ops(self, shape: Shape, ranks: Sequence[int], modes: Modes, *, execution: str) -> list[Op]:
        (out, inp, *kernel), d, r = shape, len(modes.inputs), (1, *ranks, 1)
        core = Op((r[d + 1], r[d], *kernel), tuple(range(len(kernel))))
        if execution == "merged":
            return [pointwise(r[d], inp, shape), core, pointwise(out, r[d + 1], shape)]
        ones = [1] * len(kernel)
        first, rest = modes.inputs, r[d + 1 :]
        contract_in = [
            Op((r[k + 1], r[k] * n, *ones), takes=n, pending=math.prod(first[k + 1 :])) for k, n in enumerate(first)
        ]
        contract_out = [
            Op((n * rest[k + 1], rest[k], *ones), gives=n, done=math.prod(modes.outputs[:k]))
            for k, n in enumerate(modes.outputs)
        ]
        return [*contract_in, core, *contract_out]

    def kernels(self, factors: Sequence[Tensor], shape: Shape, modes: Modes, *, execution: str) -> list[Tensor]:
        if execution != "merged":
            return super().kernels(factors, shape, modes, execution=execution)
        d = len(modes.inputs)
        inner, core, outer = self.ops(shape, self.ranks(factors), modes, execution=execution)
        first, last = merged_cores(factors[:d]), merged_cores(factors[d + 1 :])
        middle = self.kernel(factors[d], core)
        return [first[0].mT.reshape(inner.kernel), middle, last[..., 0].mT.reshape(outer.kernel)]


class TTMatrix(TTFormat):
    """Paired modes (O_1 I_1, .., O_d I_d): the TT-matrix of a linear layer's (O, I) weight.

    Source: Novikov, Podoprikhin, Osokin, Vetrov, Tensorizing Neural Networks, NeurIPS 2015: section 3.
    """

    min_modes = 2
    executions: tuple[str, ...] = ("merged", "chain")

    def tensor_shape(self, shape: Shape, modes: Modes) -> tuple[int, ...]:
        return tuple(o * i for o, i in zip(modes.outputs, modes.inputs, strict=True))

    def tensorize(self, weights: Tensor, modes: Modes) -> Tensor:
        d = len(modes.inputs)
        split = weights.reshape(len(weights), *modes.outputs, *modes.inputs)
        paired = split.permute(0, *(axis for k in range(1, d + 1) for axis in (k, d + k)))
        return paired.reshape(len(weights), *self.tensor_shape(weights.shape[1:], modes))

    def to_weight(self, tensors: Tensor, shape: Shape, modes: Modes) -> Tensor:
        d = len(modes.inputs)
        pairs = [n for pair in zip(modes.outputs, modes.inputs, strict=True) for n in pair]
        split = tensors.reshape(len(tensors), *pairs)
        return split.permute(0, *range(1, 2 * d, 2), *range(2, 2 * d + 1, 2)).reshape(len(tensors), *shape)

    def ops(self, shape: Shape, ranks: Sequence[int], modes: Modes, *, execution: str) -> list[Op]:
        # merged: the weight is rebuilt once, then used as a dense one
        return [dense_op(shape)] if execution == "merged" else paired_ops(shape, (1, *ranks, 1), modes)

    def kernels(self, factors: Sequence[Tensor], shape: Shape, modes: Modes, *, execution: str) -> list[Tensor]:
        if execution != "merged":
            return super().kernels(factors, shape, modes, execution=execution)
        return [self.reconstruct([core.flatten(1, -2) for core in factors], shape, modes)]


class TTLookup(TTMatrix):
    """The TT-matrix of an embedding: both its width and its vocabulary are split, and a row is a product of slices.

    The vocabulary is split by its own factors and never padded.

    Source: Hrinchuk, Khrulkov, Mirvakhabova, Orlova, Oseledets, Tensorized Embedding Layers, Findings of EMNLP 2020:
    section 3.
    """

    executions = ("chain",)

    def unsuitable(self, shape: Shape, modes: Modes) -> str:
        if min(modes.inputs) > 1:
            return ""
        count = len(modes.inputs)
        return (
            f"its vocabulary of {shape[1]} entries has no {count} factors above 1 (modes {list(modes.inputs)}): give "
            "it unused entries up to a number that has, or choose fewer modes or method svd"
        )

    def ops(self, shape: Shape, ranks: Sequence[int], modes: Modes, *, execution: str) -> list[Op]:
        r, pairs = (1, *ranks, 1), zip(modes.outputs, modes.inputs, strict=True)
        return [
            Op((o * r[k + 1], r[k]), gives=o, done=math.prod(modes.outputs[:k]), entries=i)
            for k, (o, i) in enumerate(pairs)
        ]


CONV, CONV_TRANSPOSED = TTConv(), TTConv(transposed=True)
LINEAR, LOOKUP = TTMatrix(), TTLookup()
