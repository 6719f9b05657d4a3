"""Scores of nets in a JSON file, reused only for the same weights, net, input and evaluation."""

import hashlib
import json
import logging
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import cast

import torch
from torch import nn

from hodec.cost.count import Inputs, as_inputs
from hodec.errors import CheckpointError, ConfigError, Use, literal
from hodec.io.atomic import read_json, write_json
from hodec.plan.layer import LayerPlan

log = logging.getLogger(__name__)

FORMAT = "hodec-greedy-scores"
VERSION = 1

# Which layers are factorized, and how: layer name -> what ``label`` says of it. Empty for the dense net.
Net = tuple[tuple[str, str], ...]


def identity(model: nn.Module, example_input: Inputs, evaluate: Callable[..., object], key: str = "") -> dict[str, str]:
    """All that the scores of a model depend on, part by part.

    Two evaluations are told apart by the function's name and by ``key``, not by what they do: data that changes needs
    another key.

    Args:
        model: its parameters and buffers count bit for bit, its modules by type and settings.
        example_input: sizes and types count, the numbers in it do not.
        evaluate: the evaluation.
        key: the user's own word for it, e.g. ``val-5000``.
    """
    inputs = ", ".join(f"{list(x.shape)} {str(x.dtype).removeprefix('torch.')}" for x in as_inputs(example_input))
    return {
        "weights": _weights(model),
        "structure": _structure(model),
        "inputs": inputs,
        "evaluation": f"{_function_name(evaluate)} {key}".strip(),
    }


def _weights(model: nn.Module) -> str:
    digest = hashlib.sha256()
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        numbers = tensor.detach().cpu().contiguous()
        digest.update(f"{name} {numbers.dtype} {tuple(numbers.shape)}\n".encode())
        digest.update(numbers.flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _structure(model: nn.Module) -> str:
    modules = model.named_modules(remove_duplicate=False)
    lines = [f"{name}: {type(m).__module__}.{type(m).__qualname__}({m.extra_repr()})" for name, m in modules]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _function_name(evaluate: Callable[..., object]) -> str:
    inner = getattr(evaluate, "func", evaluate)  # functools.partial
    named = inner if hasattr(inner, "__qualname__") else type(inner)
    return f"{named.__module__}.{named.__qualname__}"


def label(layer: LayerPlan) -> str:
    """The part of a layer's plan that its factors and their execution depend on, as text."""
    inputs, outputs, ranks = (
        "·".join(map(str, numbers)) for numbers in (layer.modes.inputs, layer.modes.outputs, layer.ranks)
    )
    return f"{layer.method} {inputs} x {outputs} ranks {ranks} {layer.resolved_execution}"


def net_of(layers: Mapping[str, LayerPlan]) -> Net:
    """The key of a score: these layers factorized, all others dense."""
    return tuple((name, label(layer)) for name, layer in sorted(layers.items()))


class ScoreTable:
    """Scores by net. With a path every new score is on disk before ``put`` returns.

    A file holds the tables of several identities, each under the SHA-256 of its own; those of others are kept.

    Args:
        path: JSON file, made if it is not there; None keeps the scores in memory.
        about: ``identity`` of the model and its evaluation.

    Raises:
        CheckpointError: the file is not a score table of this version, or damaged.
        ConfigError: it cannot be written.
    """

    def __init__(self, path: Path | None, about: Mapping[str, str]) -> None:
        self.path, self.about = path, dict(about)
        self.key = hashlib.sha256(json.dumps(self.about, sort_keys=True).encode()).hexdigest()
        self.scores: dict[Net, float] = {}
        self._others: dict[str, object] = {}
        if path is not None:
            self._open(path)

    def _open(self, path: Path) -> None:
        if path.exists():
            self._others = _read(path)
        mine = self._others.pop(self.key, None)
        if mine is not None:
            self.scores = _scores(mine, path)
            log.info("%d scores of this model are known from %s", len(self.scores), path)
        elif self._others:
            log.warning("%s has no scores for this model and evaluation: %s", path, self._why())
        try:
            self._write(path)  # so that a path that cannot be written is found out before hours of evaluation
        except OSError as error:
            raise ConfigError(
                f"{{table}} cannot be written ({literal(error)}); give another path, or none",
                table=Use("ranks.table", path),
            ) from error

    def _why(self) -> str:
        """Which parts differ from the table written last."""
        last = list(self._others.values())[-1]
        other = last.get("about", {}) if isinstance(last, dict) else {}
        differing = [part for part, value in self.about.items() if other.get(part) != value]
        return f"{' and '.join(differing)} differ from the last ones there; all are evaluated anew"

    def get(self, net: Net) -> float | None:
        """The known score of a net, or None."""
        return self.scores.get(net)

    def put(self, net: Net, score: float) -> None:
        """Remember a score; one that cannot be written any more is still used, with a warning."""
        self.scores[net] = score
        if self.path is None:
            return
        try:
            self._write(self.path)
        except OSError as error:
            log.warning("score not saved in %s: %s", self.path, error)

    def _write(self, path: Path) -> None:
        scores = [{"net": dict(net), "score": score} for net, score in self.scores.items()]
        tables = {**self._others, self.key: {"about": self.about, "scores": scores}}
        write_json(path, {"format": FORMAT, "version": VERSION, "tables": tables})


def _read(path: Path) -> dict[str, object]:
    """The tables of a file, by the key of their identity."""
    value = read_json(path, "score table")
    if not isinstance(value, dict) or value.get("format") != FORMAT or not isinstance(value.get("tables"), dict):
        raise CheckpointError(f"{path} is not a score table of the greedy rule; give another file as table")
    if value.get("version") != VERSION:
        raise CheckpointError(
            f"score table {path} has version {value.get('version')!r}, not {VERSION}, which this hodec reads; give "
            "another file as table"
        )
    return dict(value["tables"])


def _scores(table: object, path: Path) -> dict[Net, float]:
    """The scores of one table."""
    try:
        entries = cast(dict[str, list[dict[str, dict[str, str]]]], table)["scores"]
        scores = {tuple(sorted(entry["net"].items())): cast(object, entry["score"]) for entry in entries}
    except (TypeError, KeyError, AttributeError) as error:
        raise CheckpointError(f"score table {path} is damaged ({error!r}); move it away") from error
    for net, score in scores.items():
        if isinstance(score, bool) or not isinstance(score, int | float) or not math.isfinite(score):
            raise CheckpointError(f"score table {path} is damaged: {dict(net)} has score {score!r}; move it away")
    return {net: float(cast(float, score)) for net, score in scores.items()}
