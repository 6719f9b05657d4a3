"""The settings of ADMM: to be replaced by hodec.admm.options, which has the same names and fields."""

from dataclasses import dataclass
from typing import ClassVar

from hodec.experiment.config.values import bad_interval, bad_rho
from hodec.options import Option, setting


@dataclass(frozen=True)
class AdmmOptions(Option):
    """Draws the dense weights towards low rank; rho follows the learning rate, so that the pull stays the same."""

    group: ClassVar[str] = "admm"
    name: ClassVar[str] = "default"

    rho: object = setting(
        "auto",
        "auto: from pull; balanced: by the ratio of residuals; 1e-3: constant; {0: 1e-3, 50: 1e-2}: from these epochs "
        "on; {layer1.*: 1e-3, layer2.*: 1e-2}: by layer",
        words="auto | balanced | a number above 0 | {epoch: number} | {layer glob: number}",
        check=bad_rho,
    )
    pull: float = setting(0.8, "for rho=auto: share of its way to Z a weight covers per update", above=0, below=1)
    update_every: int | str = setting(
        1, "between updates of Z and U", words="whole epochs from 1, or 50steps, 2epochs", check=bad_interval
    )
    relax: float = setting(1.0, "over-relaxation of the update; 1: none", low=1, high=1.9)
    dual: bool = setting(True, "false: U stays 0, the control that is a quadratic penalty")
    tolerance: float = setting(1e-3, "stop when both relative residuals are below it; 0: never", low=0)
    track_truncated: bool = setting(True, "test the hard-truncated net at every update: costs one evaluation each")
    distribute_projection: bool = setting(True, "with several devices: each projects its share of the layers")


@dataclass(frozen=True)
class AdmmPaper(AdmmOptions):
    """As published: a constant rho, one update of Z and U per epoch, no relaxation, no early stop."""

    name: ClassVar[str] = "paper"

    rho: object = setting(
        1e-3,
        "constant",
        words="auto | balanced | a number above 0 | {epoch: number} | {layer glob: number}",
        check=bad_rho,
    )
    tolerance: float = setting(0.0, "0: never stop early", low=0)


@dataclass(frozen=True)
class AdmmOff(Option):
    """The control: the same epochs without ADMM, then direct truncation."""

    group: ClassVar[str] = "admm"
    name: ClassVar[str] = "off"
