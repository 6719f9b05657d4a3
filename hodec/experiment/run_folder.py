"""A run's folder: the results of the phases that are done, and what a second start needs to go on.

``run.json`` lists the finished phases with the SHA-256 of their files, ``metrics.jsonl`` has a flushed row per
epoch, ``checkpoints/`` the last two of the phase under way. Each file is whole or absent.
"""

import contextlib
import json
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
from hodec.io.atomic import JsonObject, read_json, sha256, write_json, write_text
from hodec.io.tensors import load_tensors, not_numbers, save_tensors, zip_fault
from hodec.plan.plan import Plan


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
        folder._probe()
        if differences:
            raise ConfigError(
                f"{path} holds a run with other settings (they differ in {', '.join(differences[:6])}). Give the "
                "settings of that run to go on with it, or another folder: hydra.run.dir=PATH"
            )
        if not (path / "config.yaml").exists():
            write_text(path / "config.yaml", config_text)
        if (path / "run.json").exists():
            state = read_json(path / "run.json", "state of the run")
            if isinstance(state, dict) and "stages" in state:
                raise CheckpointError(
                    f"{path} was begun by hodec 0.1.0, whose unfinished runs this version does not go on with: finish "
                    "it there, or give another folder, hydra.run.dir=PATH"
                )
            if not isinstance(state, dict) or not isinstance(state.get("phases"), dict):
                raise CheckpointError(f"{path / 'run.json'} is not the state of a run; give another hydra.run.dir=PATH")
            folder.phases = state["phases"]
        return folder

    def _probe(self) -> None:
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self.path):
                pass
        except OSError as error:
            raise ConfigError(
                f"the run folder {self.path} cannot be written ({error.strerror}); give another: hydra.run.dir=PATH"
            ) from error

    # -- phases --------------------------------------------------------------------------------------------------

    def done(self, phase: str) -> bool:
        """Return whether the phase has finished, in this start or an earlier one."""
        return phase in self.phases

    def finish(self, phase: str, facts: JsonObject) -> None:
        """Note that a phase is finished, with facts about it."""
        self.phases[phase] = facts
        if self.writes:
            write_json(self.path / "run.json", {"phases": self.phases})

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
        """Return the plan of the run: read where it has been made, else made now and kept."""
        if self.done("plan"):
            return Plan.load(self.path / "plan.json")
        plan = compute()
        self.keep_plan(plan)
        self.finish("plan", {})
        return plan

    def keep_plan(self, plan: Plan) -> None:
        """Write ``plan.json``."""
        if self.writes:
            plan.save(self.path / "plan.json")

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
        """Return all rows so far; a line cut short by a kill or a full disk is left out."""
        rows, text = [], self.metrics_path.read_text(encoding="utf-8") if self.metrics_path.exists() else ""
        for line in text.splitlines():
            with contextlib.suppress(ValueError):
                rows.append(json.loads(line))
        return rows

    def drop_rows(self, phase: str, first_epoch: int) -> None:
        """Forget rows of epochs that are about to be trained again."""
        if self.writes:
            rows = [row for row in self.rows() if row["phase"] != phase or row["epoch"] < first_epoch]
            write_text(self.metrics_path, "".join(json.dumps(row) + "\n" for row in rows))


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
