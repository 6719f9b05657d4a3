"""AdmmTrainerCallback: Admm on the events of the Trainer of Hugging Face transformers."""

import logging
import math
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias, Unpack

import torch
from torch import nn

try:
    from transformers import TrainerCallback
except ImportError as error:
    raise ImportError("hodec.AdmmTrainerCallback needs transformers: pip install transformers") from error

from hodec.admm.core import Admm
from hodec.admm.options import AdmmSettings, mode_options
from hodec.admm.penalty import penalty_of
from hodec.admm.projection import Projection, RankLearner
from hodec.admm.stopping import Status
from hodec.calibration.input_covariance import InputCovariance
from hodec.errors import CheckpointError, TrainingError
from hodec.inference import Batch
from hodec.plan.plan import Plan

log = logging.getLogger(__name__)

# What the Trainer tells at an event: its arguments, state and control, the model, the optimizer.
Told: TypeAlias = Any

# File in a checkpoint's folder that holds the state of ADMM.
STATE_FILE = "hodec_admm.pt"


class AdmmTrainerCallback(TrainerCallback):  # type: ignore[misc,unused-ignore]
    """Pulls the planned layers towards low rank while a ``transformers.Trainer`` trains; see ``hodec.Admm`` for how.

    Its state is written into each checkpoint's folder, and read again by ``trainer.train(resume_from_checkpoint=..)``.

    Args:
        plan: the layers, their methods and ranks.
        evaluate: model -> accuracy, measured each epoch while the weights are truncated; by default nothing is.
        stop_when_converged: end the training then.
        resume: the folder to go on from, where it is not ``output_dir/checkpoint-STEP``.
        learner, covariances, root: as for ``hodec.Admm``.
        settings: the fields of ``hodec.admm.options.AdmmOptions``.

    Attributes:
        latest: what the last epoch reported; it stands in ``trainer.state.log_history``, too.

    Raises (when training begins): PlanError, TrainingError: what cannot work, with the way out; CheckpointError: a
        checkpoint without ADMM's state.
    """

    def __init__(
        self,
        plan: Plan,
        *,
        evaluate: Callable[[nn.Module], float] | None = None,
        stop_when_converged: bool = True,
        resume: str | Path | None = None,
        learner: RankLearner | None = None,
        covariances: Mapping[str, InputCovariance] | None = None,
        root: str | None = None,
        **settings: Unpack[AdmmSettings],
    ) -> None:
        options = mode_options(**settings)  # this and the next refuse now, not when training begins
        penalty_of(options, list(plan))
        Projection(plan, learner, covariances)
        self.evaluate, self.stop_when_converged, self.resume = evaluate, stop_when_converged, resume
        self._make = partial(Admm, plan=plan, learner=learner, covariances=covariances, root=root, **settings)
        self._admm: Admm | None = None
        self.latest: dict[str, float] = {}

    @property
    def admm(self) -> Admm:
        """The ADMM of the latest training.

        Raises:
            TrainingError: none has begun.
        """
        if self._admm is None:
            raise TrainingError("AdmmTrainerCallback holds no ADMM state before trainer.train has begun")
        return self._admm

    def convert(self, batches: Iterable[Batch] | None = None, *, skeleton: nn.Module | None = None) -> nn.Module:
        """``Admm.convert``: the part of the model that the plan was made from, factorized."""
        return self.admm.convert(batches, skeleton=skeleton)

    # -- events ----------------------------------------------------------------------------------------------------

    def on_train_begin(self, args: Told, state: Told, control: Told, **given: Told) -> None:
        if args.deepspeed or getattr(args, "fsdp", None):
            raise TrainingError(
                "DeepSpeed and FSDP of the Trainer split weights into flat pieces, in which ADMM finds no layers: "
                "leave them out, or train in a loop of your own with torch.distributed.fsdp.fully_shard and hodec.Admm"
            )
        loader = given["train_dataloader"]
        try:
            batches: float = len(loader)
        except TypeError:  # an IterableDataset: every DataLoader has __len__, and those of such raise
            batches = math.nan
        steps = None if math.isnan(batches) else math.ceil(batches / args.gradient_accumulation_steps)
        self._admm = self._make(given["model"], optimizer=given["optimizer"], steps_per_epoch=steps)
        if state.global_step:
            folder = Path(self.resume or Path(args.output_dir) / f"checkpoint-{state.global_step}")
            if not (folder / STATE_FILE).is_file():
                raise CheckpointError(
                    f"training goes on from step {state.global_step}, but {folder} has no {STATE_FILE}: give "
                    "AdmmTrainerCallback the folder that has one by resume="
                )
            self._admm.load_state_dict(torch.load(folder / STATE_FILE, map_location="cpu", weights_only=True))
        self._admm.start()

    def on_pre_optimizer_step(self, args: Told, state: Told, control: Told, **given: Told) -> None:
        self.admm.before_step()  # gradients are clipped already, so that the pull is not

    def on_step_end(self, args: Told, state: Told, control: Told, **given: Told) -> None:
        self.admm.after_step()
        self._stop(control)

    def on_epoch_end(self, args: Told, state: Told, control: Told, **given: Told) -> None:
        evaluate = partial(self.evaluate, given["model"]) if self.evaluate else None
        cut_short = (
            control.should_training_stop and self.admm.steps - self.admm.epoch_began != self.admm.steps_per_epoch
        )
        report = self.admm.report(evaluate) if cut_short else self.admm.end_epoch(evaluate)
        self.latest = {f"admm/{key}": value for key, value in report.items()}
        state.log_history.append({**self.latest, "epoch": state.epoch, "step": state.global_step})
        self._stop(control)

    def on_save(self, args: Told, state: Told, control: Told, **given: Told) -> None:
        if state.is_world_process_zero:
            torch.save(self.admm.state_dict(), Path(args.output_dir) / f"checkpoint-{state.global_step}" / STATE_FILE)

    def on_train_end(self, args: Told, state: Told, control: Told, **given: Told) -> None:
        self.admm.finish()

    def _stop(self, control: Told) -> None:
        if self.stop_when_converged and self.admm.status is Status.CONVERGED:
            control.should_training_stop = True
