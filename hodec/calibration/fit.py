"""The weight of planned ranks whose outputs are nearest to those of the dense layer, by least squares.

With the covariance C of a layer's patches x in the compressed net and the outputs y of the dense layer, the error of a
weight Z and the bias that goes with it is

    E |y - Z x - b|^2 + d |Z - W|^2 = tr (Z - W*) (C + d 1) (Z - W*)^T + const,    W* = (Cov(y, x) + d W) (C + d 1)^-1

so W* is the best weight of any rank, drawn towards the trained W by the damping d, and what is left is to find the
nearest Z of the planned ranks in the metric C + d 1. For one matrix with all of O as its rows (``svd``) that is
reduced-rank regression, which has a closed form; other formats start from the projection in a Kronecker product of
covariances and are refined by alternating least squares (Z is linear in each factor) or by ADMM.

Source: Izenman, Reduced-rank regression for the multivariate linear model, J. Multivariate Analysis 5, 1975; Zhang,
Zou, He, Sun, Accelerating Very Deep Convolutional Networks, TPAMI 2016: section 2.2 (asymmetric reconstruction).
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from hodec.calibration.input_covariance import AxisRoot, InputCovariance, input_sizes
from hodec.calibration.moments import FitMoments
from hodec.errors import ConfigError, PlanError
from hodec.formats.layer_types import LAYER_TYPES
from hodec.formats.roles import Role
from hodec.plan.layer import LayerPlan

# Damping, as a share of the mean eigenvalue of C.
DAMPING = 1e-3
# Numbers in a patch up to which a fit is computed in float64: beyond, float32 takes half of the time and memory, and
# the damping keeps its Cholesky factors far from singular.
FLOAT64_SIDE = 1024
# Alternating least squares: sweeps over all factors, steps of conjugate gradients for each factor, and the least gain
# of a sweep, as a share of the loss, that another one follows.
SWEEPS, CG_STEPS, LEAST_GAIN = 6, 10, 1e-3
# Multiply-adds that refining one layer may take, about 5 s of one core; each step takes O n^2, so that layers of more
# than some 1500 numbers in a patch get fewer steps.
WORK = 5e10
# ADMM: rounds, and rho, in units of the metric's mean eigenvalue.
ROUNDS, RHO = 40, 1.0


@dataclass(frozen=True)
class Fit:
    """What a layer becomes.

    Attributes:
        weight: (O, I, K_1, ..) of the planned ranks, float64: decomposing it at these ranks loses nothing.
        bias: (O,) float64, by which the mean output is met.
        error: share of the variance of the wanted outputs that is missed, on the data of the moments.
    """

    weight: Tensor
    bias: Tensor
    error: float


def fittable(layer: LayerPlan) -> bool:
    """Whether a layer has one weight, of no other layer's, that is multiplied by patches of its input."""
    layer_type = LAYER_TYPES[layer.layer_type]
    looked_up = layer_type.is_embedding or layer_type.stacked
    return layer.role is Role.LAYER and layer.groups == 1 and not looked_up and not layer.ties


@torch.no_grad()
def fit_layer(
    layer: LayerPlan,
    weight: Tensor,
    moments: FitMoments,
    *,
    solver: str = "als",
    damping: float = DAMPING,
    output_root: Tensor | None = None,
    metric: "Metric | None" = None,
) -> Fit:
    """The weight and bias of the planned ranks with least error in the outputs.

    Args:
        layer: method, modes and ranks.
        weight: the trained one, (O, I, K_1, ..).
        moments: of the layer's patches and wanted outputs.
        solver: what refines the projection: ``als``, ``admm``, or ``none``; ``svd`` is exact without.
        damping: how strongly the weight is drawn towards the trained one, as a share of C's mean eigenvalue, > 0.
        output_root: symmetric (O, O): the error counts as norm(output_root error), by default as norm(error).
        metric: ``metric_of`` these patches at this damping, where that is known already.

    Raises:
        ConfigError: an unknown solver, or a damping out of range.
        DataError: moments of no data.
        PlanError: the layer has no weight of its own that meets patches, or moments of another shape.
        TrainingError: NaN or Inf in the data.
    """
    if solver not in SOLVERS:
        raise ConfigError(f"solver: {solver!r} given; allowed: {', '.join(SOLVERS)}")
    if not fittable(layer) or moments.shape != layer.shape:
        raise PlanError(f"{layer!r} cannot be fitted to data of a weight {moments.shape}; leave it as it is")
    problem = _problem(layer, weight, moments, metric or metric_of(layer, moments, damping), output_root)
    near = problem.outer(SOLVERS[solver](layer, problem)).reshape(layer.shape)
    return as_fit(near, moments)


