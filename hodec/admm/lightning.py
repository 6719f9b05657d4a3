"""AdmmCallback: Admm on the hooks of Lightning's Trainer, in anybody's LightningModule.

Lightning comes under two names, ``pytorch_lightning`` and ``lightning.pytorch``, with two families of classes.
``AdmmCallback`` is a callback of the one in use; of both, where both are.
"""

import logging
import math
import sys
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Unpack

from torch import nn
from torch.optim import Optimizer

from hodec.admm.binding import check_trainer
from hodec.admm.core import Admm
from hodec.admm.options import AdmmSettings, mode_options
from hodec.admm.penalty import penalty_of
from hodec.admm.processes import Processes
from hodec.admm.projection import Projection, RankLearner, State
from hodec.admm.statistics import RecentCalls
from hodec.admm.stopping import Status
from hodec.admm.truncated import Module, Trainer, averaged, forward_of, validation_accuracy
from hodec.calibration.input_covariance import InputCovariance
from hodec.errors import ConfigError, HodecError, TrainingError, Use
from hodec.inference import Batch
from hodec.plan.plan import Plan

log = logging.getLogger(__name__)

NAMES = ("pytorch_lightning", "lightning.pytorch")


def lightning_callback() -> type:
    """The base class of callbacks of the Lightning that is imported, or else installed; one of both, if it is both.

    Raises:
        ImportError: neither is installed.
    """
    used = [name for name in NAMES if sys.modules.get(name)] or [n for n in NAMES if find_spec(n.partition(".")[0])]
    bases = tuple(import_module(name).Callback for name in used)
    if not bases:
        raise ImportError("hodec.AdmmCallback needs Lightning: pip install 'hodec[lightning]'")
    return bases[0] if len(bases) == 1 else type("Callback", bases, {})


if TYPE_CHECKING:  # for a type checker it is a callback of both
    from lightning.pytorch import Callback as LightningCallback  # type: ignore[import-not-found,unused-ignore]
    from pytorch_lightning import Callback as PytorchLightningCallback

    class Callback(PytorchLightningCallback, LightningCallback): ...  # type: ignore[misc,unused-ignore]
else:
    Callback = lightning_callback()


