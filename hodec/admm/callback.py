"""AdmmCallback: connects the ADMM updates to Lightning's hooks, in anybody's LightningModule."""

import logging
import math
from collections.abc import Mapping
from typing import Any

import torch
from pytorch_lightning import Callback, LightningModule, Trainer
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer

from hodec.admm.binding import find_root, planned_weights, refuse_impossible, trainable
from hodec.admm.interval import Interval
from hodec.admm.penalty import WEAK_PULL, StepSize, make_penalty
from hodec.admm.processes import Processes
from hodec.admm.projection import Projection, RankLearner
from hodec.admm.stopping import Status, check_convergence, final
from hodec.admm.truncated import Evaluate, validation_accuracy, weights_replaced
from hodec.admm.updates import AdmmState, Project, Residuals, full_precision, measure, start, step, total, with_rho
from hodec.calibration.input_covariance import InputCovariance
from hodec.errors import CheckpointError, ConfigError, TrainingError
from hodec.linalg.svd import check_finite
from hodec.plan.layer import LayerPlan

log = logging.getLogger(__name__)


class AdmmCallback(Callback):
    """Pulls the planned layers towards low rank while they train.

    Args:
        plan: the layers, their methods and ranks.
        rho: ``auto`` (solved from ``pull``), ``balanced``, a number (the paper's constant), {epoch: number}, or
            {layer glob: number}.
        pull: share of the way to Z - U that W covers between two Z-updates, 0..1; for ``auto`` and ``balanced``.
        update_every: epochs (``1``) or optimizer steps (``"50steps"``) between Z-updates.
        relax: over-relaxation, 1..1.9.
        dual: False keeps U at 0: the control without ADMM's memory, a quadratic penalty.
        tolerance: relative primal and dual residual at which the run has converged.
        stop_when_converged: end the fit then (``min_epochs`` still holds).
        track_truncated: each epoch, the accuracy that hard truncation would leave (costs one validation pass).
        evaluate: module -> accuracy, for modules whose validation batches are not (images, labels).
        learner: chooses the ranks anew at each Z-update, see ``hodec.ranks.Learned``; ``final_plan`` has the last ones.
        covariances: of the layers' inputs, see ``hodec.collect_covariances``: Z is then the nearest by the layer's
            outputs.
        spread: of several processes that train together, each projects its share of the layers.
        root: the part of the LightningModule that the plan was made from, where that is ambiguous.

    The pull is added to the gradient in ``on_before_optimizer_step`` (after unscaling and accumulation, before
    clipping), which equals adding rho/2 |W - Z + U|^2 to the loss. With optimizers other than SGD, ``auto`` and
    ``balanced`` move the weight itself after the step instead, as AdamW does with weight decay: their normalized
    gradients give rho no fixed meaning.

    Raises (in ``on_fit_start``): PlanError, TrainingError: what cannot work, with the way out.
    """

    def __init__(  # noqa: PLR0913
        self,
        plan: Mapping[str, LayerPlan],
        rho: Any = "auto",
        *,
        pull: float = 0.8,
        update_every: int | str = 1,
        relax: float = 1.0,
        dual: bool = True,
        tolerance: float = 1e-3,
        stop_when_converged: bool = True,
        track_truncated: bool = True,
        evaluate: Evaluate | None = None,
        learner: RankLearner | None = None,
        covariances: Mapping[str, InputCovariance] | None = None,
        spread: bool = True,
        root: str | None = None,
    ) -> None:
        if not 1 <= relax < 2:
            raise ConfigError(f"admm.relax={relax} must lie in 1..1.9")
        self.start_plan, self.learner, self.covariances, self.spread = plan, learner, covariances, spread
        self.penalty = make_penalty(rho, pull=pull, layers=list(plan))
        self.interval = Interval.parse(update_every)
        self.relax, self.uses_dual = relax, dual
        self.tolerance, self.stop_when_converged = tolerance, stop_when_converged
        self.track_truncated, self.evaluate, self.root = track_truncated, evaluate, root
        self.latest: dict[str, Any] = {}  # what the last epoch reported
        self._begin_anew()
        self._restored_plan: dict[str, Any] | None = None
        self._restored_projection: dict[str, Any] = {}
        self._weights: dict[str, Parameter] = {}
        self._groups: dict[str, int] = {}  # number of the optimizer's group that each weight is in
        self._targets: dict[str, Tensor] = {}
        self._rates: dict[str, float] = {}  # learning rates that rho was chosen at
        self._pull = 0.0
        self._decoupled = False
        self._is_sgd = True
        self._stepped_at = 0
        self._warned: set[str] = set()

    def _begin_anew(self) -> None:
        self.states: dict[str, AdmmState] = {}
        self.residuals: dict[str, Residuals] = {}
        self.primal: list[float] = []
        self.dual: list[float] = []
        self.verdict = Status.RUNNING
        self.updated_at = 0
        self.projection = Projection(self.start_plan, self.learner, self.covariances, spread=self.spread)

    @property
    def plan(self) -> Mapping[str, LayerPlan]:
        """The layers, with the ranks that Z has now."""
        return self.projection.plan

    @property
    def factors(self) -> dict[str, list[Tensor]]:
        """Factors of Z where a format is found by iteration: ``starts`` of ``hodec.convert``."""
        return self.projection.factors

    def final_plan(self) -> Mapping[str, LayerPlan]:
        """The plan to convert by: where ranks were learned, those of the last Z.

        Raises:
            PlanError: no layer is left whose learned ranks save anything.
        """
        return self.projection.final_plan()

    # -- binding -------------------------------------------------------------------------------------------------

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # Lightning has restored our state by now, still on the CPU.
        if self._restored_plan is None and trainer.global_step == 0:
            self._begin_anew()  # an earlier fit of this callback was of other weights
        optimizer = refuse_impossible(type(trainer.strategy).__name__, trainer.optimizers, str(trainer.precision))
        root = find_root(pl_module, self.plan, self.root)
        self._weights, idle = trainable(planned_weights(pl_module, self.plan, root), optimizer)
        if idle:
            log.warning("frozen layers take no part in ADMM: %s", ", ".join(idle))
        self._groups = {
            name: next(i for i, g in enumerate(optimizer.param_groups) if any(p is w for p in g["params"]))
            for name, w in self._weights.items()
        }
        self._is_sgd = isinstance(optimizer, torch.optim.SGD)  # what rho pulls, others' steps do not tell
        self._decoupled = self.penalty.follows_pull and not self._is_sgd

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.states:
            self._check_restored()
            self.projection.load_state_dict(self._restored_projection)
            self.states = {name: self.states[name].to(w.device) for name, w in self._weights.items()}
            if self.verdict is Status.CONVERGED and self.stop_when_converged:
                trainer.should_stop = True  # it was written just before the fit ended
        else:
            for name, w in self._weights.items():
                check_finite(w.detach(), f"layer {name}")
            self.states = start(self._weights, dict.fromkeys(self._weights, 0.0), self._project(trainer))
            self.updated_at = trainer.global_step
        self._stepped_at = trainer.global_step
        self._warn_of_short_intervals(trainer)

    def _warn_of_short_intervals(self, trainer: Trainer) -> None:
        momentum = max(float(group.get("momentum", 0.0)) for group in trainer.optimizers[0].param_groups)
        steps, memory = self._steps(trainer), round(2 / (1 - momentum), 3)
        if self._is_sgd and steps < memory:
            self._warn(
                "interval",
                "Z is updated every %g optimizer steps, but momentum %g lets W answer over about %.0f: Z chases "
                "a W that is still on its way. Update less often: admm.update_every=%dsteps",
                steps,
                momentum,
                memory,
                math.ceil(memory),
            )

    def _check_restored(self) -> None:
        mine = _identity(self.start_plan, ranks=self.learner is None)
        theirs = mine if self._restored_plan is None else self._restored_plan
        self._restored_plan = None
        differ = [
            name
            for name in {**mine, **theirs}
            if mine.get(name) != theirs.get(name) or (name in self._weights and name not in self.states)
        ]
        if differ:
            first = differ[0]
            raise CheckpointError(
                f"the checkpoint's ADMM state is of another plan: {len(differ)} layers differ, first {first} "
                f"(checkpoint: {theirs.get(first, 'without it')}; plan: {mine.get(first, 'without it')}). "
                "Resume with the plan it was written with, or start without ckpt_path"
            )

    # -- the three updates ---------------------------------------------------------------------------------------

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._set_rho(trainer, residuals=None)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        # Gradients are final here: unscaled, accumulated, reduced over processes, not yet clipped.
        if self._learning_rates(trainer) != self._rates:  # a schedule moved: the pull per step is to stay
            self._set_rho(trainer, residuals=None)
        if self._decoupled:
            return
        grads = {name: w.grad for name, w in self._weights.items() if w.grad is not None}
        if len(grads) < len(self._weights):
            idle = ", ".join(name for name in self._weights if name not in grads)
            self._warn("gradient", "the loss does not reach %s: without a gradient ADMM cannot pull them", idle)
        if grads:
            offsets = self._offsets(list(grads), {name: self.states[name].rho for name in grads})
            torch._foreach_add_(tuple(grads.values()), tuple(offsets))

    def _offsets(self, names: list[str], factors: Mapping[str, float]) -> list[Tensor]:
        """factor * (W - Z + U) of each layer, in the weight's type."""
        weights = [full_precision(self._weights[name]) for name in names]
        offsets = torch._foreach_sub(weights, [self._targets[name] for name in names])
        torch._foreach_mul_(offsets, [factors[name] for name in names])
        return [offset.to(self._weights[name].dtype) for name, offset in zip(names, offsets, strict=True)]

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._decoupled and trainer.global_step > self._stepped_at:
            names = list(self._weights)
            shares = {name: min(1.0, self._rates[name] * self.states[name].rho) for name in names}
            with torch.no_grad():
                torch._foreach_sub_([self._weights[name].data for name in names], self._offsets(names, shares))
        self._stepped_at = trainer.global_step
        if self._is_due(trainer):
            self._update(trainer)

    def _is_due(self, trainer: Trainer) -> bool:
        if self.interval.unit == "step":
            return trainer.global_step - self.updated_at >= self.interval.count
        return trainer.is_last_batch and (trainer.current_epoch + 1) % self.interval.count == 0

    def _update(self, trainer: Trainer) -> None:
        for name, w in self._weights.items():
            check_finite(w.detach(), f"layer {name}, epoch {trainer.current_epoch}, step {trainer.global_step}")
        project = self._project(trainer)
        self.states, self.residuals = step(self._weights, self.states, project, relax=self.relax, dual=self.uses_dual)
        self.updated_at = trainer.global_step
        overall = total(self.residuals)
        self.primal.append(overall.primal)
        self.dual.append(overall.dual)
        self._set_rho(trainer, residuals=self.residuals)
        self.verdict = check_convergence(self.primal, self.dual, tolerance=self.tolerance)
        if self.verdict is Status.CONVERGED and self.stop_when_converged:
            trainer.should_stop = True
        if self.verdict is Status.DIVERGED:
            self._warn(
                "diverged",
                "ADMM diverges: norm(W - Z) / norm(W) rose from %.3g to %.3g. U winds up because W does not follow: "
                "raise admm.pull (rho=auto) or admm.rho, or update less often",
                self.primal[0],
                self.primal[-1],
            )

    def _project(self, trainer: Trainer) -> Project:
        rho = {name: state.rho for name, state in self.states.items()}

        def project(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
            return self.projection.update(tensors, rho or dict.fromkeys(tensors, 0.0), Processes.of(trainer))

        return project

    # -- rho -----------------------------------------------------------------------------------------------------

    def _learning_rates(self, trainer: Trainer) -> dict[str, float]:
        rates = [float(group["lr"]) for group in trainer.optimizers[0].param_groups]
        return {name: rates[number] for name, number in self._groups.items()}

    def _steps(self, trainer: Trainer) -> float:
        """Optimizer steps between two Z-updates."""
        per_epoch = trainer.num_training_batches / trainer.accumulate_grad_batches
        if math.isfinite(per_epoch):
            per_epoch = math.ceil(per_epoch)
        elif self.interval.unit == "epoch":
            raise TrainingError(
                "the training data does not say how many batches an epoch has: give the interval in steps, e.g. "
                "AdmmCallback(plan, update_every='100steps')"
            )
        return self.interval.steps(per_epoch)

    def _set_rho(self, trainer: Trainer, *, residuals: Mapping[str, Residuals] | None) -> None:
        pulls, steps, self._rates = [], self._steps(trainer), self._learning_rates(trainer)
        for name, state in self.states.items():
            group = trainer.optimizers[0].param_groups[self._groups[name]]
            size = StepSize(self._rates[name], float(group.get("momentum", 0.0)), steps, self._decoupled)
            mine = residuals[name] if residuals else None
            rho = self.penalty.rho(name, trainer.current_epoch, size, state.rho or None, mine)
            self.states[name] = with_rho(state, rho)
            pulls.append(size.pull(rho))
        self._pull = sum(pulls) / len(pulls)
        self._targets = {name: s.z - s.u for name, s in self.states.items()}
        if self._is_sgd and not self.penalty.follows_pull and self._pull < WEAK_PULL:
            self._warn(
                "pull",
                "admm.rho pulls W only %.2f of its way to Z between two updates; below %.1f U winds up instead. "
                "Use admm.rho=auto, or a larger rho",
                self._pull,
                WEAK_PULL,
            )

    def _warn(self, kind: str, message: str, *values: object) -> None:
        if kind not in self._warned:
            self._warned.add(kind)
            log.warning(message, *values)

    # -- reporting -----------------------------------------------------------------------------------------------

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.latest = self._report(trainer, pl_module)
        # Equal in all processes; said so, or Lightning would warn that they might not be.
        pl_module.log_dict({k: v for k, v in self.latest.items() if isinstance(v, float)}, sync_dist=True)
        per_layer = {
            f"admm/{key}/{name}": value
            for name, row in self.latest["admm/layers"].items()
            for key, value in row.items()
        }
        for logger in trainer.loggers:
            logger.log_metrics(per_layer, step=trainer.global_step)

    def _report(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
        full = {name: full_precision(w) for name, w in self._weights.items()}
        # Before the first update, how far W is from the Z it started with.
        residuals = self.residuals or {n: measure(w, self.states[n], self.states[n].z) for n, w in full.items()}
        overall = total(residuals)
        projected = self.projection.truncate(full)
        missed = sum(float((full[n] - projected[n]).square().sum()) for n in full)
        size = sum(float(w.square().sum()) for w in full.values())
        report: dict[str, Any] = {
            "admm/rho": sum(s.rho for s in self.states.values()) / len(self.states),
            "admm/pull": self._pull,
            "admm/primal_residual": overall.primal,
            "admm/dual_residual": overall.dual,
            "admm/truncation_error": (missed / size) ** 0.5 if size else 0.0,
        }
        report |= {f"admm/planned_{key}": share for key, share in self.projection.learned_shares().items()}
        if self.track_truncated:
            with weights_replaced(self._weights, projected):
                accuracy = self.evaluate(pl_module) if self.evaluate else validation_accuracy(trainer, pl_module)
            if accuracy is not None:
                report["admm/truncated_accuracy"] = float(accuracy)
        report["admm/layers"] = {
            name: {"rho": self.states[name].rho, "primal_residual": r.primal, "dual_residual": r.dual}
            for name, r in residuals.items()
        }
        return report

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.verdict = final(self.verdict, self.primal)
        last = f"{self.primal[-1]:.4g}" if self.primal else "not measured: no Z-update took place"
        log.info("ADMM %s; norm(W - Z) / norm(W) = %s", self.verdict.value, last)

    # -- state: plain numbers and tensors only, so that checkpoints load with weights_only=True ---------------------

    def state_dict(self) -> dict[str, Any]:
        return {
            "plan": _identity(self.start_plan, ranks=self.learner is None),
            "projection": self.projection.state_dict(),
            "layers": {name: {"z": s.z, "u": s.u, "rho": s.rho} for name, s in self.states.items()},
            "residuals": {name: [r.gap, r.weight, r.move, r.dual_scale] for name, r in self.residuals.items()},
            "primal": list(self.primal),
            "dual": list(self.dual),
            "verdict": self.verdict.value,
            "updated_at": self.updated_at,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._restored_plan = state_dict["plan"]
        self._restored_projection = state_dict["projection"]
        self.states = {name: AdmmState(s["z"], s["u"], s["rho"]) for name, s in state_dict["layers"].items()}
        self.residuals = {name: Residuals(*row) for name, row in state_dict["residuals"].items()}
        self.primal, self.dual = list(state_dict["primal"]), list(state_dict["dual"])
        self.verdict = Status(state_dict["verdict"])
        self.updated_at = state_dict["updated_at"]


def _identity(plan: Mapping[str, LayerPlan], *, ranks: bool) -> dict[str, str]:
    """What Z depends on, per layer and in words, for the checkpoint; learned ranks are state instead."""
    return {
        name: f"{p.method} {p.layer_type} {list(p.shape)} modes {list(p.modes.inputs)} x {list(p.modes.outputs)} ranks "
        + (str(list(p.ranks)) if ranks else "learned")
        for name, p in plan.items()
    }
