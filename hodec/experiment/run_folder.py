"""A run's folder: what is done in it, and what a second start finds there.

``run.json`` lists the finished phases with the SHA-256 of their files, ``metrics.jsonl`` has a flushed row per
epoch, ``checkpoints/`` the last two of the phase under way. Each file is whole or absent.
"""

import contextlib
import json
import os
import pickle
import tempfile
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from hodec.errors import CheckpointError, ConfigError
from hodec.io.atomic import read_json, sha256, write_json, write_text
from hodec.io.tensors import load_tensors, save_tensors


class RunFolder:
    """The files of one run; see ``open``."""

    def __init__(self, path: Path, *, writes: bool = True) -> None:
        self.path, self.writes = path, writes
        self.phases: dict[str, dict[str, Any]] = {}
        self._kept: dict[str, dict[str, torch.Tensor]] = {}  # weights of phases that this process may not write

    @classmethod
    def open(cls, path: Path, config_text: str, differences: Sequence[str] = (), *, writes: bool = True) -> "RunFolder":
        """Open a new folder, or one in which a run with the same settings was stopped.

        Args:
            path: the folder; created when missing.
            config_text: the settings as YAML, kept as ``config.yaml``.
            differences: dotted keys in which the folder's settings differ from these.
            writes: False in all processes but the first, where several train together: it reads what there is, and
                keeps the rest to itself.

        Raises:
            ConfigError: the folder cannot be written, or holds a run with other settings.
            CheckpointError: its ``run.json`` is damaged.
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
        """Whether the phase has finished, in this start or an earlier one."""
        return phase in self.phases

    def finish(self, phase: str, **facts: Any) -> None:
        """Note that a phase is finished, with facts about it (plain JSON values)."""
        self.phases[phase] = facts
        if self.writes:
            write_json(self.path / "run.json", {"phases": self.phases})

    def save_phase(self, phase: str, model: nn.Module, **facts: Any) -> None:
        """Keep a phase's resulting weights and note it as finished."""
        weights = {name: t.detach() for name, t in model.state_dict().items()}
        if not self.writes:
            self._kept[phase] = {name: t.clone() for name, t in weights.items()}
            self.finish(phase, **facts)
            return
        path = self.path / "phases" / f"{phase}.safetensors"
        save_tensors(path, weights)
        self.finish(phase, sha256=sha256(path), **facts)

    def load_phase(self, phase: str, model: nn.Module) -> None:
        """Put a finished phase's weights into ``model``.

        Raises:
            CheckpointError: the file is missing or altered.
        """
        if phase in self._kept:
            model.load_state_dict(self._kept[phase])
            return
        path = self.path / "phases" / f"{phase}.safetensors"
        if not path.exists() or sha256(path) != self.phases[phase]["sha256"]:
            raise CheckpointError(
                f"{path} is missing or was altered since it was written; remove its entry {phase!r} from "
                f"{self.path / 'run.json'} to compute that phase again"
            )
        model.load_state_dict(load_tensors(path))

    def save_factors(self, phase: str, factors: Mapping[str, Sequence[torch.Tensor]]) -> None:
        """Keep factors of layers that a phase found, for the one after it; nothing is written when there are none."""
        named = {f"{layer}:{i}": f for layer, each in factors.items() for i, f in enumerate(each)}
        if not self.writes:
            self._kept[f"{phase}_factors"] = {name: f.clone() for name, f in named.items()}
        elif named:
            save_tensors(self.path / "phases" / f"{phase}_factors.safetensors", named)

    def load_factors(self, phase: str) -> dict[str, list[torch.Tensor]]:
        """What ``save_factors`` kept; empty when there were none.

        Raises:
            CheckpointError: the file is truncated.
        """
        path, named = self.path / "phases" / f"{phase}_factors.safetensors", self._kept.get(f"{phase}_factors", {})
        if not named and path.exists():
            named = load_tensors(path)
        factors: dict[str, list[torch.Tensor]] = {}
        for key in sorted(named, key=lambda key: int(key.rpartition(":")[2])):
            factors.setdefault(key.rpartition(":")[0], []).append(named[key])
        return factors

    # -- checkpoints of the phase under way ----------------------------------------------------------------------

    def checkpoint(self, phase: str) -> Path:
        """Where Lightning's checkpoint of the last whole epoch goes."""
        return self.path / "checkpoints" / f"{phase}.ckpt"

    def readable_checkpoint(self, phase: str) -> Path | None:
        """The latest checkpoint of a phase that is intact, or None when there is none.

        Raises:
            CheckpointError: there are checkpoints but none is readable.
        """
        paths = [self.checkpoint(phase), previous(self.checkpoint(phase))]
        present = [path for path in paths if path.exists()]
        for path in present:
            if not damage(path):
                return path
        if present:
            raise CheckpointError(
                f"checkpoint {present[0]} is not readable ({damage(present[0])}), nor is an earlier one; remove "
                f"{present[0].parent} to start phase {phase} again"
            )
        return None

    # -- rows per epoch ------------------------------------------------------------------------------------------

    @property
    def metrics_path(self) -> Path:
        return self.path / "metrics.jsonl"

    def append_row(self, row: Mapping[str, Any]) -> None:
        """Add one row and flush it to the disk: a killed run keeps every finished epoch."""
        with self.metrics_path.open("a", encoding="utf-8") as f:
            f.write(json.dumps(row) + "\n")
            f.flush()
            os.fsync(f.fileno())

    def rows(self) -> list[dict[str, Any]]:
        """All rows so far; a line cut short by a kill or a full disk is left out."""
        if not self.metrics_path.exists():
            return []
        rows = []
        for line in self.metrics_path.read_text(encoding="utf-8").splitlines():
            with contextlib.suppress(ValueError):
                rows.append(json.loads(line))
        return rows

    def drop_rows(self, phase: str, first_epoch: int) -> None:
        """Forget rows of epochs that are about to be trained again."""
        if not self.writes:
            return
        kept = [row for row in self.rows() if row["phase"] != phase or row["epoch"] < first_epoch]
        write_text(self.metrics_path, "".join(json.dumps(row) + "\n" for row in kept))


def previous(path: Path) -> Path:
    """Where the checkpoint before the last is kept."""
    return path.with_suffix(".previous.ckpt")


def damage(path: Path) -> str:
    """What is wrong with a checkpoint file, or an empty string; every byte's checksum is verified."""
    try:
        with zipfile.ZipFile(path) as archive:
            bad = archive.testzip()
        return f"its part {bad} is altered" if bad else ""
    except (OSError, zipfile.BadZipFile) as error:
        return f"{error}; is it truncated?"


def checkpoint_epoch(path: Path) -> int:
    """Epochs finished when a Lightning checkpoint was written.

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
