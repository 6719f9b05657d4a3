"""The ADMM updates as functions of tensors; state goes in, new state comes out.

min loss(W) + g(Z) with W = Z, g = 0 on tensors of the planned ranks and infinite elsewhere, in scaled form:
W: optimizer steps on loss + rho/2 |W - Z + U|^2;  Z := project(W + U);  U := U + W - Z.

Source: Boyd, Parikh, Chu, Peleato, Eckstein, ADMM, Foundations and Trends in ML 3(1), 2011: section 3.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from hodec.calibration.input_covariance import InputCovariance, whitened_projection
from hodec.formats.base import project_batch
from hodec.formats.layer_types import LAYER_TYPES
from hodec.linalg.svd import naming
from hodec.plan.layer import LayerPlan

Rows = Mapping[str, Sequence[float]]

Project = Callable[[dict[str, Tensor]], dict[str, Tensor]]

# Channels up to which layers of one shape are projected together, which saves a call per layer (benchmarks/scaling.py:
# of 64 channels, 64 layers take 0.6 of the time of as many alone); wider ones fill the cores by themselves.
BATCH_CHANNELS = 128

# Where W needs no dual (its ranks suffice), U is rounding: less than this share of W counts as this share.
SMALL_DUAL = 0.01


@dataclass(frozen=True)
class AdmmState:
    """State of one layer, float32 (float64 for float64 weights): ``z``, scaled dual ``u`` like the weight, ``rho``."""

    z: Tensor
    u: Tensor
    rho: float


@dataclass(frozen=True)
class Residuals:
    """How far one layer is from agreement; squared norms, so that layers can be added up.

    Attributes:
        gap: |W - Z|^2.   weight: |W|^2.   move: |Z - Z_before|^2.   dual_scale: |U|^2.
    """

    gap: float
    weight: float
    move: float
    dual_scale: float

    @property
    def primal(self) -> float:
        """norm(W - Z) / norm(W): the approximation error."""
        return _ratio(self.gap, self.weight)

    @property
    def dual(self) -> float:
        """norm(Z - Z_before) / norm(U), the relative dual residual. Source: Wohlberg, arXiv 1704.06209, 2017."""
        return _ratio(self.move, max(self.dual_scale, SMALL_DUAL**2 * self.weight))

    def __add__(self, other: "Residuals") -> "Residuals":
        return Residuals(
            self.gap + other.gap, self.weight + other.weight, self.move + other.move, self.dual_scale + other.dual_scale
        )


def _ratio(above: float, below: float) -> float:
    return (above / below) ** 0.5 if below > 0 else 0.0


def full_precision(w: Tensor) -> Tensor:
    """The weight detached, in the type that state is kept in."""
    return w.detach() if w.dtype == torch.float64 else w.detach().float()


def project_layers(
    plan: Mapping[str, LayerPlan],
    tensors: Mapping[str, Tensor],
    covariances: Mapping[str, InputCovariance] | None = None,
) -> dict[str, Tensor]:
    """Project each layer's tensor onto its planned ranks; equal small layers go through one batched call.

    Layers that have one of the ``covariances`` are projected in it, in float64, one by one.
    """
    covariances = covariances or {}
    result = {
        name: whitened_projection(plan[name], tensors[name], covariance)
        for name, covariance in covariances.items()
        if name in tensors
    }
    groups: dict[tuple[object, ...], list[str]] = {}
    for name in tensors:
        if name in result:
            continue
        layer = plan[name]
        key = (layer.method, layer.layer_type, layer.groups, layer.shape, layer.modes, layer.ranks)
        alone = () if max(layer.shape[:2]) <= BATCH_CHANNELS else (name,)
        groups.setdefault((*key, *alone, tensors[name].device, tensors[name].dtype), []).append(name)
    for names in groups.values():
        layer = plan[names[0]]
        layer_type = LAYER_TYPES[layer.layer_type]
        batch = torch.stack([layer_type.to_oihw(tensors[name]) for name in names])
        with naming(f"layer {' or '.join(names)}"):
            projected = project_batch(layer.format, batch, layer.ranks, layer.modes)
        result.update((name, layer_type.from_oihw(one)) for name, one in zip(names, projected, strict=True))
    return {name: result[name] for name in tensors}


def start(weights: Mapping[str, Tensor], rho: Mapping[str, float], project: Project) -> dict[str, AdmmState]:
    """Z = project(W), U = 0."""
    full = {name: full_precision(w) for name, w in weights.items()}
    z = project(full)
    return {name: AdmmState(z[name], torch.zeros_like(w), rho[name]) for name, w in full.items()}


@torch.no_grad()
def step(
    weights: Mapping[str, Tensor],
    states: Mapping[str, AdmmState],
    project: Project,
    *,
    relax: float = 1.0,
    dual: bool = True,
) -> tuple[dict[str, AdmmState], dict[str, Residuals]]:
    """Z- and U-update of all layers.

    Args:
        weights: W of each layer.
        states: state before the update.
        project: name -> tensor, projected onto the planned ranks.
        relax: over-relaxation, 1..1.9; 1 is plain ADMM. Source: Boyd et al., section 3.4.3.
        dual: False keeps U at 0, which leaves a quadratic penalty with alternating projections.

    Returns:
        The states after it, and each layer's residuals.
    """
    relaxed = {name: relax * full_precision(w) + (1 - relax) * states[name].z for name, w in weights.items()}
    z = project({name: w + states[name].u for name, w in relaxed.items()})
    after, residuals = {}, {}
    for name, w in weights.items():
        before = states[name]
        u = before.u + relaxed[name] - z[name] if dual else before.u
        after[name] = replace(before, z=z[name], u=u)
        residuals[name] = measure(w, after[name], before.z)
    return after, residuals


@torch.no_grad()
def towards(weights: Mapping[str, Tensor], states: Mapping[str, AdmmState], share: float) -> dict[str, Tensor]:
    """Each W moved by a share of its way to Z, above 0 and at most 1: at 1 it is Z.

    Where Z is the truncated SVD of W, the singular values that it cuts off are multiplied by 1 - share.
    """
    if share == 1:
        return {name: states[name].z for name in weights}
    return {name: torch.lerp(full_precision(w), states[name].z, share) for name, w in weights.items()}


@torch.no_grad()
def measure(w: Tensor, state: AdmmState, z_before: Tensor) -> Residuals:
    """Residuals of one layer whose Z was ``z_before`` before the last update."""
    full = full_precision(w)
    squares = torch.stack([t.square().sum() for t in (full - state.z, full, state.z - z_before, state.u)])
    gap, weight, move, dual_scale = squares.tolist()
    return Residuals(gap, weight, move, dual_scale)


def with_rho(state: AdmmState, rho: float, *, follows_rate: bool = False) -> AdmmState:
    """Change the penalty and keep the true dual rho * U. Source: Boyd et al., section 3.4.1.

    Args:
        follows_rate: rho is solved from a pull, and falls because the learning rate or the interval rises or a smaller
            pull is asked for: U stays then. It holds residuals of a net that still moves, and would grow by the ratio.
    """
    if rho == state.rho:
        return state
    keeps = follows_rate and rho < state.rho
    return replace(state, rho=rho, u=state.u if keeps else state.u * (state.rho / rho))


def error(
    tensors: Mapping[str, Tensor], near: Mapping[str, Tensor], added: Callable[[Rows], Rows] = lambda rows: rows
) -> float:
    """norm(tensors - near) / norm(tensors), of all layers together; ``added`` adds up the squares of their parts."""
    rows = added({n: [float((t - near[n]).square().sum()), float(t.square().sum())] for n, t in tensors.items()})
    return _ratio(sum(missed for missed, _ in rows.values()), sum(whole for _, whole in rows.values()))


def total(residuals: Mapping[str, Residuals]) -> Residuals:
    """Residuals of all layers together."""
    return sum(residuals.values(), Residuals(0.0, 0.0, 0.0, 0.0))


@contextmanager
def weights_replaced(weights: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> Iterator[None]:
    """Within the block the weights hold ``values``; afterwards, whatever happened, their own numbers again."""
    own = {name: w.detach().clone() for name, w in weights.items()}
    try:
        put(weights, values)
        yield
    finally:
        put(weights, own)


def put(weights: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> None:
    """Write the values into the weights."""
    for name, w in weights.items():
        w.data.copy_(values[name])
