"""The processes that train together: each projects its share of the layers and sends the result to the others."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor

from hodec.plan.layer import LayerPlan

if TYPE_CHECKING:
    from pytorch_lightning import Trainer


def _alone(value: Any, _: int) -> Any:
    return value


@dataclass(frozen=True)
class Processes:
    """What one of ``count`` processes knows of them.

    Attributes:
        rank: which one this is, from 0.
        broadcast: (value, source) -> the value that process ``source`` gave, in all of them.
    """

    rank: int = 0
    count: int = 1
    broadcast: Callable[[Any, int], Any] = _alone

    @classmethod
    def of(cls, trainer: "Trainer") -> "Processes":
        """Those of a trainer."""
        if trainer.world_size == 1:
            return cls()
        return cls(trainer.global_rank, trainer.world_size, trainer.strategy.broadcast)

    def agree(self, value: Any, source: int = 0) -> Any:
        """The value of one process in all of them; tensors arrive on the CPU."""
        if self.count == 1:
            return value
        # over the CPU, for a tensor is unpickled on the device of its sender
        return self.broadcast(_on_cpu(value) if self.rank == source else None, source)


def _on_cpu(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.cpu()
    if isinstance(value, Mapping):
        return {key: _on_cpu(one) for key, one in value.items()}
    return type(value)(_on_cpu(one) for one in value) if isinstance(value, list | tuple) else value


def shares(plan: Mapping[str, LayerPlan], names: Sequence[str], count: int) -> list[list[str]]:
    """Layers divided among ``count`` processes so that all have about as much to factorize; the same everywhere."""
    divided: list[list[str]] = [[] for _ in range(count)]
    work = [0] * count
    for name in sorted(names, key=lambda n: (-_work(plan[n]), n)):
        least = work.index(min(work))
        divided[least].append(name)
        work[least] += _work(plan[name])
    return divided


def _work(layer: LayerPlan) -> int:
    """Multiply-adds of the Gram matrix of the output channels, which all formats come near to."""
    out, *rest = layer.shape
    return out * math.prod(rest) * min(out, math.prod(rest))
