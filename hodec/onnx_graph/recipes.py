"""What a planned layer is made of in a graph: convolutions, matrix products and reshapes, in order."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from hodec.errors import ConvertError
from hodec.formats.base import Format, working_copy
from hodec.formats.layer_types import LAYER_TYPES
from hodec.formats.staged import StagedFormat
from hodec.formats.tt import TTConv, TTLinearForm
from hodec.layers.base import balance
from hodec.linalg.svd import norm
from hodec.plan.layer import LayerPlan

# Weights of as many numbers are compared by their first rows, and their error is found without a copy of them.
LARGE, ROWS = 2**24, 64
# A smaller error would be blurred by the rounding of the two norms it is the difference of.
LEAST_LOST = 0.1


@dataclass(frozen=True)
class Convolve:
    """A convolution that moves along ``axes`` with the layer's settings there.

    Attributes:
        kernel: (out, in, K_1, ..), or (channels, 1, K_1, ..) where it is depthwise.
    """

    kernel: Tensor
    axes: tuple[int, ...] = ()
    depthwise: bool = False


@dataclass(frozen=True)
class Multiply:
    """A linear map by a matrix (out, in)."""

    matrix: Tensor


@dataclass(frozen=True)
class Reshape:
    """A reshape, in ONNX's words: 0 keeps an axis of the input, -1 is what is left."""

    to: tuple[int, ...]


@dataclass(frozen=True)
class Flatten:
    """(.., I) -> (positions, *to)."""

    to: tuple[int, ...]


@dataclass(frozen=True)
class Restore:
    """(.., ..) -> the leading axes of the layer's input, and ``width`` outputs."""

    width: int


Step = Convolve | Multiply | Reshape | Flatten | Restore


@dataclass(frozen=True)
class Recipe:
    """The steps that stand in for a layer.

    Attributes:
        bias_inside: whether the last step's outputs are the layer's, so that it can carry the bias.
    """

    steps: tuple[Step, ...]
    bias_inside: bool = True

    @property
    def weights(self) -> list[Tensor]:
        """Kernels and matrices, in order."""
        return [
            step.kernel if isinstance(step, Convolve) else step.matrix
            for step in self.steps
            if isinstance(step, Convolve | Multiply)
        ]


@dataclass(frozen=True)
class Cook:
    """How a family of formats becomes a recipe, and how many numbers that has."""

    make: Callable[[LayerPlan, Sequence[Tensor]], Recipe]
    numbers: Callable[[LayerPlan], int]


def factors_of(layer: LayerPlan, weight: Tensor) -> list[Tensor]:
    """Factors of a weight (O, I, ..) as the plan says, equally large, in float32 or float64."""
    return balance(layer.format.decompose(working_copy(weight), layer.ranks, layer.modes))


def dense_of(layer: LayerPlan, factors: Sequence[Tensor]) -> Tensor:
    """The weight (O, I, ..) that factors stand for; of a large one its first rows, where they can be had alone."""
    if math.prod(layer.shape) >= LARGE:
        rows = layer.format.leading(factors, ROWS, layer.shape, layer.modes)
        if rows is not None:
            return rows
    return layer.format.reconstruct(factors, layer.shape, layer.modes)


def error_of(layer: LayerPlan, factors: Sequence[Tensor], weight: Tensor, dense: Tensor) -> float:
    """norm(W - factorized W) / norm(W), 0 for a zero weight.

    Of a large weight from norms alone where the format allows it: W is the sum of two orthogonal parts, and the norm
    of the kept one is that of the factor that is not orthonormal. The others have as many columns as their ranks.

    Args:
        factors: as ``factors_of`` gives them.
        dense: ``dense_of`` them.
    """
    whole = norm(weight)
    if not whole:
        return 0.0
    if math.prod(layer.shape) >= LARGE and layer.format.orthogonal:
        kept = math.prod(norm(factor) for factor in factors) / math.prod(layer.ranks) ** 0.5 / whole
        lost = math.sqrt(max(0.0, 1.0 - kept**2))
        if lost >= LEAST_LOST:
            return lost
    if dense.shape != weight.shape:
        dense = layer.format.reconstruct(factors, layer.shape, layer.modes)
    return norm(weight - dense) / whole


def recipe_of(layer: LayerPlan, factors: Sequence[Tensor]) -> Recipe:
    """The steps that a layer's factors come to.

    Raises:
        ConvertError: a format that has none, see ``no_recipe``.
    """
    return _known_cook(layer).make(layer, factors)


def numbers_of(layer: LayerPlan) -> int:
    """Numbers in the steps: what a file holds. More than ``params_after`` where factors are merged with each other."""
    return _known_cook(layer).numbers(layer)


def no_recipe(fmt: Format) -> str:
    """Why a format has no form of plain nodes, or an empty string."""
    return "" if _cook(fmt) else "its layer is no chain of plain convolutions or products"


def movers(fmt: Format, shape: Sequence[int], kind: str) -> int:
    """How many convolutions share the settings of the layer out among them."""
    if not isinstance(fmt, StagedFormat):
        return 1
    return (
        sum(bool(stage.axes) for stage in fmt.stages(shape, [1] * len(fmt.most(shape))))
        if LAYER_TYPES[kind].dims
        else 1
    )


