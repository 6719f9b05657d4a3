"""Rank rules: what chooses ranks. RULES is the only table of them."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from hodec.cost.latency import LatencyTable
from hodec.errors import PlanError, near_matches
from hodec.ranks.ascend import Ascend
from hodec.ranks.base import Candidate, Choice, RankRule, make_plan
from hodec.ranks.budget import Budget
from hodec.ranks.energy import Energy
from hodec.ranks.greedy.rule import Greedy
from hodec.ranks.learned import Learned
from hodec.ranks.manual import Manual
from hodec.ranks.ratio import Ratio
from hodec.ranks.tar import Tar
from hodec.ranks.vbmf import Vbmf


@dataclass(frozen=True)
class RuleEntry:
    """A rule and the settings it is built from; ``evaluate`` among them is a function net -> accuracy."""

    build: Callable[..., RankRule]
    settings: tuple[str, ...]


def timed(rule: Callable[..., RankRule]) -> Callable[..., RankRule]:
    """The rule, with the latency table of this device where its settings ask for milliseconds."""

    def build(**settings: Any) -> RankRule:
        if settings.get("latency_ms") is None and settings.get("metric") != "latency_ms":
            return rule(**settings)
        return rule(**settings, latency_table=LatencyTable())

    return build


LIMITS = ("round_to", "min_rank", "max_rank")
RULES: dict[str, RuleEntry] = {
    "manual": RuleEntry(Manual, ("tt_ranks",)),
    "ratio": RuleEntry(Ratio, ("target", "metric", *LIMITS)),
    "energy": RuleEntry(Energy, ("keep", *LIMITS)),
    "vbmf": RuleEntry(Vbmf, ("calibration", *LIMITS)),
    "ascend": RuleEntry(Ascend, ()),
    "greedy": RuleEntry(
        timed(Greedy), ("evaluate", "target", "metric", "candidates", "monotonic", "multiplicity", "ignore")
    ),
    "tar": RuleEntry(Tar, ("evaluate", "indices", "metric", *LIMITS)),
    "budget": RuleEntry(timed(Budget), ("macs", "params", "latency_ms", "methods", "tolerance", *LIMITS)),
    "learned": RuleEntry(Learned, ("alpha", "macs", "params", "metric", *LIMITS)),
}


def build_rule(name: str, settings: Mapping[str, Any]) -> RankRule:
    """The rule of that name, from those of ``settings`` that it takes.

    Raises:
        PlanError: no such rule.
        ConfigError: a setting out of range.
    """
    if name not in RULES:
        raise PlanError(f"unknown rank rule {name!r}; there are {', '.join(RULES)}.{near_matches(name, tuple(RULES))}")
    entry = RULES[name]
    return entry.build(**{key: settings[key] for key in entry.settings})


__all__ = [
    "RULES",
    "Ascend",
    "Budget",
    "Candidate",
    "Choice",
    "Energy",
    "Greedy",
    "Learned",
    "Manual",
    "RankRule",
    "Ratio",
    "Tar",
    "Vbmf",
    "build_rule",
    "make_plan",
]
