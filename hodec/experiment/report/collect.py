"""Reads run folders: the only place that knows how the files of a run are laid out."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from hodec.errors import CheckpointError
from hodec.experiment.report.fields import Fields, broken, read_bytes, read_object
from hodec.experiment.report.labels import folder_order, run_labels
from hodec.experiment.report.rundata import NETWORKS, Epoch, Layer, Network, Outcome, PlanData, RunData

CONFIG, PLAN, EPOCHS, OUTCOME = "config.yaml", "plan.json", "metrics.jsonl", "metrics.json"
PLAN_VERSION = 2

_AGAIN = "Start the run again with the same folder, it goes on where it was and writes the file anew"
_PLAN_AGAIN = "Restore it from a copy, or start the run again in an empty folder"


def collect(run_folder: str | Path) -> RunData:
    """Read one run. Absent files and fields stay empty; files that are there must be whole.

    Args:
        run_folder: Folder with any of ``config.yaml``, ``plan.json``, ``metrics.jsonl``, ``metrics.json``.

    Raises:
        CheckpointError: No such folder, none of the files in it, or one of them is broken.
    """
    folder = Path(run_folder)
    files = (CONFIG, PLAN, EPOCHS, OUTCOME)
    if not folder.is_dir():
        raise broken(folder, "is not a folder", "Give the folder of a run, as printed when it started")
    if not any((folder / name).exists() for name in files):
        remedy = "Give the folder of one run; a folder of several runs (a multirun) is read by `collect_sweep`"
        raise broken(folder, f"holds none of {', '.join(files)}, so it is no run", remedy)
    outcome = folder / OUTCOME
    return RunData(
        folder=folder,
        label=folder.resolve().name,
        config=_read_config(folder / CONFIG),
        plan=_read_plan(folder / PLAN),
        epochs=_read_epochs(folder / EPOCHS),
        outcome=_read_outcome(outcome) if outcome.exists() else Outcome(),
        finished=outcome.exists(),
    )


def collect_sweep(folder: str | Path) -> list[RunData]:
    """Read the runs of a Hydra multirun: every subfolder that a run was started in, ``2`` before ``10``.

    A run that cannot be read, or that stopped before its first epoch, is in the list with its ``problem``: a sweep
    report that hides the failed runs would be a wrong one. The label of a run is what sets its config apart.

    Raises:
        CheckpointError: No such folder, or no run was ever started in it.
    """
    sweep = Path(folder)
    if not sweep.is_dir():
        raise broken(sweep, "is not a folder", "Give the folder of a multirun (`hydra.sweep.dir`)")
    started = [child for child in sweep.iterdir() if (child / CONFIG).exists() or (child / ".hydra").is_dir()]
    if not started:
        remedy = "Give the folder of a multirun (`hydra.sweep.dir`); its subfolders are the runs"
        raise broken(sweep, f"holds no subfolder with {CONFIG}, so no runs", remedy)
    return run_labels([_collect_or_problem(child) for child in sorted(started, key=folder_order)])


def _collect_or_problem(folder: Path) -> RunData:
    if not (folder / CONFIG).exists():
        return RunData(folder, _overrides(folder), problem="stopped before its config was written")
    try:
        run = collect(folder)
    except CheckpointError as error:
        # the reader of the sweep sees which folder it is: only the file's name is news
        problem = str(error).replace(f"{folder}/", "")
        return RunData(folder, _overrides(folder), config=_config_or_nothing(folder), problem=problem)
    if run.epochs or run.finished:
        return run
    return replace(run, problem="stopped before its first epoch ended")


def _config_or_nothing(folder: Path) -> dict[str, Any]:
    try:
        return _read_config(folder / CONFIG)
    except CheckpointError:
        return {}


def _overrides(folder: Path) -> str:
    """What the user changed, from Hydra's own record: the best name for a run whose config is not readable."""
    try:
        given = yaml.safe_load((folder / ".hydra" / "overrides.yaml").read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        given = None
    return ", ".join(map(str, given)) if isinstance(given, list) and given else folder.name


def _read_config(path: Path) -> dict[str, Any]:
    """The config as plain values. OmegaConf reads it because YAML alone takes ``1e-3`` for a text."""
    if not path.exists():
        return {}
    read_bytes(path)
    remedy = "Start the run again with the same settings, which writes it anew"
    try:
        config = OmegaConf.load(path)
    except (yaml.YAMLError, OmegaConfBaseException, ValueError, OSError) as error:
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise broken(path, f"is not readable as YAML ({first})", remedy) from error
    if not isinstance(config, DictConfig):
        raise broken(path, "holds a list where names with values are expected", remedy)
    values = OmegaConf.to_container(config, resolve=False)
    return {str(key): value for key, value in values.items()} if isinstance(values, dict) else {}


def _read_plan(path: Path) -> PlanData:
    if not path.exists():
        return PlanData()
    plan = Fields(read_object(path, _PLAN_AGAIN), path, _PLAN_AGAIN)
    if plan.source.get("format") != "hodec-plan":
        raise broken(path, f"says format = {plan.source.get('format')!r}, not 'hodec-plan'", _PLAN_AGAIN)
    version = plan.number("version")
    if version is not None and version > PLAN_VERSION:
        raise broken(path, f"is a plan of version {version:g}, known is {PLAN_VERSION}", "Update hodec to read it")
    skipped = plan.inside("skipped")
    layers = _layers(plan.inside("layers"))
    methods = dict.fromkeys(layer.method for layer in layers if layer.method)
    return PlanData(
        rule=plan.text("rule"),
        method=plan.text("method") or ", ".join(methods),
        layers=layers,
        skipped={name: skipped.text(name) for name in skipped.source},
        totals=plan.inside("totals").numbers(),
    )


def _layers(fields: Fields) -> tuple[Layer, ...]:
    return tuple(_layer(name, fields.inside(name)) for name in fields.source)


def _layer(name: str, fields: Fields) -> Layer:
    modes = fields.inside("modes")
    calls = fields.count("calls")
    return Layer(
        name=name,
        method=fields.text("method"),
        kind=fields.text("layer_type") or fields.text("kind"),
        shape=fields.integers("shape"),
        modes_in=modes.integers("in"),
        modes_out=modes.integers("out"),
        ranks=fields.integers("ranks"),
        resolved_execution=fields.text("resolved_execution") or fields.text("runs_as"),
        calls=None if calls is None else int(calls),
        aliases=fields.texts("aliases"),
        notes=fields.texts("notes"),
        params_before=fields.count("params_before"),
        params_after=fields.count("params_after"),
        macs_before=fields.count("macs_before"),
        macs_after=fields.count("macs_after"),
    )


def _read_epochs(path: Path) -> tuple[Epoch, ...]:
    """Rows in order. An epoch that a resumed run did again stands twice in the file: the later row counts."""
    if not path.exists():
        return ()
    rows: dict[tuple[str, int], Epoch] = {}
    for number, fields in _rows(path):
        row = _epoch(fields, number)
        rows[row.phase, row.epoch] = row
    phases = list(dict.fromkeys(row.phase for row in rows.values()))
    return tuple(sorted(rows.values(), key=lambda row: (phases.index(row.phase), row.epoch)))


def _rows(path: Path) -> Iterator[tuple[int, Fields]]:
    """Line number and content of each row; a broken *last* line is what a killed run leaves, and is dropped."""
    lines = [(number, line) for number, line in enumerate(read_bytes(path).split(b"\n"), start=1) if line.strip()]
    for number, line in lines:
        remedy = f"Delete line {number}; the report then does without that epoch"
        try:
            row = json.loads(line.decode("utf-8-sig"))
        except (ValueError, RecursionError) as error:
            if number == lines[-1][0]:
                return
            raise broken(path, f"is broken in line {number} ({error})", remedy) from error
        if not isinstance(row, dict):
            raise broken(path, f"holds a {type(row).__name__} in line {number}, not an object", remedy)
        yield number, Fields(row, path, remedy, where=f"in line {number} ")


def _epoch(fields: Fields, number: int) -> Epoch:
    phase, epoch = fields.text("phase") or fields.text("stage"), fields.number("epoch")  # stage: hodec 0.1.0
    if not phase or epoch is None or epoch < 0 or not epoch.is_integer():
        raise broken(fields.path, f"has no phase or no epoch (0, 1, ..) in line {number}", fields.remedy)
    layers = fields.inside("admm/layers")
    metrics = [key for key in fields.source if key not in ("phase", "stage", "epoch", "admm/layers")]
    values = {key: fields.number(key) for key in metrics if "/" in key or key in ("lr", "seconds")}
    return Epoch(
        phase=phase,
        epoch=int(epoch),
        values={key: value for key, value in values.items() if value is not None},
        layers={name: layers.inside(name).numbers() for name in layers.source},
    )


def _read_outcome(path: Path) -> Outcome:
    fields = Fields(read_object(path, _AGAIN), path, _AGAIN)
    admm, data, versions = (fields.inside(key) for key in ("admm", "data", "versions"))
    return Outcome(
        networks={name: _network(fields.inside(name)) for name in NETWORKS if fields.source.get(name)},
        reduction=fields.inside("reduction").numbers(),
        status=admm.text("status"),
        primal_residual=admm.number("primal_residual"),
        conversion=fields.inside("conversion").numbers(),
        seconds=fields.inside("seconds").numbers(),
        seed=fields.text("seed"),
        command=fields.text("command"),
        data=data.text("name"),
        images=data.inside("images").numbers(),
        versions={name: versions.text(name) for name in versions.source},
    )


def _network(fields: Fields) -> Network:
    return Network(
        accuracy=fields.number("test_accuracy"),
        accuracy_raw=fields.number("test_accuracy_raw"),
        params=fields.count("params"),
        macs=fields.count("macs"),
        latency_ms=fields.number("latency_ms"),
    )
