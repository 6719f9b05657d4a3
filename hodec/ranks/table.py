"""RULES: the only table of rank rules, and how a rule is found by its name or by ranks. It does not load torch."""

from collections.abc import Mapping, Sequence
from functools import cache
from importlib.metadata import EntryPoint, entry_points

from hodec.errors import ConfigError, near_matches
from hodec.ranks.amct import Amct
from hodec.ranks.budget import Budget
from hodec.ranks.energy import Energy
from hodec.ranks.equal_residual import EqualResidual
from hodec.ranks.greedy.rule import Greedy
from hodec.ranks.learned import Learned
from hodec.ranks.manual import Manual, Ranks
from hodec.ranks.ratio import Ratio
from hodec.ranks.rule import RankRule
from hodec.ranks.vbmf import Vbmf

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
        rule = _loaded(offered)
        if not (isinstance(rule, type) and issubclass(rule, RankRule) and rule.name == name):
            raise ConfigError(f"entry point {name} = {offered.value} of {ENTRY_POINTS} is no RankRule of that name")
        return register(rule)
    if name not in RULES:
        names = rule_names()
        raise ConfigError(f"unknown rank rule {name!r}; there are {', '.join(names)}.{near_matches(name, names)}")
    return RULES[name]


def _loaded(offered: EntryPoint) -> object:
    try:
        return offered.load()
    except Exception as error:  # whatever an import raises
        raise ConfigError(
            f"entry point {offered.name} = {offered.value} of {ENTRY_POINTS} cannot be loaded ({type(error).__name__}: "
            f"{error}); mend or uninstall its package"
        ) from error


@cache
def _offered() -> dict[str, EntryPoint]:
    return {point.name: point for point in entry_points(group=ENTRY_POINTS)}


AnyRule = RankRule | str | Ranks | Mapping[str, Ranks]
"""A rule, the name of one with its default settings, or ranks by hand."""


def as_rule(given: AnyRule) -> RankRule:
    """A rule as it is; ``"energy"``: the rule of that name; 16, [4, 16, 16, 4] or {layer glob: ranks}: ``Manual``.

    Raises:
        ConfigError: no such rule, or no ranks.
    """
    if isinstance(given, RankRule):
        return given
    if isinstance(given, str):
        return get_rule(given)()
    if isinstance(given, int) or (isinstance(given, Sequence | Mapping) and not isinstance(given, str)):
        return Manual(given)
    raise ConfigError(
        f"rule: {given!r} given; allowed: a rule such as hodec.ranks.Energy(0.9), the name of one "
        f"({', '.join(rule_names())}), or ranks: 16, [4, 16, 16, 4], {{layer glob: ranks}}"
    )
