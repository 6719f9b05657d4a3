"""What a rank rule is shown of a layer and of the whole net."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

from torch import nn

from hodec.conversion.eligibility import LayerSite
from hodec.cost.count import Cost
from hodec.cost.metric import LayerTimes
from hodec.errors import PlanError, Use
from hodec.formats.base import Format
from hodec.formats.modes import Modes
from hodec.formats.roles import REBUILT, Role
from hodec.inputs import Inputs
from hodec.plan.layer import LayerPlan


@dataclass(frozen=True)
class LayerContext:
    """A layer that a rule chooses ranks for: where it stands, and how a method sees it.

    Attributes:
        format: the format's mathematics for this layer type.
        modes: how its channels split.
        others: the same layer under the further methods among which the rule may choose.
        block: channels that the runtime works on at a time; 1 where ranks of any size are as fast.
    """

    name: str
    method: str
    site: LayerSite
    format: Format
    modes: Modes
    execution: str = "auto"
    others: tuple["LayerContext", ...] = ()
    block: int = 1

    @cached_property
    def full_ranks(self) -> tuple[int, ...]:
        """Ranks at which the format is exact for every weight of this shape."""
        return self.format.max_ranks(self.site.shape, self.modes)

    @cached_property
    def dense(self) -> LayerPlan:
        """The layer plan at full ranks, for what the dense layer costs."""
        return self.planned(self.full_ranks)

    def fit(self, ranks: Sequence[int]) -> tuple[int, ...]:
        """The largest ranks that are nowhere above ``ranks`` and that the layer can take."""
        return tuple(self.format.fit_ranks(self.site.shape, self.modes, ranks))

    def planned(self, ranks: tuple[int, ...], notes: tuple[str, ...] = ()) -> LayerPlan:
        """The layer plan at these ranks.

        Raises:
            PlanError: ranks, modes or an execution that do not fit the layer.
        """
        execution = self.execution
        if self.site.role is Role.PARAMETER and execution not in ("auto", REBUILT):
            notes = (*notes, f"execution {execution} does not apply: the module reads the rebuilt weight")
            execution = "auto"
        return LayerPlan(
            method=self.method,
            layer_type=self.site.layer_type,
            shape=self.site.shape,
            modes=self.modes,
            ranks=tuple(ranks),
            call_sites=self.site.call_sites,
            execution=execution,
            aliases=self.site.aliases,
            notes=(*self.site.notes, *notes),
            role=self.site.role,
            groups=self.site.groups,
            computed_from=self.site.computed_from,
            ties=self.site.ties,
        ).check(self.name)


@dataclass(frozen=True)
class NetContext:
    """The whole dense net that a rule chooses ranks for.

    Attributes:
        cost: its parameters and multiply-adds.
        module: layer name -> its module; of a model file, a module with the node's settings and no numbers.
        model, example_input: the net itself and what it takes; None and () for a model file.
        times: milliseconds of a model file's layers; None where the net itself is measured.
        block: of its layers.
    """

    cost: Cost
    module: Callable[[str], nn.Module]
    model: nn.Module | None = None
    example_input: Inputs = ()
    times: LayerTimes | None = None
    block: int = 1

    def runnable(self, why: str, **uses: Use) -> tuple[nn.Module, Inputs]:
        """The net and its input.

        Raises:
            PlanError: there is a model file only; ``why`` says what the net is needed for, with the settings it names.
        """
        if self.model is None:
            raise PlanError(f"{why}: that takes a model with a Python class, and a model file has none", **uses)
        return self.model, self.example_input
