"""Tensors in safetensors files, whole or not at all."""

import hashlib
import os
import re
import sys
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, TypeGuard

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from hodec.errors import CheckpointError
from hodec.io.atomic import replacing

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


def save_tensors(path: Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write tensors as safetensors, atomically; shared storage is stored once per name.

    Raises:
        OSError: the file cannot be written.
    """
    plain = {name: t.detach().cpu().clone().contiguous() for name, t in tensors.items()}
    write_tensors(path, plain, dict(metadata or {}))


def write_tensors(path: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> None:
    """``save_tensors`` of contiguous tensors that share no memory, without a copy."""
    with replacing(path) as temporary:
        try:
            save_file(tensors, temporary, metadata=metadata)
        except SafetensorError as error:
            raise as_os_error(error) from error


def as_os_error(error: SafetensorError) -> OSError:
    """The refusal of the system, which safetensors words as text: ``os error 28``, in older versions ``code: 28``."""
    found = re.search(r"(?:os error|code:) (\d+)", str(error))
    return OSError(int(found[1]), os.strerror(int(found[1]))) if found else OSError(str(error))


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """What runs within reads a safetensors file.

    Raises:
        CheckpointError: missing, truncated, or another kind of file.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path} is not a readable safetensors file ({error}); is it truncated?") from error


def load_tensors(path: Path) -> dict[str, torch.Tensor]:
    """Read a safetensors file.

    Raises:
        CheckpointError: see ``reading``.
    """
    with reading(path):
        return load_file(path)


def tensor_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Name -> shape of the tensors in a safetensors file, of which only the header is read.

    Raises:
        CheckpointError: see ``reading``.
    """
    with reading(path), safe_open(path, "pt") as file:
        return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118


def bits(tensor: torch.Tensor) -> bytes:
    """The numbers of a tensor as they stand in memory, whatever its device and type."""
    plain = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)  # numpy has no bfloat16
    return plain.numpy().tobytes()


def digest(*tensors: torch.Tensor) -> str:
    """SHA-256 over the bits of tensors, in order."""
    found = hashlib.sha256()
    for tensor in tensors:
        found.update(bits(tensor))
    return found.hexdigest()


def zip_fault(path: Path) -> str:
    """What is wrong with the zip archive that ``torch.save`` wrote, or an empty text; it is read through once.

    torch itself looks at no checksum. It writes its parts unpacked, so that together they are smaller than the file:
    an archive that unpacks to more was made to fill the memory, and is refused before a byte of it is unpacked.

    Raises:
        OSError, zipfile.BadZipFile: it is truncated, or no archive.
    """
    with zipfile.ZipFile(path) as archive:
        unpacked, size = sum(part.file_size for part in archive.infolist()), path.stat().st_size
        if unpacked > size:
            return f"its {size:,} bytes unpack to {unpacked:,}, and torch.save packs nothing: save it again with torch"
        bad = archive.testzip()
    return f"the checksum of its part {bad} is wrong: it is altered" if bad else ""


def kind_of(tensor: torch.Tensor) -> str:
    """What a tensor holds: ``real``, ``complex``, ``integer`` or ``truth``; how it is stored, where not plainly.

    Numbers of one kind go over into another type of it by rounding; between kinds they would become others.
    """
    if tensor.is_quantized or tensor.layout is not torch.strided or tensor.device.type == "meta":
        return "quantized" if tensor.is_quantized else "absent" if tensor.device.type == "meta" else "sparse"
    if tensor.is_complex():
        return "complex"
    if tensor.is_floating_point():
        return "real"
    return "truth" if tensor.dtype == torch.bool else "integer"


def is_divided(tensor: object) -> "TypeGuard[DTensor]":
    """Whether a tensor is a ``DTensor``, of which each process holds a part."""
    module = sys.modules.get("torch.distributed.tensor")  # not imported: then there is none
    return module is not None and isinstance(tensor, module.DTensor)


def not_numbers(values: object) -> list[str]:
    """The paths of the tensors in nested dicts and lists that hold a NaN: ``state_dict.conv1.weight``.

    An infinity is no fault by itself: masks of attention hold them.
    """
    items: list[tuple[object, object]] = []
    if isinstance(values, torch.Tensor):
        return [""] if (values.is_floating_point() or values.is_complex()) and bool(values.isnan().any()) else []
    if isinstance(values, Mapping):
        items = list(values.items())
    elif isinstance(values, list | tuple):
        items = list(enumerate(values))
    return [f"{key}.{path}".rstrip(".") for key, value in items for path in not_numbers(value)]
