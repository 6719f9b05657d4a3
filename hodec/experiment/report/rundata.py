"""The content of one run's folder as plain frozen data; a number that no file gives is ``None``."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from hodec.plan.plan import Plan

#: Key of a phase in the files -> its name for readers, in the order of a run.
PHASES = {
    "pretrain": "pretraining",
    "dense": "dense training",  # the control: in place of ADMM
    "admm": "ADMM training",
    "retrain": "retraining",
}

#: Key of a measured network in the files -> what it is, in the order of a run.
NETWORKS = {
    "teacher": "another trained network that taught",
    "pretrained": "the trained network that this run began with",
    "dense": "the trained network, before anything is cut",
    "truncated": "cut to the planned ranks, not yet retrained",
    "compressed": "factorized and retrained: the result",
}


@dataclass(frozen=True)
class Epoch:
    """One row of ``metrics.jsonl``.

    Attributes:
        phase: a key of ``PHASES``.
        epoch: its number within the phase, from 0.
        values: metric name -> value, for example ``val/accuracy`` -> 0.97 (a fraction).
        layers: layer name -> its ``rho``, ``primal_residual``, ``dual_residual``; empty outside phase ``admm``.
    """

    phase: str
    epoch: int
    values: Mapping[str, float]
    layers: Mapping[str, Mapping[str, float]] = field(default_factory=dict)


@dataclass(frozen=True)
class Network:
    """One measured network: accuracies are fractions of 1, the raw one is that before BatchNorm was re-estimated."""

    validation_accuracy: float | None = None
    test_accuracy: float | None = None
    test_accuracy_raw: float | None = None
    params: float | None = None
    macs: float | None = None
    latency_ms: float | None = None


@dataclass(frozen=True)
class Results:
    """The content of ``metrics.json``, which a run writes at its end.

    Attributes:
        networks: key of ``NETWORKS`` -> its measurements.
        reduction: ``params`` and ``macs`` -> fraction cut, 0.8 meaning 80 % fewer.
        status: ``converged``, ``epochs ended``, ``diverged`` or ``off``; empty when not given.
        primal_residual: norm(W - Z) / norm(W) over all layers at the end of ADMM.
        conversion: layer name -> relative error of the factorized weight against W.
        retraining: ``lr``, its highest learning rate, and ``probes``, the descents that found it (0: it was given).
        retraining_end: ``lowest`` or ``highest`` where the rate is that of those tried; else empty.
        against: dense network -> test images that it has right and the compressed one has not, ``lost``, and
            the reverse, ``won``.
        seconds: phase -> wall-clock seconds.
        images: ``train``, ``validation`` and ``test`` -> number of images.
        latency: how ``latency_ms`` was measured: ``batch``, ``device`` (with the threads of a CPU).
        data, seed, command: as text.
        versions: package -> version.
    """

    networks: Mapping[str, Network] = field(default_factory=dict)
    reduction: Mapping[str, float] = field(default_factory=dict)
    status: str = ""
    primal_residual: float | None = None
    conversion: Mapping[str, float] = field(default_factory=dict)
    retraining: Mapping[str, float] = field(default_factory=dict)
    retraining_end: str = ""
    against: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    seconds: Mapping[str, float] = field(default_factory=dict)
    images: Mapping[str, float] = field(default_factory=dict)
    latency: Mapping[str, str] = field(default_factory=dict)
    data: str = ""
    seed: str = ""
    command: str = ""
    versions: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Spectrum:
    """Singular values that one rank of a layer cuts, before the cut.

    Attributes:
        rank: how many are kept.
        full: how many there are.
        at: places of those that were recorded, from 1.
        values: these, as shares of the largest.
    """

    rank: float
    full: float
    at: tuple[float, ...]
    values: tuple[float, ...]


@dataclass(frozen=True)
class RunData:
    """One run folder, read and checked.

    Attributes:
        label: the run's name among others: the settings that differ, else the folder's name.
        config: the settings, as plain values.
        settings: those in which it differs from the runs beside it, as text.
        plan: None where there is no ``plan.json`` yet.
        spectra: layer -> those of its ranks; empty where the run wrote none.
        finished: ``metrics.json`` is there; ``results`` is empty otherwise.
        problem: why the folder of a sweep's run could not be read; empty when it could.
    """

    folder: Path
    label: str
    config: Mapping[str, object] = field(default_factory=dict)
    settings: Mapping[str, str] = field(default_factory=dict)
    plan: Plan | None = None
    epochs: tuple[Epoch, ...] = ()
    results: Results = field(default_factory=Results)
    spectra: Mapping[str, tuple[Spectrum, ...]] = field(default_factory=dict)
    finished: bool = False
    problem: str = ""

    def network(self, name: str) -> Network:
        """Measurements of a network, named as in ``NETWORKS``; all ``None`` when the files have none."""
        return self.results.networks.get(name, Network())

    @property
    def reference(self) -> str:
        """The dense network that others are compared with: the more accurate one of those that were measured.

        Beside a network that ADMM has cost accuracy alone, the result would look better than it is.
        """
        scores = {name: self.network(name).test_accuracy for name in ("dense", "pretrained")}
        known = {name: score for name, score in scores.items() if score is not None}
        return max(known, key=lambda name: known[name], default="dense")

    def reduction(self, cost: str) -> float | None:
        """Fraction of ``params`` or ``macs`` that was cut: as recorded, else from the measured networks."""
        dense, compressed = self.network(self.reference), self.network("compressed")
        measured = {"params": cut(dense.params, compressed.params), "macs": cut(dense.macs, compressed.macs)}
        return self.results.reduction.get(cost, measured[cost])

    @property
    def compressed_bytes(self) -> int | None:
        """Size of ``compressed.safetensors``, where it is there."""
        path = self.folder / "compressed.safetensors"
        return path.stat().st_size if path.is_file() else None

    @property
    def latency_ratio(self) -> float | None:
        """Latency of the dense network over that of the compressed one; above 1 the compressed one is faster."""
        dense, compressed = self.network("dense").latency_ms, self.network("compressed").latency_ms
        return dense / compressed if dense and compressed else None

    @property
    def primal_residual(self) -> float | None:
        """norm(W - Z) / norm(W) at the end of ADMM, or in the last epoch that was recorded."""
        recorded = series(self.phase("admm"), "admm/primal_residual")
        at_end = self.results.primal_residual
        return at_end if at_end is not None or not recorded else recorded[-1]

    def phase(self, name: str) -> tuple[Epoch, ...]:
        """The epochs of one phase, in order."""
        return tuple(row for row in self.epochs if row.phase == name)


def series(rows: tuple[Epoch, ...], key: str) -> list[float]:
    """The values that the epochs recorded for a metric, in order."""
    return [row.values[key] for row in rows if key in row.values]


def cut(before: float | None, after: float | None) -> float | None:
    """Fraction by which ``after`` is smaller than ``before``; ``None`` when either is unknown or before is 0."""
    if before is None or after is None or before == 0:
        return None
    return 1 - after / before
