"""Reads run folders: the only place that knows how the files of a run are laid out."""

import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields, replace
from pathlib import Path
from typing import TypeVar

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from hodec.errors import CheckpointError, PlanError
from hodec.experiment.report.rundata import NETWORKS, Epoch, Network, Results, RunData, Spectrum
from hodec.plan.plan import Plan

_Key = TypeVar("_Key")

CONFIG, PLAN, EPOCHS, RESULTS = FILES = ("config.yaml", "plan.json", "metrics.jsonl", "metrics.json")

SPECTRA = "spectra.json"  # which no run of hodec 0.1.0 has

FAILURE = "error.txt"  # why a job of a sweep has failed; gone when it is started again

_REMEDIES = {
    CONFIG: "Start the run again with the same settings, which writes it anew",
    PLAN: "Restore it from a copy, or start the run again in an empty folder",
    EPOCHS: "Delete that line; the report then does without its epoch",
    RESULTS: "Start the run again with the same folder, it goes on where it was and writes the file anew",
    SPECTRA: "Delete it; the report then does without its figure",
}
# What the readers of JSON, YAML and plans raise for a file that is damaged.
_BROKEN = (ValueError, TypeError, OverflowError, RecursionError, PlanError, yaml.YAMLError, OmegaConfBaseException)


def collect(run_folder: str | Path) -> RunData:
    """Read one run. Absent files and fields stay empty; files that are there must be whole.

    Args:
        run_folder: folder with any of ``config.yaml``, ``plan.json``, ``metrics.jsonl``, ``metrics.json``.

    Raises:
        CheckpointError: there is no such folder, it has none of the files, or one of them is broken.
    """
    folder = Path(run_folder)
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is not a folder. Give the folder of a run, as printed when it started")
    present = [name for name in FILES if (folder / name).exists()]
    if not present:
        raise CheckpointError(
            f"{folder} holds none of {', '.join(FILES)}, so it is no run. Give the folder of one run; the folder of "
            "several runs (a multirun) holds such folders"
        )
    return RunData(
        folder=folder,
        label=folder.resolve().name,
        config=_config(folder / CONFIG) if CONFIG in present else {},
        plan=_plan(folder / PLAN) if PLAN in present else None,
        epochs=_epochs(folder / EPOCHS) if EPOCHS in present else (),
        results=_results(folder / RESULTS) if RESULTS in present else Results(),
        spectra=_spectra(folder / SPECTRA) if (folder / SPECTRA).exists() else {},
        finished=RESULTS in present,
    )


def collect_sweep(folder: str | Path) -> list[RunData]:
    """Read the runs of a Hydra multirun: every subfolder that a run was started in, ``2`` before ``10``.

    A run that cannot be read, or that stopped before its first epoch, is in the list with its ``problem``: a sweep
    report that hides the failed runs would be a wrong one. The label of a run names the settings that differ.

    Raises:
        CheckpointError: there is no such folder, or no run was ever started in it.
    """
    sweep = Path(folder)
    remedy = "Give the folder of a multirun (`hydra.sweep.dir`); its subfolders are the runs"
    if not sweep.is_dir():
        raise CheckpointError(f"{sweep} is not a folder. {remedy}")
    started = [child for child in sweep.iterdir() if (child / CONFIG).exists() or (child / ".hydra").is_dir()]
    if not started:
        raise CheckpointError(f"{sweep} holds no subfolder with {CONFIG}, so no runs. {remedy}")
    return _run_labels([_run_or_problem(child) for child in sorted(started, key=_folder_order)])


def collect_runs(folders: Sequence[str | Path]) -> list[RunData]:
    """Read runs from anywhere, in this order, labelled as those of a sweep.

    Raises:
        CheckpointError: one of the folders is no run, or a file of it is broken.
    """
    return _run_labels([collect(folder) for folder in folders])


def _run_or_problem(folder: Path) -> RunData:
    run = _read_or_problem(folder)
    if run.finished or not (folder / FAILURE).is_file():
        return run
    return replace(run, problem=(folder / FAILURE).read_text(encoding="utf-8", errors="replace").strip())


def _read_or_problem(folder: Path) -> RunData:
    if not (folder / CONFIG).exists():
        return RunData(folder, folder.name, problem="stopped before its config was written")
    config: Mapping[str, object] = {}
    try:
        config = _config(folder / CONFIG)
        run = collect(folder)
    except CheckpointError as error:
        # the reader of the sweep sees which folder it is: only the file's name is news
        problem = str(error).replace(f"{folder}/", "")
        return RunData(folder, folder.name, config=config, problem=problem)
    if run.epochs or run.finished:
        return run
    return replace(run, problem="stopped before its first epoch ended")


def _folder_order(folder: Path) -> list[tuple[bool, int, str]]:
    """Sort key that reads numbers in a name as numbers: ``2`` before ``10``."""
    parts = re.findall(r"\d+|\D+", folder.name)
    return [(not part.isdecimal(), int(part) if part.isdecimal() else 0, part) for part in parts]


def _run_labels(runs: Sequence[RunData]) -> list[RunData]:
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
    own = [{key: column[at] for key, column in telling.items() if column[at]} for at in range(len(runs))]
    return [replace(run, label=label, settings=of_run) for run, label, of_run in zip(runs, unique, own)]


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


