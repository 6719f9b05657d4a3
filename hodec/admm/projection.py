"""Projection: the Z-update of all planned layers, and what has to be remembered from one to the next."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol

import torch
from torch import Tensor

from hodec.admm.division import Division, turns
from hodec.admm.processes import Processes, partition
from hodec.admm.updates import project_layers
from hodec.calibration.input_covariance import InputCovariance, check_covariances
from hodec.errors import PlanError
from hodec.formats.base import working_copy
from hodec.formats.layer_types import LAYER_TYPES
from hodec.plan.layer import LayerPlan
from hodec.plan.plan import Plan

State = dict[str, Any]
"""Tensors, plain numbers and texts, in dicts and lists: what a checkpoint may hold without running code."""


class RankLearner(Protocol):
    """What changes the ranks while training; such as the rule ``hodec.ranks.Learned``."""

    def update(self, plan: Plan, weights: Mapping[str, Tensor], rho: Mapping[str, float]) -> Plan:
        """The plan with the ranks that the next Z should have."""

    def freeze(self, plan: Plan) -> Plan:
        """The plan to convert by."""


class Projection:
    """Projects tensors onto the planned ranks, layer by layer.

    Args:
        plan: the layers.
        learner: chooses the ranks anew at each update; without one they stay.
        covariances: of the layers' inputs, see ``hodec.collect_covariances``: distances are those of the outputs.
        distribute: each process projects its part of the layers; otherwise the first projects all.

    Raises:
        PlanError: covariances of layers that the plan lacks, or whose format is found by iteration.

    Attributes:
        plan: the layers with the ranks they have now; those that still fall to these ranks are no part of it.
    """

    def __init__(
        self,
        plan: Plan,
        learner: RankLearner | None = None,
        covariances: Mapping[str, InputCovariance] | None = None,
        *,
        distribute: bool = True,
    ) -> None:
        self.plan, self.learner, self.distribute = plan, learner, distribute
        self.covariances = check_covariances(covariances or {}, plan)
        for name in self.covariances:
            if plan[name].format.iterative:
                raise PlanError(
                    f"{name}: {plan[name].method} is found by iteration, which goes on from the last Z and knows no "
                    "covariance; use another method, or no calibration data"
                )
        self._held: dict[str, list[Tensor]] = {}  # factors of the last Z, at the ranks that it had

    @property
    def factors(self) -> dict[str, list[Tensor]]:
        """Layer -> factors of its Z, for the formats that are found by iteration, where that has the planned ranks.

        The next update goes on from them, and so does the conversion: either could end in another local optimum else.
        """
        return {name: held for name, held in self._held.items() if _same_size(self.plan[name], held)}

    def update(
        self,
        tensors: dict[str, Tensor],
        rho: Mapping[str, float],
        processes: Processes,
        division: Division | None = None,
        *,
        fallen: float = 1.0,
    ) -> dict[str, Tensor]:
        """The next Z of each layer from its W + U, equal in all processes; in parts where these are parts.

        Args:
            fallen: how far, 0..1, the ranks have come from the full ones to the planned ones, see ``falling_plan``.
                Layers whose ranks are full stay as they are.
        """
        if self.learner is not None:
            learned = self.learner.update(self.plan, tensors, rho)
            ranks = processes.broadcast({name: layer.ranks for name, layer in learned.items()})
            self.plan = with_ranks(self.plan, ranks)
        plan = self.plan if fallen == 1 else falling_plan(self.plan, fallen)
        full = {name: t.clone() for name, t in tensors.items() if fallen < 1 and _is_full(plan[name])}
        parted = {name: t for name, t in tensors.items() if name not in full and division and name in division}
        z, factors = self._project_parted(parted, plan, processes, division) if division else ({}, {})
        whole = [name for name in tensors if name not in full and name not in parted]
        parts = partition(plan, whole, processes.count if self.distribute else 1)
        for source, names in enumerate(parts):
            mine = {name: tensors[name] for name in names} if processes.rank == source else {}
            # decompositions differ in the last bits between processes, so one of them decides
            part, own = processes.broadcast(self._project(mine, plan), source)
            z.update((name, one.to(tensors[name].device)) for name, one in part.items())
            factors.update((name, [f.to(tensors[name].device) for f in many]) for name, many in own.items())
        self._held = {**self._held, **factors}  # those of layers that nothing trains now stay
        return {name: full[name] if name in full else z[name] for name in tensors}

    def truncate(
        self, tensors: Mapping[str, Tensor], processes: Processes | None = None, division: Division | None = None
    ) -> dict[str, Tensor]:
        """Each tensor at its planned ranks; nothing is remembered."""
        if not (division and processes):
            return self._project(tensors, self.plan)[0]
        parted = {name: t for name, t in tensors.items() if name in division}
        z = self._project_parted(parted, self.plan, processes, division)[0]
        z |= self._project({name: t for name, t in tensors.items() if name not in parted}, self.plan)[0]
        return {name: z[name] for name in tensors}

    def _project_parted(
        self, tensors: Mapping[str, Tensor], plan: Plan, processes: Processes, division: Division
    ) -> tuple[dict[str, Tensor], dict[str, list[Tensor]]]:
        """``_project`` of layers that are divided: each process gathers one at a time, and all work at once."""
        z, factors = dict[str, Tensor](), dict[str, list[Tensor]]()
        parts = partition(plan, list(tensors), processes.count if self.distribute else 1)
        for turn in turns(parts, {name: math.prod(plan[name].shape) for name in tensors}):
            mine: dict[str, Tensor] = {}
            for source, names in enumerate(turn):
                for name in names:
                    gathered = division.whole(name, tensors[name])
                    if source == processes.rank:
                        mine[name] = gathered
                    del gathered  # or the next would be gathered beside it
            part, own = self._project(mine, plan)
            mine.clear()
            for source, names in enumerate(turn):
                z |= {name: division.sent(name, part.pop(name, None), source, tensors[name].dtype) for name in names}
                if any(plan[name].format.iterative for name in names):
                    many = processes.broadcast(own, source)
                    factors |= {name: [f.to(tensors[name].device) for f in one] for name, one in many.items()}
        return z, factors

    @torch.no_grad()
    def _project(self, tensors: Mapping[str, Tensor], plan: Plan) -> tuple[dict[str, Tensor], dict[str, list[Tensor]]]:
        """Each tensor at the ranks of ``plan``, and the factors of those whose format is iterative."""
        factors = {
            name: self._iterate(name, t, plan[name]) for name, t in tensors.items() if plan[name].format.iterative
        }
        plain = {name: t for name, t in tensors.items() if name not in factors}
        z = project_layers(plan, plain, self.covariances)
        for name, own in factors.items():
            layer = plan[name]
            with torch.autocast(tensors[name].device.type, enabled=False):
                dense = layer.format.reconstruct(own, layer.shape, layer.modes).to(tensors[name].dtype)
            z[name] = LAYER_TYPES[layer.layer_type].from_oihw(dense)
        return {name: z[name] for name in tensors}, factors

    def _iterate(self, name: str, tensor: Tensor, layer: LayerPlan) -> list[Tensor]:
        """Factors of one layer, from those of its last Z where they have the ranks of ``layer``."""
        before = self._held.get(name)
        weight = LAYER_TYPES[layer.layer_type].to_oihw(working_copy(tensor))
        with torch.autocast(weight.device.type, enabled=False):
            if before is None or not _same_size(layer, before):
                return layer.format.decompose(weight, layer.ranks, layer.modes)
            return layer.format.refine(weight, layer.ranks, layer.modes, [f.to(weight) for f in before])

    def final_plan(self) -> Plan:
        """The plan to convert by.

        Raises:
            PlanError: no layer is left whose learned ranks save anything.
        """
        return self.plan if self.learner is None else self.learner.freeze(self.plan)

    def learned_cost(self) -> dict[str, float]:
        """Shares of the dense net's ``macs`` and ``params`` that learned ranks would keep; empty without a learner."""
        plan = self.plan
        if self.learner is None:
            return {}
        idle = [layer for layer in plan.values() if not layer.saves()]  # these will be left dense
        macs = plan.macs_after + sum(layer.macs_before - layer.macs_after for layer in idle)
        params = plan.params_after + sum(layer.params_before - layer.params_after for layer in idle)
        return {"macs": macs / plan.macs_before, "params": params / plan.params_before}

    # -- state -----------------------------------------------------------------------------------------------------

    def identity(self, plan: Mapping[str, LayerPlan]) -> dict[str, str]:
        """What Z depends on, per layer and in words; learned ranks are state instead."""
        return {
            name: f"{p.method} {p.layer_type} {list(p.shape)} modes {list(p.modes.inputs)} x {list(p.modes.outputs)} "
            f"ranks {'learned' if self.learner else list(p.ranks)}"
            for name, p in plan.items()
        }

    def state_dict(self) -> State:
        """Tensors and plain numbers."""
        ranks = {name: list(layer.ranks) for name, layer in self.plan.items()} if self.learner else {}
        return {"ranks": ranks, "factors": {name: list(factors) for name, factors in self._held.items()}}

    def load_state_dict(self, state: State) -> None:
        """Go on from another's state, which must be of the same layers."""
        self._held = {name: list(factors) for name, factors in state["factors"].items()}
        self.plan = with_ranks(self.plan, state["ranks"])


