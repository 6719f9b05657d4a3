"""FactorSGD: SGD for a net with factorized layers, whose factors move by an update made for them."""

import logging
from collections.abc import Callable, Mapping, Sequence
from inspect import unwrap
from numbers import Real
from typing import Any, cast

import torch
from torch import Tensor, nn

from hodec.errors import ConfigError, listed, near_matches
from hodec.formats.base import Core
from hodec.inference import check_module
from hodec.layers.base import FactorizedLayer, factor_parameters
from hodec.optim.cores import as_matrix, cores_of, grams, through

log = logging.getLogger(__name__)

# Added to a Gram matrix, as a share of its mean eigenvalue: a step along a direction that has all but gone is scaled by
# at most 1,000 over that.
DAMPING = 1e-3
# A polynomial whose fifth iterate takes every singular value between 0.001 and 1 to between 0.7 and 1.2.
# Source: Jordan et al., Muon: an optimizer for hidden layers in neural networks, 2024.
NEWTON_SCHULZ, ROUNDS = (3.4445, -4.7750, 2.0315), 5


def param_groups(  # noqa: PLR0913
    net: nn.Module,
    *,
    lr: float,
    factor_lr: float | None = None,
    weight_decay: float = 0.0,
    factor_decay: float | None = None,
) -> list[dict[str, Any]]:
    """The parameters of a net as groups for any optimizer: the factors of its factorized layers, and all others.

    Args:
        net: a net with factorized layers, or a dense one, which has no group of factors.
        lr, weight_decay: of the others.
        factor_lr, factor_decay: of the factors; by default those of the others.

    Returns:
        ``[{"params": .., "lr": .., "weight_decay": .., "name": "others"}, {.., "name": "factors"}]``, in this order,
        without a group that would be empty; no parameter is in both, and a shared one is there once.

    Raises:
        ConfigError: no module, or a rate or decay that is no number of at least 0.

    Examples:
        >>> net = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
        >>> plan = hodec.make_plan(net, 4, method="svd", example_input=torch.zeros(1, 64))
        >>> groups = hodec.param_groups(hodec.convert(net, plan), lr=1e-3, factor_lr=3e-4)
        >>> [(group["name"], group["lr"], len(group["params"])) for group in groups]
        [('others', 0.001, 2), ('factors', 0.0003, 4)]
        >>> optimizer = torch.optim.AdamW(groups)
    """
    check_module(net)
    given = {"lr": lr, "factor_lr": factor_lr, "weight_decay": weight_decay, "factor_decay": factor_decay}
    for what, number in given.items():
        if number is not None and not (isinstance(number, (Real, Tensor)) and number >= 0):
            raise ConfigError(f"{what}: {number!r} given; allowed: a number of at least 0")
    factors = {p: None for layer in factorized_layers(net) for p in factor_parameters(layer)}
    others = [p for p in net.parameters() if p not in factors]
    own_lr = lr if factor_lr is None else factor_lr
    own_decay = weight_decay if factor_decay is None else factor_decay
    groups = [
        {"params": others, "lr": lr, "weight_decay": weight_decay, "name": "others"},
        {"params": list(factors), "lr": own_lr, "weight_decay": own_decay, "name": "factors"},
    ]
    return [group for group in groups if group["params"]]


def factorized_layers(net: nn.Module) -> list[FactorizedLayer]:
    """The factorized layers of a net, each once; of those with the same factors one, if it can be no embedding."""
    found: dict[frozenset[nn.Parameter], FactorizedLayer] = {}
    for layer in (module for module in net.modules() if isinstance(module, FactorizedLayer)):
        held = found.setdefault(own := frozenset(factor_parameters(layer)), layer)
        if held.layer_type.is_embedding and not layer.layer_type.is_embedding:
            found[own] = layer
    return list(found.values())


