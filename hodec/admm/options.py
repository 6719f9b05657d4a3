"""The settings of ADMM, with their defaults, ranges and meaning; nothing here imports torch."""

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from numbers import Real
from typing import Any, ClassVar, TypedDict

from hodec.errors import ConfigError, Use, near_matches
from hodec.options import BadParts, Option, setting, settings_of

Rho = float | str | Mapping[int, float] | Mapping[str, float]
AskedPull = float | Mapping[int, float]
Interval = int | str | Mapping[int, int | str]

# Pull (0..1) below which U winds up because W does not follow Z. ResNet-20 on CIFAR-10, rho = 1e-3: at a pull of 0.18
# the primal residual rises from 0.68 to 0.87 in three epochs.
WEAK_PULL = 0.3

INTERVAL = re.compile(r"\s*([1-9]\d*)\s*(epoch|step|)s?\s*")


def began(value: object, epoch: int) -> int:
    """The epoch from which on the value of an epoch holds: of {epoch: value} the last key by then, else 0."""
    return max(key for key in value if key <= epoch) if isinstance(value, Mapping) else 0


def at_epoch(value: object, epoch: int) -> Any:
    """What holds in an epoch: of {epoch: value} the last one that began by then, else the value itself."""
    return value[began(value, epoch)] if isinstance(value, Mapping) else value


def _or_by_epoch(bad: Callable[[object], BadParts]) -> Callable[[object], BadParts]:
    """A check of a value that may be given as {epoch: value}, which holds from these epochs on, 0 among them."""

    def check(value: object) -> BadParts:
        if not isinstance(value, Mapping):
            yield from bad(value)
            return
        for key, one in value.items():
            if not isinstance(key, int) or isinstance(key, bool) or key < 0:
                yield "", {key: one}
            else:
                yield from ((f"[{key}]", part) for _, part in bad(one))
        if 0 not in value:
            yield "", dict(value)

    return check


def _bad_number(value: object) -> BadParts:
    """Yield what is no number above 0."""
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < math.inf:
        yield "", value


def _bad_rho(value: object) -> BadParts:
    """Yield what is wrong in rho: a word, a number above 0, {epoch: number} or {layer glob: number}."""
    if not isinstance(value, Mapping):
        if value not in ("auto", "balanced"):
            yield from _bad_number(value)
    elif isinstance(next(iter(value), None), int):  # as text, '0' is a layer of nn.Sequential
        yield from _or_by_epoch(_bad_number)(value)
    else:
        for glob, one in value.items():
            if not isinstance(glob, str):
                yield "", {glob: one}
            else:
                yield from ((f"[{glob}]", part) for _, part in _bad_number(one))
        if not value:
            yield "", {}


def _bad_pull(value: object) -> BadParts:
    """Yield a pull that is no number above 0 and below 1."""
    if not isinstance(value, Real) or isinstance(value, bool) or not 0 < float(value) < 1:
        yield "", value


def _bad_interval(value: object) -> BadParts:
    """Yield an interval that is neither a number of epochs nor a word such as 50steps or 2epochs."""
    if isinstance(value, bool) or not INTERVAL.fullmatch(str(value)):
        yield "", value


RHO = {
    "words": "auto | balanced | a number above 0 | {0: number, epoch: number} | {layer glob: number}",
    "check": _bad_rho,
}


@dataclass(frozen=True)
class ProjectionOptions(Option):
    """When the planned layers are projected onto their ranks, in every mode."""

    group: ClassVar[str] = "admm"
    mode: ClassVar[str]

    update_every: Interval = setting(
        1,
        "between updates of Z and U: epochs from 1, or 50steps, 2epochs; {0: 1, 10: 50steps}: from these epochs on",
        words="whole epochs from 1, or 50steps, 2epochs | {0: interval, epoch: interval}",
        check=_or_by_epoch(_bad_interval),
    )
    track_truncated: bool = setting(True, "test the hard-truncated net each epoch: costs one evaluation each")
    distribute_projection: bool = setting(True, "with several devices: each projects its share of the layers")

    def __post_init__(self) -> None:
        super().__post_init__()
        for key in ("rho", "update_every"):
            if getattr(self, key, "") is None:
                raise ConfigError("{setting}: None given; leave it out for its default", setting=Use(f"admm.{key}"))

    def interval(self, epoch: int) -> tuple[int, str]:
        """``update_every`` in an epoch, as a count and its unit, ``epoch`` or ``step``."""
        count, unit = INTERVAL.findall(str(at_epoch(self.update_every, epoch)))[0]
        return int(count), unit or "epoch"

    def ends_with(self, epoch: int) -> bool:
        """Whether an interval in epochs ends with this one; they are counted from where that interval came to hold."""
        count, unit = self.interval(epoch)
        return unit == "epoch" and (epoch + 1 - began(self.update_every, epoch)) % count == 0

    @property
    def needs_epochs(self) -> bool:
        """Whether the interval is in epochs now or later."""
        every = self.update_every
        return any(self.interval(epoch)[1] == "epoch" for epoch in (every if isinstance(every, Mapping) else (0,)))


