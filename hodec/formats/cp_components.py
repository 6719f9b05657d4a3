"""Sums of outer products of vectors, in batches."""

from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor


@dataclass(frozen=True)
class Components:
    """A batch of sums of outer products: unit ``columns[k]`` (B, n_k, R) times ``weights`` (B, R), at least 0."""

    columns: list[Tensor]
    weights: Tensor

    def pick(self, index: Tensor) -> "Components":
        """Some elements of the batch."""
        return Components([c[index] for c in self.columns], self.weights[index])

    def put(self, index: Tensor, other: "Components") -> "Components":
        """A copy in which ``other`` takes the place of some elements."""
        columns = [c.index_copy(0, index, o) for c, o in zip(self.columns, other.columns, strict=True)]
        return Components(columns, self.weights.index_copy(0, index, other.weights))

    def where(self, mask: Tensor, other: "Components") -> "Components":
        """These where ``mask`` (B,) holds, the other ones elsewhere."""
        pairs = zip(self.columns, other.columns, strict=True)
        columns = [torch.where(mask[:, None, None], mine, theirs) for mine, theirs in pairs]
        return Components(columns, torch.where(mask[:, None], self.weights, other.weights))

    def spread(self) -> list[Tensor]:
        """Factors (B, n_k, R) with each component's weight in equal shares; a weight of zero is in the first."""
        share = self.weights ** (1 / len(self.columns))
        others = torch.where(share > 0, share, torch.ones_like(share))
        first, *rest = self.columns
        return [first * share[:, None], *(c * others[:, None] for c in rest)]

    def weights_norm(self) -> Tensor:
        """Norm of the weights, (B,): at most 1 for orthogonal components of a unit tensor."""
        return cast(Tensor, self.weights.norm(dim=1))

    def congruence(self) -> Tensor:
        """Largest congruence (cosine) of two components, (B,), after Tucker; -1 where there is one only."""
        cosines = torch.stack([c.mT @ c for c in self.columns]).prod(0)
        same = torch.eye(cosines.shape[-1], dtype=torch.bool, device=cosines.device)
        return cosines.masked_fill(same, -1).flatten(1).amax(1)

    def residual(self, tensors: Tensor) -> Tensor:
        """Norm of what the sum leaves of the tensors (B, n_1, ..), (B,)."""
        first, *rest = self.columns
        left = tensors.flatten(2) - (first * self.weights[:, None]) @ khatri_rao(rest).mT
        return cast(Tensor, left.flatten(1).norm(dim=1))


def khatri_rao(factors: list[Tensor]) -> Tensor:
    """(B, n_k, R) each -> (B, n_1 n_2 .., R), the last index moving fastest."""
    product = factors[0]
    for factor in factors[1:]:
        product = (product[:, :, None] * factor[:, None]).flatten(1, 2)
    return product


def unit(columns: Tensor, lengths: Tensor, other: Tensor | None = None) -> Tensor:
    """Columns over their lengths; those of length 0 become ``other``'s, by default equal entries."""
    if other is None:
        other = torch.full_like(columns, columns.shape[1] ** -0.5)
    empty = (lengths <= 1e-150)[:, None]
    return torch.where(empty, other, columns / torch.where(empty, 1, lengths[:, None]))