class FactorSGD(torch.optim.SGD):
    """SGD with momentum for a net with factorized layers, whose factors move by an update of their own.

    - ``muon``: the momentum of each factor, as a matrix, is replaced by the nearest orthogonal one, and the factor
      moves by ``factor_lr`` times its own norm along it; its norm stays, and it has no decay. A factor whose gradient
      is 0 everywhere stands still, and so does one that is 0 itself, of which a warning tells. Meant for layers behind
      which a norm follows, as the scale of their weight hardly moves. Source: Jordan et al., Muon, 2024; for factors:
      docs/training.md.
    - ``scaled_gd``: the gradient of each factor is divided by the Gram matrices of the others, which takes the factors'
      own scales out of the step: its rate is that of the dense layer. Source: Tong, Ma, Chi, JMLR 22, 2021.
    - ``sgd``: the gradient as it is.

    ``decay="product"`` adds ``weight_decay`` times the gradient of |W|^2 / 2 of the product W instead of that of the
    factors. Source: Khodak, Tenenholtz, Mackey, Fusi, Initialization and Regularization of Factorized Neural Layers,
    ICLR 2021: section 3.2. Under ``scaled_gd`` that *is* the decay of the factors.

    Everything else (norms, biases, dense layers) moves by plain SGD. The state is SGD's: momentum buffers. What a group
    says (rate, momentum, decay, ``maximize``) is true of the parameters in it, also once they are moved to another.

    Args:
        net: the net whose parameters are trained; its layers are looked up once, so convert it before.
        lr: of all but the factors.
        factors: ``muon``, ``scaled_gd`` or ``sgd``.
        factor_lr: of the factors; by default ``lr``, and 0.008 for ``muon``, where it is a share of a factor's norm.
        momentum, nesterov, weight_decay: as in SGD; ``nesterov`` needs a momentum.
        decay: ``factors`` or ``product``.

    Raises:
        ConfigError: no module, an unknown update or decay, or a rate or decay below 0.

    Examples:
        >>> net = nn.Sequential(nn.Conv2d(8, 16, 3), nn.BatchNorm2d(16), nn.ReLU())
        >>> plan = hodec.make_plan(net, 4, method="tucker", example_input=torch.zeros(1, 8, 8, 8))
        >>> small = hodec.convert(net, plan)
        >>> optimizer = hodec.FactorSGD(small, lr=0.02, factors="muon")
    """

    def __init__(  # noqa: PLR0913
        self,
        net: nn.Module,
        lr: float,
        *,
        factors: str = "muon",
        factor_lr: float | None = None,
        momentum: float = 0.9,
        nesterov: bool = True,
        weight_decay: float = 0.0,
        decay: str = "factors",
    ) -> None:
        for what, given, known in (("factors", factors, UPDATES), ("decay", decay, ("factors", "product"))):
            if given not in known:
                raise ConfigError(
                    f"{what}: {given!r} given; allowed: {', '.join(known)}.{near_matches(given, [*known])}"
                )
        own_decay = 0.0 if factors == "muon" else weight_decay
        if factor_lr is None and factors == "muon":
            factor_lr = 0.008
        groups = param_groups(net, lr=lr, factor_lr=factor_lr, weight_decay=weight_decay, factor_decay=own_decay)
        super().__init__(
            groups, lr=lr, momentum=momentum, nesterov=nesterov and momentum > 0, weight_decay=weight_decay
        )
        self.factors, self.decay, self.layers = factors, decay, factorized_layers(net)
        if factors == "muon" and (still := [name for name, one in net.named_modules() if _has_zero_factor(one)]):
            log.warning(
                "muon cannot move a factor that is 0, as in %s, nor does the layer's weight then: take "
                "factors='scaled_gd' (optimizer=scaled_gd), or leave such a layer dense",
                listed(still),
            )

    def __getstate__(self) -> dict[str, Any]:
        """What copies and pickles are made of; torch's own leaves out what a subclass has."""
        return {**super().__getstate__(), **{key: vars(self)[key] for key in ("factors", "layers", "decay")}}

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One step; returns what ``closure`` returned."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        layers = [layer for layer in self.layers if any(p.grad is not None for p in factor_parameters(layer))]
        moved = UPDATES[self.factors](self, layers)
        held = {parameter: parameter.grad for parameter in moved}
        for parameter in held:
            parameter.grad = None  # SGD passes it by
        # not as torch wraps it once any plain SGD is made: hooks on this optimizer would be called twice
        unwrap(torch.optim.SGD.step, stop=lambda step: not hasattr(step, "hooked"))(self)
        for parameter, grad in held.items():
            parameter.grad = grad
        return loss

    def _muon(self, layers: Sequence[FactorizedLayer]) -> list[nn.Parameter]:
        """Move the factors; returns them."""
        groups = self._groups()
        parameters = [p for layer in layers for p in factor_parameters(layer) if p.grad is not None and p in groups]
        ahead = {p: self._momentum(p, groups[p]) for p in parameters}
        _orthogonalize([core for layer in layers for core in cores_of(layer, _for(layer, ahead))])
        for parameter, step in ahead.items():
            _turn(parameter, step, groups[parameter]["lr"])
        return parameters

    def _groups(self) -> dict[nn.Parameter, dict[str, Any]]:
        """Parameter -> the group that it is in now."""
        return {parameter: group for group in self.param_groups for parameter in group["params"]}

    def _momentum(self, parameter: nn.Parameter, group: Mapping[str, Any]) -> Tensor:
        """The gradient after momentum, of which the buffer is kept as SGD keeps it."""
        grad, decay = cast(Tensor, parameter.grad), float(group["momentum"])
        grad = -grad if group["maximize"] else grad
        if not decay:
            return grad.clone()
        state = self.state[parameter]
        held = state.get("momentum_buffer")
        buffer = grad.clone() if held is None else held.mul_(decay).add_(grad)
        state["momentum_buffer"] = buffer
        return grad + decay * buffer if group["nesterov"] else buffer.clone()

    def _scaled(self, layers: Sequence[FactorizedLayer]) -> list[nn.Parameter]:
        """Divide the gradients by the Gram matrices of the other factors; SGD does the rest."""
        for layer in layers:
            gradients = cores_of(layer, _for(layer, _gradients(layer)))
            for core, gram in zip(gradients, grams(cores_of(layer)), strict=True):
                right = None if gram.right is None else _inverse(gram.right)
                _write(core, through(core, _inverse(gram.left), right))
        return []

    def _plain(self, layers: Sequence[FactorizedLayer]) -> list[nn.Parameter]:
        """Add the gradient of the product's decay, if there is any, less that of the factor's, which SGD adds."""
        groups = self._groups() if self.decay == "product" else {}
        for layer in layers:
            found = {p: groups[p] for p in _gradients(layer) if p in groups and groups[p]["weight_decay"]}
            decayed = _product_decay(layer) if found else {}
            for parameter, group in found.items():
                share = -group["weight_decay"] if group["maximize"] else group["weight_decay"]
                cast(Tensor, parameter.grad).add_(decayed[parameter] - parameter, alpha=share)
        return []


