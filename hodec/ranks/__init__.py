"""Rank rules: RULES is the only table of them. Importing it does not load torch; ``make_plan`` and contexts do."""

from functools import cache
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from typing import TYPE_CHECKING

from hodec.errors import ConfigError, near_matches
from hodec.ranks.amct import Amct
from hodec.ranks.budget import Budget
from hodec.ranks.energy import Energy
from hodec.ranks.equal_residual import EqualResidual
from hodec.ranks.greedy.rule import Greedy
from hodec.ranks.learned import Learned
from hodec.ranks.manual import Manual
from hodec.ranks.ratio import Ratio
from hodec.ranks.rule import Choice, Limits, RankRule
from hodec.ranks.vbmf import Vbmf

if TYPE_CHECKING:
    from hodec.ranks.context import LayerContext, NetContext
    from hodec.ranks.planning import make_plan

RULES: dict[str, type[RankRule]] = {
    rule.name: rule for rule in (Manual, Ratio, Energy, Vbmf, Amct, Budget, Greedy, EqualResidual, Learned)
}
"""Name -> rule. ``register`` adds one; rules of installed packages join it when they are asked for."""

ENTRY_POINTS = "hodec.rules"
"""The group of entry points by which a package offers rules: name of the rule -> its class."""


def register(rule: type[RankRule]) -> type[RankRule]:
    """Add a rule to RULES under its own name; it can be used as a decorator.

    Raises:
        ConfigError: it has no name, or another rule has that name.
    """
    if not rule.name or RULES.get(rule.name, rule) is not rule:
        raise ConfigError(
            f"rank rule {rule.__qualname__} has the name {rule.name!r}; give it one that none of these have: "
            f"{', '.join(RULES)}"
        )
    RULES[rule.name] = rule
    return rule


def rule_names() -> tuple[str, ...]:
    """The names of all rules: those of RULES, then those that installed packages offer."""
    return tuple(dict.fromkeys([*RULES, *_offered()]))


def get_rule(name: str) -> type[RankRule]:
    """The rule of that name; one that an installed package offers is loaded now, and joins RULES.

    Raises:
        ConfigError: there is no such rule, or a package offers one whose name is taken or that is no rank rule.
    """
    offered = _offered().get(name)
    if offered is not None:
        rule = offered.load()
        if not (isinstance(rule, type) and issubclass(rule, RankRule) and rule.name == name):
            raise ConfigError(f"entry point {name} = {offered.value} of {ENTRY_POINTS} is no RankRule of that name")
        return register(rule)
    if name not in RULES:
        names = rule_names()
        raise ConfigError(f"unknown rank rule {name!r}; there are {', '.join(names)}.{near_matches(name, names)}")
    return RULES[name]


@cache
def _offered() -> dict[str, EntryPoint]:
    return {point.name: point for point in entry_points(group=ENTRY_POINTS)}


def __getattr__(name: str) -> object:
    homes = {"make_plan": "planning", "LayerContext": "context", "NetContext": "context"}
    if name not in homes:
        raise AttributeError(f"module 'hodec.ranks' has no attribute {name!r}")
    return getattr(import_module(f"hodec.ranks.{homes[name]}"), name)


__all__ = [
    "RULES",
    "Amct",
    "Budget",
    "Choice",
    "Energy",
    "EqualResidual",
    "Greedy",
    "LayerContext",
    "Learned",
    "Limits",
    "Manual",
    "NetContext",
    "RankRule",
    "Ratio",
    "Vbmf",
    "get_rule",
    "make_plan",
    "register",
    "rule_names",
]
