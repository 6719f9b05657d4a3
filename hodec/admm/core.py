"""Admm: state, pull, Z- and U-update and status of ADMM, for any training loop."""

import logging
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Unpack

import torch
from torch import Tensor, nn

from hodec.admm import updates
from hodec.admm.binding import bind, find_root, planned_weights, signature_of, unwrapped
from hodec.admm.options import WEAK_PULL, AdmmOptions, AdmmSettings
from hodec.admm.penalty import Moment, make_penalty
from hodec.admm.processes import Processes
from hodec.admm.projection import Projection, RankLearner, State
from hodec.admm.pull import CLIPPED, Pull, haste, weakness
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
PLAIN = ("primal", "dual", "updated_at", "steps", "epoch", "epoch_began", "pulls")


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
        optimizer: the one that trains the planned weights; of several (GAN, Muon beside AdamW) those that do so serve.
        learner: chooses the ranks anew at each Z-update, see ``hodec.ranks.Learned``; ``final_plan`` has the last ones.
        covariances: of the layers' inputs, see ``hodec.collect_covariances``: Z is then the nearest by their outputs.
        steps_per_epoch: optimizer steps of one epoch. Without it the first epoch counts them; where the pull depends
            on them, ADMM begins after that epoch.
        root: the part of ``model`` that the plan was made from, where that is ambiguous.
        processes: those that train together, by default torch.distributed's.
        clipped: gradients are clipped after ``before_step``. ``rho="auto"`` then moves the weights themselves, which
            it does anyhow once it sees that.
        settings: the fields of ``hodec.admm.options.AdmmOptions``: ``rho``, ``pull``, ``update_every``, ``relax``,
            ``dual``, ``tolerance``, ``track_truncated``, ``distribute_projection``.

    Attributes:
        projection: has the ``plan`` with the ranks that Z has now, and the ``factors`` of iterative formats.
        states: layer -> its Z, U and rho; empty before ADMM begins.
        residuals: layer -> its residuals at the last Z-update; before the first, at the last report.
        primal, dual: overall relative residuals after each Z-update.
        status: RUNNING, CONVERGED, DIVERGED, or after ``finish`` EPOCHS_ENDED.
        pull: mean over the layers, as rho and the learning rate now give it; NaN while it is not known.
        pulls: layer -> the pull that was measured between the last two Z-updates.
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
        optimizer: torch.optim.Optimizer | Sequence[torch.optim.Optimizer],
        *,
        learner: RankLearner | None = None,
        covariances: Mapping[str, InputCovariance] | None = None,
        steps_per_epoch: int | None = None,
        root: str | None = None,
        processes: Processes | None = None,
        clipped: bool = False,
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
        prefix = find_root(model, plan, root)
        self.model, self.optimizer, self._clipped = model.get_submodule(prefix.rstrip(".")), optimizer, clipped
        self._planned, self._optimizers = planned_weights(model, plan, prefix), unwrapped(optimizer)
        self.states, self.residuals = dict[str, AdmmState](), dict[str, Residuals]()
        self.primal, self.dual, self.pulls = list[float](), list[float](), dict[str, float]()
        self.status, self.pull = Status.RUNNING, math.nan
        self.steps = self.epoch = self.updated_at = self.epoch_began = 0
        self._chosen_at: tuple[int, dict[str, float]] = (-1, {})  # epoch and learning rates that rho was chosen at
        self._targets: dict[str, Tensor] = {}  # Z - U
        self._parked: dict[str, AdmmState] = {}  # states of layers that nothing trains now
        self._idle = ""  # layers that the loss did not reach at the last step
        self._warned: set[str] = set()
        self._bind()

    def _bind(self, before: Mapping[str, nn.Parameter] | None = None) -> None:
        """Find what trains the planned weights now; ``before`` are those of the last time, None at first."""
        binding = bind(self._planned, self._optimizers)
        if len(binding.owners) > 1 and not self.penalty.follows_pull:
            text = f"{len(binding.owners)} optimizers train the planned layers"
            raise TrainingError(f"{text}: use {{auto}}, which moves the weights itself", auto=Use("admm.rho", "auto"))
        joined = [name for name in binding.weights if before is not None and name not in before]
        self._binding, self.weights = binding, binding.weights
        self._pull = Pull(binding, movable=self.penalty.follows_pull, clipped=self._clipped)
        if joined:
            log.info("epoch %d: ADMM takes in %s, which training changes now", self.epoch, ", ".join(joined))
        elif binding.frozen:
            log.warning("frozen layers take no part in ADMM: %s", ", ".join(binding.frozen))
        if self.states or self._parked:
            self._take_in()

    def _take_in(self) -> None:
        """States of the layers that are trained now; those that were trained before go on where they were."""
        known = self._parked | self.states
        new = {name: updates.full_precision(w) for name, w in self.weights.items() if name not in known}
        z = self.processes.broadcast(self.projection.truncate(new))
        known |= {n: AdmmState(z[n].to(w.device), torch.zeros_like(w), 0.0) for n, w in new.items()}
        self.states = {name: known[name] for name in self.weights}
        self._parked = {name: state for name, state in known.items() if name not in self.weights}
        self.residuals = {name: one for name, one in self.residuals.items() if name in self.weights}
        self._chosen_at = (-1, self._chosen_at[1])

    # -- hooks of the loop ---------------------------------------------------------------------------------------

    def start(self) -> None:
        """Set Z = project(W) and U = 0 where there is no state yet; ``before_step`` does it too.

        Raises:
            TrainingError: a weight is NaN or Inf.
        """
        if self.states or not self.weights or (self.penalty.follows_pull and math.isnan(self._interval_steps())):
            return
        for name, w in self.weights.items():
            check_finite(w.detach(), f"layer {name}")
        self.states = updates.start(self.weights, dict.fromkeys(self.weights, 0.0), self._project)
        self.updated_at = self.steps
        self._choose_rho()
        if words := haste(self._pull, self._interval_steps()):
            self._warn("interval", words)

    def before_step(self, optimizer: torch.optim.Optimizer | None = None) -> None:
        """Add the pull to the gradients: call it when these are final (unscaled, accumulated, reduced), not clipped.

        Args:
            optimizer: the one that is about to step, where there are several; nothing is done if it has no planned
                weight.
        """
        if self._binding.signature != signature_of(self._planned, self._optimizers):
            self._pull.release()
            self._bind(self.weights)
        if not self.weights:
            self._warn("frozen", "all planned layers are frozen: ADMM waits until one is trained")
            return
        if optimizer is not None and not any(unwrapped(optimizer)[0] is owner for owner in self._binding.owners):
            return
        self.start()
        if not self.states:
            text = "rho depends on the optimizer steps of an epoch, not known without steps_per_epoch"
            self._warn("steps", f"{text}: this epoch counts its steps and is trained without ADMM")
            return
        if self._chosen_at != (self.epoch, self._pull.rates()):  # a schedule moved: the pull per step is to stay
            self._choose_rho()
        if not self._pull.decoupled:
            idle = self._pull.add(self._targets, {name: state.rho for name, state in self.states.items()})
            self._idle = ", ".join(idle)

    def after_step(self) -> None:
        """Take note of the optimizer's steps since the last call; update Z and U where that is due in steps.

        A step that a loss scaler skipped, or that had no gradient at all, is none.

        Raises:
            TrainingError: a weight is NaN or Inf when an update is due.
        """
        steps = self._pull.counted()
        self.steps += steps
        if not (steps and self.states):
            return
        if self._idle:
            self._warn("gradient", f"the loss does not reach {self._idle}: without a gradient ADMM cannot pull them")
        if self._pull.decoupled:
            rho = {name: state.rho for name, state in self.states.items()}
            for _ in range(steps):
                self._pull.move(self._targets, rho, self._chosen_at[1])
        elif self.penalty.follows_pull and self._pull.kept < CLIPPED:
            log.info("gradients are clipped, and the pull in them: from here on ADMM moves the weights themselves")
            self._pull.decoupled = self._clipped = True
            self._choose_rho()
        if self._unit == "step" and self.steps - self.updated_at >= self._every:
            self.update()

    def end_epoch(self, evaluate: Callable[[], float | None] | None = None) -> dict[str, float]:
        """Update Z and U where that is due in epochs; returns ``report(evaluate)``.

        Raises:
            TrainingError: no optimizer step since the last call, or a weight that is NaN or Inf.
        """
        if self.steps == self.epoch_began and self.weights:
            raise TrainingError("an epoch ends without a step: call before_step and after_step around optimizer.step()")
        if self.states:
            self.update_at_epoch_end()
        self.count_epoch()
        self.start()  # where no step was taken yet
        report = self.report(evaluate)
        self.epoch += 1
        return report

    def count_epoch(self) -> None:
        """Choose rho by the steps that this epoch had, from the next one on; ADMM begins if it waited for them."""
        counted, expected = self.steps - self.epoch_began, self.steps_per_epoch
        self.epoch_began = self.steps
        if not counted or counted == expected:
            return
        if expected is not None:
            given = f"an epoch had {counted} optimizer steps, not steps_per_epoch={expected}, by which rho is chosen"
            self._warn("length", f"{given}: its pull was not the one asked for. The next epochs go by this count")
        self.steps_per_epoch, self._chosen_at = counted, (-1, self._chosen_at[1])
        self.start()

    def update_at_epoch_end(self) -> None:
        """Update Z and U if this epoch's end is one where that is due."""
        due = self._unit == "epoch" and (self.epoch + 1) % self._every == 0
        if due and self.states and self.steps > self.updated_at:  # an epoch may be one that only measures BatchNorm
            self.update()

    def finish(self) -> Status:
        """Settle the status once training is over."""
        self.status = final_status(self.status, self.primal)
        last = f"{self.primal[-1]:.4g}" if self.primal else "not measured: no Z-update took place"
        log.info("ADMM %s; norm(W - Z) / norm(W) = %s", self.status.value, last)
        return self.status

    # -- the three updates ---------------------------------------------------------------------------------------

    def update(self) -> None:
        """Update Z and U of all layers, then rho and the status.

        Raises:
            TrainingError: a weight is NaN or Inf.
        """
        for name, w in self.weights.items():
            check_finite(w.detach(), f"layer {name}, epoch {self.epoch}, step {self.steps}")
        relax, dual = self.options.relax, self.options.dual
        self.states, self.residuals = updates.step(self.weights, self.states, self._project, relax=relax, dual=dual)
        self._judge_pull()
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

    def _interval_steps(self) -> float:
        """Optimizer steps between two Z-updates; NaN while they are not known."""
        return self._every * (1 if self._unit == "step" else self.steps_per_epoch or math.nan)

    def _choose_rho(self, residuals: Mapping[str, Residuals] | None = None) -> None:
        """Choose rho of all layers; ``residuals`` are those of the Z-update just done."""
        pulls, steps, rates, follows = [], self._interval_steps(), self._pull.rates(), self.penalty.follows_rate
        if follows:
            self._pull.calm(self._chosen_at[1])
        for name, state in self.states.items():
            size = self._pull.size(name, steps)
            mine = residuals.get(name) if residuals else None
            rho = self.penalty.rho(Moment(name, self.epoch, size, state.rho, mine))
            self.states[name] = updates.with_rho(state, rho, follows_rate=follows)
            pulls.append(size.pull(rho))
        self._chosen_at = (self.epoch, rates)
        self.pull = sum(pulls) / len(pulls) if self._pull.known and pulls else math.nan
        self._targets = {name: s.z - s.u for name, s in self.states.items()}
        if not self.penalty.follows_pull and self.pull < WEAK_PULL:
            weak = f"rho pulls W only {self.pull:.2f} of its way to Z between two updates"
            self._warn("pull", f"{weak}; below {WEAK_PULL} U winds up instead. Use rho=auto, or a larger rho")

    def _judge_pull(self) -> None:
        """Keep the pull that was measured since the last Z-update; say what took most of it away."""
        self.pulls, steps = self._pull.measured(), self._interval_steps()
        asked = self.options.pull if self.penalty.follows_pull else None
        rho = {name: state.rho for name, state in self.states.items()}
        if words := weakness(self._pull, asked=asked, steps=steps, rho=rho):
            self._warn("weak", words)
        self._pull.restart()

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
            ``planned_params``, the shares of the dense net's cost that its ranks keep; ``truncated_accuracy``. ``pull``
            is the measured one, absent where the optimizer's steps do not tell it. Empty while ADMM has not begun.
        """
        if not self.states:
            return {}
        full = self._full()
        if not self.primal:
            self.residuals = {n: updates.measure(w, self.states[n], self.states[n].z) for n, w in full.items()}
        overall, pulls = updates.total(self.residuals), self.pulls or self._pull.measured()
        report = {
            "rho": sum(s.rho for s in self.states.values()) / len(self.states),
            **({"pull": sum(pulls.values()) / len(pulls)} if pulls else {}),
            "primal_residual": overall.primal,
            "dual_residual": overall.dual,
            "truncation_error": updates.error(full, self.projection.truncate(full)),
        }
        report |= {f"planned_{key}": ratio for key, ratio in self.projection.learned_cost().items()}
        accuracy = self.truncated(evaluate) if evaluate is not None else None
        return report if accuracy is None else {**report, "truncated_accuracy": accuracy}

    def _full(self) -> dict[str, Tensor]:
        return {name: updates.full_precision(w) for name, w in self.weights.items()}

    def truncated(self, evaluate: Callable[[], float | None]) -> float | None:
        """What ``evaluate`` gives while the weights are truncated; None where it is not to be measured."""
        if not (self.options.track_truncated and self.states):
            return None
        with updates.weights_replaced(self.weights, self.projection.truncate(self._full())):
            accuracy = evaluate()
        return None if accuracy is None else float(accuracy)

    def layer_report(self) -> dict[str, dict[str, float]]:
        """``rho``, ``primal_residual``, ``dual_residual`` and ``pull`` of each layer at the last ``report``."""
        pulls = self.pulls or self._pull.measured()
        return {
            name: {"rho": self.states[name].rho, "primal_residual": r.primal, "dual_residual": r.dual}
            | ({"pull": pulls[name]} if name in pulls else {})
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
            "plan": self.projection.identity(self.start_plan),
            "projection": self.projection.state_dict(),
            "layers": {name: vars(state).copy() for name, state in self.states.items()},
            "parked": {name: vars(state).copy() for name, state in self._parked.items()},
            "residuals": {name: [r.gap, r.weight, r.move, r.dual_scale] for name, r in self.residuals.items()},
            "verdict": self.status.value,
            "steps_per_epoch": self.steps_per_epoch,
            "pulling": self._pull.state_dict() | {"rates": self._chosen_at[1], "clipped": self._clipped},
            **{key: getattr(self, key) for key in PLAIN},
        }

    def load_state_dict(self, state: State) -> None:
        """Go on from a state; its tensors are moved to the devices of the weights.

        Raises:
            CheckpointError: it is of another plan.
        """
        mine, theirs = self.projection.identity(self.start_plan), state["plan"]
        if differ := [name for name in {**mine, **theirs} if mine.get(name) != theirs.get(name)]:
            first = differ[0]
            raise CheckpointError(
                f"the checkpoint's ADMM state is of another plan: {len(differ)} layers differ, first {first} "
                f"(checkpoint: {theirs.get(first, 'without it')}; plan: {mine.get(first, 'without it')}). "
                "Resume with the plan it was written with, or start without the checkpoint"
            )
        self.projection.load_state_dict(state["projection"])
        self.residuals = {name: Residuals(*row) for name, row in state["residuals"].items()}
        self.status, pulling = Status(state["verdict"]), state.get("pulling", {})
        self._clipped = self._clipped or pulling.get("clipped", False)
        self.steps_per_epoch = state.get("steps_per_epoch") or self.steps_per_epoch
        for key in PLAIN:  # a checkpoint of hodec 0.1.0 lacks those that Lightning counts itself
            setattr(self, key, state.get(key, getattr(self, key)))
        self._parked = {
            name: AdmmState(one["z"].to(w.device), one["u"].to(w.device), one["rho"])
            for name, w in self._planned.items()
            if (one := {**state.get("parked", {}), **state["layers"]}.get(name)) is not None
        }
        self.states, self._chosen_at = {}, (-1, pulling.get("rates", {}))
        self._pull.release()
        self._bind(self.weights)
        self._pull.load_state_dict(pulling)
