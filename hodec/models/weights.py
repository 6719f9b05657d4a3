"""Weights from a file into a model: checked before a single number is changed."""

import logging
import os
import zipfile
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from hodec.errors import CheckpointError, Use, literal
from hodec.io.tensors import kind_of, zip_fault

log = logging.getLogger(__name__)

StateDict = dict[str, Tensor]
SUFFIXES = (".safetensors", ".ckpt", ".pt", ".pth")
WRAPPERS = ("state_dict", "model_state_dict", "model")  # where training programs keep the weights
COUNTER = "num_batches_tracked"  # of BatchNorm: many files lack it, and no forward pass needs it
COUNTS = ("integer", "real", "truth")  # what it may be stored as


def load_weights(model: nn.Module, path: str | Path, *, allow_new_head: bool = False) -> None:
    """Set the parameters and buffers of a model from a file.

    A prefix that a wrapper put before every name (``net.``, ``model.``, ``module.``) is dropped when the
    names fit without it. Counters of BatchNorm that the file lacks become 0. No code from the file is run.

    Args:
        model: changed in place, only when everything fits.
        path: a ``.safetensors`` file; or ``.ckpt``, ``.pt``, ``.pth`` written by ``torch.save`` or Lightning.
        allow_new_head: keep the model's own last layer when the file's has another number of outputs.

    Raises:
        CheckpointError: if the file is missing, unreadable or truncated, belongs to another model, or holds
            a NaN or an infinity. The model is then as it was.
    """
    path = Path(path)
    target = {key: value for key, value in model.state_dict().items() if isinstance(value, Tensor)}
    tensors = _without_prefix(_read(path), target, path)
    counters = {key: torch.zeros_like(target[key]) for key in target if key.endswith(COUNTER) and key not in tensors}
    differ = _differences(tensors, {key: value for key, value in target.items() if key not in counters})
    head = _head_keys(model)
    only_head = differ.keys() <= set(head) and all(
        key in tensors
        and tensors[key].shape[1:] == target[key].shape[1:]
        and kind_of(tensors[key]) == kind_of(target[key])
        for key in differ
    )
    if differ and only_head and allow_new_head:
        log.info("%s: last layer (%s) starts anew, the file's has other outputs", path, ", ".join(head))
        tensors = {key: value for key, value in tensors.items() if key not in head}
    elif differ:
        total = sum(not key.endswith(COUNTER) for key in target)
        raise _misfit(path, differ, fitting=total - len(differ.keys() & target.keys()), total=total, head=only_head)
    _check_finite(tensors, path)
    model.load_state_dict({**model.state_dict(), **counters, **tensors}, strict=True)


def _read(path: Path) -> StateDict:
    if path.suffix not in SUFFIXES:
        raise CheckpointError(f"{path}: weights are read from {', '.join(SUFFIXES)}, not {path.suffix!r}")
    if not os.path.isfile(path):  # Path.is_file raises for names that are too long
        raise CheckpointError(f"{path}: no such file; give the path of existing weights")
    if path.stat().st_size == 0:
        raise CheckpointError(f"{path}: the file is empty; write or fetch it again, or take an earlier one")
    try:
        content = load_file(path) if path.suffix == ".safetensors" else _read_torch(path)
    except Exception as error:  # whatever bytes stand in the file, the readers may raise anything
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise CheckpointError(
            f"{path}: not readable as weights (truncated, altered, or another kind of file; more than "
            f"tensors and plain values are refused): {reason[:160]}. Write or fetch it again, or take an older one"
        ) from error
    return _named_tensors(content, path)


def _read_torch(path: Path) -> object:
    if zipfile.is_zipfile(path) and (fault := zip_fault(path)):
        raise zipfile.BadZipFile(fault)
    content: object = torch.load(path, map_location="cpu", weights_only=True)
    if isinstance(content, Mapping):
        return next((content[key] for key in WRAPPERS if isinstance(content.get(key), Mapping)), content)
    return content