def _staged(layer: LayerPlan, factors: Sequence[Tensor]) -> Recipe:
    if not LAYER_TYPES[layer.layer_type].dims:
        return Recipe(tuple(Multiply(factor) for factor in factors))
    stages = cast(StagedFormat, layer.format).stages(layer.shape, layer.ranks)
    steps, channels = list[Step](), layer.shape[1]
    for factor, stage in zip(factors, stages, strict=True):
        depthwise = channels > 1 and stage.kernel[1] == 1  # groups are all of the channels, or there are none
        steps.append(Convolve(factor.reshape(stage.kernel), stage.axes, depthwise))
        channels = stage.kernel[0]
    return Recipe(tuple(steps))


def _train(layer: LayerPlan, factors: Sequence[Tensor]) -> Recipe:
    """HODEC's tensor train: in cores (r, I_j, r'), kernel (r_d, K, t), out cores (t, O_j, t')."""
    d, kernel = len(layer.modes.inputs), layer.shape[2:]
    middle = torch.einsum("r...t->tr...", factors[d].unflatten(1, kernel)).contiguous()
    core = Convolve(middle, tuple(range(len(kernel))))
    if layer.resolved_execution == "chain":
        last = (Reshape((-1, layer.shape[0], *(0 for _ in kernel))),) if d > 1 else ()
        steps = (*_chain_in(layer, factors[:d]), core, *_chain_out(layer, factors[d + 1 :]), *last)
        return Recipe(steps, bias_inside=d == 1)
    inner, outer = _product(factors[:d]), _product(factors[d + 1 :])
    return Recipe((_pointwise(inner[0].mT, kernel), core, _pointwise(outer[..., 0].mT, kernel)))


def _chain_in(layer: LayerPlan, cores: Sequence[Tensor]) -> list[Step]:
    """Input modes contracted one at a time; those to come lie along the first spatial axis."""
    kernel, steps = layer.shape[2:], list[Step]()
    for core in cores:
        if len(cores) > 1:
            steps.append(Reshape((0, core.shape[0] * core.shape[1], -1, *(0 for _ in kernel[1:]))))
        steps.append(_pointwise(core.flatten(0, 1).mT, kernel))
    return steps


def _chain_out(layer: LayerPlan, cores: Sequence[Tensor]) -> list[Step]:
    """Output modes expanded one at a time; those that are done lie along the batch axis."""
    kernel, steps = layer.shape[2:], list[Step]()
    for core in cores:
        if steps:
            steps.append(Reshape((-1, core.shape[0], *(0 for _ in kernel))))
        steps.append(_pointwise(core.movedim(0, 2).flatten(0, 1), kernel))
    return steps


def _paired(layer: LayerPlan, factors: Sequence[Tensor]) -> Recipe:
    """Paired cores (r, O_k I_k, s): 1-D convolutions; inputs to come lie along the axis, done outputs in the batch."""
    inputs, outputs, steps = layer.modes.inputs, layer.modes.outputs, list[Step]()
    for k, core in enumerate(factors):
        split = core.unflatten(1, (outputs[k], inputs[k]))  # r o i s
        r, o, i, s = split.shape
        to = (r * i, math.prod(inputs[k + 1 :]))
        steps.append(Flatten(to) if not steps else Reshape((-1, *to)))
        steps.append(Convolve(split.permute(1, 3, 0, 2).reshape(o * s, r * i, 1)))
    return Recipe((*steps, Restore(layer.shape[0])), bias_inside=False)


def _product(cores: Sequence[Tensor]) -> Tensor:
    """Cores (r, n, s) -> (r, n_1 n_2 .., s)."""
    whole = cores[0]
    for core in cores[1:]:
        whole = (whole.flatten(0, 1) @ core.flatten(1)).reshape(whole.shape[0], -1, core.shape[2])
    return whole


def _pointwise(matrix: Tensor, kernel: Sequence[int]) -> Convolve:
    return Convolve(matrix.reshape(*matrix.shape, *(1 for _ in kernel)))


def _train_numbers(layer: LayerPlan) -> int:
    if layer.resolved_execution == "chain":
        return layer.params_after
    d, (out, inp, *kernel) = len(layer.modes.inputs), layer.shape
    before, after = layer.ranks[d - 1 : d + 1]
    return inp * before + before * after * math.prod(kernel) + after * out


COOKS: dict[type, Cook] = {
    StagedFormat: Cook(_staged, lambda layer: layer.params_after),
    TTConv: Cook(_train, _train_numbers),
    TTLinearForm: Cook(
        _paired, lambda layer: layer.params_after if layer.resolved_execution == "chain" else layer.params_before
    ),
}


def _cook(fmt: Format) -> Cook | None:
    return next((COOKS[base] for base in type(fmt).__mro__ if base in COOKS), None)


def _known_cook(layer: LayerPlan) -> Cook:
    cook = _cook(layer.format)
    if cook is None:
        raise ConvertError(f"method {layer.method} for {layer.layer_type}: {no_recipe(layer.format)}")
    return cook
