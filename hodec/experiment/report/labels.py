"""Names for the runs of a sweep: the settings that Hydra overrode and in which the runs differ."""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import yaml
from omegaconf import OmegaConf

from hodec.experiment.report.rundata import RunData


def folder_order(folder: Path) -> list[tuple[bool, int, str]]:
    """Sort key that reads numbers in a name as numbers: ``2`` before ``10``."""
    parts = re.findall(r"\d+|\D+", folder.name)
    return [(not part.isdecimal(), int(part) if part.isdecimal() else 0, part) for part in parts]


def run_labels(runs: Sequence[RunData]) -> list[RunData]:
    """The same runs with labels such as ``admm.rho=0.001``; runs that cannot be told apart get the folder's name."""
    overrides = [_overrides(run.folder) for run in runs]
    keys = dict.fromkeys(key for each in overrides for key in each)
    values = {key: [each.get(key) or _configured(run, key) for run, each in zip(runs, overrides)] for key in keys}
    telling = {key: column for key, column in values.items() if len(set(column)) > 1}
    labels = [
        ", ".join(f"{key}={column[at]}" for key, column in telling.items() if column[at]) or run.label
        for at, run in enumerate(runs)
    ]
    often = Counter(labels)
    unique = [label if often[label] == 1 else f"{label} ({run.folder.name})" for run, label in zip(runs, labels)]
    return [replace(run, label=label) for run, label in zip(runs, unique)]


def _overrides(folder: Path) -> dict[str, str]:
    """Setting -> value of the overrides in Hydra's own record of a run; empty where there is none."""
    try:
        given = yaml.safe_load((folder / ".hydra" / "overrides.yaml").read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        given = None
    pairs = (str(each).lstrip("+~").partition("=") for each in (given if isinstance(given, list) else ()))
    return {key: value for key, _, value in pairs}


def _configured(run: RunData, key: str) -> str:
    """The value of a setting that a run left at its default; the name of the option for a config group."""
    value = OmegaConf.select(OmegaConf.create(dict(run.config)), key.partition("@")[0])
    if OmegaConf.is_dict(value):
        value = value.get("name")
    return "" if value is None else str(value)
