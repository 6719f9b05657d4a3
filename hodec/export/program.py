"""A compressed model as a PyTorch program (.pt2): it runs without its Python class and without hodec."""

import inspect
import io
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from hodec.compare import batch_sizes, verified
from hodec.errors import CheckpointError, ConvertError
from hodec.fusion.report import FuseReport
from hodec.fusion.search import fuse
from hodec.inference import settled_input, uncompiled
from hodec.inputs import Inputs, ModelInput, as_input
from hodec.io.atomic import write_bytes
from hodec.layers.plain import copied


@dataclass(frozen=True)
class Exported:
    """A written file.

    Attributes:
        path: the file.
        error: largest relative difference between its outputs and the model's; None where it was not verified.
        batches: batch sizes that it was run with.
        nodes: operator -> how often it occurs.
    """

    path: Path
    error: float | None
    batches: tuple[int, ...] = ()
    nodes: Mapping[str, int] = field(default_factory=dict)

    def __str__(self) -> str:
        sizes = ", ".join(map(str, self.batches))
        checked = "not verified" if self.error is None else f"outputs differ by {self.error:.1e} at batch {sizes}"
        return f"{self.path} ({self.path.stat().st_size / 1e6:.3g} MB): {checked}"


def to_program(
    model: nn.Module, path: str | Path, *, example_input: Inputs, dynamic_batch: bool = True, verify: bool = True
) -> Exported:
    """Write a model as a PyTorch program, which ``torch.export.load(path).module()`` runs.

    Args:
        model: what ``fuse`` made; or a compressed model, which is brought into plain layers first.
        path: ends in ``.pt2``; an existing file is replaced, in one move.
        example_input: as the model takes, batch first; see ``hodec.make_plan``.
        dynamic_batch: let the file take any batch size.
        verify: read the file again, run it at several batch sizes and compare the outputs.

    Raises:
        CheckpointError: a path with another ending, or one that cannot be written.
        ConvertError: the model cannot be exported, or the file gives other outputs.

    Examples:
        >>> net = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
        >>> plan = hodec.make_plan(net, 4, method="svd", example_input=torch.zeros(1, 64))
        >>> written = hodec.to_program(hodec.convert(net, plan), "small.pt2", example_input=torch.zeros(1, 64))
        >>> torch.export.load("small.pt2").module()(torch.zeros(3, 64)).shape
        torch.Size([3, 10])
    """
    path = checked_path(path, ".pt2")
    inputs = settled_input(uncompiled(model), example_input)
    net = plain_net(model, inputs)
    program = exported_program(net, inputs, dynamic_batch=dynamic_batch)
    content = io.BytesIO()
    torch.export.save(program, content)
    error, sizes = None, batch_sizes(inputs, dynamic_batch) if verify else ()
    if verify:
        content.seek(0)
        error = verified(str(path), torch.export.load(content).module(), net, inputs, sizes, allowed=1e-3)
    write_bytes(path, content.getvalue())
    calls = Counter(str(node.target) for node in program.graph.nodes if node.op == "call_function")
    return Exported(path, error, sizes, calls)


def checked_path(path: str | Path, ending: str) -> Path:
    """The path.

    Raises:
        CheckpointError: it has another ending.
    """
    path = Path(path)
    if path.suffix != ending:
        raise CheckpointError(f"{path}: this kind of file ends in {ending}, not {path.suffix!r}")
    return path


def plain_net(model: nn.Module, inputs: Inputs) -> nn.Module:
    """The model in evaluation mode, out of torch's own layers: a fused one as it is, else fused by multiply-adds.

    The given model stays in its mode: a fused one in training mode is copied.
    """
    model = uncompiled(model)
    if isinstance(getattr(model, "fuse_report", None), FuseReport):
        return copied(model).eval() if any(module.training for module in model.modules()) else model
    return fuse(model, example_input=inputs, target="macs")


def exported_program(net: nn.Module, given: Inputs, *, dynamic_batch: bool) -> torch.export.ExportedProgram:
    """The net as torch.export takes it down.

    Raises:
        ConvertError: it cannot, with its reason.
    """
    inputs, shapes = as_input(given, net), None
    if dynamic_batch:
        # a batch of one would be taken for a constant, and a tensor that is as long as the batch for one of the batch
        others = {len(x) for x in inputs.tensors if x.ndim and len(x) != inputs.batch}
        inputs = inputs.with_batch(next(n for n in count(max(2, inputs.batch)) if n not in others))
        shapes = _open_batch(net, inputs)
    try:
        with torch.no_grad():
            return torch.export.export(net, inputs.args, dict(inputs.kwargs), dynamic_shapes=shapes)
    except Exception as error:
        way_out = "; dynamic_batch=False fixes the batch size" if dynamic_batch else ""
        raise ConvertError(f"the model cannot be exported by torch.export ({cause(error)}){way_out}") from error


def cause(error: BaseException) -> str:
    """What went wrong first, in one line: exporters wrap it, and hang advice and colours on it."""
    while error.__cause__ is not None:
        error = error.__cause__
    first, *more = re.sub(r"\x1b\[[0-9;]*m", "", str(error)).splitlines() or [""]
    details = next((line.strip(" -") for line in more if line.startswith("  - ")), "")
    return f"{type(error).__name__}: {first}{f' {details}' if details else ''}"


def _open_batch(net: nn.Module, inputs: ModelInput) -> dict[str, object]:
    """The parameters of ``forward`` by name, each with the axis of the batch in its tensors left open."""
    batch, size = torch.export.Dim("batch"), inputs.batch
    bound = inspect.signature(net.forward).bind(*inputs.args, **inputs.kwargs).arguments
    opened: dict[str, object] = tree_map(
        lambda x: {0: batch} if isinstance(x, Tensor) and x.ndim and len(x) == size else None, dict(bound)
    )
    return opened
