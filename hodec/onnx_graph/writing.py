"""Model files that are either whole or not there, with their tensors beside them where they are too many."""

import glob
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import onnx
import onnx_ir as ir

from hodec.errors import ConvertError, Use, literal
from hodec.io.atomic import check_place, replacing, writing
from hodec.onnx_graph.graph import OnnxGraph, tensors_of

# Protobuf refuses messages of 2 GiB; nodes and names get 64 MiB of that.
MAX_BYTES = 2**31 - 2**26


def check_target(out: Path, graph: OnnxGraph, *, force: bool) -> None:
    """Refuse a place that cannot be written to, before any work is done.

    Raises:
        ConvertError: no such folder, the input itself, or a file that is there already, without ``force``.
    """
    check_place(out, ConvertError, "output: ")
    if out.exists() and any(out.samefile(path) for path in (graph.path, *graph.data_files)):
        raise ConvertError(f"output {out} is the input itself, which is never touched; name another file")
    if out.exists() and not force:
        raise ConvertError(
            literal(f"output {out} is there already; ") + "{force} replaces it", force=Use("force", True, "--force")
        )


@contextmanager
def written(graph: OnnxGraph, out: Path) -> Iterator[list[Path]]:
    """Yield the finished files, the model first, in the folder of ``out``; afterwards the model is moved to ``out``.

    An error inside leaves everything as it was. Where the graph keeps tensors in other files, or is too large for one,
    those and its initializers of 1 KiB and more go into a new file beside ``out``, at multiples of a page, so that they
    can be mapped; the graph then refers to them there.

    Raises:
        ConvertError: no space left, or the folder cannot be written to.
    """
    total = sum(tensor.nbytes for tensor in tensors_of(graph.model))
    movable = _movable(graph.model) if graph.data_files or total >= MAX_BYTES else []
    data = [out.with_name(_free_name(out))] if movable else []
    needed = {path.resolve() for path in graph.data_files}
    earlier = [path for path in _data_files(out) if path.resolve() not in needed]
    moved = False
    try:
        with writing(out, ConvertError, "nothing was changed"), replacing(out) as path:
            for one in data:
                _move_out(movable, one)
            path.write_bytes(ir.to_proto(graph.model).SerializeToString())
            yield [path, *data]
        moved = True
    finally:
        for one in earlier if moved else data:
            one.unlink(missing_ok=True)


def _free_name(out: Path) -> str:
    """A name for the data that no file has: one that is being replaced may be in use until the end."""
    name, k = f"{out.name}.data", 1
    while (out.parent / name).exists():
        k += 1
        name = f"{out.name}.{k}.data"
    return name


def _movable(model: ir.Model, *, least: int = 1024) -> list[tuple[ir.Value, ir.TensorProtocol]]:
    """Initializers of ``least`` bytes and more, and those in other files; tensors of attributes there are read."""
    for node in ir.traversal.RecursiveGraphIterator(model.graph):
        for name, attribute in node.attributes.items():
            if attribute.type == ir.AttributeType.TENSOR and isinstance(attribute.value, ir.ExternalTensor):
                node.attributes[name] = ir.AttrTensor(name, ir.tensor(attribute.value.numpy().copy()))
    values = [one for graph in model.graphs() for one in graph.initializers.values()]
    held = [(value, tensor) for value in values if (tensor := value.const_value) is not None]
    return [
        (value, tensor)
        for value, tensor in held
        if isinstance(tensor, ir.ExternalTensor) or (tensor.nbytes >= least and tensor.dtype != ir.DataType.STRING)
    ]


def _move_out(movable: list[tuple[ir.Value, ir.TensorProtocol]], data: Path, *, page: int = 4096) -> None:
    """Write initializers into a file, each from a ``page`` on, and let them refer to it."""
    tensors = ir.external_data.convert_tensors_to_external(
        [tensor for _, tensor in movable], data.parent, data.name, alignment=page, align_threshold=0
    )
    for (value, _), tensor in zip(movable, tensors, strict=True):
        value.const_value = tensor
    with data.open("rb+") as stream:
        os.fsync(stream.fileno())


def _data_files(out: Path) -> list[Path]:
    """Data files of a model that is about to be replaced, as far as this module wrote them."""
    if not out.exists() or not any(out.parent.glob(f"{glob.escape(out.name)}.*data")):
        return []  # and the file, which may be gigabytes, need not be read
    try:
        model = onnx.load(str(out), format="protobuf", load_external_data=False)
    except Exception:  # whatever it is, its neighbours are not ours
        return []
    entries = [entry for tensor in model.graph.initializer for entry in tensor.external_data if entry.key == "location"]
    names = {
        entry.value for entry in entries if entry.value.startswith(f"{out.name}.") and entry.value.endswith(".data")
    }
    return [out.parent / name for name in names if "/" not in name]
