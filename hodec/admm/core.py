"""Admm: ADMM for any training loop, and what comes of it: reports, the plan, the factorized net, its state."""

from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor, nn

from hodec.admm import updates
from hodec.admm.loop import AdmmLoop
from hodec.admm.projection import State
from hodec.admm.stopping import Status
from hodec.admm.updates import AdmmState, Residuals
from hodec.conversion.batchnorm import reestimate_batchnorm
from hodec.conversion.divided import convert_divided
from hodec.conversion.swap import convert
from hodec.errors import CheckpointError, TrainingError
from hodec.inference import Batch
from hodec.plan.plan import Plan

# Attributes of Admm that a checkpoint holds as they are.
PLAIN = ("primal", "dual", "updated_at", "steps", "epoch", "epoch_began", "pulls")


class Admm(AdmmLoop):
    """Pulls the planned layers of a net towards low rank while a training loop trains it:

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
            ``dual``, ``tolerance``, ``track_truncated``, ``distribute_projection``. With ``mode="project"`` those of
            ``AdmmProject`` (``update_every``, ``share``, ``falling_epochs``): the weights themselves are projected
            every few steps, and there is no pull.

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

    Examples:
        >>> net = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
        >>> plan = hodec.make_plan(net, 4, method="svd", example_input=torch.zeros(1, 64))
        >>> optimizer = torch.optim.SGD(net.parameters(), lr=0.05)
        >>> loader = [(torch.randn(16, 64), torch.randint(10, (16,))) for _ in range(4)]
        >>> admm = hodec.Admm(net, plan, optimizer, steps_per_epoch=len(loader))
        >>> for x, y in loader:
        ...     optimizer.zero_grad()
        ...     nn.functional.cross_entropy(net(x), y).backward()
        ...     admm.before_step()
        ...     optimizer.step()
        ...     admm.after_step()
        >>> sorted(set(admm.end_epoch()) & {"primal_residual", "pull", "rho"})
        ['primal_residual', 'pull', 'rho']
        >>> small = admm.convert()
    """

    def end_epoch(self, evaluate: Callable[[], float | None] | None = None) -> dict[str, float]:
        """Update Z and U where that is due in epochs; returns ``report(evaluate)``.

        Raises:
            TrainingError: ``after_step`` was not called since the last time, or a weight is NaN or Inf.
        """
        if self.steps == self.epoch_began and self.weights:
            if not self._told:
                text = "an epoch ends without a step: call before_step and after_step around optimizer.step()"
                raise TrainingError(text)
            self._warn("skipped", "no step of an epoch changed a planned layer: a loss scaler skipped all of them")
        if self.states:
            self.update_at_epoch_end()
        self.count_epoch()
        self.start()  # where no step was taken yet
        report = self.report(evaluate)
        self.epoch, self._told = self.epoch + 1, False
        return report

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
        if new := {n: w for n, w in full.items() if not self.primal or n not in self.residuals}:
            found = {n: updates.measure(w, self.states[n], self.states[n].z) for n, w in new.items()}
            self.residuals = self.residuals | self.division.residuals(found)
        overall, pulls = updates.total(self.residuals), self._pulls()
        rho = sum(s.rho for s in self.states.values()) / len(self.states)
        report = {
            **({} if self.projects else {"rho": rho}),
            **({"pull": sum(pulls.values()) / len(pulls)} if pulls else {}),
            "primal_residual": overall.primal,
            "dual_residual": overall.dual,
            "truncation_error": updates.error(full, self._truncate(full), self.division.added),
        }
        report |= {f"planned_{key}": ratio for key, ratio in self.projection.learned_cost().items()}
        accuracy = self.truncated(evaluate) if evaluate is not None else None
        return report if accuracy is None else {**report, "truncated_accuracy": accuracy}

    def _full(self) -> dict[str, Tensor]:
        return {name: updates.full_precision(w) for name, w in self.own.items()}

    def truncated(self, evaluate: Callable[[], float | None]) -> float | None:
        """What ``evaluate`` gives while the weights are truncated; None where it is not to be measured."""
        if not (self.options.track_truncated and self.states):
            return None
        near = self._truncate(self._full())
        try:
            with updates.weights_replaced(self.own, near):
                self.division.settle()
                accuracy = evaluate()
        finally:
            self.division.settle()
        return None if accuracy is None else float(accuracy)

    def layer_report(self) -> dict[str, dict[str, float]]:
        """``rho``, ``primal_residual``, ``dual_residual`` and ``pull`` of each layer at the last ``report``."""
        pulls = self._pulls()
        return {
            name: ({} if self.projects else {"rho": self.states[name].rho})
            | {"primal_residual": r.primal, "dual_residual": r.dual}
            | ({"pull": pulls[name]} if name in pulls else {})
            for name, r in self.residuals.items()
        }

    def _pulls(self) -> dict[str, float]:
        """What was measured between the last two Z-updates, or since the first; none where nothing pulls."""
        return {} if self.projects else self.pulls or self._pull.measured()

    def final_plan(self) -> Plan:
        """The plan to convert by: where ranks were learned, those of the last Z.

        Raises:
            PlanError: no layer is left whose learned ranks save anything.
        """
        return self.projection.final_plan()

    def convert(self, batches: Iterable[Batch] | None = None, *, skeleton: nn.Module | None = None) -> nn.Module:
        """A copy of the net with factorized layers: by the final plan, from the factors and covariances of ADMM.

        Args:
            batches: training data to re-estimate BatchNorm's statistics from, see ``hodec.reestimate_batchnorm``.
            skeleton: of a net that is divided among processes, the same before it was, see ``hodec.convert_divided``.

        Raises:
            PlanError: no layer is left whose learned ranks save anything.
            ConvertError, TrainingError: as ``hodec.convert``.
        """
        plan = self.final_plan()
        covariances = {name: one for name, one in self.projection.covariances.items() if name in plan}
        self.division.settle()
        factors = self.projection.factors
        if skeleton is None:
            compressed = convert(self.model, plan, covariances=covariances, init_factors=factors)
        else:
            compressed = convert_divided(self.model, plan, skeleton, covariances=covariances, init_factors=factors)
        if batches is not None:
            reestimate_batchnorm(compressed, batches)
        return compressed

    # -- state: plain numbers and tensors only, so that checkpoints load with weights_only=True ---------------------

    def state_dict(self, *, whole: bool = False) -> State:
        """All that ADMM goes on from, beside the weights and the optimizer's state.

        Args:
            whole: of a net that is divided among processes, Z and U are DTensors, as torch.distributed.checkpoint
                writes them. True: the first process gets them whole on the CPU, layer by layer, the others without
                numbers; all call it together.
        """
        return {
            "plan": self.projection.identity(self.start_plan),
            "projection": self.projection.state_dict(),
            "layers": {name: self._stored(name, state, whole) for name, state in self.states.items()},
            "parked": {name: self._stored(name, state, whole) for name, state in self._parked.items()},
            "residuals": {name: [r.gap, r.weight, r.move, r.dual_scale] for name, r in self.residuals.items()},
            "verdict": self.status.value,
            "steps_per_epoch": self.steps_per_epoch,
            "pulling": self._pull.state_dict()
            | {"rates": self._chosen_at[1], "clipped": self._clipped, "epoch": self._asked_in},
            "rest": {name: self._store(name, rest, whole) for name, rest in self._pull.rest.items()},
            **{key: getattr(self, key) for key in PLAIN},
        }

    def _stored(self, name: str, state: AdmmState, whole: bool) -> State:
        """Z, U and rho of a layer; of a divided one as DTensors, of which each process writes its part, or whole."""
        return {"z": self._store(name, state.z, whole), "u": self._store(name, state.u, whole), "rho": state.rho}

    def _store(self, name: str, tensor: Tensor, whole: bool) -> Any:
        return (self.division.gathered if whole else self.division.wrapped)(name, tensor)

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
            name: AdmmState(self.division.taken(name, one["z"], w), self.division.taken(name, one["u"], w), one["rho"])
            for name, w in self._planned.items()
            if (one := {**state.get("parked", {}), **state["layers"]}.get(name)) is not None
        }
        self.states, self._chosen_at = {}, (-1, pulling.get("rates", {}))
        self._asked_in = pulling.get("epoch", self.epoch)
        self._pull.release()
        self._bind(self.weights)
        self._pull.load_state_dict(pulling)
        rest = state.get("rest", {})
        self._pull.rest = {n: self.division.taken(n, rest[n], w) for n, w in self.weights.items() if n in rest}
