"""A compressed model on disk: safetensors beside a JSON of its structure, checked when read."""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

import hodec
from hodec.conversion import convert
from hodec.errors import CheckpointError
from hodec.files import read_json, sha256, write_json
from hodec.plan import Plan
from hodec.run_folder import load_tensors, save_tensors

FORMAT, VERSION = "hodec-model", 1


def save(model: nn.Module, path: str | Path, plan: Plan, *, facts: Mapping[str, Any] | None = None) -> None:
    """Write a converted model: ``path`` (safetensors) and the same name with ``.json`` (plan, SHA-256, facts).

    Args:
        model: what ``convert`` made from ``plan``, trained further or not.
        path: ends in ``.safetensors``.
        plan: the plan it was converted by.
        facts: plain JSON values to keep with it, e.g. the name the dense net is built by.

    Raises:
        CheckpointError: a path with another ending.
    """
    path = Path(path)
    if path.suffix != ".safetensors":
        raise CheckpointError(f"{path}: a compressed model is written to a .safetensors file, not {path.suffix!r}")
    save_tensors(path, model.state_dict(), {"format": FORMAT})  # one entry: of several, the order would vary
    structure = {
        "format": FORMAT,
        "version": VERSION,
        "hodec": hodec.__version__,
        "sha256": sha256(path),
        "facts": dict(facts or {}),
        "plan": plan.to_dict(),
    }
    write_json(path.with_suffix(".json"), structure)


def load(path: str | Path, skeleton: nn.Module) -> nn.Module:
    """Rebuild a compressed model.

    Args:
        path: the ``.safetensors`` file that ``save`` wrote, its ``.json`` beside it.
        skeleton: the dense net, of any weights; it is left as it was.

    Raises:
        CheckpointError: a file is missing, truncated or altered, or belongs to another model.
        PlanError: the plan is for another skeleton.
    """
    path = Path(path)
    structure = read_structure(path)
    if not path.exists():
        raise CheckpointError(f"{path} does not exist")
    if sha256(path) != structure["sha256"]:
        raise CheckpointError(f"{path} is truncated or was altered: its SHA-256 is not the one in its .json")
    small = convert(skeleton, Plan.from_dict(structure["plan"]), decompose=False)
    tensors = load_tensors(path)
    own = {name: tuple(t.shape) for name, t in small.state_dict().items()}
    given = {name: tuple(t.shape) for name, t in tensors.items()}
    if own != given:
        wrong = sorted(name for name in own.keys() | given.keys() if own.get(name) != given.get(name))
        first = wrong[0]
        raise CheckpointError(
            f"{path} does not fit this skeleton: {len(wrong)} of {len(own)} tensors differ, first {first} "
            f"(file {given.get(first, 'absent')}, model {own.get(first, 'absent')})"
        )
    small.load_state_dict(tensors)
    return small


def read_structure(path: str | Path) -> dict[str, Any]:
    """The JSON beside a compressed model: ``facts`` say how its dense net is built.

    Raises:
        CheckpointError: missing, unreadable or of another format.
    """
    structure = read_json(Path(path).with_suffix(".json"), "structure of the model")
    if not isinstance(structure, dict) or structure.get("format") != FORMAT or structure.get("version") != VERSION:
        raise CheckpointError(f"{Path(path).with_suffix('.json')} is not a hodec model of version {VERSION}")
    if missing := [key for key in ("sha256", "plan") if key not in structure]:
        raise CheckpointError(f"{Path(path).with_suffix('.json')} lacks {', '.join(missing)}: it was altered")
    return structure


def weights_digest(model: nn.Module) -> str:
    """SHA-256 over all tensors of a model, in order: equal digests mean bit-equal weights."""
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        digest.update(name.encode())
        bits = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)  # numpy has no bfloat16
        digest.update(bits.numpy().tobytes())
    return digest.hexdigest()
