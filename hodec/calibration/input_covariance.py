"""The covariance of a layer's input: projections that lose least of the output instead of least of the weight.

A weight W (O, I, K..) that is replaced by Z changes the layer's output by (W - Z) x for each patch x of the input, on
average by |(W - Z) C^(1/2)| with C = E[x x^T]. So W C^(1/2) is projected, and C^(-1/2) applied to what comes out. C is
kept as a Kronecker product over the groups of input axes that the format can mix (``Format.mixable``): then the ranks
of Z are exactly those of the projection.

Source: Zhang, Zou, He, Sun, Accelerating Very Deep Convolutional Networks, TPAMI 2016: section 2.2 (outputs instead of
weights); Wang, Zheng, Wan, Zhang, SVD-LLM, ICLR 2025 (scaling by a root of the input's second moment).
"""

import logging
import math
from collections.abc import Container, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import cast

import torch
from torch import Tensor, nn

from hodec.calibration.im2col import Draw, patches, token_counts
from hodec.errors import ConfigError, DataError, PlanError, TrainingError
from hodec.formats.layer_types import LAYER_TYPES
from hodec.formats.roles import Role
from hodec.inference import Batch, inference, run_batches, uncompiled
from hodec.layers.plain import plain_layer
from hodec.linalg.svd import sqrtm_psd
from hodec.plan.layer import LayerPlan
from hodec.plan.plan import Plan, check_plan

log = logging.getLogger(__name__)

# Coordinates of one axis beyond which only the diagonal of its covariance is kept; a full one takes 512 MiB here.
LARGEST_AXIS = 8192
# Coordinates up to which a matrix multiplies from the left: a product of many short rows takes ten times as long.
NARROW = 32


@dataclass(frozen=True)
class AxisRoot:
    """One factor of the Kronecker product, float64 where collected.

    Attributes:
        axes: the input axes it acts on together, numbered in (I_1, .., I_d, K_1, ..).
        root, inverse: C^(1/2) and C^(-1/2), (n, n); or their diagonals, (n,). Without an inverse the root is lower
            triangular and solved with.
    """

    axes: tuple[int, ...]
    root: Tensor
    inverse: Tensor | None = None


@dataclass(frozen=True)
class InputCovariance:
    """The covariance of one layer's input.

    Attributes:
        sizes: of the input axes, (I_1, .., I_d, K_1, ..).
        roots: what acts on them; axes that none acts on are left alone.
    """

    sizes: tuple[int, ...]
    roots: tuple[AxisRoot, ...]

    def apply(self, weight: Tensor) -> Tensor:
        """Weights (.., O, I, K..) -> W C^(1/2), in the type of the roots: float64, or what a fit is computed in."""
        return self._multiply(weight, {root.axes: root.root for root in self.roots})

    def undo(self, weight: Tensor) -> Tensor:
        """Inverse of ``apply``."""
        solved = {one.axes for one in self.roots if one.inverse is None}
        by = {one.axes: one.root if one.inverse is None else one.inverse for one in self.roots}
        return self._multiply(weight, by, solved)

    def inverted(self) -> "InputCovariance":
        """The covariance with an inverse of each root, which pays where it is undone more than once or twice."""
        roots = []
        for one in self.roots:
            eye = torch.eye(len(one.root), dtype=one.root.dtype)
            solved = torch.linalg.solve_triangular(one.root, eye, upper=False) if one.inverse is None else one.inverse
            roots.append(AxisRoot(one.axes, one.root, solved))
        return InputCovariance(self.sizes, tuple(roots))

    def _multiply(
        self, weight: Tensor, by: Mapping[tuple[int, ...], Tensor], solved: Container[tuple[int, ...]] = ()
    ) -> Tensor:
        dtype = next(iter(by.values())).dtype if by else torch.float64
        x = weight.to(dtype).reshape(-1, *self.sizes)
        for axes, matrix in by.items():
            matrix = matrix.to(weight.device)
            source, count = [1 + axis for axis in axes], len(axes)
            if len(matrix) <= NARROW and matrix.ndim == 2 and axes not in solved:
                front = x.movedim(source, tuple(range(count)))
                x = (
                    (matrix.mT @ front.reshape(len(matrix), -1))
                    .reshape(front.shape)
                    .movedim(tuple(range(count)), source)
                )
                continue
            last = tuple(range(-count, 0))
            moved = x.movedim(source, last)
            flat = moved.reshape(-1, len(matrix))  # as rows: a product with a strided view is eight times as slow
            if axes in solved:
                flat = torch.linalg.solve_triangular(matrix, flat, upper=False, left=False)
            else:
                flat = flat * matrix if matrix.ndim == 1 else flat @ matrix
            x = flat.reshape(moved.shape).movedim(last, source)
        return x.reshape(weight.shape)

    def to(self, device: torch.device | str) -> "InputCovariance":
        """The covariance with its tensors on ``device``."""
        moved = [(r.root.to(device), None if r.inverse is None else r.inverse.to(device)) for r in self.roots]
        return InputCovariance(self.sizes, tuple(AxisRoot(r.axes, *m) for r, m in zip(self.roots, moved, strict=True)))

    def check(self, name: str, layer: LayerPlan) -> "InputCovariance":
        """This covariance, if projecting in it keeps the ranks of ``layer``.

        Raises:
            PlanError: it was collected for a plan that splits or factorizes the layer differently.
        """
        groups = layer.format.mixable(layer.shape, layer.modes)
        fits = all(any(set(root.axes) <= set(group) for group in groups) for root in self.roots)
        if self.sizes != input_sizes(layer) or not fits:
            raise PlanError(
                f"{name}: its covariance acts on axes {[r.axes for r in self.roots]} of the input sides {self.sizes}, "
                f"but method {layer.method} with input sides {input_sizes(layer)} can mix {groups} only: collect the "
                "covariances with this plan"
            )
        return self


