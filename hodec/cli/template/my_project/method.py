"""The method: ``method=custom method._target_=my_project.method.BALANCED``."""

from collections.abc import Sequence

import torch
from torch import Tensor

from hodec.formats.layer_types import LAYER_TYPES
from hodec.formats.modes import Modes
from hodec.formats.svd import OutputSplit
from hodec.layers.staged import StagedConv
from hodec.methods import Method


class BalancedSplit(OutputSplit):
    """The SVD's K x K and 1x1 convolutions, where both factors carry the square roots of the singular values."""

    orthogonal = False  # of the factors, none is orthonormal

    def decompose(self, weight: Tensor, ranks: Sequence[int], modes: Modes) -> list[Tensor]:
        """Weight (O, I, K, K) -> kernels (r, I, K, K) and (O, r, 1, 1)."""
        first, second = super().decompose(weight, ranks, modes)  # the second is orthonormal
        root = torch.linalg.vector_norm(first.flatten(1), dim=1).clamp_min(1e-12).sqrt()  # a rank of zeros stays zero
        return [first / root.view(-1, 1, 1, 1), second * root.view(1, -1, 1, 1)]


class BalancedConv2d(StagedConv):
    """The layer: its format says which convolutions run."""

    format, layer_type = BalancedSplit(), LAYER_TYPES["conv2d"]


BALANCED = Method("balanced", {"conv2d": BalancedConv2d}, "my_project")
