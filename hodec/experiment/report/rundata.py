"""What the files of one run say, as plain frozen data; a number that a file does not give is ``None``."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

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
        phase: A key of ``PHASES``.
        epoch: Number within the phase, from 0.
        values: Metric name -> value, for example ``val/accuracy`` -> 0.97 (a fraction).
        layers: Layer name -> its ``rho``, ``primal_residual``, ``dual_residual``; empty outside phase ``admm``.
    """

    phase: str
    epoch: int
    values: Mapping[str, float]
    layers: Mapping[str, Mapping[str, float]] = field(default_factory=dict)


@dataclass(frozen=True)
class Layer:
    """One planned layer of ``plan.json``.

    ``shape`` is (O, I, K_h, K_w) or (O, I), ``runs_as`` the execution that the MACs are counted for, one image each.
    """

    name: str
    method: str = ""
    kind: str = ""
    shape: tuple[int, ...] = ()
    modes_in: tuple[int, ...] = ()
    modes_out: tuple[int, ...] = ()
    ranks: tuple[int, ...] = ()
    resolved_execution: str = ""
    calls: int | None = None
    aliases: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    params_before: float | None = None
    params_after: float | None = None
    macs_before: float | None = None
    macs_after: float | None = None


@dataclass(frozen=True)
class PlanData:
    """The plan: what was factorized and how, and what was left dense and why."""

    rule: str = ""
    method: str = ""
    layers: tuple[Layer, ...] = ()
    skipped: Mapping[str, str] = field(default_factory=dict)
    totals: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Network:
    """One measured network. Accuracies are fractions of 1; ``accuracy_raw`` is before BatchNorm re-estimation."""

    accuracy: float | None = None
    accuracy_raw: float | None = None
    params: float | None = None
    macs: float | None = None
    latency_ms: float | None = None


@dataclass(frozen=True)
class Outcome:
    """What ``metrics.json`` says at the end of a run.

    Attributes:
        networks: Key of ``NETWORKS`` -> its measurements.
        reduction: ``params`` and ``macs`` -> fraction cut, 0.8 meaning 80 % fewer.
        status: ``converged``, ``epochs ended``, ``diverged`` or ``off``; empty when not given.
        primal_residual: norm(W - Z) / norm(W) over all layers at the end of ADMM.
        conversion: Layer name -> relative error of the factorized weight against W.
        seconds: Phase -> wall-clock seconds.
        images: ``train``, ``validation`` and ``test`` -> number of images.
    """

    networks: Mapping[str, Network] = field(default_factory=dict)
    reduction: Mapping[str, float] = field(default_factory=dict)
    status: str = ""
    primal_residual: float | None = None
    conversion: Mapping[str, float] = field(default_factory=dict)
    seconds: Mapping[str, float] = field(default_factory=dict)
    seed: str = ""
    command: str = ""
    data: str = ""
    images: Mapping[str, float] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class RunData:
    """One run folder, read and checked.

    Attributes:
        label: How the run is called among others: what sets its config apart, else the folder's name.
        finished: ``metrics.json`` is there; ``outcome`` is empty otherwise.
        problem: Why the folder could not be read, for a run of a sweep; empty when it could.
    """

    folder: Path
    label: str
    config: Mapping[str, Any] = field(default_factory=dict)
    plan: PlanData = field(default_factory=PlanData)
    epochs: tuple[Epoch, ...] = ()
    outcome: Outcome = field(default_factory=Outcome)
    finished: bool = False
    problem: str = ""

    def network(self, name: str) -> Network:
        """Measurements of a network, named as in ``NETWORKS``; all ``None`` when the files have none."""
        return self.outcome.networks.get(name, Network())

    @property
    def reference(self) -> str:
        """The dense network that others are measured against: the more accurate one of those that were measured.

        ADMM costs a network accuracy before anything is cut: beside that one alone, what comes out would look better
        than it is.
        """
        scores = {name: self.network(name).accuracy for name in ("dense", "pretrained")}
        known = {name: score for name, score in scores.items() if score is not None}
        return max(known, key=lambda name: known[name], default="dense")

    def phase(self, name: str) -> tuple[Epoch, ...]:
        """The epochs of one phase, in order."""
        return tuple(row for row in self.epochs if row.phase == name)

    def trunk(self) -> tuple[Epoch, ...]:
        """The epochs of ADMM training, or of the plain training that a control run has in their place."""
        return self.phase("admm") or self.phase("dense")

    def last(self, key: str, phase: str = "admm") -> float | None:
        """The latest value that a phase recorded for a metric."""
        return next((row.values[key] for row in reversed(self.phase(phase)) if key in row.values), None)

    def reduction(self, cost: str) -> float | None:
        """Fraction of ``params`` or ``macs`` that was cut: as recorded, else from the measured networks."""
        if cost in self.outcome.reduction:
            return self.outcome.reduction[cost]
        return cut(getattr(self.network(self.reference), cost), getattr(self.network("compressed"), cost))

    def planned_reduction(self, cost: str) -> float | None:
        """Fraction of ``params`` or ``macs`` that the plan promises to cut."""
        totals = self.plan.totals
        return cut(totals.get(f"{cost}_before"), totals.get(f"{cost}_after"))


def cut(before: float | None, after: float | None) -> float | None:
    """Fraction by which ``after`` is smaller than ``before``; ``None`` when either is unknown or before is 0."""
    if before is None or after is None or before == 0:
        return None
    return 1 - after / before
