"""A run's folder: the results of the phases that are done, and what a second start needs to go on.

``run.json`` lists the finished phases with the SHA-256 of their files, ``metrics.jsonl`` has a flushed row per
epoch, ``checkpoints/`` the last two of the phase under way. Each file is whole or absent.
"""

import json
import logging
import os
import pickle
import tempfile
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from hodec.errors import CheckpointError, ConfigError, TrainingError
from hodec.experiment.run_state import check_begun, read_state
from hodec.io.atomic import NO_SPACE, JsonObject, sha256, write_json, write_text
from hodec.io.tensors import load_tensors, not_numbers, save_tensors, zip_fault
from hodec.plan.plan import Plan

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Outcome:
    """The result of a phase.

    Attributes:
        net: the net as the phase left it, on the CPU.
        facts: further results, as plain JSON values.
        factors: layer -> factors that the phase found, for the phase after it.
    """

    net: nn.Module
    facts: JsonObject = field(default_factory=dict)
    factors: Mapping[str, Sequence[Tensor]] = field(default_factory=dict)


class RunFolder:
    """The files of one run; see ``open``."""

    def __init__(self, path: Path, *, writes: bool = True) -> None:
        self.path, self.writes, self.metrics_path = path, writes, path / "metrics.jsonl"
        self.phases: dict[str, JsonObject] = {}
        self.begun_with: JsonObject = {}

    @classmethod
    def open(cls, path: Path, config_text: str, differences: Sequence[str] = (), *, writes: bool = True) -> "RunFolder":
        """Open a new folder, or one in which a run with the same settings was stopped.

        Args:
            path: the folder; created when missing.
            config_text: the settings as YAML, kept as ``config.yaml``.
            differences: dotted keys in which the folder's settings differ from these.
            writes: False in all processes but the first, where several train together: they read what there is, and
                write nothing.

        Raises:
            ConfigError: the folder cannot be written, or holds a run with other settings.
            CheckpointError: its ``run.json`` is damaged, or of hodec 0.1.0.
        """
        folder = cls(path, writes=writes)
        probe(path)
        if differences:
            raise ConfigError(
                f"{path} holds a run with other settings (they differ in {', '.join(differences[:6])}). Give the "
                "settings of that run to go on with it, or another folder: hydra.run.dir=PATH"
            )
        if not (path / "config.yaml").exists():
            write_text(path / "config.yaml", config_text)
        if (path / "run.json").exists():
            folder.phases, folder.begun_with = read_state(path / "run.json")
        return folder

    def check_begun(self, begun_with: JsonObject) -> None:
        """Compare what the run is computed with to what it was begun with, which is noted with its next phase.

        Args:
            begun_with: ``data`` and the versions of what computes.

        Raises:
            CheckpointError: other images.
        """
        check_begun(self.path, self.begun_with, begun_with)
        self.begun_with = {**begun_with, **self.begun_with}

    # -- phases --------------------------------------------------------------------------------------------------

    def done(self, phase: str) -> bool:
        """Return whether the phase has finished, in this start or an earlier one."""
        return phase in self.phases

    @property
    def handed_over(self) -> int:
        """Epochs that the dense training, which ended early, has left to retraining."""
        return int(self.phases.get("dense", {}).get("switch", {}).get("left", 0))

    def finish(self, phase: str, facts: JsonObject) -> None:
        """Note that a phase is finished, with facts about it."""
        self.phases[phase] = facts
        self.write_state()

    def write_state(self) -> None:
        """Write ``run.json``, where this process writes."""
        if self.writes:
            begun = {"begun_with": self.begun_with} if self.begun_with else {}
            write_json(self.path / "run.json", {**begun, "phases": self.phases})

    def memo(self, phase: str, blank: Callable[[], nn.Module], compute: Callable[[], Outcome]) -> Outcome:
        """Return the outcome of a phase: read where the phase is done, else computed and kept.

        Args:
            phase: its name in ``run.json``.
            blank: builds a net of the structure that the phase results in; its weights are replaced.
            compute: runs the phase.

        Raises:
            CheckpointError: a file of the phase is missing or was altered.
        """
        if self.done(phase):
            net = blank()
            self.load_phase(phase, net)
            return Outcome(net, self.phases[phase], self._load_factors(phase))
        outcome = compute()
        if bad := not_numbers(outcome.net.state_dict()):
            raise TrainingError(
                f"phase {phase} ended with NaN in {', '.join(bad[:3])}: it is not kept. Lower optimizer.lr, or give "
                "bn_batches=0 where it is a statistic of BatchNorm"
            )
        kept: JsonObject = {}
        if self.writes:
            if outcome.factors:
                named = {f"{layer}:{i}": f for layer, each in outcome.factors.items() for i, f in enumerate(each)}
                save_tensors(self._tensors(f"{phase}_factors"), named)
            save_tensors(self._tensors(phase), outcome.net.state_dict())
            kept = {"sha256": sha256(self._tensors(phase))}
        self.finish(phase, kept | outcome.facts)
        return outcome

    def memo_plan(self, compute: Callable[[], Plan]) -> Plan:
        """Return the plan of the run: read where it has been made, else made now and kept.

        Raises:
            CheckpointError: ``plan.json`` is missing or was altered since.
            PlanError: it is no plan.
        """
        if self.done("plan"):
            return self._load_plan()
        plan = compute()
        self.finish("plan", self._written(plan))
        return plan

    def keep_plan(self, plan: Plan) -> None:
        """Put the plan with learned ranks in the place of the one that ADMM began with."""
        if (facts := self._written(plan)) != self.phases["plan"]:
            self.finish("plan", facts)

    def _written(self, plan: Plan) -> JsonObject:
        """Write ``plan.json``; its SHA-256, where this process writes."""
        path = self.path / "plan.json"
        if not self.writes:
            return {}
        plan.save(path)
        return {"sha256": sha256(path)}

    def _load_plan(self) -> Plan:
        path, kept = self.path / "plan.json", self.phases["plan"].get("sha256")
        learned = self.phases.get("admm", {}).get("plan")
        as_kept = path.is_file() and kept in (None, sha256(path))
        # Killed between the two writes of ``keep_plan``, a run has the learned plan and the digest of the first one.
        if not as_kept and (learned is None or Plan.load(path).to_dict() != learned):
            raise CheckpointError(
                f"{path} was altered since this run made it, which has trained by it: restore it, or start a run of "
                f"its own in another folder, plan={path} hydra.run.dir=PATH"
            )
        return Plan.load(path)

    def load_phase(self, phase: str, net: nn.Module) -> None:
        """Put a finished phase's weights into ``net``.

        Raises:
            CheckpointError: the file is missing or altered.
        """
        path = self._tensors(phase)
        if not path.exists() or sha256(path) != self.phases[phase]["sha256"]:
            raise CheckpointError(
                f"{path} is missing or was altered since it was written; remove its entry {phase!r} from "
                f"{self.path / 'run.json'} to compute that phase again"
            )
        net.load_state_dict(load_tensors(path))

    def _load_factors(self, phase: str) -> dict[str, list[Tensor]]:
        path, factors = self._tensors(f"{phase}_factors"), dict[str, list[Tensor]]()
        named = load_tensors(path) if path.exists() else {}
        for key in sorted(named, key=lambda key: int(key.rpartition(":")[2])):
            factors.setdefault(key.rpartition(":")[0], []).append(named[key])
        return factors

    def _tensors(self, name: str) -> Path:
        return self.path / "phases" / f"{name}.safetensors"

    # -- checkpoints of the phase under way ----------------------------------------------------------------------

    def checkpoint(self, phase: str) -> Path:
        """Return where Lightning's checkpoint of the last whole epoch goes."""
        return self.path / "checkpoints" / f"{phase}.ckpt"

    def readable_checkpoint(self, phase: str) -> Path | None:
        """Return the latest checkpoint of a phase that is intact, or None when there is none.

        Raises:
            CheckpointError: there are checkpoints but none is readable.
        """
        paths = [self.checkpoint(phase), previous(self.checkpoint(phase))]
        faults = {path: damage(path) for path in paths if path.exists()}
        for path, fault in faults.items():
            if not fault:
                return path
        for path, fault in faults.items():
            raise CheckpointError(
                f"checkpoint {path} is not readable ({fault}), nor is an earlier one; remove {path.parent} to start "
                f"phase {phase} again"
            )
        return None

    # -- rows per epoch ------------------------------------------------------------------------------------------

    def append_row(self, row: JsonObject) -> None:
        """Add one row and flush it to the disk: a killed run keeps every finished epoch."""
        with self.metrics_path.open("a", encoding="utf-8") as f:
            f.write(json.dumps(row) + "\n")
            f.flush()
            os.fsync(f.fileno())

    def rows(self) -> list[JsonObject]:
        """Return all rows so far; a line cut short by a kill or a full disk is left out, as is one that is no row."""
        lines = self.metrics_path.read_bytes().splitlines() if self.metrics_path.exists() else []
        return [row for line in lines if line.strip() and (row := _row(line)) is not None]

    def drop_rows(self, phase: str, first_epoch: int) -> None:
        """Forget rows of epochs that are about to be trained again."""
        if self.writes:
            rows = [row for row in self.rows() if row["phase"] != phase or row["epoch"] < first_epoch]
            write_text(self.metrics_path, "".join(json.dumps(row) + "\n" for row in rows))


