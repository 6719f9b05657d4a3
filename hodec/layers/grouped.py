"""Factorized grouped convolutions: every group by factors of its own, at the same ranks, as grouped convolutions."""

from typing import ClassVar, cast

from hodec.formats.stacked import Grouped
from hodec.formats.staged import StagedFormat
from hodec.layers.made import Made, once
from hodec.layers.staged import StagedConv


class GroupedConv(Made, StagedConv):
    """A grouped convolution as the ops that its format lists; its class fixes how many groups there are.

    Attributes:
        one: the layer as which each group is factorized.
    """

    one: ClassVar[type[StagedConv]]


@once
def grouped_class(one: type[StagedConv], groups: int) -> type[GroupedConv]:
    """The layer of so many groups that are each factorized as ``one`` does it; made once."""
    names = {
        "one": one, "groups": groups, "layer_type": one.layer_type, "__module__": __name__,
        "format": Grouped(cast(StagedFormat, one.format), groups), "made_by": (grouped_class, one, groups),
        "__doc__": f"A convolution of {groups} groups that are each a ``{one.__name__}``; see ``GroupedConv``.",
    }  # fmt: skip
    return type(f"Grouped{one.__name__}", (GroupedConv,), names)
