"""Rank rules: what chooses ranks. RULES is the only table of them."""

from hodec.ranks.base import Candidate, Choice, RankRule, build_rule, make_plan
from hodec.ranks.manual import Manual

RULES: dict[str, type] = {"manual": Manual}

__all__ = ["RULES", "Candidate", "Choice", "Manual", "RankRule", "build_rule", "make_plan"]
