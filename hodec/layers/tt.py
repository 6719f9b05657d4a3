"""Layers stored as tensor trains: HODEC's convolutions, linear layers with paired cores, and the classical baseline.

The classes of convolutions are made from a table: ``TTConv2d``, ``ClassicalTTConv1d``, ..
"""

from collections.abc import Callable

from torch import Tensor, nn

from hodec.formats import tt, tt_classical
from hodec.layers.base import FactorizedLayer, conv_classes, listed
from hodec.layers.conv import FactorizedConv
from hodec.layers.linear import FactorizedLinear, InFirst


class _Cores(FactorizedLayer):
    """Factors (r, n, s) of layers whose views may have a pair of modes, or the sides of a kernel, for n."""

    def factors(self) -> list[Tensor]:
        return [view.flatten(1, -2) for view in self.views()]


class TTConv(_Cores, FactorizedConv):
    """Convolution whose weight is a tensor train over (I_1..I_d, K_1*K_2*.., O_1..O_d).

    Two executions of the same parameters, equal to rounding: ``chain`` contracts the input channels mode by
    mode, convolves at the inner ranks, and expands the output channels mode by mode; ``merged`` first contracts
    the cores of each side with each other, weights only, and runs 1x1, K x K and 1x1 convolutions.

    Source: Yin et al., HODEC, CVPR 2022 (chain).
    """

    def build_factors(self, zeros: Callable[..., nn.Parameter]) -> None:
        d, r = len(self.modes.inputs), (1, *self.ranks, 1)
        self.in_cores = nn.ParameterList(zeros(r[j], n, r[j + 1]) for j, n in enumerate(self.modes.inputs))
        self.kernel = zeros(r[d + 1], r[d], *self.shape[2:])
        self.out_cores = nn.ParameterList(
            zeros(r[d + 1 + j], n, r[d + 2 + j]) for j, n in enumerate(self.modes.outputs)
        )

    def views(self) -> list[Tensor]:
        return [*listed(self.in_cores), self.kernel.movedim(0, -1), *listed(self.out_cores)]


class TTLinear(_Cores, FactorizedLinear):
    """Linear layer whose weight (O, I) is a TT-matrix with paired cores (r, O_k, I_k, r').

    ``chain`` turns one input mode into one output mode at a time; ``merged`` rebuilds the weight once and uses
    it as a dense one (fewer parameters, the dense layer's multiply-adds).

    Source: Novikov, Podoprikhin, Osokin, Vetrov, Tensorizing Neural Networks, NeurIPS 2015: section 4.
    """

    format = tt.LINEAR

    def build_factors(self, zeros: Callable[..., nn.Parameter]) -> None:
        r, pairs = (1, *self.ranks, 1), zip(self.modes.outputs, self.modes.inputs, strict=True)
        self.cores = nn.ParameterList(zeros(r[k], o, i, r[k + 1]) for k, (o, i) in enumerate(pairs))

    def views(self) -> list[Tensor]:
        return listed(self.cores)


class TTLinearInFirst(InFirst, TTLinear):
    """``TTLinear`` for a layer that stores (I, O)."""


class ClassicalTTConv(_Cores, FactorizedConv):
    """Convolution whose weight is a tensor train over (K_h*K_w, I_1 O_1, .., I_d O_d): stores little, computes much.

    Source: Garipov et al., Ultimate Tensorization, arXiv 1611.03214, 2016.
    """

    def build_factors(self, zeros: Callable[..., nn.Parameter]) -> None:
        r, pairs = (*self.ranks, 1), zip(self.modes.inputs, self.modes.outputs, strict=True)
        self.kernel = zeros(r[0], 1, *self.shape[2:])
        self.cores = nn.ParameterList(zeros(r[k], i, o, r[k + 1]) for k, (i, o) in enumerate(pairs))

    def views(self) -> list[Tensor]:
        return [self.kernel.movedim(0, -1), *listed(self.cores)]


TT = conv_classes(TTConv, "TTConv", tt.CONV, transposed=tt.CONV_TRANSPOSED)
CLASSICAL = conv_classes(ClassicalTTConv, "ClassicalTTConv", tt_classical.CONV)
