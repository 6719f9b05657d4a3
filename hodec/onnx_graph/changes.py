"""The map of changes: what hodec decompose did to a model file, as it stands in the file's metadata."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hodec.errors import CheckpointError, PlanError, listed
from hodec.onnx_graph.graph import load_graph
from hodec.plan.layer import KEYS_OF_VERSION_1, LayerPlan
from hodec.plan.plan import Plan

METADATA = "hodec.changes"
FORMAT, VERSION = "hodec-onnx-changes", 2

Layers = dict[str, dict[str, Any]]


@dataclass(frozen=True)
class Change:
    """What became of one node.

    Attributes:
        nodes, weights: names of the new nodes and of their initializers.
        error: norm(W - factorized W) / norm(W) of the weights as they stand in the file.
    """

    nodes: tuple[str, ...]
    weights: tuple[str, ...]
    layer: LayerPlan
    error: float

    def to_dict(self) -> dict[str, object]:
        """Plain JSON values."""
        return {
            "nodes": list(self.nodes),
            "weights": list(self.weights),
            "method": self.layer.method,
            "layer_type": self.layer.layer_type,
            "shape": list(self.layer.shape),
            "ranks": list(self.layer.ranks),
            "resolved_execution": self.layer.resolved_execution,
            "error": float(f"{self.error:.4g}"),
        }


@dataclass(frozen=True)
class ChangeMap:
    """The map of changes of one file.

    Attributes:
        rule: the rule that chose the ranks of the last call.
        layers: node -> what ``Change.to_dict`` says of it, of all calls.
        skipped: node -> why the last call left it dense.
    """

    rule: str
    layers: Layers
    skipped: dict[str, str]

    def to_dict(self) -> dict[str, object]:
        """Plain JSON values, as they stand in a file of this version."""
        return {"format": FORMAT, "version": VERSION, **vars(self)}

    def __str__(self) -> str:
        first = f"{len(self.layers)} layers decomposed by rule {self.rule}, {len(self.skipped)} left dense"
        return "\n".join([first, *layer_lines(self.layers, self.skipped)])


def layer_lines(layers: Layers, skipped: Mapping[str, str]) -> list[str]:
    """A line for each layer, and one for each reason why others stay dense, with long names cut."""
    lines = [
        f"  {shortened(name)} {'·'.join(map(str, one['shape']))} -> {len(one['nodes'])} nodes  "
        f"{one['method']} {one['ranks']}, weight error {one['error']:.3f}"
        for name, one in layers.items()
    ]
    reasons: dict[str, list[str]] = {}
    for name, reason in skipped.items():
        reasons.setdefault(reason, []).append(shortened(name))
    return [*lines, *(f"  dense, {reason}: {listed(names)}" for reason, names in reasons.items())]


def shortened(name: str, most: int = 60) -> str:
    """A name of at most ``most`` characters, its end among them, which tells nodes apart."""
    return name if len(name) <= most else f"{name[: most // 3]}..{name[2 + most // 3 - most :]}"


def changes_text(earlier: Layers, changes: Mapping[str, Change], plan: Plan) -> str:
    """The map of changes after a call, as JSON, with the layers of earlier calls in front."""
    layers = {**earlier, **{name: change.to_dict() for name, change in changes.items()}}
    return json.dumps(ChangeMap(plan.rule, layers, dict(plan.skipped)).to_dict())


def earlier_layers(text: str) -> Layers:
    """The layers of a map of changes of any version, in the words of this one; none if it is not one."""
    try:
        return _layers(json.loads(text))
    except ValueError:
        return {}


def _layers(value: object) -> Layers:
    layers = value.get("layers") if isinstance(value, dict) else None
    if not isinstance(layers, dict) or not all(isinstance(one, dict) for one in layers.values()):
        return {}
    return {name: {KEYS_OF_VERSION_1.get(key, key): part for key, part in one.items()} for name, one in layers.items()}


def read_changes(path: str | Path) -> ChangeMap:
    """The map of changes in a model file; files of version 1 are read too.

    Raises:
        CheckpointError: no ONNX file, or a map that is damaged or of another version.
        PlanError: a model that hodec decompose did not write.
    """
    text = load_graph(path).model.metadata_props.get(METADATA)
    if text is None:
        raise PlanError(
            f"{path} holds no map of changes (metadata {METADATA!r}): hodec decompose did not write it, or the program "
            "that wrote it since dropped its metadata"
        )
    try:
        value = json.loads(text)
    except ValueError as error:
        raise CheckpointError(
            f"{path}: metadata {METADATA!r} is no JSON ({error}); decompose the model again"
        ) from error
    if not isinstance(value, dict) or value.get("format") != FORMAT or value.get("version") not in (1, VERSION):
        given = [value.get(key) for key in ("format", "version")] if isinstance(value, dict) else type(value).__name__
        raise CheckpointError(
            f"{path}: metadata {METADATA!r} is {given}; this hodec reads {[FORMAT, VERSION]}: update it, or decompose "
            "the model again"
        )
    rule, skipped, layers = value.get("rule"), value.get("skipped"), _layers(value)
    complete = "layers" in value and len(layers) == len(value["layers"]) and all(map(_is_change, layers.values()))
    if not complete or not isinstance(rule, str) or not isinstance(skipped, dict):
        raise CheckpointError(f"{path}: metadata {METADATA!r} lacks a field or was altered; decompose the model again")
    return ChangeMap(rule, layers, skipped)


def _is_change(one: Mapping[str, object]) -> bool:
    lists = all(isinstance(one.get(key), list) for key in ("nodes", "shape", "ranks"))
    return lists and isinstance(one.get("error"), int | float) and "method" in one
