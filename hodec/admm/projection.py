"""Projection: the Z-update of all planned layers, and what has to be remembered from one to the next."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol

import torch
from torch import Tensor

from hodec.admm.processes import Processes, shares
from hodec.admm.updates import project_layers
from hodec.calibration.input_covariance import InputCovariance
from hodec.errors import PlanError
from hodec.formats.base import working_copy
from hodec.formats.layer_types import LAYER_TYPES
from hodec.plan.layer import LayerPlan
from hodec.plan.plan import Plan


class RankLearner(Protocol):
    """What changes the ranks while training; see ``hodec.ranks.Learned.learner``."""

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
        spread: each process projects its share of the layers; otherwise the first projects all.

    Raises:
        PlanError: covariances of layers that the plan lacks, or whose format is found by iteration.

    Attributes:
        plan: the layers with the ranks they have now.
        factors: layer -> factors of its Z, for the formats that are found by iteration: the next update goes on
            from them, and so does the conversion. Without them either could end in another local optimum.
    """

    def __init__(
        self,
        plan: Mapping[str, LayerPlan],
        learner: RankLearner | None = None,
        covariances: Mapping[str, InputCovariance] | None = None,
        *,
        spread: bool = True,
    ) -> None:
        self.plan, self.learner, self.covariances, self.spread = plan, learner, dict(covariances or {}), spread
        for name, covariance in self.covariances.items():
            if name not in plan:
                raise PlanError(
                    f"there is a covariance for {name}, which is not in the plan: collect them with this plan"
                )
            covariance.check(name, plan[name])
            if plan[name].format.iterative:
                raise PlanError(
                    f"{name}: {plan[name].method} is found by iteration, which goes on from the last Z and knows no "
                    "covariance; use another method, or no covariances (calibration_batches=0)"
                )
        self.factors: dict[str, list[Tensor]] = {}

    def update(self, tensors: dict[str, Tensor], rho: Mapping[str, float], processes: Processes) -> dict[str, Tensor]:
        """The next Z of each layer from its W + U, equal in all processes."""
        if self.learner is not None and isinstance(self.plan, Plan):
            learned = self.learner.update(self.plan, tensors, rho)
            ranks = processes.agree({name: layer.ranks for name, layer in learned.items()})
            self.plan = with_ranks(self.plan, ranks)
        divided = shares(self.plan, list(tensors), processes.count if self.spread else 1)
        z: dict[str, Tensor] = {}
        factors: dict[str, list[Tensor]] = {}
        for source, names in enumerate(divided):
            mine = {name: tensors[name] for name in names} if processes.rank == source else {}
            found = self._found(mine)
            # decompositions differ in the last bits between processes, so one of them decides
            part, found = processes.agree((self._projected(mine, found), found), source)
            z.update((name, one.to(tensors[name].device)) for name, one in part.items())
            factors.update((name, [f.to(tensors[name].device) for f in many]) for name, many in found.items())
        self.factors = {name: factors[name] for name in tensors if name in factors}
        return {name: z[name] for name in tensors}

    def truncate(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Each tensor at its planned ranks; nothing is remembered."""
        return self._projected(tensors, self._found(tensors))

    @torch.no_grad()
    def _found(self, tensors: Mapping[str, Tensor]) -> dict[str, list[Tensor]]:
        """Factors of the layers whose formats are iterative."""
        found = {}
        for name, tensor in tensors.items():
            layer = self.plan[name]
            if not layer.format.iterative:
                continue
            weight, start = LAYER_TYPES[layer.layer_type].to_oihw(working_copy(tensor)), self.factors.get(name)
            with torch.autocast(weight.device.type, enabled=False):
                if start is None or not _same_size(layer, start):
                    found[name] = layer.format.decompose(weight, layer.ranks, layer.modes)
                else:
                    near = [f.to(weight) for f in start]
                    found[name] = layer.format.refine(weight, layer.ranks, layer.modes, near)
        return found

    def _projected(self, tensors: Mapping[str, Tensor], found: Mapping[str, list[Tensor]]) -> dict[str, Tensor]:
        plain = {name: t for name, t in tensors.items() if name not in found}
        result = project_layers(self.plan, plain, self.covariances)
        for name, factors in found.items():
            layer = self.plan[name]
            dense = layer.format.reconstruct(factors, layer.shape, layer.modes).to(tensors[name].dtype)
            result[name] = LAYER_TYPES[layer.layer_type].from_oihw(dense)
        return {name: result[name] for name in tensors}

    def final_plan(self) -> Mapping[str, LayerPlan]:
        """The plan to convert by.

        Raises:
            PlanError: no layer is left whose learned ranks save anything.
        """
        if self.learner is not None and isinstance(self.plan, Plan):
            return self.learner.freeze(self.plan)
        return self.plan

    def learned_shares(self) -> dict[str, float]:
        """Shares of the dense net's ``macs`` and ``params`` that learned ranks would keep; empty without a learner."""
        plan = self.plan
        if self.learner is None or not isinstance(plan, Plan):
            return {}
        idle = [layer for layer in plan.values() if not layer.saves()]  # these will be left dense
        macs = plan.macs_after + sum(layer.macs_before - layer.macs_after for layer in idle)
        params = plan.params_after + sum(layer.params_before - layer.params_after for layer in idle)
        return {"macs": macs / plan.macs_before, "params": params / plan.params_before}

    # -- state -----------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain numbers."""
        ranks = {name: list(layer.ranks) for name, layer in self.plan.items()} if self.learner else {}
        return {"ranks": ranks, "factors": {name: list(factors) for name, factors in self.factors.items()}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from another's state; ranks of layers that this plan lacks are left to its owner to refuse."""
        self.factors = {name: list(factors) for name, factors in state["factors"].items()}
        ranks = {name: tuple(r) for name, r in state["ranks"].items() if name in self.plan}
        if ranks and isinstance(self.plan, Plan):
            self.plan = with_ranks(self.plan, ranks)


def with_ranks(plan: Plan, ranks: Mapping[str, Sequence[int]]) -> Plan:
    """The plan with other ranks of some layers, which may then cost more than the dense ones.

    Raises:
        PlanError: ranks that do not fit.
    """
    changed = {name: replace(plan[name], ranks=tuple(r)).check(name) for name, r in ranks.items()}
    return replace(plan, layers={**plan.layers, **changed})


def _same_size(layer: LayerPlan, factors: Sequence[Tensor]) -> bool:
    return layer.format.params(layer.shape, layer.ranks, layer.modes) == sum(f.numel() for f in factors)
