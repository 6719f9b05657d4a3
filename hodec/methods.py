"""METHODS: every way to factorize a layer. The only table of methods; plans, conversion and tests read it."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from importlib.metadata import entry_points
from typing import cast

from hodec.errors import PlanError, near_matches
from hodec.formats.base import Format
from hodec.formats.layer_types import LAYER_TYPES
from hodec.layers import embedding, staged, tt
from hodec.layers.base import FactorizedLayer
from hodec.layers.experts import experts_class
from hodec.layers.grouped import grouped_class
from hodec.layers.linear import FactorizedLinear
from hodec.layers.staged import StagedConv
from hodec.layers.tied import ROWS

GROUP = "hodec.methods"


@dataclass(frozen=True)
class Method:
    """A way to factorize: which layer stands in for which type of dense layer.

    Attributes:
        layers: type of dense layer (``conv2d``, ``linear``, ..) -> the factorized layer; its ``format`` is the format.
        source: where the method comes from.
        summary: the layers that stand in for a dense one, in one sentence.
        grouped: type of dense convolution -> the layer as which each group of a grouped one is factorized.
    """

    name: str
    layers: Mapping[str, type[FactorizedLayer]]
    source: str
    summary: str = ""
    grouped: Mapping[str, type[StagedConv]] = field(default_factory=dict)

    def format(self, layer_type: str, groups: int = 1) -> Format:
        """The format's mathematics for a type of layer."""
        return self.layer(layer_type, groups).format

    def layer(self, layer_type: str, groups: int = 1) -> type[FactorizedLayer]:
        """The layer that stands in for a type; for experts and groups, one made from that of a single one."""
        if groups > 1:
            return grouped_class(self.grouped[layer_type], groups)
        if layer_type in self.layers or not LAYER_TYPES[layer_type].stacked:
            return self.layers[layer_type]
        return experts_class(cast(type[FactorizedLinear], self.layers["linear"]))

    def tied_layer(self, layer_type: str, tied_type: str, groups: int = 1) -> type[FactorizedLayer] | None:
        """What has the factors of this method's layer, for a layer of ``tied_type`` with the same weight; or None."""
        if not self.serves(layer_type, groups) or not self.serves(tied_type, groups):
            return None
        whole = self.layer(layer_type, groups)
        return whole if tied_type == layer_type else ROWS.get(whole) if tied_type == "embedding" else None

    def serves(self, layer_type: str, groups: int = 1) -> bool:
        """Whether it has a layer for that type."""
        if groups > 1:
            return layer_type in self.grouped
        known = LAYER_TYPES.get(layer_type)
        return layer_type in self.layers or (known is not None and known.stacked and "linear" in self.layers)


class Methods(Mapping[str, Method]):
    """Methods by name: hodec's own, those that ``register`` added, and those of installed packages.

    A package offers a method by an entry point of the group ``hodec.methods`` that names a ``Method``. Entry points
    are loaded once, when the table is first read.

    Raises:
        PlanError: at the first reading, an entry point that cannot be loaded or whose name is taken.

    Examples:
        >>> list(hodec.METHODS)[:3], hodec.METHODS["cp3"].layers["conv2d"].__name__
        (['tt', 'tt_classical', 'tucker'], 'CP3Conv2d')
    """

    def __init__(self, own: Sequence[Method]) -> None:
        self._methods = {method.name: method for method in own}
        self._loaded = False

    def add(self, method: Method, origin: str) -> None:
        """Add a method; ``origin`` says in a message where it comes from.

        Raises:
            PlanError: its name is taken, or its layers are of other types than it says.
        """
        table = self._table()
        _check(method, table, origin)
        table[method.name] = method

    def remove(self, name: str) -> None:
        """Take a method out of the table."""
        del self._table()[name]

    def _table(self) -> dict[str, Method]:
        if not self._loaded:
            self._loaded = True  # a package that reads the table while it is loaded sees what is there already
            try:
                self._methods |= _offered(self._methods)
            except PlanError:
                self._loaded = False
                raise
        return self._methods

    def __getitem__(self, name: str) -> Method:
        return self._table()[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._table())

    def __len__(self) -> int:
        return len(self._table())


def _offered(known: Mapping[str, Method]) -> dict[str, Method]:
    """The methods of installed packages.

    Raises:
        PlanError: one that cannot be loaded, or whose name is taken.
    """
    found: dict[str, Method] = {}
    for point in entry_points(group=GROUP):
        origin = f"entry point {point.name!r} = {point.value} of group {GROUP}"
        try:
            method = point.load()
        except Exception as error:  # whatever an import raises
            raise PlanError(
                f"{origin} cannot be loaded ({type(error).__name__}: {error}); mend or uninstall its package"
            ) from error
        _check(method, {**known, **found}, origin)
        found[method.name] = method
    return found


