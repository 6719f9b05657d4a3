"""Factorized embeddings: a narrow table with a linear map, and a tensor train whose table is never built."""

from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Self, Unpack, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hodec.formats import svd, tt
from hodec.formats.layer_types import LAYER_TYPES
from hodec.layers.base import FactorizedLayer, LayerOptions, listed


class FactorizedEmbedding(FactorizedLayer):
    """Base of the factorized embeddings; modes of the vocabulary are inputs, those of the width outputs.

    Args:
        num_embeddings, embedding_dim, padding_idx: as in ``nn.Embedding``.
        options: see ``LayerOptions``; there is no bias.
    """

    layer_type = LAYER_TYPES["embedding"]
    settings = ("num_embeddings", "embedding_dim", "padding_idx")
    #: what parents read of ``nn.Embedding``; another value stays dense
    max_norm: ClassVar[None] = None
    scale_grad_by_freq: ClassVar[bool] = False
    sparse: ClassVar[bool] = False

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        *,
        padding_idx: int | None = None,
        **options: Unpack[LayerOptions],
    ) -> None:
        # before the factors, which depend on the padding
        self.num_embeddings, self.embedding_dim, self.padding_idx = num_embeddings, embedding_dim, padding_idx
        options["bias"] = False
        super().__init__((embedding_dim, num_embeddings), **options)


class SVDEmbedding(FactorizedEmbedding):
    """A narrow table of ``rank`` columns and a linear map to the full width; padding rows stay zero."""

    format = svd.LOOKUP

    def build_factors(self, zeros: Callable[..., nn.Parameter]) -> None:
        rank = self.ranks[0]
        self.table, self.expand = zeros(self.num_embeddings, rank), zeros(self.embedding_dim, rank)

    def views(self) -> list[Tensor]:
        return [self.table.mT, self.expand]

    def forward(self, tokens: Tensor) -> Tensor:
        """(...) whole numbers -> (..., width)."""
        return F.linear(F.embedding(tokens, self.table, self.padding_idx), self.expand)


class TTEmbedding(FactorizedEmbedding):
    """Embedding whose table is a TT-matrix: token i is read as (i_1, .., i_d), and each i_k picks a slice of core k.

    The table is never built. The padding row, which all cores would have to agree on, is kept as it was beside them:
    like that of ``nn.Embedding`` it has no gradient.

    Source: Hrinchuk et al., Tensorized Embedding Layers, Findings of EMNLP 2020: section 3.
    """

    format = tt.LOOKUP

    def build_factors(self, zeros: Callable[..., nn.Parameter]) -> None:
        r, pairs = (1, *self.ranks, 1), zip(self.modes.inputs, self.modes.outputs, strict=True)
        self.cores = nn.ParameterList(zeros(i, r[k], o, r[k + 1]) for k, (i, o) in enumerate(pairs))
        self.padding_row: Tensor | None
        row = None if self.padding_idx is None else zeros(self.embedding_dim).data
        self.register_buffer("padding_row", row)

    @classmethod
    def like(cls, module: nn.Module, ranks: Sequence[int], **options: Any) -> Self:
        layer = super().like(module, ranks, **options)
        if layer.padding_row is not None:
            layer.padding_row.copy_(cast(Tensor, module.weight).detach()[layer.padding_idx])
        return layer

    @torch.no_grad()
    def reset_parameters(self) -> None:
        super().reset_parameters()
        if self.padding_idx is not None and self.num_embeddings > 1:  # the other rows make up for one of zeros
            gain = 2 / self.num_embeddings / self.dense_weight().square().mean().clamp_min(1e-12)
            self.load_factors([f * gain ** (0.5 / len(self.cores)) for f in self.factors()])

    def views(self) -> list[Tensor]:
        return [core.permute(1, 2, 0, 3) for core in self.cores]

    def factors(self) -> list[Tensor]:
        return [view.flatten(1, 2) for view in self.views()]

    def dense_weight(self) -> Tensor:
        table = super().dense_weight()
        return self._padded(table, torch.arange(self.num_embeddings, device=table.device))

    def forward(self, tokens: Tensor) -> Tensor:
        """(...) whole numbers -> (..., width)."""
        first, *others = (
            F.embedding(index, core.flatten(1)).unflatten(1, core.shape[1:])  # n r o r'
            for core, index in zip(self.slices(), self._digits(tokens.reshape(-1)), strict=True)
        )
        y = first.flatten(1, 2)  # n p r with p outputs so far
        for core in others:
            y = torch.bmm(y, core.flatten(2)).unflatten(2, core.shape[2:]).flatten(1, 2)
        return self._padded(y.reshape(*tokens.shape, self.embedding_dim), tokens)

    def slices(self) -> list[Tensor]:
        """The cores as (i, r, o, r'), by their index i."""
        return listed(self.cores)

    def _padded(self, rows: Tensor, tokens: Tensor) -> Tensor:
        """Rows (.., width) of these tokens with the padding row in its places."""
        if self.padding_row is None or self.padding_idx is None:
            return rows
        return torch.where(torch.eq(tokens, self.padding_idx).unsqueeze(-1), self.padding_row, rows)

    def _digits(self, tokens: Tensor) -> list[Tensor]:
        """Token i as (i_1, .., i_d), the last running fastest."""
        digits, rest = [], tokens
        for n in reversed(self.modes.inputs[1:]):
            digits.append(rest % n)
            rest = rest // n
        # the first takes what is left: a token outside the vocabulary is outside its core too, and refused there
        return [rest, *digits[::-1]]
