"""Layers of the formats that are stored as they run: CP, Tucker-2 and the SVDs, one parameter for each op.

The classes of convolutions are made from a table: ``TuckerConv2d``, ``SVDConvTranspose1d``, ..
"""

from collections.abc import Callable

from torch import Tensor, nn

from hodec.formats import cp, svd, tucker
from hodec.layers.base import FactorizedLayer, conv_classes, listed
from hodec.layers.conv import FactorizedConv
from hodec.layers.linear import FactorizedLinear, InFirst


class Staged(FactorizedLayer):
    """The storage of a format whose factor k is the kernel of op k."""

    def build_factors(self, zeros: Callable[..., nn.Parameter]) -> None:
        self.kernels = nn.ParameterList(zeros(*op.kernel) for op in self.ops[self.format.executions[-1]])

    def views(self) -> list[Tensor]:
        return listed(self.kernels)


class StagedConv(Staged, FactorizedConv):
    """A convolution as the ops that its format lists."""

    bias_inside = False


class StagedLinear(Staged, FactorizedLinear):
    """A linear layer as a product of small ones, input side first."""


class SVDLinear(StagedLinear):
    """I -> rank -> O."""

    format = svd.SVD


class SVDLinearInFirst(InFirst, SVDLinear):
    """``SVDLinear`` for a layer that stores (I, O)."""


TUCKER = conv_classes(StagedConv, "TuckerConv", tucker.CONV, transposed=tucker.CONV_TRANSPOSED)
CP = conv_classes(StagedConv, "CPConv", cp.CONV, transposed=cp.CONV_TRANSPOSED)
CP3 = conv_classes(StagedConv, "CP3Conv", cp.JOINT, transposed=cp.JOINT_TRANSPOSED, dims=(2,))
SVD = conv_classes(StagedConv, "SVDConv", svd.SVD, transposed=svd.SVD_TRANSPOSED)
WEIGHT_SVD = conv_classes(StagedConv, "WeightSVDConv", svd.WEIGHT_SVD, transposed=svd.WEIGHT_SVD_TRANSPOSED)
SPATIAL_SVD = conv_classes(
    StagedConv, "SpatialSVDConv", svd.SPATIAL_SVD, transposed=svd.SPATIAL_SVD_TRANSPOSED, dims=(2,)
)
