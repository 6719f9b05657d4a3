"""What every factorized embedding has: the settings of ``nn.Embedding``, and factors that a subclass builds."""

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, Self

from hodec.formats.layer_types import LAYER_TYPES
from hodec.formats.modes import Modes
from hodec.layers.base import FactorizedLayer


class FactorizedEmbedding(FactorizedLayer):
    """Base of the factorized embeddings.

    Args:
        num_embeddings, embedding_dim, padding_idx: as in ``nn.Embedding``.
        ranks, modes: see the format; modes of the vocabulary are inputs, those of the width outputs.
    """

    layer_type = LAYER_TYPES["embedding"]

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        *,
        ranks: Sequence[int],
        modes: Modes | None = None,
        padding_idx: int | None = None,
        execution: str = "",
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__((embedding_dim, num_embeddings), ranks=ranks, modes=modes, execution=execution)
        self.num_embeddings, self.embedding_dim, self.padding_idx = num_embeddings, embedding_dim, padding_idx
        self.build_factors(device=device, dtype=dtype)
        self.bias = None
        self.reset_parameters()

    @abstractmethod
    def build_factors(self, *, device: Any, dtype: Any) -> None:
        """Create the parameters, uninitialized."""

    @classmethod
    def like(cls, module: Any, ranks: Sequence[int], *, modes: Modes | None = None, execution: str = "") -> Self:
        return cls(
            module.num_embeddings,
            module.embedding_dim,
            ranks=ranks,
            modes=modes,
            padding_idx=module.padding_idx,
            execution=execution,
            device=module.weight.device,
            dtype=module.weight.dtype,
        )
