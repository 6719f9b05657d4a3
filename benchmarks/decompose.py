"""Decomposing one kernel: tensor train, Tucker-2 and matrix splits, beside tensorly and plain SVDs.

All at half rank, in one process, on one thread, in float32; errors of both sides are compared.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks import work
from benchmarks.kernels import distance, half_ranks, kernel
from benchmarks.rows import Row, Target
from benchmarks.settings import Settings
from benchmarks.timing import in_turns
from hodec.formats import svd, tt, tucker
from hodec.formats.modes import Modes

GROUP = "decompose"


@dataclass(frozen=True)
class Way:
    """One way to decompose: what is timed, and the dense tensor of what it returns."""

    run: Callable[[], Any]
    rebuild: Callable[[Any], Tensor]


@dataclass(frozen=True)
class Case:
    """One decomposition.

    Attributes:
        wanted: the dense tensor.
        peers: the first one is what ``target`` is about.
        least: the work that cannot be avoided.
    """

    what: str
    wanted: Tensor
    ours: Way
    peers: Mapping[str, Way]
    target: Target
    least: work.Work


def tensor_train(weight: Tensor) -> Case:
    """HODEC's order (I_1, I_2, K K, O_1, O_2)."""
    import tensorly as tl
    from tensorly.decomposition import tensor_train as peer

    modes, ranks = half_ranks(tuple(weight.shape))
    x = tt.CONV.tensorize(weight[None], modes)[0].contiguous()

    def by_tensorly() -> list[Tensor]:
        with tl.backend_context("pytorch"):
            return list(peer(x, [1, *ranks, 1]))

    peers = {
        "tensorly tensor_train": Way(by_tensorly, tt.reconstruct),
        "numpy SVD loop": Way(lambda: _numpy_train(x, ranks), tt.reconstruct),
    }
    ours = Way(lambda: tt.decompose(x, ranks), tt.reconstruct)
    return Case("tensor train", x, ours, peers, Target(">=", 5), work.tensor_train(x.shape, ranks))


def _numpy_train(x: Tensor, ranks: tuple[int, ...]) -> list[Tensor]:
    """One compact SVD after the other."""
    rest, cores, left = x.numpy(), [], 1
    for n, rank in zip(x.shape[:-1], ranks, strict=True):
        u, s, vh = np.linalg.svd(rest.reshape(left * n, -1), full_matrices=False)
        cores.append(torch.from_numpy(u[:, :rank].reshape(left, n, rank)))
        rest, left = s[:rank, None] * vh[:rank], rank
    return [*cores, torch.from_numpy(rest.reshape(left, x.shape[-1], 1))]


def tucker2(weight: Tensor) -> Case:
    """Both channel axes."""
    import tensorly as tl
    from tensorly.decomposition import partial_tucker

    out, inp = weight.shape[:2]
    ranks, modes = (inp // 2, out // 2), Modes.split(inp, out, 1)

    def by_tensorly() -> list[Tensor]:
        with tl.backend_context("pytorch"):
            (core, (outer, inner)), _ = partial_tucker(weight, rank=[out // 2, inp // 2], modes=[0, 1])
        return [inner.mT, core, outer]

    def rebuild(factors: list[Tensor]) -> Tensor:
        return tucker.CONV.reconstruct(factors, weight.shape, modes)

    ours = Way(lambda: tucker.CONV.decompose(weight, ranks, modes), rebuild)
    peers = {"tensorly partial_tucker": Way(by_tensorly, rebuild)}
    return Case("Tucker-2", weight, ours, peers, Target(">=", 12), work.tucker(weight.shape, ranks))


def matrix_split(what: str, fmt: svd.MatrixSplit, least: float, weight: Tensor) -> Case:
    """The best approximation of a matrix that the kernel is unfolded into."""
    out, inp = weight.shape[:2]
    modes, matrix = Modes.split(inp, out, 1), fmt.matrix(weight).contiguous()
    rank = min(matrix.shape) // 2

    def by_torch() -> tuple[Tensor, Tensor]:
        u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
        return u[:, :rank], s[:rank, None] * vh[:rank]

    def by_numpy() -> tuple[Tensor, Tensor]:
        u, s, vh = np.linalg.svd(matrix.numpy(), full_matrices=False)
        return torch.from_numpy(u[:, :rank]), torch.from_numpy(s[:rank, None] * vh[:rank])

    def rebuild(pair: tuple[Tensor, Tensor]) -> Tensor:
        return fmt.to_weight(pair[0] @ pair[1], weight.shape, fmt.first_axes(weight.shape))

    ours = Way(lambda: fmt.decompose(weight, (rank,), modes), lambda made: fmt.reconstruct(made, weight.shape, modes))
    peers = {"torch compact SVD": Way(by_torch, rebuild), "numpy compact SVD": Way(by_numpy, rebuild)}
    truncation = work.truncation(matrix.shape[0], matrix.shape[1], rank)
    return Case(what, weight, ours, peers, Target(">=", least), truncation)


CASES: tuple[Callable[[Tensor], Case], ...] = (
    tensor_train,
    tucker2,
    partial(matrix_split, "split O x (I k k)", svd.SVD, 6),
    partial(matrix_split, "spatial split (O k) x (I k)", svd.SPATIAL_SVD, 2),
)


@torch.no_grad()
def rows(settings: Settings) -> Iterator[Row]:
    """One row a case, size and peer."""
    for channels in settings.kernel_channels:
        for make in CASES:
            yield from measure(make(kernel(channels, channels, 3)), f"{channels}x{channels}x3x3", settings)


def measure(case: Case, size: str, settings: Settings) -> Iterator[Row]:
    """The rows of one case."""
    ways = {"ours": case.ours, **case.peers}
    errors = {name: distance(way.rebuild(way.run()), case.wanted) for name, way in ways.items()}
    times = in_turns(
        {name: way.run for name, way in ways.items()}, seconds=settings.seconds(6), rounds=settings.rounds(3)
    )
    seconds = times.median("ours")
    limit = settings.ceilings.limit(seconds, flops=case.least.flops, nbytes=case.least.nbytes)
    for at, peer in enumerate(case.peers):
        yield Row(
            GROUP,
            f"{case.what} of {size}, half ranks",
            peer,
            **times.beside("ours", peer),
            target=case.target if at == 0 else None,
            error=errors["ours"] / errors[peer],
            limit=limit if at == 0 else "",
            note=f"relative error {errors['ours']:.4f}",
        )
