"""Tucker-2 layers: 1x1, K x K at the ranks, 1x1."""

from hodec.formats import tucker
from hodec.formats.layer_types import LAYER_TYPES
from hodec.layers.staged import StagedConv


class TuckerConv1d(StagedConv):
    """Tucker-2 of a ``nn.Conv1d``."""

    format, layer_type = tucker.CONV, LAYER_TYPES["conv1d"]


class TuckerConv2d(StagedConv):
    """Tucker-2 of a ``nn.Conv2d``."""

    format, layer_type = tucker.CONV, LAYER_TYPES["conv2d"]


class TuckerConv3d(StagedConv):
    """Tucker-2 of a ``nn.Conv3d``."""

    format, layer_type = tucker.CONV, LAYER_TYPES["conv3d"]


class TuckerConvTranspose1d(StagedConv):
    """Tucker-2 of a ``nn.ConvTranspose1d``."""

    format, layer_type = tucker.CONV_TRANSPOSED, LAYER_TYPES["conv_transpose1d"]


class TuckerConvTranspose2d(StagedConv):
    """Tucker-2 of a ``nn.ConvTranspose2d``."""

    format, layer_type = tucker.CONV_TRANSPOSED, LAYER_TYPES["conv_transpose2d"]


class TuckerConvTranspose3d(StagedConv):
    """Tucker-2 of a ``nn.ConvTranspose3d``."""

    format, layer_type = tucker.CONV_TRANSPOSED, LAYER_TYPES["conv_transpose3d"]