def _check(method: object, table: Mapping[str, Method], origin: str) -> None:
    if not isinstance(method, Method):
        raise PlanError(f"{origin} is a {type(method).__name__}; a hodec.methods.Method is needed")
    if method.name in table:
        raise PlanError(f"{origin}: there is a method {method.name!r} already; give this one another name")
    for name, layer in method.layers.items():
        if layer.layer_type.name != name or name not in LAYER_TYPES:
            raise PlanError(
                f"{origin}: {layer.__name__} stands in for layers of type {layer.layer_type.name!r}, but method "
                f"{method.name} has it for {name!r}; the types are {', '.join(LAYER_TYPES)}"
            )


def _groups(layers: Mapping[str, type[FactorizedLayer]]) -> dict[str, type[StagedConv]]:
    """Those of the convolutions that are not transposed: the others store their groups along the inputs."""
    made = {name: layer for name, layer in layers.items() if not layer.layer_type.transposed}
    return cast(dict[str, type[StagedConv]], made)


_LINEAR = {"linear": staged.SVDLinear, "linear_in_first": staged.SVDLinearInFirst}

METHODS = Methods(
    [
        Method(
            "tt",
            {**tt.TT, "linear": tt.TTLinear, "linear_in_first": tt.TTLinearInFirst, "embedding": embedding.TTEmbedding},
            "Yin et al., HODEC, CVPR 2022; Novikov et al., Tensorizing Neural Networks, NeurIPS 2015; "
            "Hrinchuk et al., Tensorized Embedding Layers, EMNLP 2020",
            "Tensor train, the kernel in the middle: contract channels in, convolve, contract channels out.",
            _groups(staged.TUCKER),  # which is a tensor train of one mode a side
        ),
        Method(
            "tt_classical",
            tt.CLASSICAL,
            "Garipov et al., Ultimate Tensorization, 2016",
            "Tensor train of the weight with kernel and channels in one chain of cores.",
        ),
        Method(
            "tucker",
            {**staged.TUCKER, **_LINEAR},
            "Kim et al., Compression of Deep CNNs, ICLR 2016",
            "Tucker-2: 1x1 to the input rank, the kernel on the core, 1x1 to the outputs.",
            _groups(staged.TUCKER),
        ),
        Method(
            "cp",
            {**staged.CP, **_LINEAR},
            "Lebedev et al., Speeding-up CNNs Using Fine-tuned CP-Decomposition, ICLR 2015",
            "CP: 1x1 to the rank, one depthwise convolution along each kernel axis, 1x1 to the outputs.",
            _groups(staged.CP),
        ),
        Method(
            "cp3",
            {**staged.CP3, **_LINEAR},
            "Astrid and Lee, CP-decomposition with Tensor Power Method for CNNs Compression, BigComp 2017",
            "CP with the kernel in one piece: 1x1 to the rank, depthwise K x K, 1x1 to the outputs.",
            _groups(staged.CP3),
        ),
        Method(
            "svd",
            {**staged.SVD, **_LINEAR, "embedding": embedding.SVDEmbedding},
            "Zhang et al., Accelerating Very Deep Convolutional Networks, TPAMI 2016",
            "SVD: the kernel to the rank, 1x1 to the outputs.",
            _groups(staged.SVD),
        ),
        Method(
            "weight_svd",
            {**staged.WEIGHT_SVD, **_LINEAR},
            "AIMET user guide, weight SVD",
            "Weight SVD: 1x1 to the rank, the kernel to the outputs.",
            _groups(staged.WEIGHT_SVD),
        ),
        Method(
            "spatial_svd",
            {**staged.SPATIAL_SVD, **_LINEAR},
            "Jaderberg et al., Speeding up CNNs with Low Rank Expansions, BMVC 2014",
            "Spatial SVD: K x 1 to the rank, 1 x K to the outputs, or the orientation that costs less.",
            _groups(staged.SPATIAL_SVD),
        ),
    ]
)


def register(method: Method) -> ExitStack:
    """Add a method of one's own to ``METHODS``, for this process.

    Returns:
        A context that takes it out again: ``with register(method): ..``. Without ``with``, the method stays.

    Raises:
        PlanError: the name is taken, or its layers are of other types than it says.
    """
    METHODS.add(method, "hodec.methods.register")
    undo = ExitStack()
    undo.callback(METHODS.remove, method.name)
    return undo


def any_of(names: Sequence[str]) -> Method:
    """A method with the layers of all of these; of a type that several have, the first one's layer.

    Raises:
        PlanError: no such method.
    """
    methods = [get_method(name) for name in names]
    layers = {layer_type: layer for method in reversed(methods) for layer_type, layer in method.layers.items()}
    grouped = {layer_type: one for method in reversed(methods) for layer_type, one in method.grouped.items()}
    sources = "; ".join(method.source for method in methods)
    return Method(" or ".join(names), layers, sources, grouped=grouped)


def get_method(name: str) -> Method:
    """The method of that name.

    Raises:
        PlanError: no such method; the message lists those there are.
    """
    if name not in METHODS:
        raise PlanError(f"unknown method {name!r}; there are {', '.join(METHODS)}.{near_matches(name, tuple(METHODS))}")
    return METHODS[name]