def as_fit(weight: Tensor, moments: FitMoments) -> Fit:
    """A weight (O, I, K_1, ..) with the bias that meets the mean output, and their error."""
    (x, y), yx = moments.means(), moments.cross_covariance()
    xx = moments.covariance().to(fit_dtype(len(x)))
    z = weight.double().cpu().flatten(1)
    wanted = float((moments.yy / moments.count - y.square()).sum())
    missed = wanted - 2 * float((z * yx).sum()) + float(((z.to(xx.dtype) @ xx) * z).sum())
    return Fit(weight, y - z @ x, max(0.0, missed / max(wanted, 1e-300)))


def fit_dtype(side: int) -> torch.dtype:
    """What fits of so many numbers in a patch are computed in."""
    return torch.float64 if side <= FLOAT64_SIDE else torch.float32


def target_weight(weight: Tensor, moments: FitMoments, damping: float = DAMPING) -> Tensor:
    """The best weight of any rank, W* above, float64 on the CPU, in the shape of ``weight`` (O, I, K_1, ..).

    Raises:
        ConfigError: a damping that is not above 0.
    """
    _, root, ridge = _damped(moments, damping)
    return _regression(weight, moments, root, ridge).double().reshape(weight.shape)


def _damped(moments: FitMoments, damping: float) -> tuple[Tensor, Tensor, float]:
    """C + d 1 in the type that fits of this size are computed in, its Cholesky factor, and d."""
    if not damping > 0:
        raise ConfigError(f"damping: {damping!r} given; allowed: a number above 0; {DAMPING} suits most nets")
    xx = moments.covariance()
    rounding = moments.rounding * float(moments.xx.diagonal().mean()) / moments.count
    ridge = max(damping * float(xx.diagonal().mean()), rounding, 1e-30)
    xx.diagonal().add_(ridge)
    near = xx.to(fit_dtype(len(xx)))
    root, failed = torch.linalg.cholesky_ex(near)
    if int(failed):  # few rows of one strong direction: float32 does not tell the damping from rounding
        near = xx
        root, failed = torch.linalg.cholesky_ex(near)
    # the rounding of a mean much larger than what varies about it: no more than is added is told apart
    while int(failed):
        xx.diagonal().add_(9 * ridge)
        ridge *= 10
        root, failed = torch.linalg.cholesky_ex(near)
    return near, root, ridge


def _regression(weight: Tensor, moments: FitMoments, root: Tensor, ridge: float) -> Tensor:
    """W* (O, n), from the Cholesky factor of C + d 1."""
    drawn = moments.cross_covariance() + ridge * weight.double().cpu().flatten(1)
    return torch.cholesky_solve(drawn.mT.to(root.dtype), root).mT


# -- the problem in coordinates in which its metric is near to 1 ---------------------------------------------------


