"""AdmmCallback: Admm on the hooks of Lightning's Trainer, in anybody's LightningModule."""

import math
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Unpack

from torch import nn
from torch.optim import Optimizer

try:
    from pytorch_lightning import Callback, LightningModule, Trainer
except ImportError as error:
    raise ImportError("hodec.AdmmCallback needs Lightning: pip install 'hodec[lightning]'") from error

from hodec.admm.binding import the_optimizer
from hodec.admm.core import Admm
from hodec.admm.options import AdmmOptions, AdmmSettings
from hodec.admm.penalty import make_penalty
from hodec.admm.processes import Processes
from hodec.admm.projection import Projection, RankLearner, State
from hodec.admm.stopping import Status
from hodec.admm.truncated import validation_accuracy
from hodec.calibration.input_covariance import InputCovariance
from hodec.errors import TrainingError, Use
from hodec.inference import Batch
from hodec.plan.plan import Plan


class AdmmCallback(Callback):
    """Pulls the planned layers towards low rank while they train; see ``hodec.Admm`` for how.

    Args:
        plan: the layers, their methods and ranks.
        stop_when_converged: end the fit then (``min_epochs`` still holds).
        evaluate: module -> accuracy, for modules whose validation batches are not (images, labels).
        learner, covariances, root: as for ``hodec.Admm``.
        settings: the fields of ``hodec.admm.options.AdmmOptions``. ``track_truncated`` measures, each epoch, the
            accuracy that hard truncation would leave (one validation pass).

    Attributes:
        latest: values that the last epoch reported, by the names under which they are logged.

    Raises (in ``on_fit_start``): PlanError, TrainingError: what cannot work, with the way out.
    """

    def __init__(
        self,
        plan: Plan,
        *,
        stop_when_converged: bool = True,
        evaluate: Callable[[LightningModule], float] | None = None,
        learner: RankLearner | None = None,
        covariances: Mapping[str, InputCovariance] | None = None,
        root: str | None = None,
        **settings: Unpack[AdmmSettings],
    ) -> None:
        options = AdmmOptions(**settings)
        make_penalty(options.rho, pull=options.pull, layers=list(plan))  # these two refuse now, not at the fit's start
        Projection(plan, learner, covariances)
        self._by_epoch = options.interval[1] == "epoch"
        self.stop_when_converged, self.evaluate = stop_when_converged, evaluate
        self._make = partial(Admm, plan=plan, learner=learner, covariances=covariances, root=root, **settings)
        self._admm: Admm | None = None
        self._restored: State | None = None
        self.latest: dict[str, object] = {}

    @property
    def admm(self) -> Admm:
        """The ADMM of the latest fit.

        Raises:
            TrainingError: no fit has begun.
        """
        if self._admm is None:
            raise TrainingError("AdmmCallback holds no ADMM state before trainer.fit has begun")
        return self._admm

    def final_plan(self) -> Plan:
        """``Admm.final_plan``: the plan to convert by."""
        return self.admm.final_plan()

    def convert(self, batches: Iterable[Batch] | None = None) -> nn.Module:
        """``Admm.convert``: the part of the module that the plan was made from, factorized."""
        return self.admm.convert(batches)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        before = self._admm.state_dict() if self._admm and trainer.global_step else None  # goes on with its own fit
        state, self._restored = self._restored or before, None
        optimizer = the_optimizer(type(trainer.strategy).__name__, trainer.optimizers, str(trainer.precision))
        processes = Processes() if trainer.world_size == 1 else Processes.current()
        self._admm = self._make(pl_module, optimizer=optimizer, processes=processes)
        if state is not None:
            self._admm.load_state_dict(state)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._follow(trainer).steps = trainer.global_step
        self.admm.start()
        self._stop_if_converged(trainer)  # the checkpoint was written just before the fit ended

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        # Gradients are final here: unscaled, accumulated, reduced over processes, not yet clipped.
        self._follow(trainer).before_step()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: object, batch: object, batch_idx: int
    ) -> None:
        admm = self._follow(trainer)
        if trainer.global_step > admm.steps:
            admm.after_step(trainer.global_step - admm.steps)
        if trainer.is_last_batch:
            admm.update_at_epoch_end()  # before validation, whose checkpoints are to hold the new Z
        self._stop_if_converged(trainer)

    def _follow(self, trainer: Trainer) -> Admm:
        """The ADMM, told where the trainer is."""
        batches = trainer.num_training_batches / trainer.accumulate_grad_batches
        if math.isinf(batches) and self._by_epoch:
            raise TrainingError(
                "the training data does not say how many batches an epoch has: give the interval in steps, {steps}",
                steps=Use("admm.update_every", "'100steps'"),
            )
        self.admm.epoch = trainer.current_epoch
        self.admm.steps_per_epoch = None if math.isinf(batches) else math.ceil(batches)
        return self.admm

    def _stop_if_converged(self, trainer: Trainer) -> None:
        if self.stop_when_converged and self.admm.status is Status.CONVERGED:
            trainer.should_stop = True

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        measure = (
            partial(self.evaluate, pl_module) if self.evaluate else partial(validation_accuracy, trainer, pl_module)
        )
        report = {f"admm/{key}": value for key, value in self.admm.report(measure).items()}
        layers = self.admm.layer_report()
        self.latest = {**report, "admm/layers": layers}
        # Equal in all processes; said so, or Lightning would warn that they might not be.
        pl_module.log_dict(report, sync_dist=True)
        per_layer = {f"admm/{key}/{name}": value for name, row in layers.items() for key, value in row.items()}
        for logger in trainer.loggers:
            logger.log_metrics(per_layer, step=trainer.global_step)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.admm.finish()

    def state_dict(self) -> State:
        return self._admm.state_dict() if self._admm else {}

    def load_state_dict(self, state_dict: State) -> None:
        self._restored = state_dict
