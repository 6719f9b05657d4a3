"""Conversion of a model that is divided among processes (``fully_shard``, FSDP2): whole again, one layer at a time."""

from collections.abc import Mapping, Sequence
from typing import cast

from torch import Tensor, distributed, nn

from hodec.calibration.input_covariance import InputCovariance
from hodec.conversion.keeping import keep_plan
from hodec.conversion.streamed import Streamed, Unit, put_tensors
from hodec.conversion.swap import convert
from hodec.errors import ConvertError
from hodec.io.tensors import is_divided
from hodec.plan.plan import Plan


def convert_divided(
    model: nn.Module,
    plan: Plan,
    skeleton: nn.Module,
    *,
    covariances: Mapping[str, InputCovariance] | None = None,
    init_factors: Mapping[str, Sequence[Tensor]] | None = None,
) -> nn.Module:
    """The converted model, whole, on the CPU and the same in all processes, which call this together.

    One layer is gathered at a time; processes take turns in decomposing. Give it to ``fully_shard`` for further
    training: factors are parameters like others.

    Args:
        model: whose parameters are DTensors; it is left as it was.
        plan, covariances, init_factors: as for ``convert``.
        skeleton: the same net before ``fully_shard``, best on the meta device: torch cannot copy one after it.

    Raises:
        ConvertError: a model that is whole, or a skeleton with buffers that no ``state_dict`` holds on the meta device.
        PlanError, TrainingError: as ``convert``.

    Example::

        with torch.device("meta"):
            skeleton = build()
        small = hodec.convert_divided(net, plan, skeleton)  # in all processes
        fully_shard(small)
    """
    if not any(map(is_divided, model.parameters())):
        raise ConvertError("convert_divided: this model is whole; hodec.convert converts it, without a skeleton")
    stream = Streamed(skeleton, plan, covariances=covariances, init_factors=init_factors)
    small = convert(skeleton, plan, decompose=False)
    held = model.state_dict()
    turn = 0
    for unit in stream.units:
        given = {path: _whole(held[path]) for path in unit.sources}
        turn += bool(unit.layer)
        put_tensors(small, _decided(stream, unit, given, turn % distributed.get_world_size()))
    if blank := [name for name, one in small.named_buffers() if one.is_meta]:
        raise ConvertError(
            f"{blank[0]}: this buffer of the skeleton is on the meta device and no state_dict holds it, because the "
            "net computes it when it is built: give a skeleton with memory"
        )
    keep_plan(small, plan)
    return small


def _decided(stream: Streamed, unit: Unit, given: Mapping[str, Tensor], source: int) -> dict[str, Tensor]:
    """What one process makes of a layer, in all of them: decompositions differ in the last bits between machines."""
    if not unit.layer:
        return stream.make(unit, given)
    made: list[object] = [stream.make(unit, given) if distributed.get_rank() == source else None]
    distributed.broadcast_object_list(made, source)
    return cast(dict[str, Tensor], made[0])


def _whole(tensor: Tensor) -> Tensor:
    return (tensor.full_tensor() if is_divided(tensor) else tensor).detach().cpu()