@dataclass(frozen=True)
class Metric:
    """C + d 1 of a layer's patches, factorized: fits to the same patches share it.

    Attributes:
        xx: (n, n), float64, or float32 for wide patches; so is all that follows.
        ridge: d.
        root: Cholesky factor of ``xx``.
        covariance: the Kronecker product near to it by which inputs are whitened, with inverses.
        scale: ``xx`` is divided by this for a mean eigenvalue near to 1.
    """

    xx: Tensor
    ridge: float
    root: Tensor
    covariance: InputCovariance
    scale: float

    @property
    def whole(self) -> bool:
        """Whether it is 1 in whitened coordinates: the format can mix all numbers of a patch."""
        return any(len(root.axes) == len(self.covariance.sizes) for root in self.covariance.roots)

    def times(self, near: Tensor) -> Tensor:
        """A whitened weight (O, n) times the metric in whitened coordinates."""
        if self.whole:
            return near
        roots = (AxisRoot(r.axes, r.root, cast(Tensor, r.inverse).mT) for r in self.covariance.roots)
        turned = InputCovariance(self.covariance.sizes, tuple(roots))
        return turned.undo(self.covariance.undo(near) @ self.xx / self.scale)


def metric_of(layer: LayerPlan, moments: FitMoments, damping: float = DAMPING) -> Metric:
    """The metric of the patches that were added.

    Raises:
        ConfigError: a damping that is not above 0.
        DataError: moments of no data.
        TrainingError: NaN or Inf in the data.
    """
    xx, root, ridge = _damped(moments, damping)
    return Metric(xx, ridge, root, kronecker(layer, xx).inverted(), float(xx.diagonal().mean()))


@dataclass(frozen=True)
class _Problem:
    """Nearest to ``wanted`` (O, n) in tr (Z - wanted) metric (Z - wanted)^T, with outputs and inputs whitened.

    Attributes:
        output_root: by which the outputs were whitened, or None.
    """

    wanted: Tensor
    metric: Metric
    output_root: Tensor | None

    def outer(self, near: Tensor) -> Tensor:
        """Whitened weight (O, n) -> the weight itself, float64."""
        plain = self.metric.covariance.undo(near).double()
        return plain if self.output_root is None else torch.linalg.solve(self.output_root, plain)

    def loss(self, near: Tensor) -> float:
        """What a whitened weight (O, n) misses."""
        off = near - self.wanted
        return float((self.metric.times(off) * off).sum())


def _problem(
    layer: LayerPlan, weight: Tensor, moments: FitMoments, metric: Metric, output_root: Tensor | None
) -> _Problem:
    best = _regression(weight, moments, metric.root, metric.ridge)
    if output_root is not None and len(layer.modes.outputs) == 1:  # split outputs do not mix
        output_root = output_root.double().cpu()
        best = output_root.to(best.dtype) @ best
    else:
        output_root = None
    return _Problem(metric.covariance.apply(best), metric, output_root)