def with_ranks(plan: Plan, ranks: Mapping[str, Sequence[int]]) -> Plan:
    """The plan with other ranks of some layers, which may then cost more than the dense ones.

    Raises:
        PlanError: ranks that do not fit.
    """
    changed = {name: replace(plan[name], ranks=tuple(r)).check(name) for name, r in ranks.items()}
    return replace(plan, layers={**plan.layers, **changed})


def falling_plan(plan: Plan, fallen: float) -> Plan:
    """The plan at ranks that have gone a share, 0..1, of their way from the full ones to its own.

    Full are those at which a format is exact for every weight, ``Format.max_ranks``. Each rank is rounded to a whole
    number, and lowered where a layer cannot use it beside its others.
    """
    ranks = {}
    for name, layer in plan.items():
        full = layer.format.max_ranks(layer.shape, layer.modes)
        now = [round(most - fallen * (most - own)) for most, own in zip(full, layer.ranks, strict=True)]
        ranks[name] = layer.format.fit_ranks(layer.shape, layer.modes, now)
    return with_ranks(plan, ranks)


def _is_full(layer: LayerPlan) -> bool:
    return layer.ranks == layer.format.max_ranks(layer.shape, layer.modes)


def _same_size(layer: LayerPlan, factors: Sequence[Tensor]) -> bool:
    return layer.format.params(layer.shape, layer.ranks, layer.modes) == sum(f.numel() for f in factors)
