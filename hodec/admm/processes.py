"""The processes that train together: each projects its part of the layers and sends the result to the others."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar, cast

from torch import Tensor, distributed

from hodec.plan.layer import LayerPlan

T = TypeVar("T")


def _send(value: object, source: int) -> object:
    values = [value]
    distributed.broadcast_object_list(values, source)
    return values[0]


@dataclass(frozen=True)
class Processes:
    """What one of ``count`` processes knows of them.

    Attributes:
        rank: number of this one, from 0.
        send: (value, source) -> the value that process ``source`` gave, in all of them.
    """

    rank: int = 0
    count: int = 1
    send: Callable[[object, int], object] = _send

    @classmethod
    def current(cls) -> "Processes":
        """Those of torch.distributed's default group, or this process alone where there is none."""
        if not (distributed.is_available() and distributed.is_initialized()):
            return cls()
        return cls(distributed.get_rank(), distributed.get_world_size())

    def broadcast(self, value: T, source: int = 0) -> T:
        """The value of one process in all of them; tensors arrive on the CPU."""
        if self.count == 1:
            return value
        # over the CPU, for a tensor is unpickled on the device of its sender
        return cast(T, self.send(_on_cpu(value) if self.rank == source else None, source))


def _on_cpu(value: object) -> object:
    if isinstance(value, Tensor):
        return value.cpu()
    if isinstance(value, Mapping):
        return {key: _on_cpu(one) for key, one in value.items()}
    return type(value)(_on_cpu(one) for one in value) if isinstance(value, list | tuple) else value


def partition(plan: Mapping[str, LayerPlan], names: Sequence[str], count: int) -> list[list[str]]:
    """Layers divided among ``count`` processes so that all have about as much to factorize; the same everywhere.

    The layer with most work goes first, each to the process that has least so far (longest processing time first).
    """
    parts: list[list[str]] = [[] for _ in range(count)]
    work = [0] * count
    for name in sorted(names, key=lambda n: (-_work(plan[n]), n)):
        least = work.index(min(work))
        parts[least].append(name)
        work[least] += _work(plan[name])
    return parts


def _work(layer: LayerPlan) -> int:
    """Multiply-adds of the Gram matrix of the output channels, which all formats come near to."""
    out, *rest = layer.shape
    return out * math.prod(rest) * min(out, math.prod(rest))