@dataclass(frozen=True)
class AdmmOptions(ProjectionOptions):
    """Draws the dense weights towards low rank; rho follows the learning rate, so that the pull stays the same.

    Raises:
        ConfigError: a setting out of range.
    """

    name: ClassVar[str] = "default"
    mode: ClassVar[str] = "admm"

    rho: Rho = setting(
        "auto",
        "auto: from pull; balanced: by the ratio of residuals; 1e-3: constant; {0: 1e-3, 50: 1e-2}: from these epochs "
        "on; {layer1.*: 1e-3, layer2.*: 1e-2}: by layer; numbers above 0",
        **RHO,
    )
    pull: AskedPull = setting(
        0.8,
        "for rho=auto and balanced: share of its way to Z - U that a weight covers per update; above 0, below 1; "
        "{0: 0.5, 10: 0.9}: from these epochs on",
        words="a number above 0 and below 1 | {0: number, epoch: number}",
        check=_or_by_epoch(_bad_pull),
    )
    relax: float = setting(1.0, "over-relaxation of the update; 1 (none) to 1.9", low=1, high=1.9)
    dual: bool = setting(True, "false: U stays 0, the control that is a quadratic penalty")
    tolerance: float = setting(1e-3, "stop when both relative residuals are below it; 0: never", low=0)


@dataclass(frozen=True)
class AdmmPaper(AdmmOptions):
    """ADMM as published: a constant rho, one update of Z and U per epoch, no relaxation, no early stop."""

    name: ClassVar[str] = "paper"

    rho: Rho = setting(1e-3, "constant, above 0", **RHO)
    tolerance: float = setting(0.0, "0: never stop early", low=0)


@dataclass(frozen=True)
class AdmmProject(ProjectionOptions):
    """Hard projection: every few steps the weights themselves are replaced by the nearest ones of the planned ranks.

    There is no Z, U and rho; the optimizer keeps its momentum. Each epoch ends with a projection, so that converting
    changes nothing, unless ``share`` is below 1 or the ranks are still falling. Source: Xu, Li, Zhang, Wen, Wang, Dai,
    Qi, Chen, Lin, Xiong, Trained Rank Pruning for Efficient Deep Neural Networks, arXiv 1812.02402, 2018: section 3.
    """

    name: ClassVar[str] = "project"
    mode: ClassVar[str] = "project"

    update_every: Interval = setting(
        "8steps",
        "between two projections: epochs from 1, or 8steps, 2epochs; {0: 8steps, 10: 50steps}: from these epochs on",
        words="whole epochs from 1, or 8steps, 2epochs | {0: interval, epoch: interval}",
        check=_or_by_epoch(_bad_interval),
    )
    share: float = setting(
        1.0,
        "share of its way to the nearest weight of the planned ranks that a projection moves each weight; below 1 what "
        "lies behind the ranks is multiplied by 1 - share each time, and converting cuts off what is left",
        above=0,
        high=1,
    )
    falling_epochs: int = setting(
        0,
        "epochs over which the ranks that are projected onto fall, step by step, from those at which nothing is lost "
        "to the planned ones; 0: the planned ones from the start",
        low=0,
    )


@dataclass(frozen=True)
class AdmmOff(Option):
    """The control: the same epochs without ADMM, then direct truncation."""

    group: ClassVar[str] = "admm"
    name: ClassVar[str] = "off"

    switch_below: float | None = setting(
        None,
        "end the dense training after an epoch in which the stable ranks of the planned layers moved by less than this "
        "share, on average; its other epochs go to retraining; null: never",
        above=0,
    )


# The ways to draw a net towards its ranks, by ``mode``.
MODES: dict[str, type[AdmmOptions] | type[AdmmProject]] = {kind.mode: kind for kind in (AdmmOptions, AdmmProject)}


def mode_options(mode: str = "admm", **settings: Any) -> AdmmOptions | AdmmProject:
    """The options of a mode.

    Raises:
        ConfigError: an unknown mode, a setting that it does not have, or one out of range.
    """
    if mode not in MODES:
        raise ConfigError(f"mode: {mode!r} given; allowed: {', '.join(MODES)}.{near_matches(mode, [*MODES])}")
    kind = MODES[mode]
    if unknown := [key for key in settings if key not in settings_of(kind)]:
        raise ConfigError(f"{unknown[0]}: mode={mode!r} has no such setting; it has {', '.join(settings_of(kind))}")
    return kind(**settings)


class AdmmSettings(TypedDict, total=False):
    """``mode`` and the fields of its options as keyword arguments, for type checkers."""

    mode: str
    rho: Rho
    pull: AskedPull
    update_every: Interval
    share: float
    falling_epochs: int
    relax: float
    dual: bool
    tolerance: float
    track_truncated: bool
    distribute_projection: bool
