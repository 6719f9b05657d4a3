"""METHODS: every way to factorize a layer. The only table of methods; plans, conversion and tests read it."""

from dataclasses import dataclass

from hodec.errors import PlanError, near_matches
from hodec.formats.base import Form
from hodec.layers.base import FactorizedLayer
from hodec.layers.tt import TTConv2d, TTLinear
from hodec.layers.tt_classical import ClassicalTTConv2d


@dataclass(frozen=True)
class Method:
    """A way to factorize: which layer stands in for which kind of dense layer.

    Attributes:
        layers: kind of dense layer (``conv2d``, ``linear``) -> the factorized layer; its ``form`` is the format.
        source: where the method comes from.
    """

    name: str
    layers: dict[str, type[FactorizedLayer]]
    source: str

    def form(self, kind: str) -> Form:
        """The format's mathematics for a kind of layer."""
        return self.layers[kind].form


METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        Method("tt", {"conv2d": TTConv2d, "linear": TTLinear}, "Yin et al., HODEC, CVPR 2022"),
        Method("tt_classical", {"conv2d": ClassicalTTConv2d}, "Garipov et al., Ultimate Tensorization, 2016"),
    )
}


def get_method(name: str) -> Method:
    """The method of that name.

    Raises:
        PlanError: no such method; the message lists those there are.
    """
    if name not in METHODS:
        raise PlanError(
            f"unknown method {name!r}; there are {', '.join(METHODS)}.{near_matches(name, tuple(METHODS))}"
        )
    return METHODS[name]
