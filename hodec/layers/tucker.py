"""Tucker-2 layers: 1x1, K x K at the ranks, 1x1."""

from hodec.formats import tucker
from hodec.formats.layer_types import KINDS
from hodec.layers.staged import StagedConv


class TuckerConv1d(StagedConv):
    """Tucker-2 of a ``nn.Conv1d``."""

    form, kind = tucker.CONV, KINDS["conv1d"]


class TuckerConv2d(StagedConv):
    """Tucker-2 of a ``nn.Conv2d``."""

    form, kind = tucker.CONV, KINDS["conv2d"]


class TuckerConv3d(StagedConv):
    """Tucker-2 of a ``nn.Conv3d``."""

    form, kind = tucker.CONV, KINDS["conv3d"]


class TuckerConvTranspose1d(StagedConv):
    """Tucker-2 of a ``nn.ConvTranspose1d``."""

    form, kind = tucker.CONV_TRANSPOSED, KINDS["conv_transpose1d"]


class TuckerConvTranspose2d(StagedConv):
    """Tucker-2 of a ``nn.ConvTranspose2d``."""

    form, kind = tucker.CONV_TRANSPOSED, KINDS["conv_transpose2d"]


class TuckerConvTranspose3d(StagedConv):
    """Tucker-2 of a ``nn.ConvTranspose3d``."""

    form, kind = tucker.CONV_TRANSPOSED, KINDS["conv_transpose3d"]
