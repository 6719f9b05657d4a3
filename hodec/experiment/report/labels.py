"""Names for the runs of a sweep: what sets the config of each apart, and nothing more."""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from hodec.experiment.report.rundata import RunData

_MISSING = object()
_MOST_PARTS = 4
#: Keys that name the choice made in a config group.
_NAMING = ("name", "rule", "_target_")


def folder_order(folder: Path) -> list[tuple[bool, int, str]]:
    """Sort key that reads numbers in a name as numbers: ``2`` before ``10``."""
    parts = re.findall(r"\d+|\D+", folder.name)
    return [(not part.isdecimal(), int(part) if part.isdecimal() else 0, part) for part in parts]


def run_labels(runs: Sequence[RunData]) -> list[RunData]:
    """The same runs with labels such as ``admm.rho=0.001``; runs that cannot be told apart get the folder's name."""
    readable = [run for run in runs if run.config]
    flat = [_flatten(run.config) for run in readable]
    keys = _telling_keys(flat, readable)
    by_folder = {run.folder: _label(values, keys) or run.label for run, values in zip(readable, flat, strict=True)}
    labels = [by_folder.get(run.folder, run.label) for run in runs]
    often = Counter(labels)
    names = [
        label if often[label] == 1 or label == run.folder.name else f"{label} ({run.folder.name})"
        for run, label in zip(runs, labels, strict=True)
    ]
    return [replace(run, label=name) for run, name in zip(runs, names, strict=True)]


def _flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """``{"admm": {"rho": 1}}`` -> ``{"admm.rho": 1}``."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, Mapping) and value:
            flat |= _flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _telling_keys(configs: Sequence[Mapping[str, Any]], runs: Sequence[RunData]) -> list[str]:
    """Keys whose values differ, without those that only repeat others.

    Left out are paths into the run's own folder, keys that hold the same values as a shorter key (one setting read
    by another through interpolation), and what a group's ``name`` says already (``model.depth`` of resnet20).
    """
    keys = list(dict.fromkeys(key for config in configs for key in config))
    shown = {key: tuple(_shown(config.get(key, _MISSING)) for config in configs) for key in keys}
    columns = {
        key: values for key, values in shown.items() if len(set(values)) > 1 and not _names_folder(key, configs, runs)
    }
    said = _said_by_name(columns)
    kept: dict[tuple[str, ...], str] = {}
    for key in sorted(columns.keys() - said, key=lambda key: (len(key), key)):
        kept.setdefault(columns[key], key)
    return [key for key in keys if key in kept.values()]


def _said_by_name(columns: Mapping[str, tuple[str, ...]]) -> set[str]:
    """Keys of a group whose name alone tells apart all that the group's keys together tell apart."""
    said: set[str] = set()
    for group, _, last in (key.rpartition(".") for key in columns):
        if not group or last not in _NAMING:
            continue
        members = [key for key in columns if key.startswith(f"{group}.")]
        together = set(zip(*(columns[key] for key in members), strict=True))
        if len(together) == len(set(columns[f"{group}.{last}"])):
            said |= set(members) - {f"{group}.{last}"}
    return said


def _names_folder(key: str, configs: Sequence[Mapping[str, Any]], runs: Sequence[RunData]) -> bool:
    values = [(str(config.get(key, "")), run.folder) for config, run in zip(configs, runs, strict=True)]
    return all("/" in value and folder.name in Path(value).parts for value, folder in values)


def _shown(value: Any) -> str:
    if value is _MISSING:
        return ""
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, list):
        return f"[{','.join(_shown(item) for item in value)}]"
    return "null" if value is None else str(value)


def _label(config: Mapping[str, Any], keys: Sequence[str]) -> str:
    parts = [f"{key}={_shown(config[key])}" for key in keys if key in config]
    more = [f"and {len(parts) - _MOST_PARTS} more"] if len(parts) > _MOST_PARTS else []
    return ", ".join(parts[:_MOST_PARTS] + more)
