"""Embeddings stored as tensor trains: a row is a product of one slice from each core."""

from collections.abc import Sequence
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hodec.formats import tt
from hodec.formats.modes import Modes
from hodec.layers.embedding import FactorizedEmbedding


class TTEmbedding(FactorizedEmbedding):
    """Embedding whose table is a TT-matrix: token i is read as (i_1, .., i_d), and each i_k picks a slice of core k.

    The table is never built. The padding row, which all cores would have to agree on, is kept as it was beside them:
    like that of ``nn.Embedding`` it has no gradient.

    Args:
        num_embeddings, embedding_dim, padding_idx: as in ``nn.Embedding``.
        ranks: the d - 1 ranks between the cores.
        modes: how vocabulary (inputs) and width (outputs) split; by default evenly, in two each.

    Source: Hrinchuk et al., Tensorized Embedding Layers, Findings of EMNLP 2020: section 3.
    """

    format = tt.LOOKUP

    def build_factors(self, *, device: Any, dtype: Any) -> None:
        r, pairs = (1, *self.ranks, 1), zip(self.modes.inputs, self.modes.outputs, strict=True)
        self.cores = nn.ParameterList(
            nn.Parameter(torch.empty(i, r[k], o, r[k + 1], device=device, dtype=dtype))
            for k, (i, o) in enumerate(pairs)
        )
        row = None if self.padding_idx is None else torch.zeros(self.embedding_dim, device=device, dtype=dtype)
        self.padding_row: Tensor | None
        self.register_buffer("padding_row", row)

    @classmethod
    def like(cls, module: Any, ranks: Sequence[int], *, modes: Modes | None = None, execution: str = "") -> Self:
        layer = super().like(module, ranks, modes=modes, execution=execution)
        if layer.padding_row is not None:
            layer.padding_row.copy_(module.weight.detach()[module.padding_idx])
        return layer

    @torch.no_grad()
    def reset_parameters(self) -> None:
        super().reset_parameters()
        if self.padding_idx is not None and self.num_embeddings > 1:  # the other rows make up for one of zeros
            gain = 2 / self.num_embeddings / self.dense_weight().square().mean().clamp_min(1e-12)
            self.load_factors([f * gain ** (0.5 / len(self.cores)) for f in self.factors()])

    def factors(self) -> list[Tensor]:
        return [core.permute(1, 2, 0, 3).flatten(1, 2) for core in self.cores]

    @torch.no_grad()
    def load_factors(self, factors: Sequence[Tensor]) -> None:
        for mine, given in zip(self.cores, factors, strict=True):
            entries, left, width, right = mine.shape
            mine.copy_(given.reshape(left, width, entries, right).permute(2, 0, 1, 3))

    def dense_weight(self) -> Tensor:
        table = super().dense_weight()
        return self._padded(table, torch.arange(self.num_embeddings, device=table.device))

    def forward(self, tokens: Tensor) -> Tensor:
        """(...) whole numbers -> (..., width)."""
        first, *others = (
            F.embedding(index, core.flatten(1)).unflatten(1, core.shape[1:])  # n r o r'
            for core, index in zip(self.cores, self._digits(tokens.reshape(-1)), strict=True)
        )
        y = first.flatten(1, 2)  # n p r with p outputs so far
        for core in others:
            y = torch.bmm(y, core.flatten(2)).unflatten(2, core.shape[2:]).flatten(1, 2)
        return self._padded(y.reshape(*tokens.shape, self.embedding_dim), tokens)

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