def kronecker(layer: LayerPlan, xx: Tensor) -> InputCovariance:
    """The covariance of patches as a Kronecker product over what the format can mix, from its partial traces.

    Roots are Cholesky factors, a tenth of the time of symmetric roots: any C = S S^T serves. They have no inverses.
    """
    sizes, roots = input_sizes(layer), []
    for axes in layer.format.mixable(layer.shape, layer.modes):
        others, side = [axis for axis in range(len(sizes)) if axis not in axes], math.prod(sizes[axis] for axis in axes)
        if side == 1:
            continue
        order = [*others, *axes]
        split = xx.reshape(*sizes, *sizes).permute(*order, *(len(sizes) + axis for axis in order))
        part = torch.einsum("iaib->ab", split.reshape(-1, side, len(xx) // side, side))
        part = part / part.diagonal().mean()
        roots.append(AxisRoot(tuple(axes), torch.linalg.cholesky(part)))
    return InputCovariance(sizes, tuple(roots))


# -- solvers: each returns the whitened weight (O, n) --------------------------------------------------------------


def _projection(layer: LayerPlan, problem: _Problem) -> Tensor:
    return _project(layer, problem.wanted)


def _project(layer: LayerPlan, matrix: Tensor) -> Tensor:
    return layer.format.project(matrix.reshape(layer.shape), layer.ranks, layer.modes).flatten(1)


def _als(layer: LayerPlan, problem: _Problem) -> Tensor:
    """Alternating least squares from the projection; each factor by some steps of conjugate gradients."""
    fmt, near = layer.format, _projection(layer, problem)
    if problem.metric.whole and fmt.orthogonal and len(fmt.unfoldings(near.reshape(layer.shape), layer.modes)) == 1:
        return near  # the one truncated SVD is exact
    losses, steps = [problem.loss(near)], WORK / near.numel() / near.shape[1]
    factors = fmt.decompose(near.reshape(layer.shape), layer.ranks, layer.modes)
    sweeps = max(1, min(SWEEPS, int(steps / len(factors) / CG_STEPS)))
    per_factor = max(2, min(CG_STEPS, int(steps / len(factors) / sweeps)))
    for _ in range(sweeps):
        for k in range(len(factors)):
            factors[k] = _improved(layer, problem, factors, k, steps=per_factor)
        made = fmt.reconstruct(factors, layer.shape, layer.modes)
        losses.append(problem.loss(made.flatten(1)))
        if losses[-1] < losses[-2]:
            near = made.flatten(1)
        if losses[-1] > (1 - LEAST_GAIN) * losses[-2]:
            break
        if fmt.orthogonal:  # orthonormal factors again, for which the least squares are well conditioned
            factors = fmt.decompose(made, layer.ranks, layer.modes)
    return near


def _improved(layer: LayerPlan, problem: _Problem, factors: Sequence[Tensor], k: int, *, steps: int) -> Tensor:
    """Factor ``k`` nearer to its least-squares solution while the others stay: the error never rises."""
    fmt = layer.format

    def weight(factor: Tensor, others: Sequence[Tensor] = factors) -> Tensor:
        return fmt.reconstruct([*others[:k], factor, *others[k + 1 :]], layer.shape, layer.modes).flatten(1)

    made, adjoint = _adjoint(weight, factors[k])
    squares = [factor.square() for factor in factors]
    _, of_squares = _adjoint(lambda factor: weight(factor, squares), factors[k])
    lengths = of_squares(torch.ones_like(made))
    scale = lengths.clamp_min(1e-12 * float(lengths.max())).reciprocal()  # of each number's column, squared
    factor = factors[k]
    residual = adjoint(problem.metric.times(problem.wanted - made))
    eased = scale * residual
    step, height = eased, float((residual * eased).sum())
    first = height
    for _ in range(steps):
        if height <= 1e-20 or height <= 1e-8 * first:
            break
        moved = adjoint(problem.metric.times(weight(step)))
        length = height / max(float((step * moved).sum()), 1e-300)
        factor, residual = factor + length * step, residual - length * moved
        eased = scale * residual
        height, before = float((residual * eased).sum()), height
        step = eased + height / before * step
    return factor


def _adjoint(linear: Callable[[Tensor], Tensor], at: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """The value of a linear function, and its adjoint."""
    with torch.enable_grad():
        given = at.detach().clone().requires_grad_()
        value = linear(given)

    def adjoint(cotangent: Tensor) -> Tensor:
        (found,) = torch.autograd.grad(value, given, cotangent, retain_graph=True)
        return found

    return value.detach(), adjoint


def _admm(layer: LayerPlan, problem: _Problem) -> Tensor:
    """ADMM: W by least squares on the outputs and the pull to Z, Z by projection; the best Z of all rounds."""
    near = best = _projection(layer, problem)
    least, dual = problem.loss(near), torch.zeros_like(near)
    rho, rounds = RHO, max(5, min(ROUNDS, int(WORK / near.numel() / near.shape[1] / 3)))
    one = torch.eye(near.shape[1], dtype=near.dtype)
    metric = problem.metric.times(one)
    metric = metric / metric.diagonal().mean()
    fixed, root = problem.wanted @ metric, torch.linalg.cholesky(metric + rho * one)
    for _ in range(rounds):
        free = torch.cholesky_solve((fixed + rho * (near - dual)).mT, root).mT
        near = _project(layer, free + dual)
        dual = dual + free - near
        loss = problem.loss(near)
        if loss < least:
            best, least = near, loss
    return best


SOLVERS: dict[str, Callable[[LayerPlan, _Problem], Tensor]] = {"als": _als, "admm": _admm, "none": _projection}
