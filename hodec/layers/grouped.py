"""Factorized grouped convolutions: every group by factors of its own, at the same ranks, as grouped convolutions."""

from typing import Any, ClassVar, cast

from torch import nn

from hodec.formats.stacked import Grouped
from hodec.formats.staged import StagedFormat
from hodec.layers.staged import StagedConv


class GroupedConv(StagedConv):
    """A grouped convolution as the ops that its format lists; its class fixes how many groups there are.

    Attributes:
        one: the layer as which each group is factorized.
    """

    one: ClassVar[type[StagedConv]]

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Copies and pickles name the layer of one group: the class is made when it is first needed."""
        _, _, *rest = cast(tuple[Any, ...], super().__reduce_ex__(protocol))
        return (_blank, (self.one, self.groups), *rest)


_classes: dict[tuple[type[StagedConv], int], type[GroupedConv]] = {}


def grouped_class(one: type[StagedConv], groups: int) -> type[GroupedConv]:
    """The layer of so many groups that are each factorized as ``one`` does it; made once."""
    key = one, groups
    if key not in _classes:
        names = {
            "one": one, "groups": groups, "layer_type": one.layer_type, "__module__": __name__,
            "format": Grouped(cast(StagedFormat, one.format), groups),
            "__doc__": f"A convolution of {groups} groups that are each a ``{one.__name__}``; see ``GroupedConv``.",
        }  # fmt: skip
        _classes[key] = type(f"Grouped{one.__name__}", (GroupedConv,), names)
    return _classes[key]


def _blank(one: type[StagedConv], groups: int) -> nn.Module:
    made = grouped_class(one, groups)
    return made.__new__(made)
