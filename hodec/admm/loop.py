"""What ADMM does step by step in a training loop: the pull, the Z- and U-update, the status."""

import logging
import math
from collections.abc import Mapping, Sequence
from typing import Unpack

import torch
from torch import Tensor, nn

from hodec.admm import updates
from hodec.admm.binding import bind, find_root, planned_weights, signature_of, unwrapped
from hodec.admm.division import Division, part_of, settle
from hodec.admm.options import WEAK_PULL, AdmmOptions, AdmmProject, AdmmSettings, at_epoch, mode_options
from hodec.admm.penalty import Moment, penalty_of
from hodec.admm.processes import Processes, check_equal, differing
from hodec.admm.projection import Projection, RankLearner
from hodec.admm.pull import CLIPPED, Pull, haste, weakness
from hodec.admm.stopping import Status, check_convergence, final_status
from hodec.admm.updates import AdmmState, Residuals
from hodec.calibration.input_covariance import InputCovariance
from hodec.errors import ConfigError, TrainingError, Use
from hodec.inference import check_module
from hodec.plan.plan import Plan, check_plan

log = logging.getLogger(__name__)


class AdmmLoop:
    """The part of ``Admm`` that runs while a loop trains; see there for the arguments and attributes."""

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
        _check_given(model, plan, steps_per_epoch)
        options, self.start_plan = mode_options(**settings), plan
        self.options, self.steps_per_epoch, self.projects = options, steps_per_epoch, isinstance(options, AdmmProject)
        if learner is not None and self.projects:
            raise ConfigError("learner: given with mode='project', which has no penalty to learn ranks from")
        self.penalty = penalty_of(options, list(plan))
        self.projection = Projection(plan, learner, covariances, distribute=self.options.distribute_projection)
        self.processes = processes or Processes.current()
        prefix = find_root(settle(model), plan, root)
        self.model, self.optimizer, self._clipped = model.get_submodule(prefix.rstrip(".")), optimizer, clipped
        self._planned, self._optimizers = planned_weights(model, plan, prefix), unwrapped(optimizer)
        self.division = Division(self._planned, model, learned=learner is not None)
        self.states, self.residuals = dict[str, AdmmState](), dict[str, Residuals]()
        self.primal, self.dual, self.pulls = list[float](), list[float](), dict[str, float]()
        self.status, self.pull = Status.RUNNING, math.nan
        self.steps = self.epoch = self.updated_at = self.epoch_began = 0
        self._compared_at = 0  # optimizer steps done when the processes last compared what they hold
        self._chosen_at: tuple[int, dict[str, float]] = (-1, {})  # epoch and learning rates that rho was chosen at
        self._asked_in = 0  # epoch that rho was last chosen in
        self._targets: dict[str, Tensor] = {}  # Z - U
        self._parked: dict[str, AdmmState] = {}  # states of layers that nothing trains now
        self._idle = ""  # layers that the loss did not reach at the last step
        self._fall = 1.0  # how far the ranks had fallen, 0..1, at the last Z
        self._warned, self._told = set[str](), False  # told: whether after_step was called in this epoch
        self._bind()

    def _bind(self, before: Mapping[str, nn.Parameter] | None = None) -> None:
        """Find what trains the planned weights now; ``before`` are those of the last time, None at first."""
        binding = bind(self._planned, self._optimizers)
        if len(binding.owners) > 1 and not self.penalty.follows_pull:
            text = f"{len(binding.owners)} optimizers train the planned layers"
            raise TrainingError(f"{text}: use {{auto}}, which moves the weights itself", auto=Use("admm.rho", "auto"))
        joined = [name for name in binding.weights if before is not None and name not in before]
        self._binding, self.weights = binding, binding.weights
        self._pull = Pull(
            binding, movable=self.penalty.follows_pull, clipped=self._clipped, summed=self.division.summed
        )
        if joined:
            log.info("epoch %d: ADMM takes in %s, which training changes now", self.epoch, ", ".join(joined))
        elif binding.frozen:
            log.warning("frozen layers take no part in ADMM: %s", ", ".join(binding.frozen))
        if self.states or self._parked:
            self._take_in()

    def _take_in(self) -> None:
        """States of the layers that are trained now; those that were trained before go on where they were."""
        known = self._parked | self.states
        new = {name: updates.full_precision(w) for name, w in self.own.items() if name not in known}
        z = self._truncate(new)
        whole = self.processes.broadcast({name: one for name, one in z.items() if name not in self.division})
        z |= {name: one.to(new[name].device) for name, one in whole.items()}
        known |= {n: AdmmState(z[n], torch.zeros_like(w), 0.0) for n, w in new.items()}
        self.states = {name: known[name] for name in self.weights}
        self._parked = {name: state for name, state in known.items() if name not in self.weights}
        self.residuals = {name: one for name, one in self.residuals.items() if name in self.weights}
        self._chosen_at = (-1, self._chosen_at[1])

    @property
    def own(self) -> dict[str, Tensor]:
        """Layer -> the part of its weight that this process holds: the whole of it where nothing is divided."""
        return {name: part_of(w) for name, w in self.weights.items()}

    def _truncate(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return self.projection.truncate(tensors, self.processes, self.division)

    # -- hooks of the loop ---------------------------------------------------------------------------------------

    def start(self) -> None:
        """Set Z = project(W) and U = 0 where there is no state yet; ``before_step`` does it too.

        Raises:
            TrainingError: a weight is NaN or Inf.
        """
        if self.states or not self.weights or (self.penalty.follows_pull and math.isnan(self._interval_steps())):
            return
        self.division.check_finite(self.own, "")
        self._fall = self._fallen(self.steps)
        self.states = updates.start(self.own, dict.fromkeys(self.weights, 0.0), self._project)
        self.updated_at = self.steps
        if self.projects:
            return
        self._look_at_interval()
        self._choose_rho()

    def _look_at_interval(self) -> None:
        """See to it that W can answer between two Z-updates, or warn.

        Momentum answers a pull in the gradients long after Z has moved on: what it owes adds up in U from update to
        update, and with 1 to 4 steps between them the weights end as NaN after 30 to 100 epochs. Moved by themselves
        they are where the pull wants them when Z is updated.
        """
        if self._pull.decoupled or not (words := haste(self._pull, self._interval_steps())):
            return
        if not self.penalty.follows_pull:
            self._warn("interval", words)
        else:
            log.info("%s. ADMM moves the weights themselves, which needs no answer", words.partition(":")[0])
            self._pull.decoupled = self._clipped = True

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
        if self.projects:
            return
        if self._chosen_at != (self.epoch, self._pull.rates()):  # a schedule moved: the pull per step is to stay
            self._look_at_interval()
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
        steps, self._told = self._pull.counted(), True
        self.steps += steps
        if not (steps and self.states):
            return
        if self._idle:
            self._warn("gradient", f"the loss does not reach {self._idle}: without a gradient ADMM cannot pull them")
        if self._pull.decoupled:
            rho = {name: state.rho for name, state in self.states.items()}
            for _ in range(steps):
                self._pull.move(self._targets, rho, self._chosen_at[1])
            self.division.settle()
        elif self.penalty.follows_pull and self._pull.kept < CLIPPED:
            log.info("gradients are clipped, and the pull in them: from here on ADMM moves the weights themselves")
            self._pull.decoupled = self._clipped = True
            self._choose_rho()
        every, unit = self.options.interval(self.epoch)
        if unit == "step" and self.steps - self.updated_at >= every:
            self.update()

    def count_epoch(self) -> None:
        """Choose rho by the steps that this epoch had, from the next one on; ADMM begins if it waited for them.

        Raises:
            TrainingError: the processes that train together hold different weights.
        """
        self._compare()
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
        due = self.projects or self.options.ends_with(self.epoch)
        falls = self._fallen(self.updated_at) < self._fallen(self.steps, ended=True)  # its steps were not known
        if due and self.states and (self.steps > self.updated_at or falls):  # an epoch may only measure BatchNorm
            self.update(ended=True)

    def finish(self) -> Status:
        """Settle the status once training is over."""
        self.status = Status.EPOCHS_ENDED if self.projects else final_status(self.status, self.primal)
        last = f"{self.primal[-1]:.4g}" if self.primal else "not measured: no Z-update took place"
        log.info("ADMM %s; norm(W - Z) / norm(W) = %s", self.status.value, last)
        if self._fall < 1:
            way = f"the ranks have fallen {self._fall:.2f} of their way to the planned ones when training ends"
            self._warn("fall", f"{way}, and converting cuts off the rest: lower falling_epochs, or train longer")
        return self.status

    # -- the three updates ---------------------------------------------------------------------------------------

    def update(self, *, ended: bool = False) -> None:
        """Update Z and U of all layers, then rho and the status; ``ended``: it is the end of an epoch.

        Raises:
            TrainingError: a weight is NaN or Inf, or differs between the processes that train together.
        """
        self._compare()
        self.division.check_finite(self.own, f", epoch {self.epoch}, step {self.steps}")
        self._fall = self._fallen(self.steps, ended=ended)
        relax, dual = (self.options.relax, self.options.dual) if isinstance(self.options, AdmmOptions) else (1.0, False)
        self.states, found = updates.step(self.own, self.states, self._project, relax=relax, dual=dual)
        self.residuals = self.division.residuals(found)
        self.updated_at = self.steps
        overall = updates.total(self.residuals)
        self.primal, self.dual = [*self.primal, overall.primal], [*self.dual, overall.dual]
        if isinstance(self.options, AdmmOptions):
            self._judge(self.options)
        else:
            updates.put(self.own, updates.towards(self.own, self.states, self.options.share))
            self.division.settle()

    def _judge(self, options: AdmmOptions) -> None:
        """Choose rho and the status by the Z-update just done."""
        self._judge_pull()
        self._choose_rho(self.residuals)
        self.status = check_convergence(self.primal, self.dual, tolerance=options.tolerance)
        if self.status is Status.DIVERGED:
            rise = f"norm(W - Z) / norm(W) rose from {self.primal[0]:.3g} to {self.primal[-1]:.3g}"
            way_out = "raise pull (rho=auto) or rho, or update less often"
            self._warn("diverged", f"ADMM diverges: {rise}. U winds up because W does not follow: {way_out}")

    def _compare(self) -> None:
        """See that all processes hold one state: the pull is added after gradients were reduced, so nothing else would.

        Raises:
            TrainingError: their weights differ.
        """
        if self.processes.count == 1 or self._compared_at == self.steps:
            return
        where, steps = f"epoch {self.epoch}, step {self.steps}", self.steps - self._compared_at
        self._compared_at = self.steps
        whole = [name for name in self.weights if name not in self.division]
        check_equal(self.processes, {name: self.weights[name] for name in whole}, steps=steps, where=where)
        states = {name: self.states[name] for name in whole if name in self.states}
        parts = {name: [s.z, s.u, torch.tensor(s.rho)] for name, s in states.items()}
        if names := differing(self.processes, parts):
            log.warning("%s: Z, U or rho of %s differ between the processes; all take the first one's", where, names)
            kept = self.processes.broadcast({name: vars(self.states[name]) for name in names})
            for name, one in kept.items():
                device = self.weights[name].device
                self.states[name] = AdmmState(one["z"].to(device), one["u"].to(device), one["rho"])
            if not self.projects:
                self._choose_rho()

    def _project(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        rho = {name: self.states[name].rho if self.states else 0.0 for name in tensors}
        return self.projection.update(tensors, rho, self.processes, self.division, fallen=self._fall)

    def _fallen(self, steps: int, *, ended: bool = False) -> float:
        """How far, 0..1, the ranks are to have fallen from the full ones to the planned ones, by ``falling_epochs``.

        They fall with the optimizer steps, and where those of an epoch are not known yet at its end.

        Args:
            steps: done by then, at the start of this epoch or later.
            ended: this epoch is over.
        """
        epochs = self.options.falling_epochs if isinstance(self.options, AdmmProject) else 0
        if not epochs:
            return 1.0
        within = 1.0 if ended else min(1.0, (steps - self.epoch_began) / (self.steps_per_epoch or math.inf))
        return min(1.0, (self.epoch + within) / epochs)

    # -- rho -----------------------------------------------------------------------------------------------------

    def _interval_steps(self) -> float:
        """Optimizer steps between two Z-updates; NaN while they are not known."""
        every, unit = self.options.interval(self.epoch)
        return every * (1 if unit == "step" else self.steps_per_epoch or math.nan)

    def _asked_pull(self, epoch: int) -> float | None:
        """The pull that the settings ask for in an epoch; None where they ask for a rho, or nothing pulls."""
        options = self.options if self.penalty.follows_pull else None
        return float(at_epoch(options.pull, epoch)) if isinstance(options, AdmmOptions) else None

    def _choose_rho(self, residuals: Mapping[str, Residuals] | None = None) -> None:
        """Choose rho of all layers; ``residuals`` are those of the Z-update just done."""
        pulls, steps, rates = [], self._interval_steps(), self._pull.rates()
        anew = self._asked_pull(self._asked_in) != self._asked_pull(self.epoch)
        follows = self.penalty.follows_rate or anew
        if self.penalty.follows_rate:
            self._pull.calm(self._chosen_at[1])
        for name, state in self.states.items():
            size, mine = self._pull.size(name, steps), residuals.get(name) if residuals else None
            moment = Moment(name, self.epoch, size, state.rho, mine, first=not self.primal, asked_anew=anew)
            rho = self.penalty.rho(moment)
            self.states[name] = updates.with_rho(state, rho, follows_rate=follows)
            pulls.append(size.pull(rho))
        self._chosen_at, self._asked_in = (self.epoch, rates), self.epoch
        self.pull = sum(pulls) / len(pulls) if self._pull.known and pulls else math.nan
        self._targets = {name: s.z - s.u for name, s in self.states.items()}
        if not self.penalty.follows_pull and self.pull < WEAK_PULL:
            weak = f"rho pulls W only {self.pull:.2f} of its way to Z between two updates"
            self._warn("pull", f"{weak}; below {WEAK_PULL} U winds up instead. Use rho=auto, or a larger rho")

    def _judge_pull(self) -> None:
        """Keep the pull that was measured since the last Z-update; say what took most of it away."""
        self.pulls, steps = self._pull.measured(), self._interval_steps()
        rho = {name: state.rho for name, state in self.states.items()}
        if words := weakness(self._pull, asked=self._asked_pull(self.epoch), steps=steps, rho=rho):
            self._warn("weak", words)
        self._pull.restart()

    def _warn(self, kind: str, message: str) -> None:
        if kind not in self._warned:
            self._warned.add(kind)
            log.warning("%s", message)


def _check_given(model: object, plan: object, steps_per_epoch: int | None) -> None:
    check_module(model)
    check_plan(plan)
    if steps_per_epoch is not None and (steps_per_epoch < 1 or steps_per_epoch % 1):
        text = f"{{steps}}: {steps_per_epoch} given; allowed: a whole number from 1, or None"
        raise ConfigError(text, steps=Use("steps_per_epoch"))