# What moves the factors before SGD moves the rest; each returns the parameters that SGD is to pass by.
UPDATES: dict[str, Callable[[FactorSGD, Sequence[FactorizedLayer]], list[nn.Parameter]]] = {
    "muon": FactorSGD._muon,
    "scaled_gd": FactorSGD._scaled,
    "sgd": FactorSGD._plain,
}


def _has_zero_factor(module: nn.Module) -> bool:
    if not isinstance(module, FactorizedLayer):
        return False
    return any(not p.is_meta and p.requires_grad and not p.any() for p in factor_parameters(module))


def _turn(parameter: nn.Parameter, step: Tensor, rate: float) -> None:
    """Move a factor by ``rate`` times its norm against ``step``, in float32 at least, and keep its norm."""
    exact = torch.promote_types(parameter.dtype, torch.float32)
    given, step = parameter.to(exact), step.to(exact)
    norm = given.norm()
    moved = given - step * (rate * norm / step.norm().clamp_min(1e-30))
    moved = moved * (norm / moved.norm().clamp_min(1e-30))
    # momentum of old would go on at full length for as long as a loss leaves the factor out
    parameter.copy_(torch.where(cast(Tensor, parameter.grad).any(), moved, given))


def _product_decay(layer: FactorizedLayer) -> dict[nn.Parameter, Tensor]:
    """The gradient of |W|^2 / 2 to each parameter."""
    factors, found = cores_of(layer), {p: torch.zeros_like(p) for p in factor_parameters(layer)}
    for core, factor, gram in zip(cores_of(layer, found), factors, grams(factors), strict=True):
        _write(core, through(factor, gram.left, gram.right))
    return found


def _gradients(layer: FactorizedLayer) -> dict[nn.Parameter, Tensor]:
    return {p: p.grad for p in factor_parameters(layer) if p.grad is not None}


def _for(layer: FactorizedLayer, values: Mapping[nn.Parameter, Tensor]) -> dict[nn.Parameter, Tensor]:
    """The values of a layer's parameters; zeros for a frozen one, which has none."""
    return {p: values[p] if p in values else torch.zeros_like(p) for p in factor_parameters(layer)}


def _inverse(gram: Tensor) -> Tensor:
    """(B, n, n) -> (G + damping)^-1; a zero matrix, as where a factor is zero, counts as the identity."""
    n = gram.shape[-1]
    mean = gram.diagonal(dim1=-2, dim2=-1).mean(-1)[:, None, None]
    eye = torch.eye(n, dtype=gram.dtype, device=gram.device)
    damped = torch.where(mean > 0, gram + DAMPING * mean * eye, eye)
    return torch.cholesky_inverse(torch.linalg.cholesky(damped))


def _write(core: Core, values: Tensor) -> None:
    core.values.copy_(values.reshape(core.values.shape))


def _orthogonalize(cores: Sequence[Core]) -> None:
    """Replace each matrix by the nearest one with equal singular values, in place; those of equal shape together."""
    by_shape: dict[tuple[int, ...], list[Core]] = {}
    for core in cores:
        by_shape.setdefault(tuple(as_matrix(core).shape[1:]), []).append(core)
    for same in by_shape.values():
        matrices = [as_matrix(core) for core in same]
        turned = newton_schulz(torch.cat(matrices)).split([len(matrix) for matrix in matrices])
        for core, matrix in zip(same, turned, strict=True):
            _write(core, matrix)


def newton_schulz(matrices: Tensor) -> Tensor:
    """(B, m, n) -> U V^T of each one's singular value decomposition, roughly: singular values of 0.7 to 1.2."""
    wide = matrices.mT if matrices.shape[1] > matrices.shape[2] else matrices
    least = torch.finfo(wide.dtype).tiny
    x = wide / wide.abs().amax((1, 2), keepdim=True).clamp_min(least)  # squares of small numbers would be 0
    x = x / x.flatten(1).norm(dim=1).clamp_min(least)[:, None, None]
    a, b, c = NEWTON_SCHULZ
    for _ in range(ROUNDS):
        square = x @ x.mT
        x = a * x + (b * square + c * square @ square) @ x
    return cast(Tensor, x.mT if matrices.shape[1] > matrices.shape[2] else x)
