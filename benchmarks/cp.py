"""CP of convolutions beside tensorly's, both from singular vectors: seconds, errors, and how large the components are.

    python -m benchmarks.cp

Components that are many times as large as the kernel cancel each other; nets of them are hard to train. Ranks keep a
fifth of the kernel's parameters. tensorly runs its default of 100 sweeps at most, in float32; hodec works in float64.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.kernels import distance, kernel
from benchmarks.rows import Row, Target, missing
from benchmarks.settings import Settings, not_installed, standalone
from benchmarks.timing import in_turns
from hodec.formats.cp import CONV
from hodec.formats.modes import Modes

GROUP, PEER = "cp", "tensorly parafac"
CHANNELS = (16, 64, 128)
KEPT = 0.2
# Beside another local optimum, not beside the same decomposition.
ALLOWED_ERROR = 1.02
NO_MODES = Modes((1,), (1,))


@dataclass(frozen=True)
class Fit:
    """A sum of outer products: factors (n, R) of O, I and the two axes, and the dense tensor."""

    factors: list[Tensor]
    whole: Tensor

    def size(self, wanted: Tensor) -> float:
        """Norm of the components' norms, over that of the tensor."""
        norms = torch.stack([factor.double().norm(dim=0) for factor in self.factors]).prod(0)
        return float(norms.norm() / wanted.norm())


def by_hodec(weight: Tensor, rank: int) -> Fit:
    """Factors of the layer's stages."""
    stages = CONV.decompose(weight, [rank], NO_MODES)
    inner, *axes, outer = (factor.flatten(1) for factor in stages)
    return Fit([outer, inner.mT, *(axis.mT for axis in axes)], CONV.reconstruct(stages, weight.shape, NO_MODES))


def by_tensorly(weight: Tensor, rank: int) -> Fit:
    """Its default but for the start, which is the better one it has."""
    import tensorly as tl
    from tensorly.decomposition import parafac

    with tl.backend_context("pytorch"):
        found = parafac(weight, rank, init="svd", n_iter_max=100)
        whole = tl.cp_to_tensor(found)
    return Fit([found.factors[0] * found.weights, *found.factors[1:]], whole)


@torch.no_grad()
def rows(settings: Settings) -> Iterator[Row]:
    """One row a size."""
    if reason := not_installed("tensorly"):
        yield missing(GROUP, "CP", PEER, reason)
        return
    for channels in CHANNELS[:1] if settings.quick else CHANNELS:
        yield compare(channels, settings)


def compare(channels: int, settings: Settings) -> Row:
    """One kernel of this many input and output channels."""
    weight = kernel(channels, channels, 3)
    rank = int(KEPT * weight.numel()) // (2 * channels + 6)
    ways = {"ours": lambda: by_hodec(weight, rank), "theirs": lambda: by_tensorly(weight, rank)}
    fits = {name: way() for name, way in ways.items()}
    errors = {name: distance(fit.whole, weight) for name, fit in fits.items()}
    times = in_turns(ways, seconds=settings.seconds(6), rounds=settings.rounds(3, 20))
    return Row(
        GROUP,
        f"CP of {channels}x{channels}x3x3, rank {rank}",
        PEER,
        **times.beside("ours", "theirs"),
        target=Target(">=", 1),
        error=errors["ours"] / errors["theirs"],
        allowed_error=ALLOWED_ERROR,
        note=f"relative error {errors['ours']:.4f}; norm of the components {fits['ours'].size(weight):.2f} times the "
        f"kernel's, tensorly's {fits['theirs'].size(weight):.2f} times",
    )


if __name__ == "__main__":
    standalone(rows)
