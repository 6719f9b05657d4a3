"""METHODS: every way to factorize a layer. The only table of methods; plans, conversion and tests read it."""

from collections.abc import Sequence
from dataclasses import dataclass

from hodec.errors import PlanError, near_matches
from hodec.formats.base import Format
from hodec.layers import cp, svd, tt, tt_classical, tt_embedding, tucker
from hodec.layers.base import FactorizedLayer


@dataclass(frozen=True)
class Method:
    """A way to factorize: which layer stands in for which kind of dense layer.

    Attributes:
        layers: kind of dense layer (``conv2d``, ``linear``, ..) -> the factorized layer; its ``form`` is the format.
        source: where the method comes from.
        summary: the layers that stand in for a dense one, in one sentence.
    """

    name: str
    layers: dict[str, type[FactorizedLayer]]
    source: str
    summary: str = ""

    def format(self, layer_type: str) -> Format:
        """The format's mathematics for a kind of layer."""
        return self.layers[layer_type].format


def _method(name: str, summary: str, source: str, *layers: type[FactorizedLayer]) -> Method:
    return Method(name, {layer.layer_type.name: layer for layer in layers}, source, summary)


METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        _method(
            "tt",
            "Tensor train, the kernel in the middle: contract channels in, convolve, contract channels out.",
            "Yin et al., HODEC, CVPR 2022; Novikov et al., Tensorizing Neural Networks, NeurIPS 2015; "
            "Hrinchuk et al., Tensorized Embedding Layers, EMNLP 2020",
            tt.TTConv1d,
            tt.TTConv2d,
            tt.TTConv3d,
            tt.TTConvTranspose1d,
            tt.TTConvTranspose2d,
            tt.TTConvTranspose3d,
            tt.TTLinear,
            tt_embedding.TTEmbedding,
        ),
        _method(
            "tt_classical",
            "Tensor train of the weight with kernel and channels in one chain of cores.",
            "Garipov et al., Ultimate Tensorization, 2016",
            tt_classical.ClassicalTTConv1d,
            tt_classical.ClassicalTTConv2d,
            tt_classical.ClassicalTTConv3d,
        ),
        _method(
            "tucker",
            "Tucker-2: 1x1 to the input rank, the kernel on the core, 1x1 to the outputs.",
            "Kim et al., Compression of Deep CNNs, ICLR 2016",
            tucker.TuckerConv1d,
            tucker.TuckerConv2d,
            tucker.TuckerConv3d,
            tucker.TuckerConvTranspose1d,
            tucker.TuckerConvTranspose2d,
            tucker.TuckerConvTranspose3d,
            svd.SVDLinear,
        ),
        _method(
            "cp",
            "CP: 1x1 to the rank, one depthwise convolution along each kernel axis, 1x1 to the outputs.",
            "Lebedev et al., Speeding-up CNNs Using Fine-tuned CP-Decomposition, ICLR 2015",
            cp.CPConv1d,
            cp.CPConv2d,
            cp.CPConv3d,
            cp.CPConvTranspose1d,
            cp.CPConvTranspose2d,
            cp.CPConvTranspose3d,
            svd.SVDLinear,
        ),
        _method(
            "cp3",
            "CP with the kernel in one piece: 1x1 to the rank, depthwise K x K, 1x1 to the outputs.",
            "Astrid and Lee, CP-decomposition with Tensor Power Method for CNNs Compression, BigComp 2017",
            cp.CP3Conv2d,
            cp.CP3ConvTranspose2d,
            svd.SVDLinear,
        ),
        _method(
            "svd",
            "SVD: the kernel to the rank, 1x1 to the outputs.",
            "Zhang et al., Accelerating Very Deep Convolutional Networks, TPAMI 2016",
            svd.SVDConv1d,
            svd.SVDConv2d,
            svd.SVDConv3d,
            svd.SVDConvTranspose1d,
            svd.SVDConvTranspose2d,
            svd.SVDConvTranspose3d,
            svd.SVDLinear,
            svd.SVDEmbedding,
        ),
        _method(
            "weight_svd",
            "Weight SVD: 1x1 to the rank, the kernel to the outputs.",
            "AIMET user guide, weight SVD",
            svd.WeightSVDConv1d,
            svd.WeightSVDConv2d,
            svd.WeightSVDConv3d,
            svd.WeightSVDConvTranspose1d,
            svd.WeightSVDConvTranspose2d,
            svd.WeightSVDConvTranspose3d,
            svd.SVDLinear,
        ),
        _method(
            "spatial_svd",
            "Spatial SVD: K x 1 to the rank, 1 x K to the outputs, or the orientation that costs less.",
            "Jaderberg et al., Speeding up CNNs with Low Rank Expansions, BMVC 2014",
            svd.SpatialSVDConv2d,
            svd.SpatialSVDConvTranspose2d,
            svd.SVDLinear,
        ),
    )
}


def any_of(names: Sequence[str]) -> Method:
    """What is eligible for at least one of these methods; of a kind that several know, the first one's layer.

    Raises:
        PlanError: no such method.
    """
    methods = [get_method(name) for name in names]
    layers = {layer_type: layer for method in reversed(methods) for layer_type, layer in method.layers.items()}
    return Method(" or ".join(names), layers, "; ".join(method.source for method in methods))


def get_method(name: str) -> Method:
    """The method of that name.

    Raises:
        PlanError: no such method; the message lists those there are.
    """
    if name not in METHODS:
        raise PlanError(f"unknown method {name!r}; there are {', '.join(METHODS)}.{near_matches(name, tuple(METHODS))}")
    return METHODS[name]
