"""Tensors in a folder of safetensors files (shards) with an index, read and written one tensor at a time.

Source of the index: Hugging Face, *huggingface_hub* and *transformers*, ``model.safetensors.index.json``.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from hodec.errors import CheckpointError, near_matches
from hodec.io.atomic import read_json, sha256, write_json
from hodec.io.tensors import reading, write_tensors

INDEX = "model.safetensors.index.json"

# Bytes of a written shard at most, unless one tensor is larger: 1 GiB, a quarter of a second of a fast disk.
SHARD_BYTES = 2**30

# How safetensors writes types that torch has.
TYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "C64": torch.complex64,
}  # fmt: skip


@dataclass(frozen=True)
class Stored:
    """Where a tensor lies and what it is.

    Attributes:
        file: the shard.
        shape, dtype: of the tensor.
    """

    file: Path
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """Bytes of its numbers."""
        return math.prod(self.shape) * self.dtype.itemsize


class Shards(Mapping[str, Stored]):
    """Name -> where the tensor lies; opening reads the headers only.

    Args:
        path: a folder with one ``*.safetensors.index.json``, or else with ``.safetensors`` files; such an index; or one
            ``.safetensors`` file.

    Raises:
        CheckpointError: no such folder or file, an index that is not readable or names files elsewhere, a missing or
            truncated shard, a tensor that lies in two, or a type that torch has not.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._found: dict[str, Stored] = {}
        files, named = _files(self.path)
        for file in files:
            for name, one in _header(file).items():
                if named is None and name in self._found:
                    raise CheckpointError(f"{self.path}: {name} lies in {self._found[name].file.name} and {file.name}")
                if named is None or named.get(name) == file.name:
                    self._found[name] = one
        if missing := [name for name in named or () if name not in self._found]:
            raise CheckpointError(
                f"{self.path}: its index names {missing[0]} in {(named or {})[missing[0]]}, which lacks it; "
                f"{len(missing)} tensors are missing: fetch the shards again"
            )

    def __getitem__(self, name: str) -> Stored:
        return self._found[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._found)

    def __len__(self) -> int:
        return len(self._found)

    @cached_property
    def files(self) -> list[Path]:
        """The shards, each once."""
        return list(dict.fromkeys(one.file for one in self._found.values()))

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(one.nbytes for one in self._found.values())

    def first_of(self, names: Sequence[str], what: str) -> str:
        """The first of several names of one tensor that is here.

        Raises:
            CheckpointError: none is; ``what`` says whose tensor it is.
        """
        found = next((name for name in names if name in self._found), None)
        if found is None:
            raise CheckpointError(
                f"{self.path} has no tensor {names[0]} for {what}: it is of another model, or its names have another "
                f"prefix.{near_matches(names[0], tuple(self._found))}"
            )
        return found

    def read(self, name: str) -> Tensor:
        """A copy of one tensor in memory of its own; the file is open for the time of the call only.

        Raises:
            CheckpointError: the file is no longer readable.
        """
        with reading(self._found[name].file), safe_open(self._found[name].file, "pt") as file:
            read: Tensor = file.get_tensor(name)
            return read.clone()  # what safetensors gives may be a view of the whole mapped file


def _files(path: Path) -> tuple[list[Path], dict[str, str] | None]:
    """The shards behind a path, and of an index the tensors with their files."""
    if path.is_file() and path.suffix == ".safetensors":
        return [path], None
    index = path
    if path.is_dir():
        found = sorted(path.glob("*.safetensors.index.json"))
        if len(found) > 1:
            names = ", ".join(one.name for one in found)
            raise CheckpointError(f"{path} has several indices, {names}: give the path of one of them")
        if not found:
            files = sorted(path.glob("*.safetensors"))
            if not files:
                raise CheckpointError(f"{path} holds no .safetensors file: give the folder of the shards")
            return files, None
        index = found[0]
    value = read_json(index, "index of shards")
    named = value.get("weight_map") if isinstance(value, dict) else None
    if not isinstance(named, dict) or not named or not all(isinstance(one, str) for one in named.values()):
        raise CheckpointError(f"{index} is no index of shards: it lacks a weight_map of tensors and their files")
    if outside := [one for one in named.values() if Path(one).name != one or not one.endswith(".safetensors")]:
        raise CheckpointError(f"{index}: {outside[0]!r} is no .safetensors file beside it; an index names no others")
    return [index.parent / one for one in dict.fromkeys(named.values())], named


def _header(file: Path) -> dict[str, Stored]:
    found: dict[str, Stored] = {}
    with reading(file), safe_open(file, "pt") as opened:
        for name in opened.keys():  # noqa: SIM118
            part = opened.get_slice(name)
            dtype = TYPES.get(part.get_dtype())
            if dtype is None:
                raise CheckpointError(f"{file}: {name} is of type {part.get_dtype()}, which is not read here")
            found[name] = Stored(file, tuple(part.get_shape()), dtype)
    return found


# -- writing -----------------------------------------------------------------------------------------------------


def grouped(sizes: Mapping[str, int], most: int) -> list[list[str]]:
    """Names in their order, in groups of at most ``most`` bytes together; one that is larger is alone."""
    groups: list[list[str]] = []
    held = 0
    for name, size in sizes.items():
        if not groups or held + size > most:
            groups.append([])
            held = 0
        groups[-1].append(name)
        held += size
    return groups


def shard_name(number: int, count: int) -> str:
    """The file name of a shard, numbered from 1, as Hugging Face has it."""
    return f"model-{number:05d}-of-{count:05d}.safetensors"


def write_shard(path: Path, tensors: Mapping[str, Tensor]) -> str:
    """Write a shard atomically; returns its SHA-256.

    Raises:
        OSError: it cannot be written.
    """
    write_tensors(path, {name: t.contiguous() for name, t in tensors.items()}, {"format": "pt"})
    return sha256(path)


def write_index(folder: Path, files: Mapping[str, Iterable[str]], nbytes: int) -> None:
    """Write the index of shards: file -> its tensors; it is written last, so that a folder with one is whole."""
    named = {name: file for file, names in files.items() for name in names}
    write_json(folder / INDEX, {"metadata": {"total_size": nbytes}, "weight_map": dict(sorted(named.items()))})
