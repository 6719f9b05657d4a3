"""Recipes: the ops of a planned layer as steps of a graph: convolutions, matrix products and reshapes, in order."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from hodec.errors import ConvertError
from hodec.formats.base import Format, working_copy
from hodec.formats.layer_types import LAYER_TYPES
from hodec.formats.modes import Modes
from hodec.formats.ops import Op, total_params
from hodec.formats.roles import REBUILT
from hodec.layers.base import equalize_norms
from hodec.linalg.svd import norm
from hodec.plan.layer import LayerPlan

# Weights of as many numbers are compared by their first rows, and their error is found without a copy of them.
LARGE, ROWS = 2**24, 64
# A smaller error would be blurred by the rounding of the two norms it is the difference of.
LEAST_LOST = 0.1


@dataclass(frozen=True)
class Step:
    """A convolution that moves along ``axes`` with the layer's settings there, or a product by a matrix.

    Attributes:
        kernel: (out, in, K_1, ..), (channels, 1, K_1, ..) where it is depthwise, or (out, in) of a product.
        blocks: groups of the layer, which it keeps apart.
        shape: what its input is reshaped to, in ONNX's words: 0 keeps an axis, -1 is what is left. Empty: not reshaped.
    """

    kernel: Tensor
    axes: tuple[int, ...] = ()
    depthwise: bool = False
    shape: tuple[int, ...] = ()
    blocks: int = 1


@dataclass(frozen=True)
class Recipe:
    """The steps that stand in for a layer.

    Attributes:
        shape: what the last step's outputs are reshaped to. Empty: they are the layer's, so that it can carry the bias.
    """

    steps: tuple[Step, ...]
    shape: tuple[int, ...] = ()


def factors_of(layer: LayerPlan, weight: Tensor) -> list[Tensor]:
    """Factors of a weight (O, I, ..) as the plan says, equally large, in float32 or float64."""
    return equalize_norms(layer.format.decompose(working_copy(weight), layer.ranks, layer.modes))


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
    """The steps that a layer's ops come to, with the kernels that its factors give.

    Raises:
        ConvertError: a format that has none, see ``no_recipe``.
    """
    if reason := no_recipe(layer.format, layer.layer_type):
        raise ConvertError(f"method {layer.method} for {layer.layer_type}: {reason}")
    if LAYER_TYPES[layer.layer_type].is_embedding:  # rows of the first factor, the table, are looked up
        return Recipe(tuple(Step(factor) for factor in factors))
    return steps_of(layer, layer.format.kernels(factors, layer.shape, layer.modes, execution=layer.resolved_execution))


def steps_of(layer: LayerPlan, kernels: Sequence[Tensor]) -> Recipe:
    """The steps that a layer's ops come to with these kernels, one for each op."""
    ops = ops_of(layer)
    pairs = list(zip(ops, kernels, strict=True))
    if any(op.contracts for op in ops):
        return _conv_chain(layer, pairs) if layer.shape[2:] else _linear_chain(layer, pairs)
    return Recipe(tuple(Step(kernel, op.axes, op.depthwise, blocks=op.blocks) for op, kernel in pairs))


def numbers_of(layer: LayerPlan) -> int:
    """Elements of the kernels in a file. They are more than ``params_after`` where factors are merged."""
    return layer.params_after if layer.resolved_execution == REBUILT else total_params(ops_of(layer))


def no_recipe(fmt: Format, layer_type: str) -> str:
    """The reason why a format has no steps for a type of layer, or an empty string."""
    if LAYER_TYPES[layer_type].is_embedding and fmt.uses_modes:
        return "the rows of a tensor train are looked up by more than plain nodes"
    return "" if fmt.in_graphs else "its layer is no chain of plain convolutions or products"


def movers(fmt: Format, shape: Sequence[int], kind: str) -> int:
    """The number of convolutions that share the settings of the layer out among them."""
    if not LAYER_TYPES[kind].dims:
        return 1
    modes = Modes.split(shape[1], shape[0], fmt.min_modes)
    ones = [1] * len(fmt.max_ranks(shape, modes))
    return sum(bool(op.axes) for op in fmt.ops(shape, ones, modes, execution=fmt.executions[0]))


def ops_of(layer: LayerPlan) -> list[Op]:
    """The ops of a planned layer, by the execution that it has in a file."""
    return layer.format.ops(layer.shape, layer.ranks, layer.modes, execution=layer.resolved_execution)


def _conv_chain(layer: LayerPlan, pairs: Sequence[tuple[Op, Tensor]]) -> Recipe:
    """Contractions as 1x1 convolutions: pending inputs are along the first spatial axis, done outputs in the batch."""
    steps, rest = list[Step](), [0] * (len(layer.shape) - 3)
    now, done = (1, layer.shape[1], 1), (1, layer.shape[0], 1)  # outputs done, channels, inputs pending
    for op, kernel in pairs:
        shape = (0, op.channels, -1, *rest) if op.takes else (-1, op.channels, 0, *rest)
        moved = (op.done, op.channels, op.pending) != now
        steps.append(Step(kernel, op.axes, op.depthwise, shape if moved else ()))
        now = (op.done, op.kernel[0], op.pending)
    return Recipe(tuple(steps), (-1, layer.shape[0], 0, *rest) if now != done else ())


def _linear_chain(layer: LayerPlan, pairs: Sequence[tuple[Op, Tensor]]) -> Recipe:
    """Contractions as 1-D convolutions; pending inputs lie along the axis, done outputs are in the batch."""
    steps = [Step(kernel.unsqueeze(2), shape=(-1, op.channels, op.pending)) for op, kernel in pairs]
    return Recipe(tuple(steps), (-1, layer.shape[0]))
