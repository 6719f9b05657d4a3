"""Layers split in two by a truncated SVD: of the output side, the input side, or the two spatial axes."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hodec.formats import svd
from hodec.formats.layer_types import LAYER_TYPES
from hodec.layers.embedding import FactorizedEmbedding
from hodec.layers.staged import StagedConv, StagedLinear


class SVDConv1d(StagedConv):
    """K, then 1."""

    format, layer_type = svd.SVD, LAYER_TYPES["conv1d"]


class SVDConv2d(StagedConv):
    """K x K, then 1x1."""

    format, layer_type = svd.SVD, LAYER_TYPES["conv2d"]


class SVDConv3d(StagedConv):
    """K x K x K, then 1x1x1."""

    format, layer_type = svd.SVD, LAYER_TYPES["conv3d"]


class SVDConvTranspose1d(StagedConv):
    """Transposed K, then 1."""

    format, layer_type = svd.SVD_TRANSPOSED, LAYER_TYPES["conv_transpose1d"]


class SVDConvTranspose2d(StagedConv):
    """Transposed K x K, then 1x1."""

    format, layer_type = svd.SVD_TRANSPOSED, LAYER_TYPES["conv_transpose2d"]


class SVDConvTranspose3d(StagedConv):
    """Transposed K x K x K, then 1x1x1."""

    format, layer_type = svd.SVD_TRANSPOSED, LAYER_TYPES["conv_transpose3d"]


class WeightSVDConv1d(StagedConv):
    """1, then K."""

    format, layer_type = svd.WEIGHT_SVD, LAYER_TYPES["conv1d"]


class WeightSVDConv2d(StagedConv):
    """1x1, then K x K."""

    format, layer_type = svd.WEIGHT_SVD, LAYER_TYPES["conv2d"]


class WeightSVDConv3d(StagedConv):
    """1x1x1, then K x K x K."""

    format, layer_type = svd.WEIGHT_SVD, LAYER_TYPES["conv3d"]


class WeightSVDConvTranspose1d(StagedConv):
    """1, then transposed K."""

    format, layer_type = svd.WEIGHT_SVD_TRANSPOSED, LAYER_TYPES["conv_transpose1d"]


class WeightSVDConvTranspose2d(StagedConv):
    """1x1, then transposed K x K."""

    format, layer_type = svd.WEIGHT_SVD_TRANSPOSED, LAYER_TYPES["conv_transpose2d"]


class WeightSVDConvTranspose3d(StagedConv):
    """1x1x1, then transposed K x K x K."""

    format, layer_type = svd.WEIGHT_SVD_TRANSPOSED, LAYER_TYPES["conv_transpose3d"]


class SpatialSVDConv2d(StagedConv):
    """One axis of the kernel, then the other."""

    format, layer_type = svd.SPATIAL_SVD, LAYER_TYPES["conv2d"]


class SpatialSVDConvTranspose2d(StagedConv):
    """One axis of the transposed kernel, then the other."""

    format, layer_type = svd.SPATIAL_SVD_TRANSPOSED, LAYER_TYPES["conv_transpose2d"]


class SVDLinear(StagedLinear):
    """I -> rank -> O."""

    format = svd.SVD


class SVDEmbedding(FactorizedEmbedding):
    """A narrow table of ``rank`` columns and a linear map to the full width; padding rows stay zero.

    Args:
        num_embeddings, embedding_dim, padding_idx: as in ``nn.Embedding``.
        ranks: one rank.
    """

    format = svd.LOOKUP

    def build_factors(self, *, device: Any, dtype: Any) -> None:
        rank = self.ranks[0]
        self.table = nn.Parameter(torch.empty(self.num_embeddings, rank, device=device, dtype=dtype))
        self.expand = nn.Parameter(torch.empty(self.embedding_dim, rank, device=device, dtype=dtype))

    def factors(self) -> list[Tensor]:
        return [self.table.mT, self.expand]

    @torch.no_grad()
    def load_factors(self, factors: Sequence[Tensor]) -> None:
        self.table.copy_(factors[0].mT)
        self.expand.copy_(factors[1])

    def forward(self, tokens: Tensor) -> Tensor:
        """(...) whole numbers -> (..., width)."""
        return F.linear(F.embedding(tokens, self.table, self.padding_idx), self.expand)
