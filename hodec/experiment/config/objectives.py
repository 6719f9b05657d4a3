"""What a run hands to a sweeper that optimises, and in which direction that is better."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

from hodec.io.atomic import JsonObject
from hodec.options import BadParts

# Name of an objective, as it stands in metrics.json under ``compressed`` -> the direction in which it is better.
OBJECTIVES = {"validation_accuracy": "maximize", "macs": "minimize", "params": "minimize", "latency_ms": "minimize"}


def names_of(objective: object) -> list[str]:
    """The setting ``objective`` as a list."""
    return [objective] if isinstance(objective, str) else list(cast(Sequence[str], objective))


def bad_objectives(value: object) -> BadParts:
    """Yield each part that is no objective: of a name, or of a list of different names."""
    names = [value] if isinstance(value, str) else value
    if not isinstance(names, list | tuple) or not names or len(set(map(str, names))) < len(names):
        yield "", value
        return
    for name in names:
        if not isinstance(name, str) or name not in OBJECTIVES:
            yield "", name


def value_of(metrics: JsonObject, objective: object, macs_limit: float | None) -> list[float] | None:
    """The objectives of a finished run, one number each; None where ``metrics`` lack one.

    Where the compressed net keeps a larger share of the MACs than ``macs_limit``, its accuracy counts as minus the
    excess: below that of every net within the limit, and the lower the farther it is outside.
    """
    net = dict(metrics["compressed"])
    excess = net["macs"] / metrics["dense"]["macs"] - macs_limit if macs_limit is not None else 0.0
    if excess > 0:
        net["validation_accuracy"] = -excess
    values = [net.get(name) for name in names_of(objective)]
    return None if any(value is None for value in values) else [float(value) for value in values if value is not None]


def wrong_direction(objective: object, direction: object) -> str:
    """Why an optimising sweeper must not run with these directions; empty where it may.

    Args:
        direction: the sweeper's own setting: one word, or one for each objective.
    """
    names = names_of(objective)
    wanted = [OBJECTIVES[name] for name in names]
    given = [str(one).rpartition(".")[2] for one in (direction if isinstance(direction, list) else [direction])]
    if given == wanted:
        return ""
    right = wanted[0] if len(wanted) == 1 else f"[{','.join(wanted)}]"
    return f"hydra.sweeper.direction: {', '.join(given)} given for {', '.join(names)}; allowed: {right}"
