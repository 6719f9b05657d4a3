"""Admm: state, pull, Z- and U-update and status of ADMM, for any training loop."""

import logging
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Unpack

import torch
from torch import Tensor, nn

from hodec.admm import updates
from hodec.admm.binding import find_root, planned_weights, trainable
from hodec.admm.options import WEAK_PULL, AdmmOptions, AdmmSettings
from hodec.admm.penalty import Moment, StepSize, make_penalty
from hodec.admm.processes import Processes
from hodec.admm.projection import Projection, RankLearner, State
from hodec.admm.stopping import Status, check_convergence, final_status
from hodec.admm.updates import AdmmState, Residuals
from hodec.calibration.input_covariance import InputCovariance
from hodec.conversion.batchnorm import reestimate_batchnorm
from hodec.conversion.swap import convert
from hodec.errors import CheckpointError, ConfigError, TrainingError, Use
from hodec.inference import Batch
from hodec.linalg.svd import check_finite
from hodec.plan.plan import Plan

log = logging.getLogger(__name__)

# Attributes of Admm that a checkpoint holds as they are.
PLAIN = ("primal", "dual", "updated_at", "steps", "epoch", "epoch_began")


class Admm:
    """Pulls the planned layers of a net towards low rank while a training loop trains it::

        admm = Admm(model, plan, optimizer, steps_per_epoch=len(loader))
        for epoch in range(epochs):
            for x, y in loader:
                optimizer.zero_grad()
                loss(model(x), y).backward()
                admm.before_step()
                optimizer.step()
                admm.after_step()
            admm.end_epoch()
        compressed = admm.convert(batches=loader)

    The pull is added to the gradient in ``before_step``, which equals adding rho/2 |W - Z + U|^2 to the loss. With
    optimizers other than SGD, ``rho="auto"`` and ``"balanced"`` move the weight itself in ``after_step`` instead, as
    AdamW does with weight decay: their normalized gradients give rho no fixed meaning.

    Args:
        model: the net that the plan was made from, or a module that holds it (a DDP wrapper, a LightningModule).
        plan: the layers, their methods and ranks.
        optimizer: the one that trains the planned weights.
        learner: chooses the ranks anew at each Z-update, see ``hodec.ranks.Learned``; ``final_plan`` has the last ones.
        covariances: of the layers' inputs, see ``hodec.collect_covariances``: Z is then the nearest by their outputs.
        steps_per_epoch: optimizer steps of one epoch. Without it the first epoch counts them; where the pull depends
            on them, ADMM begins after that epoch.
        root: the part of ``model`` that the plan was made from, where that is ambiguous.
        processes: those that train together, by default torch.distributed's.
        settings: the fields of ``hodec.admm.options.AdmmOptions``: ``rho``, ``pull``, ``update_every``, ``relax``,
            ``dual``, ``tolerance``, ``track_truncated``, ``distribute_projection``.

    Attributes:
        projection: has the ``plan`` with the ranks that Z has now, and the ``factors`` of iterative formats.
        states: layer -> its Z, U and rho; empty before ADMM begins.
        residuals: layer -> its residuals at the last Z-update; before the first, at the last report.
        primal, dual: overall relative residuals after each Z-update.
        status: RUNNING, CONVERGED, DIVERGED, or after ``finish`` EPOCHS_ENDED.
        pull: mean over the layers, as rho and the learning rate now give it; NaN while it is not known.
        steps, updated_at, epoch_began: optimizer steps done by now, at the last Z-update, before this epoch.
        epoch: number of the epoch, from 0.

    Raises:
        ConfigError: a setting out of range.
        PlanError: the plan is of another model, or its layers hang in several places.
        TrainingError: an optimizer that ADMM cannot work with, or that trains no planned layer.
    """

    def __init__(
        self,
        model: nn.Module,
        plan: Plan,
        optimizer: torch.optim.Optimizer,
        *,
        learner: RankLearner | None = None,
        covariances: Mapping[str, InputCovariance] | None = None,
        steps_per_epoch: int | None = None,
        root: str | None = None,
        processes: Processes | None = None,
        **settings: Unpack[AdmmSettings],
    ) -> None:
        if steps_per_epoch is not None and steps_per_epoch < 1:
            text = f"{{steps}}: {steps_per_epoch} given; allowed: a whole number from 1, or None"
            raise ConfigError(text, steps=Use("steps_per_epoch"))
        self.options, self.start_plan, self.steps_per_epoch = AdmmOptions(**settings), plan, steps_per_epoch
        self.penalty = make_penalty(self.options.rho, pull=self.options.pull, layers=list(plan))
        self._every, self._unit = self.options.interval
        self.projection = Projection(plan, learner, covariances, distribute=self.options.distribute_projection)
        self.processes = processes or Processes.current()
        self._bind(model, optimizer, root)
        self.states, self.residuals = dict[str, AdmmState](), dict[str, Residuals]()
        self.primal, self.dual = list[float](), list[float]()
        self.status, self.pull = Status.RUNNING, math.nan
        self.steps = self.epoch = self.updated_at = self.epoch_began = 0
        self._chosen_at: tuple[int, dict[str, float]] = (-1, {})  # epoch and learning rates that rho was chosen at
        self._targets: dict[str, Tensor] = {}  # Z - U
        self._warned: set[str] = set()

    def _bind(self, model: nn.Module, optimizer: torch.optim.Optimizer, root: str | None) -> None:
        prefix = find_root(model, self.start_plan, root)
        self.model, self.optimizer = model.get_submodule(prefix.rstrip(".")), optimizer
        self.weights, frozen = trainable(planned_weights(model, self.start_plan, prefix), optimizer)
        if frozen:
            log.warning("frozen layers take no part in ADMM: %s", ", ".join(frozen))
        self._groups = {
            name: next(i for i, g in enumerate(optimizer.param_groups) if any(p is w for p in g["params"]))
            for name, w in self.weights.items()
        }
        self._is_sgd = isinstance(optimizer, torch.optim.SGD)  # how far rho pulls, others' steps do not tell
        self._decoupled = self.penalty.follows_pull and not self._is_sgd

    # -- hooks of the loop ---------------------------------------------------------------------------------------

    def start(self) -> None:
        """Set Z = project(W) and U = 0 where there is no state yet; ``before_step`` does it too.

        Raises:
            TrainingError: a weight is NaN or Inf.
        """
        if self.states:
            return
        for name, w in self.weights.items():
            check_finite(w.detach(), f"layer {name}")
        self.states = updates.start(self.weights, dict.fromkeys(self.weights, 0.0), self._project)
        self.updated_at = self.steps
        self._choose_rho()
        self._warn_of_short_intervals()

    def before_step(self) -> None:
        """Add the pull to the gradients: call it when these are final (unscaled, accumulated, reduced), not clipped."""
        if not self.states and self.penalty.follows_pull and math.isnan(self._interval_steps()):
            text = (
                "without steps_per_epoch, rho is not known yet: this epoch counts its steps and is trained without ADMM"
            )
            self._warn("steps", text)
            return
        self.start()
        if self._chosen_at != (self.epoch, self._learning_rates()):  # a schedule moved: the pull per step is to stay
            self._choose_rho()
        if self._decoupled:
            return
        grads = {name: w.grad for name, w in self.weights.items() if w.grad is not None}
        if len(grads) < len(self.weights):
            idle = ", ".join(name for name in self.weights if name not in grads)
            self._warn("gradient", f"the loss does not reach {idle}: without a gradient ADMM cannot pull them")
        if grads:
            offsets = self._offsets(list(grads), {name: self.states[name].rho for name in grads})
            torch._foreach_add_(tuple(grads.values()), tuple(offsets))

    def after_step(self, steps: int = 1) -> None:
        """Count ``steps`` optimizer steps; update Z and U where that is due in steps.

        Raises:
            TrainingError: a weight is NaN or Inf when an update is due.
        """
        self.steps += steps
        if not self.states:
            return
        if self._decoupled:
            names, rates = list(self.weights), self._chosen_at[1]
            ratios = {name: min(1.0, rates[name] * self.states[name].rho) for name in names}
            with torch.no_grad():
                torch._foreach_sub_([self.weights[name].data for name in names], self._offsets(names, ratios))
        if self._unit == "step" and self.steps - self.updated_at >= self._every:
            self.update()

    def end_epoch(self, evaluate: Callable[[], float | None] | None = None) -> dict[str, float]:
        """Update Z and U where that is due in epochs; returns ``report(evaluate)``.

        Raises:
            TrainingError: no optimizer step since the last call, or a weight that is NaN or Inf.
        """
        counted = self.steps - self.epoch_began
        if not counted:
            raise TrainingError("an epoch ends without a step: call before_step and after_step around optimizer.step()")
        self.steps_per_epoch = self.steps_per_epoch or counted
        if counted != self.steps_per_epoch:
            given = f"steps_per_epoch={self.steps_per_epoch}, by which rho is chosen"
            self._warn(
                "length", f"an epoch had {counted} optimizer steps, not {given}: the pull is not the one asked for"
            )
        if self.states:
            self.update_at_epoch_end()
        self.start()
        report = self.report(evaluate)
        self.epoch, self.epoch_began = self.epoch + 1, self.steps
        return report

    def update_at_epoch_end(self) -> None:
        """Update Z and U if this epoch's end is one where that is due."""
        if self._unit == "epoch" and (self.epoch + 1) % self._every == 0:
            self.update()

    def finish(self) -> Status:
        """Settle the status once training is over."""
        self.status = final_status(self.status, self.primal)
        last = f"{self.primal[-1]:.4g}" if self.primal else "not measured: no Z-update took place"
        log.info("ADMM %s; norm(W - Z) / norm(W) = %s", self.status.value, last)
        return self.status

    # -- the three updates ---------------------------------------------------------------------------------------

    def _offsets(self, names: list[str], factors: Mapping[str, float]) -> list[Tensor]:
        """factor * (W - Z + U) of each layer, in the weight's type."""
        weights = [updates.full_precision(self.weights[name]) for name in names]
        offsets = torch._foreach_sub(weights, [self._targets[name] for name in names])
        torch._foreach_mul_(offsets, [factors[name] for name in names])
        return [offset.to(self.weights[name].dtype) for name, offset in zip(names, offsets, strict=True)]

    def update(self) -> None:
        """Update Z and U of all layers, then rho and the status.

        Raises:
            TrainingError: a weight is NaN or Inf.
        """
        for name, w in self.weights.items():
            check_finite(w.detach(), f"layer {name}, epoch {self.epoch}, step {self.steps}")
        relax, dual = self.options.relax, self.options.dual
        self.states, self.residuals = updates.step(self.weights, self.states, self._project, relax=relax, dual=dual)
        self.updated_at = self.steps
        overall = updates.total(self.residuals)
        self.primal, self.dual = [*self.primal, overall.primal], [*self.dual, overall.dual]
        self._choose_rho(self.residuals)
        self.status = check_convergence(self.primal, self.dual, tolerance=self.options.tolerance)
        if self.status is Status.DIVERGED:
            rise = f"norm(W - Z) / norm(W) rose from {self.primal[0]:.3g} to {self.primal[-1]:.3g}"
            way_out = "raise pull (rho=auto) or rho, or update less often"
            self._warn("diverged", f"ADMM diverges: {rise}. U winds up because W does not follow: {way_out}")

    def _project(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        rho = {name: self.states[name].rho if self.states else 0.0 for name in tensors}
        return self.projection.update(tensors, rho, self.processes)

    # -- rho -----------------------------------------------------------------------------------------------------

    def _learning_rates(self) -> dict[str, float]:
        rates = [float(group["lr"]) for group in self.optimizer.param_groups]
        return {name: rates[number] for name, number in self._groups.items()}

    def _interval_steps(self) -> float:
        """Optimizer steps between two Z-updates; NaN while they are not known."""
        return self._every * (1 if self._unit == "step" else self.steps_per_epoch or math.nan)

    def _choose_rho(self, residuals: Mapping[str, Residuals] | None = None) -> None:
        """Choose rho of all layers; ``residuals`` are those of the Z-update just done."""
        pulls, steps, rates = [], self._interval_steps(), self._learning_rates()
        for name, state in self.states.items():
            momentum = float(self.optimizer.param_groups[self._groups[name]].get("momentum", 0.0))
            size = StepSize(rates[name], momentum, steps, self._decoupled)
            mine = residuals[name] if residuals else None
            rho = self.penalty.rho(Moment(name, self.epoch, size, state.rho, mine))
            self.states[name] = updates.with_rho(state, rho)
            pulls.append(size.pull(rho))
        self._chosen_at = (self.epoch, rates)
        self.pull = sum(pulls) / len(pulls)
        self._targets = {name: s.z - s.u for name, s in self.states.items()}
        if self._is_sgd and not self.penalty.follows_pull and self.pull < WEAK_PULL:
            weak = f"rho pulls W only {self.pull:.2f} of its way to Z between two updates"
            self._warn("pull", f"{weak}; below {WEAK_PULL} U winds up instead. Use rho=auto, or a larger rho")

    def _warn_of_short_intervals(self) -> None:
        momentum = max(float(group.get("momentum", 0.0)) for group in self.optimizer.param_groups)
        steps, memory = self._interval_steps(), round(2 / (1 - momentum), 3)
        if self._is_sgd and steps < memory:
            late = f"momentum {momentum:g} lets W answer over about {memory:.0f}: Z chases a W that is still on its way"
            remedy = f"Update less often: update_every={math.ceil(memory)}steps"
            self._warn("interval", f"Z is updated every {steps:g} optimizer steps, but {late}. {remedy}")

    def _warn(self, kind: str, message: str) -> None:
        if kind not in self._warned:
            self._warned.add(kind)
            log.warning("%s", message)

    # -- results -------------------------------------------------------------------------------------------------

    def report(self, evaluate: Callable[[], float | None] | None = None) -> dict[str, float]:
        """How ADMM stands now.

        Args:
            evaluate: gives the accuracy of the net as it is, or None. It is called while the planned weights are
                truncated, unless ``track_truncated`` is False.

        Returns:
            ``rho`` and ``pull``, means over the layers; ``primal_residual``, ``dual_residual`` and ``truncation_error``
            norm(W - project(W)) / norm(W), of all layers together; with a learner ``planned_macs`` and
            ``planned_params``, the shares of the dense net's cost that its ranks keep; ``truncated_accuracy``.
        """
        full = {name: updates.full_precision(w) for name, w in self.weights.items()}
        if not self.primal:
            self.residuals = {n: updates.measure(w, self.states[n], self.states[n].z) for n, w in full.items()}
        overall, projected = updates.total(self.residuals), self.projection.truncate(full)
        missed = sum(float((full[n] - projected[n]).square().sum()) for n in full)
        size = sum(float(w.square().sum()) for w in full.values())
        report = {
            "rho": sum(s.rho for s in self.states.values()) / len(self.states),
            "pull": self.pull,
            "primal_residual": overall.primal,
            "dual_residual": overall.dual,
            "truncation_error": (missed / size) ** 0.5 if size else 0.0,
        }
        report |= {f"planned_{key}": ratio for key, ratio in self.projection.learned_cost().items()}
        if evaluate is not None and self.options.track_truncated:
            with updates.weights_replaced(self.weights, projected):
                accuracy = evaluate()
            if accuracy is not None:
                report["truncated_accuracy"] = float(accuracy)
        return report

    def layer_report(self) -> dict[str, dict[str, float]]:
        """The ``rho``, ``primal_residual`` and ``dual_residual`` of each layer at the time of the last ``report``."""
        return {
            name: {"rho": self.states[name].rho, "primal_residual": r.primal, "dual_residual": r.dual}
            for name, r in self.residuals.items()
        }

    def final_plan(self) -> Plan:
        """The plan to convert by: where ranks were learned, those of the last Z.

        Raises:
            PlanError: no layer is left whose learned ranks save anything.
        """
        return self.projection.final_plan()

    def convert(self, batches: Iterable[Batch] | None = None) -> nn.Module:
        """A copy of the net with factorized layers: by the final plan, from the factors and covariances of ADMM.

        Args:
            batches: training data to re-estimate BatchNorm's statistics from, see ``hodec.reestimate_batchnorm``.

        Raises:
            PlanError: no layer is left whose learned ranks save anything.
            ConvertError, TrainingError: as ``hodec.convert``.
        """
        plan = self.final_plan()
        covariances = {name: one for name, one in self.projection.covariances.items() if name in plan}
        compressed = convert(self.model, plan, covariances=covariances, init_factors=self.projection.factors)
        if batches is not None:
            reestimate_batchnorm(compressed, batches)
        return compressed

    # -- state: plain numbers and tensors only, so that checkpoints load with weights_only=True ---------------------

    def state_dict(self) -> State:
        """All that ADMM goes on from, beside the weights and the optimizer's state."""
        return {
            "plan": self._identity(),
            "projection": self.projection.state_dict(),
            "layers": {name: {"z": s.z, "u": s.u, "rho": s.rho} for name, s in self.states.items()},
            "residuals": {name: [r.gap, r.weight, r.move, r.dual_scale] for name, r in self.residuals.items()},
            "verdict": self.status.value,
            "steps_per_epoch": self.steps_per_epoch,
            **{key: getattr(self, key) for key in PLAIN},
        }

    def load_state_dict(self, state: State) -> None:
        """Go on from a state; its tensors are moved to the devices of the weights.

        Raises:
            CheckpointError: it is of another plan.
        """
        layers, mine, theirs = state["layers"], self._identity(), state["plan"]
        lacking = {name for name in self.weights if layers and name not in layers}
        if differ := [name for name in {**mine, **theirs} if mine.get(name) != theirs.get(name) or name in lacking]:
            first = differ[0]
            raise CheckpointError(
                f"the checkpoint's ADMM state is of another plan: {len(differ)} layers differ, first {first} "
                f"(checkpoint: {theirs.get(first, 'without it')}; plan: {mine.get(first, 'without it')}). "
                "Resume with the plan it was written with, or start without the checkpoint"
            )
        self.projection.load_state_dict(state["projection"])
        self.states = {
            name: AdmmState(one["z"].to(self.weights[name].device), one["u"].to(self.weights[name].device), one["rho"])
            for name, one in layers.items()
            if name in self.weights
        }
        self.residuals = {name: Residuals(*row) for name, row in state["residuals"].items()}
        self.status, self._chosen_at = Status(state["verdict"]), (-1, {})
        self.steps_per_epoch = self.steps_per_epoch or state.get("steps_per_epoch")
        for key in PLAIN:  # a checkpoint of hodec 0.1.0 lacks those that Lightning counts itself
            setattr(self, key, state.get(key, getattr(self, key)))

    def _identity(self) -> dict[str, str]:
        """What Z depends on, per layer and in words; learned ranks are state instead."""
        return {
            name: f"{p.method} {p.layer_type} {list(p.shape)} modes {list(p.modes.inputs)} x {list(p.modes.outputs)} "
            f"ranks {'learned' if self.projection.learner else list(p.ranks)}"
            for name, p in self.start_plan.items()
        }
