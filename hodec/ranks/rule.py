"""What all rank rules are: frozen dataclasses of settings that choose ranks. Importing this does not load torch."""

from __future__ import annotations

import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, ClassVar

from hodec.errors import ConfigError, Use
from hodec.options import Option, setting

if TYPE_CHECKING:
    from hodec.ranks.context import LayerContext, NetContext


@dataclass(frozen=True)
class Choice:
    """What a rule decides for one layer: ranks with notes on what was clipped or rounded, or why it stays dense.

    Attributes:
        method: the method it chose, where it could choose; otherwise empty.
    """

    ranks: tuple[int, ...] | None
    notes: tuple[str, ...] = ()
    reason: str = ""
    method: str = ""


@dataclass(frozen=True)
class RankRule(Option):
    """Base of all rank rules. A rule chooses layer by layer (``choose_layer``) or for the whole net (``choose``).

    Attributes:
        reads_weights: whether it needs trained weights: ranks of random ones mean nothing.
        runs_net: what it does with a net that can be run, in words: ``evaluates the net ..``. Such a rule serves no
            model file and no plan without training. Empty for rules that look at layers only.
        may_enlarge: whether layers may cost more than dense where ``allow_larger`` asks for that, and the net where
            embeddings, which are looked up, become products.
    """

    group: ClassVar[str] = "ranks"
    reads_weights: ClassVar[bool] = False
    runs_net: ClassVar[str] = ""
    may_enlarge: ClassVar[bool] = True

    def __init_subclass__(cls) -> None:
        """Subclasses are dataclasses, which would each get a representation of their own with every setting."""
        super().__init_subclass__()
        if "__repr__" not in vars(cls):
            cls.__repr__ = RankRule.__repr__  # type: ignore[method-assign]

    def __repr__(self) -> str:
        """The rule with the settings that differ from their defaults."""
        values = {
            one.name: (getattr(self, one.name), one.default)
            for one in sorted(fields(self), key=lambda one: bool(one.kw_only))
        }
        given = [
            f"{name}={reprlib.repr(value)}"
            for name, (value, default) in values.items()
            if value is not default and not (type(value) is type(default) and value == default)
        ]
        return f"{type(self).__name__}({', '.join(given)})"

    def methods_for(self, method: str) -> tuple[str, ...]:
        """The methods that a layer may take, where the plan is asked for ``method``."""
        return (method,)

    def choose(self, layers: Mapping[str, LayerContext], net: NetContext) -> dict[str, Choice]:
        """A choice for every layer.

        Raises:
            PlanError: settings that do not fit these layers.
        """
        return {name: self.choose_layer(layer, net) for name, layer in layers.items()}

    def choose_layer(self, layer: LayerContext, net: NetContext) -> Choice:
        """The choice for one layer, where it depends on no other."""
        raise NotImplementedError(f"{type(self).__name__} defines neither choose nor choose_layer")


@dataclass(frozen=True, kw_only=True)
class Limits(Option):
    """Limits that the automatic rules bring their ranks into.

    Raises:
        ConfigError: a number below 1, or ``max_rank`` below ``min_rank``.
    """

    group: ClassVar[str] = "ranks"

    round_to: int | None = setting(
        None,
        "ranks become multiples of this, rounded up; the layer's own limits still hold. null: 1, and for model files "
        "16 (4 in layers whose ranks stay below 32)",
        low=1,
    )
    min_rank: int = setting(1, "least rank, where the layer allows it", low=1)
    max_rank: int | None = setting(None, "greatest rank; by default what the layer allows", low=1)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.max_rank is not None and self.max_rank < self.min_rank:
            raise ConfigError(
                "{given} is below {least}; give {most} or more",
                given=Use("ranks.max_rank", self.max_rank),
                least=Use("ranks.min_rank", self.min_rank),
                most=Use("ranks.max_rank", self.min_rank),
            )

    def limited(self, layer: LayerContext, ranks: Sequence[int]) -> tuple[tuple[int, ...], tuple[str, ...]]:
        """Ranks that this layer can take within the limits, and a note if they differ from ``ranks``.

        A ``max_rank`` that is no multiple of ``round_to`` stands for the multiple below it, unless that is below
        ``min_rank``.
        """
        given = tuple(int(rank) for rank in ranks)
        least = tuple(max(rank, self.min_rank) for rank in given)
        multiple = self.multiple(layer)
        rounded = tuple(-(-rank // multiple) * multiple for rank in least)
        cut = tuple(self._cut(rank, multiple) for rank in rounded)
        fitted = layer.fit(cut)
        if fitted == given:
            return fitted, ()
        steps = (
            (f"min_rank={self.min_rank}", least != given),
            (f"round_to={multiple}", rounded != least),
            (f"max_rank={self.max_rank}", cut != rounded),
            ("the most that the layer and the other ranks allow", fitted != cut),
        )
        reasons = ", ".join(reason for reason, changed in steps if changed)
        return fitted, (f"ranks {list(given)} became {list(fitted)}: {reasons}",)

    def multiple(self, layer: LayerContext) -> int:
        """What the layer's ranks are multiples of: ``round_to``, or what its runtime is fast with."""
        if self.round_to is not None:
            return self.round_to
        return layer.block if max(layer.full_ranks) >= 2 * layer.block else max(1, layer.block // 4)

    def _cut(self, rank: int, multiple: int) -> int:
        if self.max_rank is None or rank <= self.max_rank:
            return rank
        below = self.max_rank // multiple * multiple
        return below if below >= self.min_rank else self.max_rank


@dataclass(frozen=True)
class Targets(Option):
    """Targets for the whole net, as shares of what the dense net costs; all that are given hold.

    Attributes:
        instead_of_targets: the setting that may stand in their place; without it and them the target is
            ``macs=0.5``.
    """

    group: ClassVar[str] = "ranks"
    instead_of_targets: ClassVar[str] = ""

    macs: float | None = setting(None, "share of the dense net's multiply-adds to keep", above=0, below=1)
    params: float | None = setting(None, "share of the dense net's parameters to keep", above=0, below=1)

    @property
    def targets(self) -> dict[str, float]:
        """Metric -> share of the dense net's cost to keep."""
        shares = {name: share for name, share in (("macs", self.macs), ("params", self.params)) if share is not None}
        return shares if shares or getattr(self, self.instead_of_targets) is not None else {"macs": 0.5}
