"""Rank rules and ``make_plan``. Importing it does not load torch; ``make_plan`` and contexts do."""

from importlib import import_module
from typing import TYPE_CHECKING

from hodec.ranks.amct import Amct
from hodec.ranks.budget import Budget
from hodec.ranks.energy import Energy
from hodec.ranks.equal_residual import EqualResidual
from hodec.ranks.greedy.rule import Greedy
from hodec.ranks.learned import Learned
from hodec.ranks.manual import Manual
from hodec.ranks.ratio import Ratio
from hodec.ranks.rule import Choice, Limits, RankRule
from hodec.ranks.table import RULES, as_rule, get_rule, register, rule_names
from hodec.ranks.vbmf import Vbmf

if TYPE_CHECKING:
    from hodec.ranks.context import LayerContext, NetContext
    from hodec.ranks.planning import make_plan


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
    "as_rule",
    "get_rule",
    "make_plan",
    "register",
    "rule_names",
]
