"""What rho is: solved from a wanted pull, a constant, a schedule, per layer, or balanced by the residuals.

The **pull** is the share of its way to Z - U that W covers between two Z-updates if the loss had no say:
1 - exp(-rho * lr * steps / (1 - momentum)). Too small and U winds up without W ever following.
"""

import fnmatch
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from hodec.admm.updates import Residuals
from hodec.errors import ConfigError, near_matches

WEAK_PULL = 0.3
# Rates and clamps of residual balancing. Source: Boyd et al., section 3.4.1 (mu = 10, tau = 2 there).
BALANCE_RATIO, BALANCE_FACTOR = 10.0, 2.0


@dataclass(frozen=True)
class StepSize:
    """What decides how far one layer moves between two Z-updates.

    Attributes:
        lr: current learning rate of the layer's parameter group.
        momentum: of SGD, 0 for other optimizers.
        steps: optimizer steps between two Z-updates.
        decoupled: the pull is applied to the weight after the step, not to its gradient.
    """

    lr: float
    momentum: float
    steps: float
    decoupled: bool = False

    def pull(self, rho: float) -> float:
        """The pull that a rho gives."""
        if self.decoupled:
            return 1 - max(0.0, 1 - self.lr * rho) ** self.steps
        return -math.expm1(-rho * self.lr * self.steps / (1 - self.momentum))

    def rho(self, pull: float) -> float:
        """The rho that gives a pull; 0 where the learning rate is 0."""
        if self.lr <= 0:
            return 0.0
        if self.decoupled:
            return (1 - (1 - pull) ** (1 / self.steps)) / self.lr
        return -math.log1p(-pull) * (1 - self.momentum) / (self.lr * self.steps)


class Penalty(Protocol):
    """Chooses rho of one layer at the start of each epoch and after each Z-update."""

    @property
    def follows_pull(self) -> bool:
        """Whether the pull may be applied to the weights after the step (rho then has no meaning to the loss)."""

    def rho(self, layer: str, epoch: int, size: StepSize, current: float | None, residuals: Residuals | None) -> float:
        """The next rho; ``residuals`` are given only right after a Z-update."""
        ...


@dataclass(frozen=True)
class Auto:
    """rho such that the pull is ``target`` at the current learning rate: rho * lr stays constant."""

    target: float
    follows_pull: bool = True

    def rho(self, layer: str, epoch: int, size: StepSize, current: float | None, residuals: Residuals | None) -> float:
        return size.rho(self.target) or current or 0.0  # a learning rate of 0 moves nothing: keep rho


@dataclass(frozen=True)
class Constant:
    """The paper's form: one number, or one per layer."""

    values: Mapping[str, float]
    follows_pull: bool = False

    def rho(self, layer: str, epoch: int, size: StepSize, current: float | None, residuals: Residuals | None) -> float:
        return self.values[layer]


@dataclass(frozen=True)
class Stepped:
    """epoch -> rho from that epoch on."""

    schedule: Mapping[int, float]
    follows_pull: bool = False

    def rho(self, layer: str, epoch: int, size: StepSize, current: float | None, residuals: Residuals | None) -> float:
        return self.schedule[max(e for e in self.schedule if e <= epoch)]


@dataclass(frozen=True)
class Balanced:
    """Start from the pull, then double or halve rho of a layer whose relative residuals differ by more than 10x.

    Source: Boyd et al., section 3.4.1, with relative residuals as in Wohlberg, arXiv 1704.06209, 2017.
    """

    first: Auto
    follows_pull: bool = True

    def rho(self, layer: str, epoch: int, size: StepSize, current: float | None, residuals: Residuals | None) -> float:
        if current is None or current == 0:
            return self.first.rho(layer, epoch, size, current, residuals)
        if residuals is None:
            return current
        if residuals.primal > BALANCE_RATIO * residuals.dual:
            return current * BALANCE_FACTOR
        if residuals.dual > BALANCE_RATIO * residuals.primal:
            return current / BALANCE_FACTOR
        return current


def make_penalty(rho: Any, *, pull: float, layers: list[str]) -> Penalty:
    """The penalty that a setting asks for.

    Args:
        rho: ``auto``; ``balanced``; a number > 0; {epoch: number} with an entry for 0; or {layer glob: number}
            that together match every planned layer (the last match counts).
        pull: wanted pull for ``auto`` and ``balanced``, between 0 and 1.

    Raises:
        ConfigError: anything else; the message names the key and what is allowed.
    """
    if not 0 < pull < 1:
        raise ConfigError(f"admm.pull={pull} must lie between 0 and 1, e.g. admm.pull=0.8")
    if rho in ("auto", "balanced"):
        return Auto(pull) if rho == "auto" else Balanced(Auto(pull))
    if isinstance(rho, Mapping) and rho:
        for value in rho.values():
            _check_number(value)
        epochs = [isinstance(key, int) for key in rho]  # as text, '0' is a layer of nn.Sequential
        if any(epochs) and not all(epochs):
            raise ConfigError(f"admm.rho={dict(rho)} mixes epochs and layer globs; give one kind of key")
        if all(epochs):
            schedule = {int(key): float(value) for key, value in rho.items()}
            if 0 not in schedule:
                raise ConfigError(f"admm.rho={dict(rho)} has no entry for epoch 0, e.g. 'admm.rho={{0:1e-3,10:1e-2}}'")
            return Stepped(schedule)
        return Constant(_per_layer(rho, layers))
    _check_number(rho)
    return Constant(dict.fromkeys(layers, float(rho)))


def _per_layer(rho: Mapping[Any, Any], layers: list[str]) -> dict[str, float]:
    values: dict[str, float] = {}
    for glob, value in rho.items():
        matched = [layer for layer in layers if fnmatch.fnmatchcase(layer, glob)]
        if not matched:
            raise ConfigError(f"admm.rho: {glob!r} matches no planned layer.{near_matches(glob, layers)}")
        values |= dict.fromkeys(matched, float(value))
    missing = [layer for layer in layers if layer not in values]
    if missing:
        raise ConfigError(
            f"admm.rho gives no rho to {', '.join(missing[:5])}; add a glob that matches, e.g. '*': 1e-3 first"
        )
    return values


def _check_number(rho: Any) -> None:
    if isinstance(rho, bool) or not isinstance(rho, int | float) or not 0 < rho < math.inf:
        raise ConfigError(
            f"admm.rho={rho!r} is not allowed: give auto, balanced, a number above 0, "
            "'{0:1e-3,10:1e-2}' (from epoch), or '{layer1.*:1e-3}' (per layer)"
        )
