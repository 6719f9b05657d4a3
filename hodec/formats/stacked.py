"""Stacks of linear maps, such as the experts of one layer: each is factorized on its own, all at the same ranks."""

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor

from hodec.formats.base import Format, Ranks
from hodec.formats.calls import CallSites
from hodec.formats.modes import Modes
from hodec.formats.ops import Op, Shape, dense_op
from hodec.linalg.svd import singular_values


class Stacked(Format):
    """The factorization ``one`` of each of E weights: a weight is (O, I, E), a factor (E, ..) one of each expert.

    Nothing runs the factors: the weight is rebuilt, and a position is a row that one expert multiplies.

    Args:
        one: the format of a linear layer.
    """

    in_graphs = False

    def __init__(self, one: Format) -> None:
        super().__init__()
        self.one = one
        self.uses_modes, self.min_modes, self.orthogonal = one.uses_modes, one.min_modes, one.orthogonal

    def max_ranks(self, shape: Shape, modes: Modes) -> Ranks:
        return self.one.max_ranks(shape[:2], modes)

    def fit_ranks(self, shape: Shape, modes: Modes, ranks: Sequence[int]) -> Ranks:
        return self.one.fit_ranks(shape[:2], modes, ranks)

    def unsuitable(self, shape: Shape, modes: Modes) -> str:
        return self.one.unsuitable(shape[:2], modes)

    def decompose(self, weight: Tensor, ranks: Sequence[int], modes: Modes) -> list[Tensor]:
        each = [self.one.decompose(w, ranks, modes) for w in weight.unbind(-1)]
        return [torch.stack(factors) for factors in zip(*each, strict=True)]

    def reconstruct(self, factors: Sequence[Tensor], shape: Shape, modes: Modes) -> Tensor:
        def rebuilt(*own: Tensor) -> Tensor:
            return self.one.reconstruct(own, shape[:2], modes)

        return torch.vmap(rebuilt, out_dims=-1)(*factors)

    def unfoldings(self, weight: Tensor, modes: Modes) -> list[tuple[int, Tensor]]:
        return [pair for w in weight.unbind(-1) for pair in self.one.unfoldings(w, modes)]

    def spectra(self, weight: Tensor, modes: Modes) -> list[tuple[int, Tensor]]:
        """One for each unfolding of ``one``: all experts lose their k-th singular values together."""
        squares: dict[int, Tensor] = {}
        for w in weight.unbind(-1):
            for number, (_, matrix) in enumerate(self.one.unfoldings(w, modes)):
                own = singular_values(matrix).double().square()
                squares[number] = squares[number] + own if number in squares else own
        positions = [position for position, _ in self.one.unfoldings(weight[..., 0], modes)]
        return [(position, squares[number].sqrt()) for number, position in enumerate(positions)]

    def project_many(self, weights: Tensor, ranks: Sequence[int], modes: Modes) -> Tensor:
        flat = weights.movedim(-1, 1).flatten(0, 1)
        projected = self.one.project_many(flat, ranks, modes)
        return cast(Tensor, projected.unflatten(0, (len(weights), -1)).movedim(1, -1))

    def ops(self, shape: Shape, ranks: Sequence[int], modes: Modes, *, execution: str) -> list[Op]:
        return [dense_op(shape[:2])]

    def ranks(self, factors: Sequence[Tensor]) -> Ranks:
        return self.one.ranks([factor[0] for factor in factors])

    def params(self, shape: Shape, ranks: Sequence[int], modes: Modes) -> int:
        return int(shape[2]) * self.one.params(shape[:2], ranks, modes)

    def macs(self, shape: Shape, ranks: Sequence[int], modes: Modes, *, call_sites: CallSites, execution: str) -> int:
        return dense_op(shape[:2]).work * call_sites.out_positions