@contextmanager
def _reading(path: Path, where: str = "") -> Iterator[None]:
    """Turn a failure to read a file into one error that names the file, the cause and the way out."""
    try:
        yield
    except OSError as error:
        raise CheckpointError(
            f"{path} cannot be read ({error.strerror}). Check that it is a file you may read"
        ) from error
    except _BROKEN as error:
        reason = str(error).replace(f" {path}", "").partition("\n")[0] or type(error).__name__
        raise CheckpointError(f"{path} is broken{where} ({reason}). {_REMEDIES[path.name]}") from error


def _config(path: Path) -> Mapping[str, object]:
    """The settings as plain values. OmegaConf reads them because YAML alone takes ``1e-3`` for a text."""
    with _reading(path):
        config = OmegaConf.load(path)
        if not isinstance(config, DictConfig):
            raise TypeError("it holds a list where names with values are expected")
        return {str(key): value for key, value in _object(OmegaConf.to_container(config)).items()}


def _plan(path: Path) -> Plan:
    with _reading(path):
        return Plan.load(path)


def _spectra(path: Path) -> Mapping[str, tuple[Spectrum, ...]]:
    with _reading(path):
        content = _object(json.loads(path.read_bytes().decode()))
        return {name: tuple(_spectrum(_object(one)) for one in _list(each)) for name, each in content.items()}


def _spectrum(one: Mapping[str, object]) -> Spectrum:
    at, values = (tuple(_numbers(dict(enumerate(_list(one.get(key))))).values()) for key in ("at", "values"))
    sizes = _numbers({key: one.get(key) for key in ("rank", "full")})
    if len(at) != len(values) or len(sizes) < 2 or not 0 < sizes["rank"] <= sizes["full"]:
        raise ValueError("a spectrum has no ranks, or another number of places than of values")
    return Spectrum(sizes["rank"], sizes["full"], at, values)


def _epochs(path: Path) -> tuple[Epoch, ...]:
    """Rows in order. An epoch that a resumed run trained again is in the file twice: the later row counts."""
    with _reading(path):
        lines = [(at, line) for at, line in enumerate(path.read_bytes().split(b"\n"), start=1) if line.strip()]
    rows: dict[tuple[str, int], Epoch] = {}
    for at, line in lines:
        with _reading(path, where=f" in line {at}"):
            try:
                content = json.loads(line.decode())
            except ValueError:
                if at == lines[-1][0]:
                    break  # the row that a killed run was writing
                raise
            row = _epoch(_object(content))
            rows[row.phase, row.epoch] = row
    phases = list(dict.fromkeys(row.phase for row in rows.values()))
    return tuple(sorted(rows.values(), key=lambda row: (phases.index(row.phase), row.epoch)))


def _epoch(row: Mapping[str, object]) -> Epoch:
    phase, epoch = row.get("phase", row.get("stage")), row.get("epoch")  # stage: hodec 0.1.0
    if not isinstance(phase, str) or not isinstance(epoch, int) or epoch < 0:
        raise ValueError("it has no phase or no epoch")
    metrics = {key: value for key, value in row.items() if key in ("lr", "seconds") or "/" in key}
    layers = _object(metrics.pop("admm/layers", {}))
    by_layer = {name: _numbers(_object(values)) for name, values in layers.items()}
    return Epoch(phase=phase, epoch=epoch, values=_numbers(metrics), layers=by_layer)


def _results(path: Path) -> Results:
    with _reading(path):
        content = _object(json.loads(path.read_bytes().decode()))
        names = ("admm", "data", "latency", "retraining", "versions", *NETWORKS)
        parts = {key: _object(content.get(key)) for key in names}
        admm, data, known = parts["admm"], parts["data"], {field.name for field in fields(Network)}
        measured = {name: _numbers(parts[name]) for name in NETWORKS if parts[name]}
        return Results(
            networks={
                name: Network(**{key: one[key] for key in one if key in known}) for name, one in measured.items()
            },
            reduction=_numbers(_object(content.get("reduction"))),
            status=_text(admm.get("status")),
            primal_residual=_numbers({"residual": admm.get("primal_residual")}).get("residual"),
            conversion=_numbers(_object(content.get("conversion"))),
            retraining=_numbers({key: parts["retraining"].get(key) for key in ("lr", "probes", "level")}),
            retraining_end=_text(parts["retraining"].get("end")),
            against={name: _numbers(_object(one)) for name, one in _object(content.get("against")).items()},
            seconds=_numbers(_object(content.get("seconds"))),
            images=_numbers(_object(data.get("images"))),
            latency={key: _text(value) for key, value in parts["latency"].items()},
            data=_text(data.get("name")),
            seed=_text(content.get("seed")),
            command=_text(content.get("command")),
            versions={name: _text(value) for name, value in parts["versions"].items()},
        )


def _object(value: object) -> Mapping[str, object]:
    """A JSON object; an absent one is empty."""
    if value is not None and not isinstance(value, dict):
        raise TypeError(f"{value!r:.60} is given where an object with named values is expected")
    return value or {}


def _list(value: object) -> list[object]:
    if not isinstance(value, list):
        raise TypeError(f"{value!r:.60} is given where a list is expected")
    return value


def _numbers(values: Mapping[_Key, object]) -> dict[_Key, float]:
    """The numbers of a JSON object, NaN and infinities included; absent ones (null) are left out."""
    for key, value in values.items():
        if value is not None and (isinstance(value, bool) or not isinstance(value, int | float)):
            raise TypeError(f"{key} = {value!r:.60} where a number is expected")
    return {key: float(value) for key, value in values.items() if isinstance(value, int | float)}


def _text(value: object) -> str:
    return "" if value is None else str(value)
