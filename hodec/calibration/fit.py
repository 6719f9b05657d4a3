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
) -> Fit:
    """The weight and bias of the planned ranks with least error in the outputs.

    Args:
        layer: method, modes and ranks.
        weight: the trained one, (O, I, K_1, ..).
        moments: of the layer's patches and wanted outputs.
        solver: what refines the projection: ``als``, ``admm``, or ``none``; ``svd`` is exact without.
        damping: how strongly the weight is drawn towards the trained one, as a share of C's mean eigenvalue, > 0.
        output_root: symmetric (O, O): the error counts as norm(output_root error), by default as norm(error).

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
    problem = _problem(layer, weight, moments, damping=damping, output_root=output_root)
    near = problem.outer(SOLVERS[solver](layer, problem)).reshape(layer.shape)
    return as_fit(near, moments)


def as_fit(weight: Tensor, moments: FitMoments) -> Fit:
    """A weight (O, I, K_1, ..) with the bias that meets the mean output, and their error."""
    (xx, yx, yy), (x, y) = moments.centred(), moments.means()
    z = weight.double().cpu().flatten(1)
    missed = yy.sum() - 2 * (z * yx).sum() + ((z @ xx) * z).sum()
    return Fit(weight, y - z @ x, float((missed / yy.sum().clamp_min(1e-300)).clamp_min(0)))


def target_weight(weight: Tensor, moments: FitMoments, damping: float = DAMPING) -> Tensor:
    """The best weight of any rank, W* above, float64 on the CPU, in the shape of ``weight`` (O, I, K_1, ..).

    Raises:
        ConfigError: a damping that is not above 0.
    """
    if not damping > 0:
        raise ConfigError(f"damping: {damping!r} given; allowed: a number above 0; {DAMPING} suits most nets")
    xx, yx, _ = moments.centred()
    more = _ridge(xx, damping)
    xx.diagonal().add_(more)
    drawn = yx + more * weight.double().cpu().flatten(1)
    return torch.cholesky_solve(drawn.mT, torch.linalg.cholesky(xx)).mT.reshape(weight.shape)


def _ridge(xx: Tensor, damping: float) -> float:
    return damping * max(float(xx.diagonal().mean()), 1e-30)


# -- the problem in coordinates in which its metric is near to 1 ---------------------------------------------------


@dataclass(frozen=True)
class _Problem:
    """Nearest to ``wanted`` (O, n) in tr (Z - wanted) metric (Z - wanted)^T, with outputs and inputs whitened.

    Attributes:
        metric: (n, n), of mean eigenvalue 1.
        covariance: by which the inputs were whitened.
        output_root: by which the outputs were, or None.
    """

    wanted: Tensor
    metric: Tensor
    covariance: InputCovariance
    output_root: Tensor | None

    @property
    def whole(self) -> bool:
        """Whether the metric is 1: the format can mix all numbers of a patch."""
        return any(len(root.axes) == len(self.covariance.sizes) for root in self.covariance.roots)

    def outer(self, near: Tensor) -> Tensor:
        """Whitened weight (O, n) -> the weight itself."""
        plain = self.covariance.undo(near)
        return plain if self.output_root is None else torch.linalg.solve(self.output_root, plain)

    def loss(self, near: Tensor) -> float:
        """What a whitened weight (O, n) misses."""
        off = near - self.wanted
        return float(((off @ self.metric) * off).sum())


def _problem(
    layer: LayerPlan, weight: Tensor, moments: FitMoments, *, damping: float, output_root: Tensor | None
) -> _Problem:
    best = target_weight(weight, moments, damping).flatten(1)
    if output_root is not None and len(layer.modes.outputs) == 1:  # split outputs do not mix
        output_root = output_root.double().cpu()
        best = output_root @ best
    else:
        output_root = None
    xx = moments.centred()[0]
    xx.diagonal().add_(_ridge(xx, damping))
    covariance = kronecker(layer, xx)
    turned = InputCovariance(covariance.sizes, tuple(AxisRoot(r.axes, r.root, r.inverse.mT) for r in covariance.roots))
    metric = turned.undo(turned.undo(xx).mT)
    return _Problem(covariance.apply(best), metric / metric.diagonal().mean(), covariance, output_root)


def kronecker(layer: LayerPlan, xx: Tensor) -> InputCovariance:
    """The covariance of patches as a Kronecker product over what the format can mix, from its partial traces.

    Roots are Cholesky factors, a tenth of the time of symmetric roots: any C = S S^T serves.
    """
    sizes, roots = input_sizes(layer), []
    for axes in layer.format.mixable(layer.shape, layer.modes):
        others, side = [axis for axis in range(len(sizes)) if axis not in axes], math.prod(sizes[axis] for axis in axes)
        if side == 1:
            continue
        order = [*others, *axes]
        split = xx.reshape(*sizes, *sizes).permute(*order, *(len(sizes) + axis for axis in order))
        part = torch.einsum("iaib->ab", split.reshape(-1, side, len(xx) // side, side))
        root = torch.linalg.cholesky(part / part.diagonal().mean())
        one = torch.eye(side, dtype=root.dtype)
        roots.append(AxisRoot(tuple(axes), root, torch.linalg.solve_triangular(root, one, upper=False)))
    return InputCovariance(sizes, tuple(roots))


# -- solvers: each returns the whitened weight (O, n) --------------------------------------------------------------


def _projection(layer: LayerPlan, problem: _Problem) -> Tensor:
    return _project(layer, problem.wanted)


def _project(layer: LayerPlan, matrix: Tensor) -> Tensor:
    return layer.format.project(matrix.reshape(layer.shape), layer.ranks, layer.modes).flatten(1)


def _als(layer: LayerPlan, problem: _Problem) -> Tensor:
    """Alternating least squares from the projection; each factor by some steps of conjugate gradients."""
    fmt, near = layer.format, _projection(layer, problem)
    if problem.whole and fmt.orthogonal and len(fmt.unfoldings(near.reshape(layer.shape), layer.modes)) == 1:
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
    residual = adjoint((problem.wanted - made) @ problem.metric)
    eased = scale * residual
    step, height = eased, float((residual * eased).sum())
    first = height
    for _ in range(steps):
        if height <= 1e-20 or height <= 1e-8 * first:
            break
        moved = adjoint(weight(step) @ problem.metric)
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
    fixed = problem.wanted @ problem.metric
    root = torch.linalg.cholesky(problem.metric + rho * torch.eye(len(problem.metric), dtype=near.dtype))
    for _ in range(rounds):
        free = torch.cholesky_solve((fixed + rho * (near - dual)).mT, root).mT
        near = _project(layer, free + dual)
        dual = dual + free - near
        loss = problem.loss(near)
        if loss < least:
            best, least = near, loss
    return best


SOLVERS: dict[str, Callable[[LayerPlan, _Problem], Tensor]] = {"als": _als, "admm": _admm, "none": _projection}
