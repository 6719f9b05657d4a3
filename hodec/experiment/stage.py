"""A run that begins where another one stands, and a finished run that trains on: no epoch is computed twice."""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import cast

import yaml

from hodec.errors import CheckpointError, ConfigError
from hodec.experiment.config.differences import differences
from hodec.experiment.config.schema import completed, read_config
from hodec.experiment.run_folder import RunFolder
from hodec.experiment.run_state import read_state
from hodec.io.atomic import sha256, write_bytes

log = logging.getLogger(__name__)

# What only phases after a stage read, so that it may differ from the run that the stage is taken from.
RETRAINING = ("retrain_epochs", "fade_epochs", "optimizer.retrain_lr", "distill.weight", "distill.temperature",
              "distill.features", "distill.model", "distill.init", "init_stage")  # fmt: skip
CONVERSION = (*RETRAINING, "bn_batches", "random_factors")
PLANNING = (*CONVERSION, "calibration_batches", "distill", "plan", "ranks", "tt_ranks", "include", "exclude", "method",
            "admm", "dense_epochs")  # fmt: skip
LATER: dict[str, tuple[str, ...]] = {
    "pretrain": PLANNING, "admm": CONVERSION, "dense": CONVERSION, "truncated": RETRAINING,
}  # fmt: skip

# Stage -> the phases whose results come along with it, as far as the other run had them.
ALONG = {"pretrain": (), "admm": ("plan", "pretrain"), "dense": ("plan", "pretrain")}
ALONG["truncated"] = ("plan", "pretrain", "admm", "dense")


def take_stage(folder: RunFolder, stage: str, settings: Mapping[str, object], free: Sequence[str]) -> None:
    """Copy what another run has finished into a new run folder, up to a stage, as if it had been computed there.

    Args:
        folder: of the run that begins; nothing is done where it has begun.
        stage: ``RUN/admm``: the folder of the other run, and its phase, one of LATER.
        settings: those of the run that begins, as plain values.
        free: settings that change no result.

    Raises:
        CheckpointError: there is no such run, it has not finished that phase, or a file of it was altered.
        ConfigError: its settings, as far as the stage depends on them, are others.
    """
    if folder.phases or not folder.writes:
        return
    source, phase = Path(stage).parent, Path(stage).name
    if phase not in LATER:
        raise ConfigError(f"init_stage={stage}: given as RUN/PHASE, the folder of a run and one of {', '.join(LATER)}")
    phases, begun = read_state(source / "run.json")
    if phase not in phases:
        done = ", ".join(name for name in phases if name in LATER) or "none"
        raise CheckpointError(f"init_stage={stage}: that run has not finished phase {phase}; it has finished: {done}")
    _check_settings(source, settings, ignore=(*_later(phase, settings), *free))
    taken = {name: facts for name, facts in phases.items() if name in (*ALONG[phase], phase)}
    for name, facts in taken.items():
        _copy(source, folder.path, name, facts.get("sha256"))
    for row in RunFolder(source).rows():
        if row["phase"] in taken:
            folder.append_row(row)
    folder.begun_with = dict(begun)
    folder.phases = taken
    folder.finish(phase, taken[phase])
    log.info("phases %s are those of %s", ", ".join(taken), source)


def _later(phase: str, settings: Mapping[str, object]) -> list[str]:
    """The settings that only phases after ``phase`` read, given what else is set."""
    distill, optimizer = cast(dict[str, object], settings["distill"]), cast(dict[str, object], settings["optimizer"])
    early = ["distill"] if distill.get("dense") and phase != "pretrain" else []  # the teacher teaches the stage too
    early += ["retrain_epochs"] if optimizer.get("joint_schedule") and phase != "pretrain" else []
    return [key for key in LATER[phase] if key.partition(".")[0] not in early]


def _check_settings(source: Path, settings: Mapping[str, object], ignore: Sequence[str]) -> None:
    try:
        theirs = yaml.safe_load((source / "config.yaml").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise CheckpointError(f"{source / 'config.yaml'} is not readable ({error}); restore it") from error
    theirs = _counted(completed(theirs)) if isinstance(theirs, dict) else {}
    keys = differences(theirs, _counted(settings), ignore=ignore)
    if keys:
        before = theirs.get("pretrain_epochs")
        counted = (
            f"; its pretraining took {before} epochs: pretrain_epochs={before}" if "pretrain_epochs" in keys else ""
        )
        raise ConfigError(
            f"init_stage: {source} was trained by other settings (they differ in {', '.join(keys[:6])}), which this "
            f"run would state as its own; give the same ones{counted}"
        )


def _counted(settings: Mapping[str, object]) -> Mapping[str, object]:
    """The settings with the epochs of pretraining that a rule of ranks brings along, where they give none."""
    config, _ = read_config(settings)
    return settings if config is None else {**settings, "pretrain_epochs": config.pretraining}


def _copy(source: Path, target: Path, phase: str, digest: object) -> None:
    """Copy the files of a phase, which have to be those that the other run has noted."""
    first = "plan.json" if phase == "plan" else f"phases/{phase}.safetensors"
    if not (source / first).is_file() or digest not in (None, sha256(source / first)):
        raise CheckpointError(f"{source / first} is missing or was altered since it was written: restore it")
    for name in (first, f"phases/{phase}_factors.safetensors"):
        if (source / name).is_file():
            (target / name).parent.mkdir(exist_ok=True)
            write_bytes(target / name, (source / name).read_bytes())


def extend(folder: RunFolder, *, epochs: int, before: int) -> None:
    """Let a run go on with its last phase, retraining, from ``before`` epochs to ``epochs``.

    Its results stay until there are new ones. Where the rate follows a schedule, that of the new length holds from
    here on: the epochs so far had the shorter one's.
    """
    before, epochs = before + folder.handed_over, epochs + folder.handed_over
    log.info(
        "retraining goes on from %d to %d epochs; the learning rate follows the schedule of %d", before, epochs, epochs
    )
    for name in ("retrain", "evaluate", "report"):
        folder.phases.pop(name, None)
    folder.write_state()
