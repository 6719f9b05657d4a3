"""FactorizedLayer: what stands in for a dense layer, and the making of its classes from a table."""

import copy
import math
import sys
from abc import abstractmethod
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from typing import Any, ClassVar, Required, Self, TypedDict, Unpack, cast

import torch
from torch import Tensor, nn

from hodec.errors import ConvertError
from hodec.formats.base import Format, working_copy
from hodec.formats.layer_types import LAYER_TYPES, LayerType, dense_class
from hodec.formats.modes import Modes
from hodec.formats.one_node import OneNode
from hodec.formats.ops import Op, Shape
from hodec.formats.roles import REBUILT
from hodec.layers.dense_weight import DenseWeight
from hodec.layers.exchange import TensorlyTensor, from_tensorly, to_tensorly


class LayerOptions(TypedDict, total=False):
    """The arguments that all factorized layers share, beside the settings of their dense layer.

    Attributes:
        ranks: the format's ranks.
        modes: how channels split; by default evenly, into two modes a side.
        bias: whether there is a bias, one number an output channel; by default there is.
        execution: how inference computes it, one of ``format.executions``; training always uses the first, the default.
        initialize: whether to draw random factors, as by default. Otherwise they are zero, to be loaded, and nothing
            is drawn.
        device, dtype: of the parameters.
    """

    ranks: Required[Sequence[int]]
    modes: Modes | None
    bias: bool
    execution: str
    initialize: bool
    device: torch.device | str | None
    dtype: torch.dtype | None