def check_covariances(covariances: Mapping[str, InputCovariance], plan: Plan) -> dict[str, InputCovariance]:
    """The covariances, if each is of a planned layer and keeps its ranks.

    Raises:
        PlanError: one was collected for another plan.
    """
    for name, covariance in covariances.items():
        if name not in plan:
            raise PlanError(
                f"there is a covariance for {name}, which is not in the plan: collect the covariances with this plan"
            )
        covariance.check(name, plan[name])
    return dict(covariances)


def input_sizes(layer: LayerPlan) -> tuple[int, ...]:
    """Sizes of the input axes (I_1, .., I_d, K_1, ..)."""
    return (*layer.modes.inputs, *layer.shape[2:])


@torch.no_grad()
def whitened_projection(layer: LayerPlan, weight: Tensor, covariance: InputCovariance) -> Tensor:
    """The weight of the planned ranks whose output is (quasi-)nearest to that of ``weight``, stored as it is.

    Least in norm((W - Z) C^(1/2)) where the format's projection is exact (the SVD methods); elsewhere as near as that
    projection comes. Computed in float64, returned in the weight's type.
    """
    layer_type = LAYER_TYPES[layer.layer_type]
    nearest = layer.format.project(covariance.apply(layer_type.to_oihw(weight)), layer.ranks, layer.modes)
    return layer_type.from_oihw(covariance.undo(nearest)).to(weight.dtype)


def collect_covariances(
    model: nn.Module,
    plan: Plan,
    batches: Iterable[Batch],
    *,
    damping: float = 1e-4,
    positions: int | None = 64,
    largest: int = 2304,
) -> dict[str, InputCovariance]:
    """The covariance of each planned layer's input, from the dense model's own activations.

    A few hundred images do: what matters is that there are more positions than input channels. The model is run in
    evaluation mode and left as it was.

    Args:
        model: the dense model the plan was made for.
        plan: the layers; which axes of their inputs may be mixed depends on the method.
        batches: model inputs in any form that ``make_plan`` takes, or (images, labels); moved to the model's device.
        damping: least eigenvalue, as a share of the mean one, 0 < damping <= 1.
        positions: most output positions of a convolution looked at per image and call, drawn at random, the same ones
            every time; None for all. Neighbouring ones say much the same: 64 of some hundred images come near to all.
        largest: most coordinates that one matrix covers, where it covers several axes; above, channels and kernel
            get one each.

    Raises:
        ConfigError: a setting out of range.
        DataError: no batch, or one that the model does not run on.
        PlanError: a layer whose method has no covariance, that the model lacks, or that is never called; a weight
            inside a module with several.
        TrainingError: a layer's input holds NaN or Inf.

    Examples:
        >>> net = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
        >>> plan = hodec.make_plan(net, 4, method="svd", example_input=torch.zeros(1, 64))
        >>> covariances = hodec.collect_covariances(net, plan, [torch.randn(32, 64) for _ in range(4)])
        >>> sorted(covariances)
        ['0', '2']
        >>> small = hodec.convert(net, plan, covariances=covariances)
    """
    check_plan(plan)
    if not 0 < damping <= 1:
        raise ConfigError(f"damping: {damping!r} given; allowed: a number above 0 and at most 1; 1e-4 suits most nets")
    if positions is not None and positions < 1:
        raise ConfigError(f"positions: {positions!r} given; allowed: a whole number from 1, or None for all")
    if inside := [name for name, layer in plan.items() if layer.role is not Role.LAYER]:
        raise PlanError(
            f"{inside[0]} is a weight inside a module: what it multiplies is not the input of a layer, so there is no "
            "covariance to collect. Collect those of the layers alone, by plan.without(..) of each such weight; "
            "convert takes them with the whole plan"
        )
    model = uncompiled(model)
    draw = Draw(positions, torch.Generator().manual_seed(0))
    moments = {name: _Moments(name, layer, draw, largest=largest) for name, layer in plan.items()}
    modules = dict(model.named_modules(remove_duplicate=False))
    if missing := [name for name in moments if name not in modules]:
        raise PlanError(f"the plan names layer {missing[0]}, which this model lacks: it was made for another model")
    with ExitStack() as hooks, inference(model):
        for name, moment in moments.items():
            plain = plain_layer(modules[name])
            see = partial(_see, moment, modules[name] if plain is None else plain.layer)
            hook = modules[name].register_forward_pre_hook(see, with_kwargs=True)
            hooks.callback(hook.remove)
        if not run_batches(model, batches, count=len(plan.example_input().args) or None):
            raise DataError("no batch to collect covariances from: give at least one, a few hundred images are enough")
    return {name: moment.covariance(damping) for name, moment in moments.items()}


