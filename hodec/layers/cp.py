"""CP layers: 1x1 to the rank, depthwise along the kernel's axes, 1x1 to the outputs."""

from hodec.formats import cp
from hodec.formats.layer_types import LAYER_TYPES
from hodec.layers.staged import StagedConv


class CPConv1d(StagedConv):
    """1, depthwise K, 1."""

    format, layer_type = cp.CONV, LAYER_TYPES["conv1d"]


class CPConv2d(StagedConv):
    """1x1, depthwise K x 1, depthwise 1 x K, 1x1."""

    format, layer_type = cp.CONV, LAYER_TYPES["conv2d"]


class CPConv3d(StagedConv):
    """1x1x1, a depthwise convolution along each axis, 1x1x1."""

    format, layer_type = cp.CONV, LAYER_TYPES["conv3d"]


class CPConvTranspose1d(StagedConv):
    """1, transposed depthwise K, 1."""

    format, layer_type = cp.CONV_TRANSPOSED, LAYER_TYPES["conv_transpose1d"]


class CPConvTranspose2d(StagedConv):
    """1x1, transposed depthwise K x 1 and 1 x K, 1x1."""

    format, layer_type = cp.CONV_TRANSPOSED, LAYER_TYPES["conv_transpose2d"]


class CPConvTranspose3d(StagedConv):
    """1x1x1, a transposed depthwise convolution along each axis, 1x1x1."""

    format, layer_type = cp.CONV_TRANSPOSED, LAYER_TYPES["conv_transpose3d"]


class CP3Conv2d(StagedConv):
    """1x1, depthwise K x K, 1x1."""

    format, layer_type = cp.JOINT, LAYER_TYPES["conv2d"]


class CP3ConvTranspose2d(StagedConv):
    """1x1, transposed depthwise K x K, 1x1."""

    format, layer_type = cp.JOINT_TRANSPOSED, LAYER_TYPES["conv_transpose2d"]
