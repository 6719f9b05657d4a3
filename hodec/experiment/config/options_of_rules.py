"""The settings of each rank rule: to be replaced by the rules of hodec.ranks, which have the same names and fields."""

from dataclasses import dataclass
from typing import ClassVar

from hodec.errors import ConfigError, Use
from hodec.experiment.config.values import bad_filled_names, bad_names
from hodec.options import Option, argument, setting


@dataclass(frozen=True)
class RankRule(Option):
    """Base of the settings of all rank rules.

    Attributes:
        runs_net: what it does with a net that can be run, in words. Such a rule serves no plan without training.
            Empty for rules that look at layers only.
    """

    group: ClassVar[str] = "ranks"
    runs_net: ClassVar[str] = ""


@dataclass(frozen=True, kw_only=True)
class Limits(RankRule):
    """The limits that most rules take."""

    round_to: int = setting(1, "ranks become multiples of this, rounded up", low=1)
    min_rank: int = setting(1, "least rank", low=1)
    max_rank: int | None = setting(None, "greatest rank; null: what the layer allows", low=1)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.max_rank is not None and self.max_rank < self.min_rank:
            raise ConfigError(
                "{greatest} is below {least}; give {remedy} or more",
                greatest=Use("ranks.max_rank", self.max_rank),
                least=Use("ranks.min_rank", self.min_rank),
                remedy=Use("ranks.max_rank", self.min_rank),
            )


@dataclass(frozen=True)
class Manual(RankRule):
    """Ranks by hand: those of tt_ranks, or one number for all."""

    name: ClassVar[str] = "manual"

    tt_ranks: object = argument()
    default: int = setting(8, "cap on every rank where no ranks are given by hand", low=1)


@dataclass(frozen=True)
class Ratio(Limits):
    """Each layer keeps the same share of its own cost."""

    name: ClassVar[str] = "ratio"

    target: float = setting(0.5, "share of each layer's dense cost to keep", above=0, high=1)
    metric: str = setting("macs", "the cost that target is a share of", choices=("macs", "params"))


@dataclass(frozen=True)
class Energy(Limits):
    """Each unfolding of a weight keeps the same share of its squared norm. Reads trained weights."""

    name: ClassVar[str] = "energy"

    keep: float = setting(0.9, "share of each unfolding's squared norm to keep", above=0, high=1)


@dataclass(frozen=True)
class Vbmf(Limits):
    """Analytic variational Bayes: the rank that stands out of the noise. Reads trained weights."""

    name: ClassVar[str] = "vbmf"

    recommendation_ratio: float = setting(
        0.0, "share of the cut that is given back; below 0 cuts as much more", low=-1, high=1
    )


@dataclass(frozen=True)
class Amct(RankRule):
    """Ascend AMCT's automatic mode: VBMF within a band of the full rank; with method=spatial_svd."""

    name: ClassVar[str] = "amct"


@dataclass(frozen=True)
class Greedy(RankRule):
    """AIMET's automatic mode: scores of every layer at several ratios, then one threshold. Evaluates the net often."""

    name: ClassVar[str] = "greedy"
    runs_net: ClassVar[str] = "evaluates the net on a validation split"

    target: float = setting(0.5, "share of the whole cost to keep", above=0, high=1)
    metric: str = setting("macs", "latency_ms is measured on this machine", choices=("macs", "params", "latency_ms"))
    ratios: int = setting(10, "n: each layer is scored at the ratios 1/n .. (n-1)/n", low=2)
    monotonic: bool = setting(False, "smooth each score curve so that it rises with the ratio")
    multiplicity: int = setting(1, "ranks become multiples of this", low=1)
    ignore: list[str] | None = setting(
        None,
        "layers that are not scored and stay dense; null: none",
        words="a list of layer globs",
        example="[conv1,layer1.0.*]",
        check=bad_names,
    )


@dataclass(frozen=True)
class EqualResidual(Limits):
    """AIMET's tensor approximation residual: one index of equal residuals for all layers. Evaluates the net often."""

    name: ClassVar[str] = "equal_residual"
    runs_net: ClassVar[str] = "evaluates the net on a validation split"

    indices: int = setting(20, "how many residual levels are tried", low=2, high=50)
    metric: str = setting("macs", "the cost that is weighed against accuracy", choices=("macs", "params"))


@dataclass(frozen=True)
class Budget(Limits):
    """One budget for the whole net, spent where it loses least. Reads trained weights."""

    name: ClassVar[str] = "budget"
    targets: ClassVar[tuple[str, ...]] = ("macs", "params", "latency_ms")

    macs: float | None = setting(
        None, "share of the whole net's multiply-adds to keep; null: no target for them", above=0, high=1
    )
    params: float | None = setting(
        None, "share of the whole net's parameters to keep; null: no target for them", above=0, high=1
    )
    latency_ms: float | None = setting(
        None, "milliseconds that the whole net may take for one image on this machine; null: no target", above=0
    )
    methods: list[str] | None = setting(
        None,
        "each layer takes the one of these methods that loses least; null: the one of method=",
        words="a list of methods",
        example="[tt,spatial_svd]",
        check=bad_filled_names,
    )
    tolerance: float = setting(0.005, "how far below a target the net may stay, as a share of it", above=0, below=1)

    def __post_init__(self) -> None:
        super().__post_init__()
        if all(getattr(self, target) is None for target in self.targets):
            raise ConfigError(
                "budget: no target is given; give {macs}, {params} or {latency}",
                macs=Use("ranks.macs", 0.4),
                params=Use("ranks.params", 0.3),
                latency=Use("ranks.latency_ms", 5),
            )


@dataclass(frozen=True)
class Learned(Limits):
    """ADMM finds the ranks: each Z-update weighs what a rank costs against what it holds. Reads trained weights."""

    name: ClassVar[str] = "learned"
    runs_net: ClassVar[str] = "finds its ranks while ADMM trains the net"

    alpha: float | None = setting(
        None, "loss that a million of `metric` are worth; null: found for the targets below", low=0
    )
    macs: float | None = setting(
        None, "share of the whole net's multiply-adds to keep; null: no target for them", above=0, high=1
    )
    params: float | None = setting(
        None, "share of the whole net's parameters to keep; null: no target for them", above=0, high=1
    )
    metric: str = setting("macs", "what alpha prices", choices=("macs", "params"))

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.alpha is None) == (self.macs is self.params is None):
            raise ConfigError(
                "learned: give either a price, {alpha} with {macs_off} and {params_off}, or targets: {macs}",
                alpha=Use("ranks.alpha", 0.1),
                macs_off=Use("ranks.macs", "null"),
                params_off=Use("ranks.params", "null"),
                macs=Use("ranks.macs", 0.4),
            )


RULES: dict[str, type[RankRule]] = {
    rule.name: rule
    for rule in (
        Manual,
        Ratio,
        Energy,
        Vbmf,
        Amct,
        Greedy,
        EqualResidual,
        Budget,
        Learned,
    )
}