class AdmmCallback(Callback):
    """Pulls the planned layers towards low rank while they train; see ``hodec.Admm`` for how.

    Args:
        plan: the layers, their methods and ranks; or the file of a saved plan, as LightningCLI can name it.
        stop_when_converged: end the fit then (``min_epochs`` still holds).
        evaluate: module -> accuracy, for modules without a ``forward`` or whose validation batches are not (images,
            labels).
        learner, covariances, root: as for ``hodec.Admm``.
        bn_batches: before each validation BatchNorm's running statistics are measured anew, on the last so many
            training batches (those since a restart, if there were fewer). Weights that ADMM has made small move fast at
            a high learning rate, and running statistics lag behind; the training itself does not use them. 0: the
            statistics stay as the training left them.
        settings: the fields of ``hodec.admm.options.AdmmOptions``. ``track_truncated`` measures, each epoch, the
            accuracy that hard truncation would leave (one validation pass); where a callback such as
            EMAWeightAveraging ends the fit with averaged weights, of those.

    Attributes:
        latest: values that the last epoch reported, by the names under which they are logged.

    Raises (in ``on_fit_start``): PlanError, TrainingError: what cannot work, with the way out.

    Examples:
        >>> from pytorch_lightning import Trainer
        >>> net = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
        >>> plan = hodec.make_plan(net, 4, method="svd", example_input=torch.zeros(1, 64))
        >>> admm = hodec.AdmmCallback(plan, pull=0.8)
        >>> trainer = Trainer(max_epochs=50, callbacks=[admm], logger=False, accelerator="cpu")
    """

    def __init__(
        self,
        plan: Plan | str | Path,
        *,
        stop_when_converged: bool = True,
        evaluate: Callable[[Module], float] | None = None,
        learner: RankLearner | None = None,
        covariances: Mapping[str, InputCovariance] | None = None,
        root: str | None = None,
        bn_batches: int = 10,
        **settings: Unpack[AdmmSettings],
    ) -> None:
        if bn_batches < 0:
            raise ConfigError(f"bn_batches: {bn_batches} given; it is a number of batches, 0 or more")
        plan = plan if isinstance(plan, Plan) else Plan.load(plan)
        options = mode_options(**settings)  # this and the next refuse now, not when training begins
        penalty_of(options, list(plan))
        Projection(plan, learner, covariances)
        self.stop_when_converged, self.evaluate = stop_when_converged, evaluate
        self._track = options.track_truncated
        self._by_epoch = options.needs_epochs
        self._make = partial(Admm, plan=plan, learner=learner, covariances=covariances, root=root, **settings)
        self._admm: Admm | None = None
        self._restored: State | None = None
        self._bn_batches = bn_batches
        self._calls: RecentCalls | None = None
        self._expected: int | None = None  # optimizer steps of an epoch, as the trainer counts them
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

    def convert(self, batches: Iterable[Batch] | None = None, *, skeleton: nn.Module | None = None) -> nn.Module:
        """``Admm.convert``: the part of the module that the plan was made from, factorized."""
        return self.admm.convert(batches, skeleton=skeleton)

    def on_fit_start(self, trainer: Trainer, pl_module: Module) -> None:
        before = None  # goes on with its own fit
        if self._admm and trainer.global_step:
            before = {**self._admm.state_dict(), "expected": self._expected}
        state, self._restored = self._restored or before, None
        check_trainer(type(trainer.strategy).__name__, trainer.optimizers, str(trainer.precision))
        processes = Processes() if trainer.world_size == 1 else Processes.current()
        clipped = bool(trainer.gradient_clip_val)
        self._admm = self._make(pl_module, optimizer=trainer.optimizers, processes=processes, clipped=clipped)
        self._calls = RecentCalls(pl_module, self._bn_batches) if self._bn_batches else None
        self._expected = None
        if state is not None:
            self._admm.load_state_dict(state)
            self._expected = state.get("expected")
        if self._track and self.evaluate is None and forward_of(pl_module) is None:
            self._measure_no_more("the module has no forward")

    def on_train_start(self, trainer: Trainer, pl_module: Module) -> None:
        state, self._restored = self._restored, None
        if state is not None:  # strategies that divide weights restore callbacks after on_fit_start
            self.admm.load_state_dict(state)
            self._expected = state.get("expected")
        admm = self._follow(trainer)
        if not admm.steps:
            admm.steps = admm.epoch_began = trainer.global_step
        admm.start()
        self._stop_if_converged(trainer)  # the checkpoint was written just before the fit ended

    def on_train_batch_start(self, trainer: Trainer, pl_module: Module, batch: object, batch_idx: int) -> None:
        if self._calls and trainer.enable_validation and not _only_measures(trainer):
            every = trainer.val_check_batch  # batches; infinite where the data does not say how many it has
            after = batch_idx % every if trainer.check_val_every_n_epoch else math.inf  # counted over epochs
            if after + self._bn_batches >= every:
                self._calls.listen()

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: Module, optimizer: Optimizer) -> None:
        # Gradients are final here: unscaled, accumulated, reduced over processes, not yet clipped.
        if not _only_measures(trainer):
            self._follow(trainer).before_step(optimizer)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: Module, outputs: object, batch: object, batch_idx: int
    ) -> None:
        if _only_measures(trainer):
            return
        if self._calls:
            self._calls.close()
        self._follow(trainer).after_step()
        if trainer.is_last_batch:
            self.admm.update_at_epoch_end()  # before validation, whose checkpoints are to hold the new Z
        self._stop_if_converged(trainer)

    def on_validation_start(self, trainer: Trainer, pl_module: Module) -> None:
        if self._calls is None or trainer.state.fn != "fit":
            return
        why = self._calls.measure(self.admm.processes, trainer.precision_plugin.forward_context())
        if why:
            self._calls = None
            log.warning("BatchNorm's statistics are not measured anew before a validation: %s", why)

    def _follow(self, trainer: Trainer) -> Admm:
        """The ADMM, told where the trainer is."""
        batches = trainer.num_training_batches / trainer.accumulate_grad_batches
        if math.isinf(batches) and self._by_epoch:
            raise TrainingError(
                "the training data does not say how many batches an epoch has: give the interval in steps, {steps}",
                steps=Use("admm.update_every", "'100steps'"),
            )
        known = not math.isinf(batches) and trainer.lightning_module.automatic_optimization
        expected = math.ceil(batches) if known else None
        if expected != self._expected:
            self.admm.steps_per_epoch = self._expected = expected
        if self.admm.epoch != trainer.current_epoch:
            # set anew, as Lightning resumes from a checkpoint of an epoch's last batch without the hook of its end
            self.admm.epoch, self.admm.epoch_began = trainer.current_epoch, self.admm.steps
        return self.admm

    def _stop_if_converged(self, trainer: Trainer) -> None:
        if self.stop_when_converged and self.admm.status is Status.CONVERGED:
            trainer.should_stop = True

    def on_train_epoch_end(self, trainer: Trainer, pl_module: Module) -> None:
        if trainer.is_last_batch and not _only_measures(trainer):
            self.admm.count_epoch()
        report = {f"admm/{key}": value for key, value in self.admm.report().items()}
        if (accuracy := self._truncated_accuracy(trainer, pl_module)) is not None:
            report["admm/truncated_accuracy"] = accuracy
        layers = self.admm.layer_report()
        self.latest = {**report, "admm/layers": layers}
        # Equal in all processes; said so, or Lightning would warn that they might not be.
        pl_module.log_dict(report, sync_dist=True)
        per_layer = {f"admm/{key}/{name}": value for name, row in layers.items() for key, value in row.items()}
        for logger in trainer.loggers:
            logger.log_metrics(per_layer, step=trainer.global_step)

    def _truncated_accuracy(self, trainer: Trainer, pl_module: Module) -> float | None:
        if not self._track:
            return None
        measure = (
            partial(self.evaluate, pl_module) if self.evaluate else partial(validation_accuracy, trainer, pl_module)
        )
        try:
            with averaged(trainer, pl_module):
                return self.admm.truncated(measure)
        except HodecError:
            raise
        except Exception as error:  # whatever somebody's forward raises, which the training may never call
            if self.evaluate:
                raise
            self._measure_no_more(f"module(x) raised {type(error).__name__}: {error}")
            return None

    def _measure_no_more(self, why: str) -> None:
        self._track = False
        log.warning("the accuracy of the truncated net is not measured: %s; give evaluate=, module -> accuracy", why)

    def on_fit_end(self, trainer: Trainer, pl_module: Module) -> None:
        self.admm.finish()

    def state_dict(self) -> State:
        # whole, for Lightning writes what the first process gives
        return {**self._admm.state_dict(whole=True), "expected": self._expected} if self._admm else {}

    def load_state_dict(self, state_dict: State) -> None:
        self._restored = state_dict


def _only_measures(trainer: Trainer) -> bool:
    """Whether this epoch trains nothing: StochasticWeightAveraging measures BatchNorm's statistics in its last one."""
    return bool(getattr(trainer.fit_loop, "_skip_backward", False))
