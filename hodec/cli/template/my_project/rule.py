"""The rank rule: ``ranks=custom ranks._target_=my_project.rule.Share``."""

from dataclasses import dataclass

from hodec.options import setting
from hodec.ranks import Choice, LayerContext, NetContext, RankRule


@dataclass(frozen=True)
class Share(RankRule):
    """Each rank is the same share of the full one."""

    name = "share"

    share: float = setting(0.5, "share of the full ranks", above=0, high=1)  # checked wherever it is given

    def choose_layer(self, layer: LayerContext, net: NetContext) -> Choice:
        """The ranks of one layer; a rule that weighs layers against each other defines ``choose`` instead."""
        ranks = [max(1, round(self.share * full)) for full in layer.full_ranks]
        return Choice(layer.fit(ranks))
