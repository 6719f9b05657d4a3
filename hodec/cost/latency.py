"""LatencyTable: milliseconds of layers on this device, measured once and stored, for ``budget`` and ``greedy``.

The time of a factorized layer that runs one op after another is the sum of their times. Ops are measured at channel
counts on a grid and interpolated linearly between them, so that hundreds of ranks cost a few dozen measurements. A
layer that runs in another way (a chain of contractions, an embedding) is measured as it is.
"""

import hashlib
import logging
import math
import os
import weakref
from collections.abc import Hashable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn

from hodec.cost.probe import Probe, probes_of
from hodec.cost.timing import device_name, medians_ms
from hodec.errors import CheckpointError, ConfigError, PlanError, first_line
from hodec.inference import inference, laid_out, settled_input
from hodec.inputs import Inputs
from hodec.io.atomic import read_json, write_json
from hodec.layers.base import same_random_state
from hodec.layers.plain import copied
from hodec.plan.layer import LayerPlan

log = logging.getLogger(__name__)

FORMAT, VERSION = "hodec-latency", 1


Placed = TypeVar("Placed", nn.Module, Tensor)


def cache_folder() -> Path:
    """The folder of measured times: ``HODEC_CACHE``, or ``hodec`` in the user's folder of caches."""
    given = os.environ.get("HODEC_CACHE")
    if given:
        return Path(given)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "hodec"


@dataclass(frozen=True)
class Machine:
    """The device, torch version and threads that a time holds for; others have files of their own."""

    device: str
    version: str
    threads: int

    @classmethod
    def this(cls, device: torch.device) -> "Machine":
        return cls(device_name(device), torch.__version__, torch.get_num_threads())

    @property
    def file(self) -> str:
        text = f"{self.device}|{self.version}|{self.threads}"
        return f"latency-{hashlib.sha256(text.encode()).hexdigest()[:16]}.json"


