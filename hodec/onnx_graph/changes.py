"""What hodec decompose did to a model file, read again from the file's metadata."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hodec.errors import CheckpointError, PlanError
from hodec.onnx_graph.model_file import load_model
from hodec.onnx_graph.rewrite import FORMAT, METADATA, VERSION

# What is shown of a layer; ``Change.to_dict`` writes these, and more.
SHOWN = ("nodes", "method", "shape", "ranks", "error")


@dataclass(frozen=True)
class ChangeMap:
    """The map of changes of one file.

    Attributes:
        value: as it stands in the file: format, version, rule, layers, skipped.
    """

    value: dict[str, Any]

    def __str__(self) -> str:
        layers, skipped = self.value["layers"], self.value["skipped"]
        lines = [f"{len(layers)} layers decomposed by rule {self.value['rule']}, {len(skipped)} left dense"]
        lines += [
            f"  {name} {'·'.join(map(str, one['shape']))} -> {', '.join(one['nodes'])}  {one['method']} {one['ranks']}"
            f", weight error {one['error']:.3f}"
            for name, one in layers.items()
        ]
        return "\n".join([*lines, *(f"  {name} stays: {reason}" for name, reason in skipped.items())])


def read_changes(path: str | Path) -> ChangeMap:
    """The map of changes in a model file.

    Raises:
        CheckpointError: no ONNX file, or a map that is damaged or of another version.
        PlanError: a model that hodec decompose did not write.
    """
    notes = {entry.key: entry.value for entry in load_model(path).proto.metadata_props}
    if METADATA not in notes:
        raise PlanError(
            f"{path} holds no map of changes (metadata {METADATA!r}): hodec decompose did not write it, or the program "
            "that wrote it since dropped its metadata"
        )
    try:
        value = json.loads(notes[METADATA])
    except ValueError as error:
        raise CheckpointError(
            f"{path}: metadata {METADATA!r} is no JSON ({error}); decompose the model again"
        ) from error
    return ChangeMap(_checked(value, path))


def _checked(value: Any, path: str | Path) -> dict[str, Any]:
    if not isinstance(value, dict) or (value.get("format"), value.get("version")) != (FORMAT, VERSION):
        found = [value.get(key) for key in ("format", "version")] if isinstance(value, dict) else type(value).__name__
        raise CheckpointError(
            f"{path}: metadata {METADATA!r} is {found}; this hodec reads {[FORMAT, VERSION]}: update it, or decompose "
            "the model again"
        )
    layers, skipped = value.get("layers"), value.get("skipped")
    whole = isinstance(layers, dict) and isinstance(skipped, dict) and isinstance(value.get("rule"), str)
    if not whole or not all(_is_change(one) for one in layers.values()):  # type: ignore[union-attr]
        raise CheckpointError(f"{path}: metadata {METADATA!r} lacks a field or was altered; decompose the model again")
    return value


def _is_change(one: Any) -> bool:
    if not isinstance(one, dict) or not set(SHOWN) <= one.keys():
        return False
    return isinstance(one["error"], int | float) and all(
        isinstance(one[key], list) for key in ("nodes", "shape", "ranks")
    )
