"""Weights that are divided among processes, as by ``fully_shard`` (FSDP2): their parts, and one layer whole at a time.

ADMM keeps Z and U of such a layer in parts like those of its weight: all that is added is added part by part. Only the
projection needs a whole layer; one process gathers it, projects it and sends the result round.
"""

import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, distributed, nn

from hodec.admm.updates import Residuals, Rows
from hodec.errors import TrainingError, Use
from hodec.io.tensors import is_divided
from hodec.linalg.svd import check_finite

if TYPE_CHECKING:
    from torch.distributed.tensor import DeviceMesh, DTensor, Placement


def part_of(tensor: Tensor) -> Tensor:
    """The part of this process, which shares the tensor's memory; a whole tensor is its own part."""
    return cast("DTensor", tensor.detach()).to_local() if is_divided(tensor) else tensor


def settle(model: nn.Module) -> nn.Module:
    """``model`` itself; FSDP2 forgets the weights that it gathered and keeps after a forward pass without gradients.

    Until then ``parameters()`` gives the gathered ones, and later passes use them whatever is written to the parts.
    """
    fsdp = sys.modules.get("torch.distributed.fsdp")
    if fsdp is not None and distributed.is_initialized():
        for module in model.modules():
            if isinstance(module, fsdp.FSDPModule):
                module.reshard()
    return model


class Division:
    """How the planned weights are divided.

    Args:
        weights: layer -> its weight.
        model: what holds them.
        learned: whether ranks are learned meanwhile.

    Raises:
        TrainingError: weights are divided although ranks are learned, or among fewer processes than train.
    """

    def __init__(self, weights: Mapping[str, Tensor], model: nn.Module, *, learned: bool = False) -> None:
        self.like: dict[str, DTensor] = {name: w for name, w in weights.items() if is_divided(w)}
        self._model = model
        if self.like and learned:
            raise TrainingError(
                "learned ranks look at whole weights, and these are divided among processes: choose the ranks before "
                "training, {budget} say, or train with DDP",
                budget=Use("ranks", "budget"),
            )
        for name, w in self.like.items():
            if w.device_mesh.size() != distributed.get_world_size():
                raise TrainingError(
                    f"{name}: its weight is divided among {w.device_mesh.size()} of {distributed.get_world_size()} "
                    "processes; ADMM works where all processes have a part (fully_shard over the whole mesh)"
                )

    def __bool__(self) -> bool:
        return bool(self.like)

    def __contains__(self, name: str) -> bool:
        return name in self.like

    def settle(self) -> None:
        """Let the next forward pass see the weights as they are now."""
        if self.like:
            settle(self._model)

    # -- parts and wholes ------------------------------------------------------------------------------------------

    def wrapped(self, name: str, part: Tensor) -> Tensor:
        """A part as a DTensor like the weight, as checkpoints hold it; a layer that is not divided as it is."""
        if name not in self.like:
            return part
        from torch.distributed.tensor import DTensor

        like, stride = self.like[name], torch.empty(self.like[name].shape, device="meta").stride()
        return DTensor.from_local(
            part, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=stride
        )

    def whole(self, name: str, part: Tensor) -> Tensor:
        """The layer's whole tensor, in each process; all call it together."""
        return cast("DTensor", self.wrapped(name, part)).full_tensor()

    def gathered(self, name: str, part: Tensor) -> Tensor:
        """``whole`` on the CPU of the first process, and on the meta device of the others."""
        if name not in self.like:
            return part
        whole = self.whole(name, part)
        return whole.cpu() if distributed.get_rank() == 0 else whole.to("meta")

    def part(self, name: str, whole: Tensor) -> Tensor:
        """This process's part of a whole tensor, in memory of its own."""
        from torch.distributed.tensor import distribute_tensor

        like = self.like[name]
        made = distribute_tensor(whole, like.device_mesh, like.placements, src_data_rank=None)
        return part_of(made).clone()

    def taken(self, name: str, tensor: Tensor, like: Tensor) -> Tensor:
        """The part of this process of a tensor from a checkpoint, on the device of ``like``, its weight.

        It may be whole, or divided in any way: another number of processes wrote it.
        """
        if name not in self.like:
            return (tensor.full_tensor() if is_divided(tensor) else tensor).to(like.device)
        if is_divided(tensor):
            mesh, placements = self.like[name].device_mesh, self.like[name].placements
            return part_of(tensor.redistribute(mesh, placements)).to(part_of(like).device)
        return self.part(name, tensor.to(part_of(like).device))

    def sent(self, name: str, whole: Tensor | None, source: int, dtype: torch.dtype) -> Tensor:
        """This process's part of what process ``source`` holds whole; the others give None."""
        like = self.like[name]
        if whole is None:
            whole = torch.empty(like.shape, dtype=dtype, device=part_of(like).device)
        whole = whole.contiguous()
        distributed.broadcast(whole, source)
        return self.part(name, whole)

    # -- numbers of all parts --------------------------------------------------------------------------------------

    def added(self, rows: Rows) -> dict[str, list[float]]:
        """Each layer's numbers, those of divided layers added up over their parts."""
        result = {name: list(row) for name, row in rows.items()}
        groups: dict[tuple[DeviceMesh, tuple[Placement, ...]], list[str]] = {}
        for name in rows:
            if name in self.like:
                groups.setdefault((self.like[name].device_mesh, self.like[name].placements), []).append(name)
        for (mesh, placements), names in groups.items():
            device = part_of(self.like[names[0]]).device
            table = torch.tensor([result[name] for name in names], dtype=torch.float64, device=device)
            for axis, placement in enumerate(placements):
                if not placement.is_replicate():
                    distributed.all_reduce(table, group=mesh.get_group(axis))
            result |= dict(zip(names, table.tolist(), strict=True))
        return result

    def residuals(self, found: Mapping[str, Residuals]) -> dict[str, Residuals]:
        """Residuals of whole layers from those of this process's parts."""
        if not self.like:
            return dict(found)
        rows = self.added({name: [r.gap, r.weight, r.move, r.dual_scale] for name, r in found.items()})
        return {name: Residuals(*row) for name, row in rows.items()}

    def summed(self, values: Tensor) -> Tensor:
        """Numbers added up over all processes where anything is divided; otherwise as they are."""
        if self.like:
            distributed.all_reduce(values)
        return values

    def check_finite(self, parts: Mapping[str, Tensor], where: str) -> None:
        """Refuse NaN and Inf, in all processes at once where only one holds them.

        Raises:
            TrainingError: naming the layer.
        """
        for name, part in parts.items():
            if name not in self.like:
                check_finite(part.detach(), f"layer {name}{where}")
        bad = self.added({name: [float((~torch.isfinite(parts[name])).sum())] for name in parts if name in self.like})
        for name, (count,) in bad.items():
            if count:
                check_finite(torch.full((1,), torch.nan), f"layer {name}{where}, {count:.0f} numbers of all processes")


def turns(parts: Sequence[Sequence[str]], sizes: Mapping[str, int]) -> Iterator[list[list[str]]]:
    """What each process works on at a time: of its layers as many as are together no larger than the largest of all.

    Args:
        parts: the layers of each process.
        sizes: of each layer.
    """
    most, left = max((sizes[name] for part in parts for name in part), default=0), [list(part) for part in parts]
    while any(left):
        turn: list[list[str]] = []
        for names in left:
            taken = names[:1]
            while len(taken) < len(names) and sum(sizes[n] for n in taken) + sizes[names[len(taken)]] <= most:
                taken.append(names[len(taken)])
            del names[: len(taken)]
            turn.append(taken)
        yield turn