class LatencyTable:
    """Measured milliseconds by layer, for ``Budget(latency_ms=.., latency_table=..)`` and for ``Greedy``.

    Times are of float32 in evaluation mode, on a CPU in channels-last order. They are kept in a JSON file with the
    device's name, torch's version and the number of threads; a file of another machine is not used.

    Args:
        batch: images at a time, 1 or more; milliseconds are of the whole batch.
        device: where to measure.
        folder: where the file is; by default ``cache_folder()``. A folder that cannot be written is warned of once,
            and times are then forgotten at the end of the process.

    Raises:
        ConfigError: a batch below 1, or a device that is not there.

    Examples:
        >>> table = hodec.LatencyTable(folder="times")  # measured once a machine, kept there
        >>> rule = hodec.ranks.Budget(latency_ms=2.5, latency_table=table)
    """

    def __init__(self, batch: int = 1, device: torch.device | str = "cpu", *, folder: str | Path | None = None) -> None:
        if isinstance(batch, bool) or not isinstance(batch, int) or batch < 1:
            raise ConfigError(f"latency table: batch={batch!r} is not a whole number of at least 1")
        self.batch, self.device = batch, _usable(device)
        self.machine = Machine.this(self.device)
        self.path = (cache_folder() if folder is None else Path(folder)) / self.machine.file
        self.measured = 0
        self._times: dict[str, float] = read_times(self.path, self.machine)
        self._known: dict[Hashable, float] = {}
        # written when the table is given up, or at the end of the process
        self._finalizer = weakref.finalize(self, write_times, self.path, self.machine, self._times)

    # -- what the rules ask ----------------------------------------------------------------------------------------

    def after(self, layer: LayerPlan) -> float:
        """Milliseconds of a planned layer, factorized."""
        return self._layer_ms(layer, dense=False)

    def before(self, layer: LayerPlan) -> float:
        """Milliseconds of the dense layer in its place."""
        return self._layer_ms(layer, dense=True)

    def rest_ms(self, model: nn.Module | None, example_input: Inputs, layers: Iterable[LayerPlan]) -> float:
        """Milliseconds of the dense net without these layers, at least 0.

        Args:
            model: the dense net; it is run in evaluation mode and left as it was.
            example_input: as the model takes; its batch is brought to the table's.
            layers: those that are planned.

        Raises:
            PlanError: no model, but a model file.
        """
        if model is None:
            raise PlanError("a LatencyTable is of PyTorch layers: leave latency_table out for a model file")
        return max(0.0, self.net_ms(model, example_input) - sum(self.before(layer) for layer in layers))

    def net_ms(self, model: nn.Module, example_input: Inputs) -> float:
        """Milliseconds of a whole net; measured each time, for nets have no name."""
        net = self._placed(copied(model))
        given = settled_input(model, example_input).with_batch(self.batch).map(self._placed)
        with inference(net):
            return medians_ms({"": lambda: given.run(net)}, device=self.device, seconds=2.0)[""]

    def save(self) -> None:
        """Write what was measured now, not only at the end of the process."""
        write_times(self.path, self.machine, self._times)

    # -- measuring -------------------------------------------------------------------------------------------------

    def _layer_ms(self, layer: LayerPlan, *, dense: bool) -> float:
        key = (
            layer.method,
            layer.layer_type,
            layer.shape,
            layer.groups,
            layer.role,
            layer.modes,
            tuple((user.layer_type, user.call_sites) for user in layer.users),
            dense or (layer.ranks, layer.resolved_execution),
        )
        if key not in self._known:
            self._known[key] = sum(times * self._probe_ms(probe) for times, probe in probes_of(layer, dense=dense))
        return self._known[key]

    def _probe_ms(self, probe: Probe) -> float:
        """Milliseconds of one probe: between its neighbours on the grid, of which there are one, two or four."""
        return sum(weight * self._entry(corner) for weight, corner in probe.corners())

    def _entry(self, probe: Probe) -> float:
        key = f"batch {self.batch}: {probe.key}"
        if key not in self._times:
            self._times[key] = self._measure(probe)
            self.measured += 1
        return self._times[key]

    def _measure(self, probe: Probe) -> float:
        with same_random_state([]):
            module, x = probe.build(), probe.example(self.batch)
        module, x = self._placed(module).eval(), self._placed(x)
        with torch.inference_mode():
            ms = medians_ms({"": lambda: module(x)}, device=self.device, seconds=0.02)[""]
        log.debug("measured %s at batch %d: %.4g ms", probe.key, self.batch, ms)
        return ms

    def _placed(self, what: Placed) -> Placed:
        """A module or tensor on the device, in the memory order that is fast there."""
        what = what.to(self.device)
        if self.device.type != "cpu":
            return what
        if isinstance(what, nn.Module):
            return laid_out(what, torch.channels_last)
        return what.to(memory_format=torch.channels_last) if what.ndim == 4 else what


def _usable(device: torch.device | str) -> torch.device:
    """The device, tried out: torch takes the name of any, and fails at the first tensor."""
    try:
        found = torch.device(device)
        torch.empty(1, device=found)
    except (RuntimeError, AssertionError) as error:
        text = f"latency table: device={str(device)!r} cannot be used ({first_line(error)}); 'cpu' always can"
        raise ConfigError(text) from error
    return found


def read_times(path: Path, machine: Machine) -> dict[str, float]:
    """Times of a file; none where it is missing. A damaged one is measured anew."""
    if not path.exists():
        return {}
    try:
        value = read_json(path, "latency table")
        same = (value["format"], value["version"], value["machine"]) == (FORMAT, VERSION, vars(machine))
        times = {str(key): float(ms) for key, ms in value["ms"].items()} if same else {}
        if not all(0 <= ms < math.inf for ms in times.values()):
            raise ValueError("a time that is none")
    except (CheckpointError, AttributeError, KeyError, TypeError, ValueError) as error:
        log.warning("latency table %s is damaged (%s) and will be measured anew", path, error)
        return {}
    return times


def write_times(path: Path, machine: Machine, times: Mapping[str, float]) -> None:
    """Write the times, together with those that another process has written meanwhile."""
    kept = read_times(path, machine)
    if times.items() <= kept.items():
        return
    value = {"format": FORMAT, "version": VERSION, "machine": vars(machine), "ms": {**kept, **times}}
    try:
        write_json(path, value)
    except OSError as error:
        log.warning("latency table %s cannot be written (%s); HODEC_CACHE names another folder", path, error.strerror)