def probe(path: Path) -> None:
    """Make the folder of a run where there is none.

    Raises:
        ConfigError: it cannot be made, or not be written.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        reason = "there is no space left" if error.errno in NO_SPACE else error.strerror
        raise ConfigError(
            f"the run folder {path} cannot be written ({reason}); give another: hydra.run.dir=PATH"
        ) from error


def _row(line: bytes) -> JsonObject | None:
    """A row of the curves; None where the line is none."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        row = None
    right = isinstance(row, dict) and isinstance(row.get("phase"), str) and type(row.get("epoch")) is int
    if not right:
        log.warning("a line of metrics.jsonl is no row and is left out: %.60r", line)
    return row if right else None


def previous(path: Path) -> Path:
    """Return where the checkpoint before the last is kept."""
    return path.with_suffix(".previous.ckpt")


def damage(path: Path) -> str:
    """Return what is wrong with a checkpoint file, or an empty string; every byte's checksum is verified.

    Nothing can be gone on with from a NaN either. Whether the content is a checkpoint, ``checkpoint_epoch`` tells.
    """
    try:
        if fault := zip_fault(path):
            return fault
    except (OSError, zipfile.BadZipFile) as error:
        return f"{error}; is it truncated?"
    try:
        bad = not_numbers(torch.load(path, map_location="cpu", weights_only=True, mmap=True))
    except Exception:  # whatever stands in the file
        return ""
    return f"it holds NaN in {', '.join(bad[:3])}" if bad else ""


def checkpoint_epoch(path: Path) -> int:
    """Return the number of epochs that were finished when a Lightning checkpoint was written.

    Raises:
        CheckpointError: not a checkpoint.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        return int(content["loops"]["fit_loop"]["epoch_progress"]["current"]["processed"])
    except Exception as error:
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        if isinstance(error, pickle.UnpicklingError):
            reason = "it holds more than tensors and plain values, which could run code"
        raise CheckpointError(
            f"checkpoint {path} is not readable ({reason}); hodec did not write it: remove it to go on from the one "
            "before"
        ) from error
