"""The processes that train together: each projects its part of the layers and sends the result to the others."""

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar, cast

import torch
from torch import Tensor, distributed

from hodec.errors import TrainingError
from hodec.io.tensors import digest
from hodec.plan.layer import LayerPlan

T = TypeVar("T")


log = logging.getLogger(__name__)


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

    def gather(self, value: T) -> list[T]:
        """The values of all processes in their order, in each of them."""
        return [self.broadcast(value, source) for source in range(self.count)]


# Relative rounding of a number of 32 bits: 2^-23.
EPSILON = float(torch.finfo(torch.float32).eps)


def differing(processes: Processes, tensors: Mapping[str, Sequence[Tensor]]) -> dict[str, list[int]]:
    """Name -> the processes that hold other bits under it than the first; the same answer in all of them."""
    if processes.count == 1:
        return {}
    first, *others = processes.gather({name: digest(*each) for name, each in tensors.items()})
    found = {name: [rank for rank, one in enumerate(others, 1) if one[name] != first[name]] for name in tensors}
    return {name: ranks for name, ranks in found.items() if ranks}


@torch.no_grad()
def check_equal(processes: Processes, weights: Mapping[str, Tensor], *, steps: int, where: str) -> None:
    """Compare the weights of all processes, which gradients that were reduced over them keep equal bit for bit.

    What devices of several kinds round apart is mended: all take the weights of the first process.

    Args:
        weights: name -> weight.
        steps: optimizer steps since they were last compared; each rounds a weight by up to EPSILON of itself.
        where: tells the message the moment.

    Raises:
        TrainingError: in all processes; a weight differs by more than rounding.
    """
    names = differing(processes, {name: [w] for name, w in weights.items()})
    if not names:
        return
    firsts = processes.broadcast({name: weights[name].detach() for name in names})
    own = {name: _distance(weights[name].detach(), first.to(weights[name].device)) for name, first in firsts.items()}
    apart = processes.gather(own)
    rank, name = max(((r, n) for r in range(processes.count) for n in names), key=lambda one: apart[one[0]][one[1]])
    if not apart[rank][name] <= EPSILON * max(1, steps):
        raise TrainingError(
            f"{where}: the weights of {len(names)} layers differ between the processes, most of all {name}: process "
            f"{rank} is {apart[rank][name]:.2g} of its norm away from process 0. They train different nets from here "
            "on. Start again from the last checkpoint: gradients have to be reduced over all processes (strategy=ddp), "
            "and nothing but the training may change a weight, or Z and U, in one of them"
        )
    for name, first in firsts.items():
        weights[name].copy_(first)
    log.info("%s: %d layers were rounded apart by the devices; all have the first one's now", where, len(names))


def _distance(own: Tensor, first: Tensor) -> float:
    """norm(own - first) / norm(first); infinite where one is no number."""
    norm, apart = float(first.double().norm()), float((own.double() - first.double()).norm())
    if apart == 0:
        return 0.0
    ratio = apart / norm if norm else math.inf
    return ratio if math.isfinite(ratio) else math.inf


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