def _named_tensors(content: object, path: Path) -> StateDict:
    if not isinstance(content, Mapping) or not content:
        raise CheckpointError(f"{path}: holds a {type(content).__name__}, no tensors; save a state_dict()")
    others = [str(key) for key, value in content.items() if not isinstance(value, Tensor)]
    if others:
        raise CheckpointError(f"{path}: {', '.join(others[:3])} are no tensors; save a state_dict()")
    return {str(key): value for key, value in content.items()}


def _without_prefix(tensors: StateDict, target: StateDict, path: Path) -> StateDict:
    """The tensors below the prefix under which most names of the model are found; no prefix goes first."""
    names = {key for key in target if not key.endswith(COUNTER)}
    if names <= tensors.keys():
        return tensors
    parts = [key.split(".") for key in tensors]
    prefixes = sorted({".".join([*p[:depth], ""]) for p in parts for depth in range(len(p))}, key=len)
    hits = {prefix: sum(prefix + name in tensors for name in names) for prefix in prefixes}
    complete = sorted(prefix for prefix in prefixes if hits[prefix] == len(names))
    if len(complete) > 1:
        raise CheckpointError(f"{path}: holds this model {len(complete)} times, under {', '.join(complete)}; save one")
    best = max(prefixes, key=hits.__getitem__)
    inside = {key.removeprefix(best): value for key, value in tensors.items() if key.startswith(best)}
    if len(inside) < len(tensors):
        log.info("%s: %d tensors outside %r are not used", path, len(tensors) - len(inside), best)
    return inside


def _differences(tensors: StateDict, target: StateDict) -> dict[str, str]:
    """Name -> how the tensor of the file differs from the model's: missing ones, other shapes, unknown ones."""
    differ = {key: "not in the file" for key in target if key not in tensors}
    for key in (key for key in target if key in tensors):
        theirs, mine = tensors[key], target[key]
        if theirs.shape != mine.shape:
            differ[key] = f"{_size(theirs)} in the file, {_size(mine)} in the model"
        elif kind_of(theirs) != kind_of(mine) and not (key.endswith(COUNTER) and kind_of(theirs) in COUNTS):
            differ[key] = f"{kind_of(theirs)} numbers ({theirs.dtype}) in the file, {kind_of(mine)} in the model"
    return differ | {key: "not in the model" for key in tensors if key not in target}


def _size(tensor: Tensor, most: int = 8) -> str:
    """The shape of a tensor in a message; a file may say that it has thousands of axes."""
    axes = tuple(tensor.shape)
    return str(axes) if len(axes) <= most else f"{axes[:most]}.. ({len(axes)} axes)"


def _head_keys(model: nn.Module) -> list[str]:
    """Names of the weights of the last layer, in the order of registration."""
    names = [name for name, _ in model.named_parameters()]
    owner = names[-1].rpartition(".")[0] if names else ""
    return [name for name in names if name.rpartition(".")[0] == owner]


def _misfit(path: Path, differ: dict[str, str], *, fitting: int, total: int, head: bool) -> CheckpointError:
    shown = "; ".join(f"{key}: {difference}" for key, difference in list(differ.items())[:3])
    if head:
        return CheckpointError(
            f"{literal(path)}: the last layer has another number of outputs ({shown}); in Python, "
            "allow_new_head=True starts with a new one. Build the model with the file's {num_classes}",
            num_classes=Use("num_classes"),
        )
    more = f" and {len(differ) - 3} more" if len(differ) > 3 else ""
    return CheckpointError(
        f"{path}: checkpoint of another model: {fitting} of {total} tensors fit; differing: {shown}{more}. "
        "Build the model that the file was saved from, or give a file of this model"
    )


def _check_finite(tensors: StateDict, path: Path) -> None:
    bad = [key for key, value in tensors.items() if value.is_floating_point() and not value.isfinite().all()]
    if bad:
        raise CheckpointError(
            f"{path}: NaN or infinity in {len(bad)} of {len(tensors)} tensors ({', '.join(bad[:3])}); "
            "the training that wrote it had broken down: take an earlier file"
        )
