"""Scores of nets in a JSON file, reused only for the same weights, net, input and evaluation."""

import hashlib
import json
import logging
import math
from collections.abc import Callable, Mapping
from pathlib import Path

from torch import nn

from hodec.errors import CheckpointError, ConfigError, Use, literal
from hodec.inputs import Inputs, as_input, form_of
from hodec.io.atomic import read_json, write_json
from hodec.io.tensors import bits
from hodec.plan.layer import LayerPlan

log = logging.getLogger(__name__)

FORMAT = "hodec-scores"
VERSION = 2


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
    digest = hashlib.sha256()
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(bits(tensor))
    modules = model.named_modules(remove_duplicate=False)
    structure = "\n".join(f"{n}: {type(m).__module__}.{type(m).__qualname__}({m.extra_repr()})" for n, m in modules)
    given = as_input(example_input, model)
    form = form_of(given)
    inner = getattr(evaluate, "func", evaluate)  # functools.partial
    named = inner if hasattr(inner, "__qualname__") else type(inner)
    return {
        "weights": digest.hexdigest(),
        "structure": _sha256(structure),
        "inputs": ", ".join(f"{list(shape)} {dtype}" for shape, dtype in given.sizes) + (str(form) if form else ""),
        "evaluation": f"{named.__module__}.{named.__qualname__} {key}".strip(),
    }


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def net_of(layers: Mapping[str, LayerPlan]) -> str:
    """The key of a score: the factorized layers with all that their factors depend on; others are dense."""
    return "; ".join(f"{name}: {_label(layer)}" for name, layer in sorted(layers.items())) or "dense"


def _label(layer: LayerPlan) -> str:
    inputs, outputs, ranks = (
        "·".join(map(str, numbers)) for numbers in (layer.modes.inputs, layer.modes.outputs, layer.ranks)
    )
    return f"{layer.method} {inputs} x {outputs} ranks {ranks} {layer.resolved_execution}"


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
        self.key = _sha256(json.dumps(self.about, sort_keys=True))
        self.scores: dict[str, float] = {}
        self._others: dict[str, dict[str, dict[str, str]]] = {}
        if path is not None:
            self._open(path)

    def _open(self, path: Path) -> None:
        if self._merged(path):
            log.info("%d scores of this model are known from %s", len(self.scores), path)
        elif self._others:
            last = list(self._others.values())[-1].get("about", {})
            differing = " and ".join(part for part, value in self.about.items() if last.get(part) != value)
            log.warning(
                "%s has no scores for this model and evaluation: %s differ from the last ones there; all are evaluated "
                "anew",
                path,
                differing,
            )
        try:
            self._write(path)  # so that a path that cannot be written is found out before hours of evaluation
        except OSError as error:
            message = f"{{table}} cannot be written ({literal(error)}); give another path, or none"
            raise ConfigError(message, table=Use("table", path)) from error

    def get(self, net: str) -> float | None:
        """The known score of a net, or None."""
        return self.scores.get(net)

    def put(self, net: str, score: float) -> None:
        """Remember a score; one that cannot be written any more is still used, with a warning."""
        self.scores[net] = score
        if self.path is None:
            return
        try:
            self._merged(self.path)
            self._write(self.path)
        except (CheckpointError, OSError) as error:
            log.warning("score not saved in %s: %s", self.path, error)

    def _merged(self, path: Path) -> bool:
        """Take over what is in the file, to which other processes write too; whether it has scores of this identity."""
        if path.exists():
            self._others |= _read(path)
        mine = self._others.pop(self.key, None)
        if mine is not None:
            self.scores = {**_scores(mine, path), **self.scores}
        return mine is not None

    def _write(self, path: Path) -> None:
        tables = {**self._others, self.key: {"about": self.about, "scores": self.scores}}
        write_json(path, {"format": FORMAT, "version": VERSION, "tables": tables})


def _read(path: Path) -> dict[str, dict[str, dict[str, str]]]:
    """The tables of a file, by the key of their identity."""
    value = read_json(path, "score table")
    if not isinstance(value, dict) or value.get("format") not in (FORMAT, "hodec-greedy-scores"):
        raise CheckpointError(f"{path} is not a score table; give another file as table")
    if value.get("version") != VERSION:
        raise CheckpointError(
            f"score table {path} has version {value.get('version')!r}, not {VERSION}, which this hodec reads (hodec "
            "0.1.0 reads version 1); give another file as table"
        )
    tables = value.get("tables")
    if not isinstance(tables, dict) or not all(isinstance(table, dict) for table in tables.values()):
        raise CheckpointError(f"score table {path} is damaged: it has no tables; move it away")
    return dict(tables)


def _scores(table: Mapping[str, object], path: Path) -> dict[str, float]:
    """The scores of one table."""
    scores = table.get("scores")
    if not isinstance(scores, dict):
        raise CheckpointError(f"score table {path} is damaged: it has no scores; move it away")
    for net, score in scores.items():
        if isinstance(score, bool) or not isinstance(score, int | float) or not math.isfinite(score):
            raise CheckpointError(f"score table {path} is damaged: {net} has score {score!r}; move it away")
    return {net: float(score) for net, score in scores.items()}
