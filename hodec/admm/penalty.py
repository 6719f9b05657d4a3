"""How rho is chosen: solved from a wanted pull, a constant, a schedule, per layer, or balanced by the residuals.

The **pull** is the share of its way to Z - U that W covers between two Z-updates if the loss had no say:
1 - exp(-rho * lr * steps / (1 - momentum)). Too small and U winds up without W ever following.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from hodec.admm.options import AdmmOptions, AdmmProject, AskedPull, Rho, at_epoch
from hodec.admm.updates import Residuals
from hodec.conversion.eligibility import match_names
from hodec.errors import ConfigError, Use, literal


@dataclass(frozen=True)
class StepSize:
    """What decides how far one layer moves between two Z-updates.

    Attributes:
        lr: current learning rate of the layer's parameter group.
        momentum: of SGD, 0 for other optimizers.
        steps: optimizer steps between two Z-updates.
        decoupled: the pull is applied to the weight after the step, not to its gradient.
        dampening: of SGD.
    """

    lr: float
    momentum: float
    steps: float
    decoupled: bool = False
    dampening: float = 0.0

    def pull(self, rho: float) -> float:
        """The pull that a rho gives."""
        if self.decoupled:
            return float(1 - max(0.0, 1 - self.lr * rho) ** self.steps)
        return -math.expm1(-rho * self.lr * self.steps / (1 - self.momentum) * (1 - self.dampening))

    def rho(self, pull: float) -> float:
        """The rho that gives a pull; 0 where the learning rate is 0, or the steps are not known."""
        if self.lr <= 0 or math.isnan(self.steps):
            return 0.0
        if self.decoupled:
            return float((1 - (1 - pull) ** (1 / self.steps)) / self.lr)
        return -math.log1p(-pull) * (1 - self.momentum) / (self.lr * self.steps) / (1 - self.dampening)


@dataclass(frozen=True)
class Moment:
    """One layer when its rho is chosen: in a new epoch, at a new learning rate, or after a Z-update.

    Attributes:
        epoch: number of the epoch, from 0.
        current: its rho so far; 0 where it has none yet.
        residuals: those of the Z-update just done, None at any other moment.
        first: whether no Z-update has been done yet.
        asked_anew: whether another pull is asked for than when its rho was last chosen.
    """

    layer: str
    epoch: int
    size: StepSize
    current: float = 0.0
    residuals: Residuals | None = None
    first: bool = False
    asked_anew: bool = False


@dataclass(frozen=True)
class Penalty:
    """A way to choose the rho of a layer.

    Attributes:
        rho: gives the next rho.
        follows_pull: rho is solved from the pull. The pull may then be applied to the weights after the step, where
            rho has no meaning to the loss.
        follows_rate: rho moves whenever the learning rate does, or what is asked for: U never grows by it.
    """

    rho: Callable[[Moment], float]
    follows_pull: bool = False
    follows_rate: bool = False


# Of a mode that does not pull.
NONE = Penalty(lambda _: 0.0)


def auto(pull: AskedPull) -> Penalty:
    """rho such that the pull is the wanted one at the current learning rate: rho * lr stays constant.

    At a rate of 0, rho stays what it was.
    """
    return Penalty(lambda now: _of_pull(pull, now), follows_pull=True, follows_rate=True)


def _of_pull(pull: AskedPull, now: Moment) -> float:
    return now.size.rho(float(at_epoch(pull, now.epoch))) or now.current


def balanced(pull: AskedPull, ratio: float = 10.0, factor: float = 2.0) -> Penalty:
    """Follow the pull up to the first Z-update, then change rho where the relative residuals are apart.

    It is multiplied or divided by ``factor`` where they differ by ``ratio``. Where a schedule asks for another pull,
    rho is solved from that and changed from there on. Source: Boyd et al., section 3.4.1 (mu = 10, tau = 2), with
    relative residuals as in Wohlberg, arXiv 1704.06209, 2017.
    """

    def rho(now: Moment) -> float:
        # a warm-up begins at a rate whose rho would be far too large later
        if now.first or now.asked_anew or not now.current:
            return _of_pull(pull, now)
        if now.residuals is None:
            return now.current
        if now.residuals.primal > ratio * now.residuals.dual:
            return now.current * factor
        if now.residuals.dual > ratio * now.residuals.primal:
            return now.current / factor
        return now.current

    return Penalty(rho, follows_pull=True)


def penalty_of(options: AdmmOptions | AdmmProject, layers: list[str]) -> Penalty:
    """The penalty of a mode, for the layers of these names; see ``make_penalty``."""
    return make_penalty(options.rho, pull=options.pull, layers=layers) if isinstance(options, AdmmOptions) else NONE


def make_penalty(rho: Rho, *, pull: AskedPull, layers: list[str]) -> Penalty:
    """The penalty that ``AdmmOptions.rho`` and ``pull`` ask for.

    Args:
        rho: checked by ``AdmmOptions``. Globs must match every planned layer together; the last match counts.
        pull: wanted pull for ``auto`` and ``balanced``.
        layers: names of the planned layers.

    Raises:
        PlanError: a glob that matches no planned layer.
        ConfigError: a planned layer that no glob matches.
    """
    if isinstance(rho, str):
        return auto(pull) if rho == "auto" else balanced(pull)
    if not isinstance(rho, Mapping):
        constant = float(rho)
        return Penalty(lambda _: constant)
    if isinstance(next(iter(rho)), int):
        return Penalty(lambda now: float(at_epoch(rho, now.epoch)))
    values: dict[str, float] = {}
    for glob, value in rho.items():
        values |= dict.fromkeys(match_names(str(glob), layers, "admm.rho"), float(value))
    if missing := [layer for layer in layers if layer not in values]:
        raise ConfigError(
            f"{{rho}}: no glob matches {literal(', '.join(missing[:5]))}; put one that matches all first: '*': 1e-3",
            rho=Use("admm.rho"),
        )
    return Penalty(lambda now: values[now.layer])
