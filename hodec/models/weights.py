"""Weights from a file into a model: checked before a single number is changed."""

import logging
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from hodec.errors import CheckpointError, Use, literal

log = logging.getLogger(__name__)

StateDict = dict[str, Tensor]
WRAPPERS = ("state_dict", "model_state_dict", "model")  # where training programs keep the weights
COUNTER = "num_batches_tracked"  # of BatchNorm: many files lack it, and no forward pass needs it
NOT_IN_FILE, NOT_IN_MODEL = "not in the file", "not in the model"
SHOWN = 3  # differing tensors named in an error


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
    found = _without_prefix(_read(path), model, path)
    target = {key: value for key, value in model.state_dict().items() if isinstance(value, Tensor)}
    fit = _compare(found, target)
    head = _head_keys(model)
    if fit.only_head(head) and allow_new_head:
        log.info("%s: last layer (%s) starts anew, the file's has other outputs", path, ", ".join(head))
        found = {key: value for key, value in found.items() if key not in head}
    elif fit.differ:
        raise _misfit(path, fit, head)
    _check_finite(found, path)
    zeros = {key: torch.zeros_like(target[key]) for key in fit.absent_counters}
    model.load_state_dict({**model.state_dict(), **zeros, **found}, strict=True)


def _read(path: Path) -> StateDict:
    reader = READERS.get(path.suffix)
    if reader is None:
        raise CheckpointError(f"{path}: weights are read from {', '.join(READERS)}, not {path.suffix!r}")
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file; give the path of existing weights")
    if path.stat().st_size == 0:
        raise CheckpointError(f"{path}: the file is empty; write or fetch it again, or take an earlier one")
    return reader(path)


def _read_safetensors(path: Path) -> StateDict:
    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError, KeyError) as error:
        raise _unreadable(path, error) from error


def _read_torch(path: Path) -> StateDict:
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                # torch does not look at the checksums: a flipped bit would load as another weight
                if (broken := archive.testzip()) is not None:
                    raise zipfile.BadZipFile(f"checksum of {broken} is wrong")
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever bytes stand in the file, torch may raise anything
        raise _unreadable(path, error) from error
    return _unwrap(content, path)


READERS: dict[str, Callable[[Path], StateDict]] = {
    ".safetensors": _read_safetensors,
    ".ckpt": _read_torch,
    ".pt": _read_torch,
    ".pth": _read_torch,
}


def _unreadable(path: Path, error: Exception) -> CheckpointError:
    reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    return CheckpointError(
        f"{path}: not readable as weights (truncated, altered, or another kind of file; more than "
        f"tensors and plain values are refused): {reason[:160]}. Write or fetch it again, or take an older one"
    )


def _unwrap(content: Any, path: Path) -> StateDict:
    for key in WRAPPERS:
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
            break
    if not isinstance(content, Mapping) or not content:
        raise CheckpointError(f"{path}: holds a {type(content).__name__}, no tensors; save a state_dict()")
    others = [str(key) for key, value in content.items() if not isinstance(value, Tensor)]
    if others:
        raise CheckpointError(f"{path}: {', '.join(others[:SHOWN])} are no tensors; save a state_dict()")
    return {str(key): value for key, value in content.items()}


def _without_prefix(found: StateDict, model: nn.Module, path: Path) -> StateDict:
    """The tensors below the prefix under which most names of the model are found; no prefix goes first."""
    names = {key for key in model.state_dict() if not key.endswith(COUNTER)}
    if names <= found.keys():
        return found
    parts = [key.split(".") for key in found]
    prefixes = sorted({".".join([*p[:depth], ""]) for p in parts for depth in range(len(p))}, key=len)
    hits = {prefix: sum(prefix + name in found for name in names) for prefix in prefixes}
    best = max(prefixes, key=hits.__getitem__)
    whole = [prefix for prefix in prefixes if hits[prefix] == len(names)]
    if len(whole) > 1:
        choice = ", ".join(sorted(whole))
        raise CheckpointError(f"{path}: holds this model {len(whole)} times, under {choice}; save one alone")
    inside = {key.removeprefix(best): value for key, value in found.items() if key.startswith(best)}
    if len(inside) < len(found):
        log.info("%s: %d tensors outside %r are not used", path, len(found) - len(inside), best)
    return inside


@dataclass(frozen=True)
class _Fit:
    """How the tensors of a file stand to those of a model."""

    total: int  # of the model, without counters
    differ: dict[str, str]  # name -> what differs
    new_outputs: frozenset[str]  # those of differ with another number of outputs, and nothing else
    absent_counters: frozenset[str]

    def only_head(self, head: list[str]) -> bool:
        """Whether the last layer's number of outputs is all that differs."""
        return bool(self.differ) and self.new_outputs == self.differ.keys() and self.new_outputs <= set(head)


def _compare(found: StateDict, target: StateDict) -> _Fit:
    absent = [key for key in target if key not in found]
    counters = {key for key in absent if key.endswith(COUNTER)}
    differ = {key: NOT_IN_FILE for key in absent if key not in counters}
    reshaped = [key for key in target if key in found and found[key].shape != target[key].shape]
    for key in reshaped:
        differ[key] = f"{tuple(found[key].shape)} in the file, {tuple(target[key].shape)} in the model"
    differ |= {key: NOT_IN_MODEL for key in found if key not in target}
    outputs = {key for key in reshaped if found[key].shape[1:] == target[key].shape[1:]}
    total = sum(not key.endswith(COUNTER) for key in target)
    return _Fit(total, differ, frozenset(outputs), frozenset(counters))


def _head_keys(model: nn.Module) -> list[str]:
    """Names of the weights of the last layer, in the order of registration."""
    names = [name for name, _ in model.named_parameters()]
    owner = names[-1].rpartition(".")[0] if names else ""
    return [name for name in names if name.rpartition(".")[0] == owner]


def _misfit(path: Path, fit: _Fit, head: list[str]) -> CheckpointError:
    shown = "; ".join(f"{key}: {what}" for key, what in list(fit.differ.items())[:SHOWN])
    if fit.only_head(head):
        return CheckpointError(
            literal(f"{path}: the last layer has another number of outputs ({shown})")
            + ". Build the model with the file's {classes}; in Python, allow_new_head=True gives it a new one",
            classes=Use("num_classes"),
        )
    missing = sum(1 for what in fit.differ.values() if what != NOT_IN_MODEL)
    more = f" and {len(fit.differ) - SHOWN} more" if len(fit.differ) > SHOWN else ""
    return CheckpointError(
        literal(
            f"{path}: checkpoint of another model: {fit.total - missing} of {fit.total} tensors fit; differing: "
            f"{shown}{more}"
        )
        + ". Choose the {model} which the file was saved from, or its own file",
        model=Use("model"),
    )


def _check_finite(found: StateDict, path: Path) -> None:
    bad = [key for key, value in found.items() if value.is_floating_point() and not value.isfinite().all()]
    if bad:
        raise CheckpointError(
            f"{path}: NaN or infinity in {len(bad)} of {len(found)} tensors ({', '.join(bad[:SHOWN])}); "
            "the training that wrote it had broken down: take an earlier file"
        )
