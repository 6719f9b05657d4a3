"""Tensors in safetensors files, whole or not at all."""

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from hodec.errors import CheckpointError
from hodec.io.atomic import replacing


def save_tensors(path: Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write tensors as safetensors, atomically; shared storage is stored once per name.

    Raises:
        OSError: the file cannot be written.
    """
    with replacing(path) as temporary:
        plain = {name: t.detach().cpu().clone().contiguous() for name, t in tensors.items()}
        try:
            save_file(plain, temporary, metadata=dict(metadata or {}))
        except SafetensorError as error:
            raise OSError(str(error)) from error


def load_tensors(path: Path) -> dict[str, torch.Tensor]:
    """Read a safetensors file.

    Raises:
        CheckpointError: missing, truncated, or another kind of file.
    """
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path} is not a readable safetensors file ({error}); is it truncated?") from error