def _see(
    moment: "_Moments", plain: nn.Module, _: nn.Module, args: tuple[Tensor, ...], kwargs: Mapping[str, Tensor]
) -> None:
    moment.add(plain, args[0] if args else next(iter(kwargs.values())))


class _Moments:
    """Sums of x x^T of one layer's input, one for each group of axes; the other axes are summed over."""

    def __init__(self, name: str, layer: LayerPlan, draw: Draw, *, largest: int) -> None:
        self.draw = draw
        self.name, self.layer_type, self.sizes = name, LAYER_TYPES[layer.layer_type], input_sizes(layer)
        groups = layer.format.mixable(layer.shape, layer.modes)
        if not groups:
            raise PlanError(
                f"{name}: method {layer.method} has no projection in a covariance; leave the covariances out"
            )
        channels = len(layer.modes.inputs)
        self.groups = [part for group in groups for part in self._parts(group, channels, largest)]
        self.sums: dict[tuple[int, ...], Tensor] = {}

    def _side(self, axes: tuple[int, ...]) -> int:
        return math.prod(self.sizes[axis] for axis in axes)

    def _parts(self, group: tuple[int, ...], channels: int, largest: int) -> list[tuple[int, ...]]:
        """A group as it is, or its channel axes and its kernel axes apart; without what has nothing to mix."""
        parts = [group]
        if len(group) > 1 and self._side(group) > largest:
            parts = [tuple(a for a in group if a < channels), tuple(a for a in group if a >= channels)]
            log.info("%s: covariance of channels and kernel apart, together they are %d", self.name, self._side(group))
        return [part for part in parts if self._side(part) > 1]

    def add(self, module: nn.Module, x: Tensor) -> None:
        """Add one call's input to the sums."""
        if self.layer_type.is_embedding:
            counts = token_counts(cast(nn.Embedding, module), x).reshape(self.sizes)
            for axes in self.groups:
                others = [axis for axis in range(len(self.sizes)) if axis not in axes]
                self._sum(axes, counts.sum(others) if others else counts.flatten())
            return
        for chunk in patches(module, self.layer_type, x, self.draw):
            split = chunk.double().reshape(-1, *self.sizes)
            for axes in self.groups:
                moved = split.movedim([1 + axis for axis in axes], tuple(range(-len(axes), 0)))
                rows = moved.reshape(-1, self._side(axes))
                self._sum(axes, rows.square().sum(0) if self._side(axes) > LARGEST_AXIS else rows.mT @ rows)

    def _sum(self, axes: tuple[int, ...], moment: Tensor) -> None:
        self.sums[axes] = self.sums[axes] + moment if axes in self.sums else moment

    def covariance(self, damping: float) -> InputCovariance:
        """The covariance of all inputs that were added."""
        if self.groups and not self.sums:
            raise PlanError(f"{self.name}: the model never calls it on these batches, so its input has no covariance")
        roots = []
        for axes, moment in self.sums.items():
            if not bool(moment.isfinite().all()):
                raise TrainingError(
                    f"layer {self.name}: its input holds NaN or Inf on the calibration data; look at the data and at "
                    "the layers before it"
                )
            roots.append(AxisRoot(axes, *sqrtm_psd(moment, damping)))
        return InputCovariance(self.sizes, tuple(roots))