class FactorizedLayer(OneNode):
    """Base of the factorized layers.

    A subclass of this, for a layer type, says how it stores the factors: ``build_factors`` and ``views``. Its class
    attributes are the format's mathematics and the type of dense layer that it stands in for.

    Args:
        shape: shape of the dense weight with output channels first, (O, I, K_1, ..) or (O, I).
        options: see ``LayerOptions``.

    Raises:
        RankError: ranks that do not fit.
        ConvertError: an execution that the format does not have.

    Examples:
        >>> net = nn.Sequential(nn.Linear(64, 64))
        >>> layer = hodec.convert(net, hodec.make_plan(net, 4, method="svd", example_input=torch.zeros(1, 64)))[0]
        >>> [tuple(factor.shape) for factor in layer.factors()], tuple(layer.dense_weight().shape)
        ([(4, 64), (64, 4)], (64, 64))
    """

    format: ClassVar[Format]
    layer_type: ClassVar[LayerType]
    #: attributes of the dense layer that go over to this one
    settings: ClassVar[tuple[str, ...]] = ()

    def __init__(self, shape: Shape, **options: Unpack[LayerOptions]) -> None:
        super().__init__()
        self.shape = tuple(shape)
        default = max(2, self.format.min_modes) if self.format.uses_modes else 1
        self.modes = options.get("modes") or Modes.split(shape[1], shape[0], default)
        self.modes.check(shape[1], shape[0])
        self.ranks = self.format.check_ranks(self.shape, self.modes, options["ranks"])
        executions = self.format.executions
        self.execution = options.get("execution") or executions[0]
        if self.execution not in executions:
            raise ConvertError(f"execution {self.execution!r} is not one of {', '.join(executions)}")
        self.ops: dict[str, list[Op]] = {
            e: self.format.ops(self.shape, self.ranks, self.modes, execution=e) for e in executions
        }
        # merged kernels, and a copy of the weights that they were made from
        self._merged: tuple[tuple[Tensor, ...], list[Tensor]] | None = None

        def zeros(*sizes: int) -> nn.Parameter:
            return nn.Parameter(torch.zeros(sizes, device=options.get("device"), dtype=options.get("dtype")))

        self.build_factors(zeros)
        self.bias = zeros(self.shape[0]) if options.get("bias", True) else None
        if options.get("initialize", True):
            self.reset_parameters()

    @abstractmethod
    def build_factors(self, zeros: Callable[..., nn.Parameter]) -> None:
        """Create the parameters that hold the factors, each by ``zeros(*sizes)``."""

    @abstractmethod
    def views(self) -> list[Tensor]:
        """The parameters as views whose axes are those of the factors, in the format's order.

        A view may have the factor's flattened axes one by one, such as (r, K_1, K_2, s) for (r, K_1 K_2, s).
        """

    @classmethod
    def like(
        cls,
        module: nn.Module,
        ranks: Sequence[int],
        *,
        modes: Modes | None = None,
        execution: str = "",
        initialize: bool = False,
    ) -> Self:
        """The structure that stands in for the dense layer ``module``, with factors of zero to load others into."""
        weight = cast(Tensor, module.weight)
        settings = cls.settings_of(module)
        if not cls.layer_type.is_embedding:
            settings["bias"] = module.bias is not None
        return cls(
            **settings, ranks=ranks, modes=modes, execution=execution, initialize=initialize,
            device=weight.device, dtype=weight.dtype,
        )  # fmt: skip

    @classmethod
    def settings_of(cls, module: nn.Module) -> dict[str, Any]:
        """The settings of the dense layer ``module`` that go over to this one."""
        return {name: getattr(module, name) for name in cls.settings}

    @classmethod
    def from_dense(
        cls,
        module: nn.Module,
        ranks: Sequence[int],
        *,
        modes: Modes | None = None,
        execution: str = "",
        init_factors: Sequence[Tensor] | None = None,
    ) -> Self:
        """Factorize a dense layer: its weight at these ranks, its bias and settings as they are.

        Args:
            module: the dense layer; it is not changed.
            ranks: ranks in the format's order; see the layer's format for their number and limits.
            modes: how channels split; by default evenly, into two modes a side.
            execution: one of the format's executions, by default its first.
            init_factors: factors of a weight nearby; formats found by iteration go on from them.

        Raises:
            RankError: ranks that do not fit.
            TrainingError: a weight with NaN or Inf.
        """
        layer = cls.like(module, ranks, modes=modes, execution=execution)
        weight = cast(Tensor, module.weight).detach()
        with torch.autocast(weight.device.type, enabled=False):
            work = cls.layer_type.to_oihw(working_copy(weight))
            if init_factors is None:
                factors = cls.format.decompose(work, layer.ranks, layer.modes)
            else:
                factors = cls.format.refine(work, layer.ranks, layer.modes, init_factors)
            layer.load_factors(equalize_norms(factors))
        return layer.adopt(module)

    def adopt(self, module: nn.Module) -> Self:
        """This layer, with the bias and the training mode of the dense layer ``module``."""
        if self.bias is not None:
            self.bias.data.copy_(cast(Tensor, module.bias).detach())
        return self.train(module.training)

    def factors(self) -> list[Tensor]:
        """The factors in the format's order and shapes, as views of the parameters where that is possible."""
        return self.views()

    @torch.no_grad()
    def load_factors(self, factors: Sequence[Tensor]) -> None:
        """Overwrite the parameters by factors in the format's order and shapes."""
        for view, factor in zip(self.views(), factors, strict=True):
            view.copy_(factor.reshape(view.shape))

    def to_tensorly(self) -> TensorlyTensor:
        """The weight as a ``TTTensor``, ``TuckerTensor`` or ``CPTensor`` of tensorly, in its active backend.

        A ``TuckerTensor`` has the shape (O, I, K_1, ..), with identities for the kernel's axes; a ``CPTensor`` leaves
        out axes of size 1 (and has K_1 K_2 for ``cp3``); a ``TTTensor`` has the modes that the format reads the weight
        as, see ``format.tensor_shape``. Under the backends pytorch and numpy (on the CPU) it shares the memory of the
        layer's factors wherever the layer stores them as tensorly does.

        Raises:
            ConvertError: tensorly is not installed or has no type for this format.
        """
        return to_tensorly(self.format, self.factors(), self.shape)

    @classmethod
    def from_tensorly(
        cls, module: nn.Module, tensor: object, *, modes: Modes | None = None, execution: str = ""
    ) -> Self:
        """The layer that stands in for ``module`` with the weight of a tensorly tensor, as ``to_tensorly`` gives it.

        Args:
            module: the dense layer, which gives bias, settings, type and device; its weight is not read.
            tensor: a tensorly tensor of this format, of any backend.
            modes: how channels split; by default evenly, into as many modes as the tensor has.
            execution: one of the format's executions, by default its first.

        Raises:
            ConvertError: tensorly is not installed, it has no type for this format, or the tensor does not fit.
            RankError: ranks that are larger than the shape allows.
        """
        weight = cast(Tensor, module.weight).detach()
        shape = tuple(cls.layer_type.to_oihw(weight).shape)
        factors, modes = from_tensorly(cls.format, tensor, shape, modes=modes)
        layer = cls.like(module, cls.format.ranks(factors), modes=modes, execution=execution)
        layer.load_factors(equalize_norms(factors))
        return layer.adopt(module)

    def dense_settings(self) -> dict[str, Any]:
        """The arguments that ``dense_class`` of its type needs for the layer that this one stands in for."""
        settings = {name: getattr(self, name) for name in self.settings}
        return settings if self.layer_type.is_embedding else {**settings, "bias": self.bias is not None}

    def dense_maker(self) -> Callable[..., nn.Module]:
        """What makes the dense layer that this one stands in for from ``dense_settings``."""
        return dense_class(self.layer_type)

    def to_dense(self) -> nn.Module:
        """The dense layer with this one's weight and bias, on its device, in its mode; factors in float64 meanwhile.

        Its weight takes gradients where a factor does. Hooks stay here.
        """
        like = next(self.parameters())
        wide = like.dtype if like.device.type == "mps" else torch.float64
        with torch.no_grad(), same_random_state(self.parameters()):  # the dense layer is made with random weights
            weight = copy.deepcopy(self).to(wide).dense_weight().to(like.dtype).contiguous()
            dense = self.dense_maker()(**self.dense_settings())
        dense.weight = nn.Parameter(weight, requires_grad=any(view.requires_grad for view in self.views()))
        if self.bias is not None:
            dense.bias = nn.Parameter(self.bias.detach().clone(), requires_grad=self.bias.requires_grad)
        return dense.train(self.training)

    def dense_weight(self) -> Tensor:
        """The dense weight that this layer applies, as the dense layer stores it."""
        return self.layer_type.from_oihw(self.format.reconstruct(self.factors(), self.shape, self.modes))

    def weight_in_whole(self) -> Tensor:
        """``dense_weight``, remembered in inference, for a module that reads the weight at each call."""
        if self.execution != REBUILT:  # what is remembered are the kernels of its ops then
            return self.dense_weight()
        return self.once_per_weights(lambda: (self.dense_weight(),))[0]

    @property
    def weight(self) -> Tensor:
        """The dense weight as parents read it: its values are computed when they are used, see ``DenseWeight``."""
        if _traced():
            return self.dense_weight()
        return DenseWeight.of(self.dense_weight, self.layer_type.stored_shape(self.shape), next(self.parameters()))

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Random factors whose dense weight has the variance of Kaiming's initialization, 2 / fan_in."""
        fan_in = math.prod(self.shape[1:])
        # half precision could overflow before the gain is known
        factors = [torch.randn_like(f, dtype=torch.promote_types(f.dtype, torch.float32)) for f in self.factors()]
        dense = self.format.reconstruct(factors, self.shape, self.modes)
        scale = dense.square().mean().sqrt().clamp_min(1e-12)
        gain = ((2 / fan_in) ** 0.5 / scale) ** (1 / len(factors))
        self.load_factors([f * gain for f in factors])

    def extra_repr(self) -> str:
        out, inp, *kernel = self.shape
        size = "x".join(map(str, kernel))
        inp *= self.format.conv_groups
        return f"{inp} -> {out}{', ' + size if size else ''}, ranks={list(self.ranks)}, execution={self.execution}"

    def running_execution(self) -> str:
        """The execution of the next call: training always merges, which is what keeps its steps cheap."""
        return self.format.executions[0] if self.training else self.execution

    def op_kernels(self, execution: str) -> Sequence[Tensor]:
        """The kernels of ``ops[execution]``; those that are products of factors are remembered in inference."""
        if execution == self.format.executions[-1]:
            return [self.format.kernel(view, op) for view, op in zip(self.views(), self.ops[execution], strict=True)]
        return self.once_per_weights(
            lambda: tuple(self.format.kernels(self.views(), self.shape, self.modes, execution=execution))
        )

    def contract(self, y: Tensor, op: Op, view: Tensor) -> Tensor:
        """One contraction of a chain: (n, p, r, i, ..) -> (n, p o, s, ..), p outputs done; no i where none is taken."""
        y = y if op.takes else y.unsqueeze(3)
        return torch.einsum("npri...,rois->npos...", y, self.format.core(view, op)).flatten(1, 2)

    def once_per_weights(self, merge: Callable[[], tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
        """``merge()``, remembered in inference on a CPU as long as the weights have the values it was made from.

        Every call compares them with a copy: writes through ``.data`` or numpy leave no other trace. Elsewhere than on
        a CPU comparing would wait for the device at every layer, so each call merges; ``fuse`` merges for good.
        """
        weights = list(self.parameters())
        if self.training or torch.is_grad_enabled() or not all(map(_comparable, weights)) or _traced():
            return merge()
        held = self._merged
        if held is None or not all(a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(weights, held[1])):
            with torch.autocast("cpu", enabled=False):  # or later calls would get its type
                # copies, because a kernel that is a view would follow memory that the layer no longer uses
                merged = tuple(kernel.clone() for kernel in merge())
            self._merged = held = (merged, [w.detach().clone() for w in weights])
        return held[0]

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_merged": None}  # copies and pickles merge anew


def _comparable(weight: Tensor) -> bool:
    """Whether its values can be read at once: on a CPU, no stand-in of a tracer or of ``torch.func``."""
    return type(weight) is nn.Parameter and weight.device.type == "cpu"


def _traced() -> bool:
    """Whether the call is being taken down as a graph, which must read the parameters themselves."""
    return torch.compiler.is_compiling() or torch.jit.is_tracing()


def added(y: Tensor, bias: Tensor | None) -> Tensor:
    """``y`` with a bias, in the type of ``y``: under autocast its sum with float32 would take twice the memory."""
    if bias is None:
        return y
    return y + (bias if bias.dtype == y.dtype else bias.to(y.dtype))  # no cast in an exported graph


# -- classes from a table ------------------------------------------------------------------------------------------


def layer_class(
    base: type[FactorizedLayer], name: str, fmt: Format, *, layer_type: LayerType, module: str
) -> type[FactorizedLayer]:
    """A subclass of ``base`` for a format and layer type, put under its name into ``module``, where pickle finds it."""
    words = f"``{type(fmt).__name__}`` of a layer of type ``{layer_type.name}``; see ``{base.__name__}``."
    made = type(name, (base,), {"format": fmt, "layer_type": layer_type, "__module__": module, "__doc__": words})
    setattr(sys.modules[module], name, made)
    return made


def conv_classes(
    base: type[FactorizedLayer],
    prefix: str,
    plain: Format,
    *,
    transposed: Format | None = None,
    dims: Sequence[int] = (1, 2, 3),
) -> dict[str, type[FactorizedLayer]]:
    """Classes ``{prefix}1d``, ``{prefix}Transpose1d``, .. in the module of ``base``, by name of the layer type."""
    made = {}
    for words, stem, fmt in (("", "conv", plain), ("Transpose", "conv_transpose", transposed)):
        for n in dims if fmt is not None else ():
            layer_type = LAYER_TYPES[f"{stem}{n}d"]
            name = f"{prefix}{words}{n}d"
            made[layer_type.name] = layer_class(
                base, name, cast(Format, fmt), layer_type=layer_type, module=base.__module__
            )
    return made


# -- factors ------------------------------------------------------------------------------------------------------


def listed(factors: nn.ParameterList) -> list[Tensor]:
    """The parameters; by their numbers, because the compiler of torch 2.8 does not unpack a ParameterList."""
    return [factors[k] for k in range(len(factors))]


def factor_parameters(layer: FactorizedLayer) -> tuple[nn.Parameter, ...]:
    """The parameters that hold a layer's factors: all but its bias."""
    return tuple(p for name, p in layer.named_parameters() if name != "bias")


def randomize_factors(model: nn.Module, *, seed: int) -> None:
    """Overwrite the factors of all factorized layers by seeded random ones; the global generators do not move."""
    layers = [module for module in model.modules() if isinstance(module, FactorizedLayer)]
    first = {factor_parameters(layer): layer for layer in reversed(layers)}
    with same_random_state(model.parameters()):
        torch.manual_seed(seed)
        for layer in reversed(first.values()):
            layer.reset_parameters()


def equalize_norms(factors: Sequence[Tensor]) -> list[Tensor]:
    """Scale factors to equal root-mean-square entries, which one learning rate fits; their product stays as it is."""
    sizes = [f.square().mean().sqrt() for f in factors]
    if min(sizes) == 0:  # shrinking the other factors would leave nothing to learn from
        return list(factors)
    mean = torch.stack([s.log() for s in sizes]).mean().exp()
    return [f * (mean / s) for f, s in zip(factors, sizes, strict=True)]


def same_random_state(tensors: Iterable[Tensor]) -> AbstractContextManager[None]:
    """A context whose draws do not move the global generators (of the CPU and of these tensors' devices)."""
    return torch.random.fork_rng(devices=sorted({t.device.index for t in tensors if t.is_cuda}))
