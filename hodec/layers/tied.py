"""Layers whose dense weight is one parameter: all of them get the same factors."""

from collections.abc import Callable, Mapping

import torch.nn.functional as F
from torch import Tensor, nn

from hodec.layers.base import FactorizedLayer, listed
from hodec.layers.embedding import SVDEmbedding, TTEmbedding
from hodec.layers.staged import SVDLinear
from hodec.layers.tt import TTLinear


class SVDRows(SVDEmbedding):
    """Looks up the rows of an ``SVDLinear`` with the same weight (entries, width), whose factors it has."""

    def build_factors(self, zeros: Callable[..., nn.Parameter]) -> None:
        rank = self.ranks[0]
        self.kernels = nn.ParameterList([zeros(rank, self.embedding_dim), zeros(self.num_embeddings, rank)])

    def views(self) -> list[Tensor]:
        expand, table = listed(self.kernels)
        return [table.mT, expand.mT]

    def forward(self, tokens: Tensor) -> Tensor:
        """(...) whole numbers -> (..., width)."""
        expand, table = listed(self.kernels)
        return F.embedding(tokens, table, self.padding_idx) @ expand


class TTRows(TTEmbedding):
    """Looks up the rows of a ``TTLinear`` with the same weight (entries, width), whose cores it has.

    The row of the padding is the linear layer's too, and not kept beside the cores.
    """

    def build_factors(self, zeros: Callable[..., nn.Parameter]) -> None:
        r, pairs = (1, *self.ranks, 1), zip(self.modes.inputs, self.modes.outputs, strict=True)
        self.cores = nn.ParameterList(zeros(r[k], i, o, r[k + 1]) for k, (i, o) in enumerate(pairs))
        self.register_buffer("padding_row", None)

    def views(self) -> list[Tensor]:
        return [core.transpose(1, 2) for core in listed(self.cores)]

    def slices(self) -> list[Tensor]:
        return [core.transpose(0, 1) for core in listed(self.cores)]


# Factorized linear layer -> the embedding that has the same factors.
ROWS: Mapping[type[FactorizedLayer], type[FactorizedLayer]] = {SVDLinear: SVDRows, TTLinear: TTRows}


def share_factors(layer: FactorizedLayer, source: FactorizedLayer) -> None:
    """Let ``layer``, of the class that is tied to that of ``source``, have its factors; its bias stays its own."""
    for path, factor in source.named_parameters():
        if path != "bias":
            owner, _, leaf = path.rpartition(".")
            layer.get_submodule(owner)._parameters[leaf] = factor
