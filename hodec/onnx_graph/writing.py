"""Model files that are either whole or not there, with their numbers beside them where they are too many."""

import errno
import glob
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from io import BufferedWriter
from pathlib import Path

import onnx
from onnx import TensorProto

from hodec.errors import ConvertError
from hodec.onnx_graph.model_file import ModelFile, every_tensor, first_line, is_external, location_of

# Protobuf refuses messages of two GiB; nodes and names need some of that.
MOST_BYTES = 2**31 - 2**26
# Tensors of fewer bytes stay in the model file; the others start at multiples of a page, so that they can be mapped.
FEW_BYTES, PAGE = 1024, 4096


def check_target(out: Path, model: ModelFile, *, force: bool) -> None:
    """Refuse a place that cannot be written to, before any work is done.

    Raises:
        ConvertError: no such folder, the input itself, or a file that is there already, without ``force``.
    """
    if out.is_dir():
        raise ConvertError(f"output {out} is a folder; name a file, e.g. {out / 'small.onnx'}")
    if out.exists() and not out.is_file():  # a device, which a move would replace
        raise ConvertError(f"output {out} is no file that could be replaced; name a file")
    if not out.parent.is_dir():
        raise ConvertError(f"folder {out.parent} of the output does not exist; make it first")
    if not os.access(out.parent, os.W_OK):
        raise ConvertError(f"folder {out.parent} of the output cannot be written to")
    same = [path for path in (model.path, *model.data_files) if out.exists() and out.samefile(path)]
    if same:
        raise ConvertError(f"output {out} is the input itself, which is never touched; name another file")
    if out.exists() and not force:
        raise ConvertError(f"output {out} is there already; --force replaces it")


@contextmanager
def staged(model: ModelFile, out: Path) -> Iterator[Path]:
    """Yield a finished copy of the model in a hidden folder beside ``out``; afterwards it is moved to ``out``.

    An error inside leaves everything as it was.

    Raises:
        ConvertError: no space left, or the folder cannot be written to.
    """
    folder, inputs = None, model.data_files
    try:
        folder = Path(tempfile.mkdtemp(dir=out.parent, prefix=f".{out.name}."))
        written = _write(model, folder / out.name, out)
        yield folder / out.name
        _move(written, out, keep=inputs)
    except OSError as error:
        raise ConvertError(f"{out} could not be written: {_why(error)}; nothing was changed") from error
    finally:
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)


def _why(error: OSError) -> str:
    if error.errno in (errno.ENOSPC, errno.EFBIG, errno.EDQUOT):
        return "there is no space left"
    return error.strerror or first_line(error)


def _write(model: ModelFile, path: Path, out: Path) -> list[Path]:
    """Write model and data; returns the files in the order in which they are to be moved."""
    if not model.data_files and model.proto.ByteSize() < MOST_BYTES:
        _flush(path, model.proto.SerializeToString())
        return [path]
    data = path.with_name(_free_name(out))
    with data.open("wb") as stream:
        own = {id(tensor) for tensor in model.graph.initializer}
        for tensor in every_tensor(model.proto):
            if is_external(tensor) or (id(tensor) in own and tensor.data_type != TensorProto.STRING):
                _move_out(model, tensor, stream, data.name)
        stream.flush()
        os.fsync(stream.fileno())
    _flush(path, model.proto.SerializeToString())
    return [data, path]


def _flush(path: Path, content: bytes) -> None:
    with path.open("wb") as stream:
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())


def _free_name(out: Path) -> str:
    """A name for the data that no file has: one that is being replaced may be in use until the end."""
    name, k = f"{out.name}.data", 1
    while (out.parent / name).exists():
        k += 1
        name = f"{out.name}.{k}.data"
    return name


def _move_out(model: ModelFile, tensor: TensorProto, stream: BufferedWriter, name: str) -> None:
    content = model.content(tensor)
    if not is_external(tensor) and content.nbytes < FEW_BYTES:
        return
    stream.seek(-(-stream.tell() // PAGE) * PAGE)
    offset = stream.tell()
    stream.write(content.data)
    for key in ("raw_data", "float_data", "int32_data", "int64_data", "double_data", "uint64_data", "external_data"):
        tensor.ClearField(key)  # type: ignore[arg-type]
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in (("location", name), ("offset", offset), ("length", content.nbytes)):
        tensor.external_data.add(key=key, value=str(value))


def _move(written: list[Path], out: Path, *, keep: list[Path]) -> None:
    old = [path for path in _data_of(out) if path not in keep]
    for path in written:
        path.chmod(_mode())
        path.replace(out.parent / path.name)
    for data in old:
        data.unlink(missing_ok=True)


def _mode() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return 0o666 & ~mask


def _data_of(out: Path) -> list[Path]:
    """Data files of a model that is about to be replaced, as far as this module wrote them."""
    if not out.exists() or not any(out.parent.glob(f"{glob.escape(out.name)}.*data")):
        return []  # and the file, which may be gigabytes, need not be read
    try:
        graph = onnx.load(str(out), format="protobuf", load_external_data=False).graph
    except Exception:  # whatever it is, its neighbours are not ours
        return []
    names = {location_of(tensor) for tensor in graph.initializer if is_external(tensor)}
    return [out.parent / n for n in names if n.startswith(f"{out.name}.") and n.endswith(".data")]
