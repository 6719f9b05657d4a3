"""The rule of hodec.ranks that settings ask for: goes when ``config.ranks`` is the rule itself."""

from collections.abc import Callable

from hodec.experiment.config.options_of_rules import RankRule as RuleSettings
from hodec.ranks import RULES, RankRule
from hodec.ranks import build_rule as build

# Names of hodec.ranks that have not followed yet.
RULE = {"amct": "ascend", "equal_residual": "tar"}
SETTING = {"recommendation_ratio": "calibration", "ratios": "candidates"}


def build_rule(
    settings: RuleSettings, tt_ranks: object = None, evaluate: Callable[..., float] | None = None
) -> RankRule:
    """The rank rule; ``tt_ranks`` are ranks by hand, ``evaluate`` gives the accuracy of a net."""
    values = {SETTING.get(key, key): value for key, value in settings.values().items()}
    values |= {"tt_ranks": values.get("default") if tt_ranks is None else tt_ranks, "evaluate": evaluate}
    name = RULE.get(settings.name, settings.name)
    return build(name, {key: values[key] for key in RULES[name].settings})
