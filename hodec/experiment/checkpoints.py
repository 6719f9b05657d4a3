"""Checkpoints of the phase under way: what a killed run goes on from, to the bit, at an epoch's end or within one."""

import logging
import os
import random
import time
from typing import cast

import numpy as np
import torch
from pytorch_lightning import LightningModule, Trainer
from pytorch_lightning.callbacks import Checkpoint

from hodec.admm.processes import Processes, check_equal
from hodec.errors import TrainingError
from hodec.experiment.data.loaders import AnyLoader
from hodec.experiment.lit import ASKED_EVERY
from hodec.experiment.run_folder import RunFolder, previous
from hodec.io.atomic import JsonObject
from hodec.io.tensors import not_numbers

log = logging.getLogger(__name__)


class KeepCheckpoint(Checkpoint):
    """Writes the state after each epoch, and within one after some minutes, whole or not at all; keeps the one before.

    It is a ``Checkpoint``, because Lightning runs those after all other callbacks. ``ModelCheckpoint`` itself ends the
    training when the disk is full, does not flush its files, and writes absolute paths into them.

    Args:
        minutes: between two checkpoints within an epoch; None: at its end only.
    """

    def __init__(self, folder: RunFolder, phase: str, minutes: float | None = None) -> None:
        self.path, self.phase, self.minutes = folder.checkpoint(phase), phase, minutes
        self.written = time.monotonic()
        self._restored: JsonObject = {}
        self._within: JsonObject = {}  # what is beside the weights at a moment within an epoch

    def state_dict(self) -> JsonObject:
        return self._within

    def load_state_dict(self, state_dict: JsonObject) -> None:
        self._restored = state_dict

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # Lightning forgets the loader's state where the optimizer has asked how many steps there are.
        if "loader" in self._restored:
            loader_of(trainer).load_state_dict(self._restored.pop("loader"))

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: object, batch_idx: int) -> None:
        if "random" in self._restored:
            restore_random_state(self._restored.pop("random"))

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: object, batch: object, batch_idx: int
    ) -> None:
        add_sums(trainer, self._restored.pop("sums", {}))
        # Gradients that were gathered for a later step are in no checkpoint.
        whole = (batch_idx + 1) % trainer.accumulate_grad_batches == 0
        if whole and not trainer.is_last_batch and self._is_due(trainer, batch_idx):
            loader = loader_of(trainer).state_dict()
            self._within = {"random": random_state(), "sums": sums_of(trainer), "loader": loader}
            self._write(trainer, pl_module, f"epoch {trainer.current_epoch}, batch {batch_idx}")
            self._within = {}

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._write(trainer, pl_module, f"epoch {trainer.current_epoch}")

    def _is_due(self, trainer: Trainer, batch_idx: int) -> bool:
        if self.minutes is None:
            return False
        due = time.monotonic() - self.written >= 60 * self.minutes
        if trainer.world_size == 1:
            return due
        return batch_idx % ASKED_EVERY == 0 and bool(trainer.strategy.broadcast(due))

    def _write(self, trainer: Trainer, module: LightningModule, where: str) -> None:
        check_numbers(trainer, module)
        if trainer.world_size > 1:
            weights = {name: w for name, w in module.named_parameters() if w.requires_grad}
            steps = int(trainer.num_training_batches)
            check_equal(Processes.current(), weights, steps=steps, where=f"phase {self.phase}, {where}")
        self.path.parent.mkdir(parents=True, exist_ok=True)
        part = self.path.with_suffix(".part")
        self.written = time.monotonic()
        try:
            trainer.save_checkpoint(part)  # all processes take part, one writes
            if not trainer.is_global_zero:
                return
            with part.open("rb+") as f:
                os.fsync(f.fileno())
        except OSError as error:
            # A full disk is no reason to lose the training: the checkpoint before stays where it is.
            log.warning("checkpoint %s could not be written (%s); training goes on", self.path, error)
            part.unlink(missing_ok=True)
            return
        if self.path.exists():
            self.path.replace(previous(self.path))
        part.replace(self.path)


# -- what is beside the weights within an epoch: plain values and tensors, which load with weights_only=True ----------


def loader_of(trainer: Trainer) -> AnyLoader:
    """The loader of the training images."""
    return cast(AnyLoader, trainer.train_dataloader)


def random_state() -> JsonObject:
    """The global random numbers of Python, NumPy and torch, on the CPU and on each GPU."""
    kind, keys, *rest = np.random.get_state()
    return {
        "python": random.getstate(),
        "numpy": [kind, torch.from_numpy(np.asarray(keys, dtype=np.int64)), *rest],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def restore_random_state(state: JsonObject) -> None:
    """Let random numbers go on from ``random_state``; those of GPUs that are not there are left out."""
    version, inner, gauss = state["python"]
    random.setstate((version, tuple(inner), gauss))
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(state["torch"].cpu())
    if state["cuda"] and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all([one.cpu() for one in state["cuda"]])


def sums_of(trainer: Trainer) -> dict[str, list[torch.Tensor]]:
    """The sums behind the means of the epoch so far, which Lightning keeps and forgets with the process.

    Of several processes each has its own: all take part, and one number of each is kept.
    """
    results = trainer.fit_loop.epoch_loop._results
    pairs = {key: (one.value, one.cumulated_batch_size) for key, one in results.items()}
    gather = trainer.strategy.all_gather if trainer.world_size > 1 else torch.clone
    return {key: [gather(one).reshape(-1).cpu() for one in pair] for key, pair in pairs.items()}


def add_sums(trainer: Trainer, sums: JsonObject) -> None:
    """Add the sums of the batches before a restart to those since, to each process its own."""
    for key, one in trainer.fit_loop.epoch_loop._results.items():
        if key in sums:
            value, count = (_own(trainer, given) for given in sums[key])
            one.value += value.to(one.value.device)
            one.cumulated_batch_size += count.to(one.cumulated_batch_size.device)


def _own(trainer: Trainer, each: torch.Tensor) -> torch.Tensor:
    """This process's number of one for each; where there were more or fewer, the first has what they add up to."""
    each = each.reshape(-1)
    if len(each) == trainer.world_size:
        return each[trainer.global_rank]
    return each.sum() if trainer.is_global_zero else torch.zeros_like(each[0])


def check_numbers(trainer: Trainer, module: LightningModule) -> None:
    """Refuse a state that no training recovers from, before it takes the place of a good one.

    The loss alone does not tell: on a GPU it is looked at every few steps, and the last step changes the weights after
    it. All processes look, and all raise.

    Raises:
        TrainingError: a weight is NaN or Inf, or a buffer or what the optimizer remembers is NaN.
    """
    bad = [name for name, weight in module.named_parameters() if not bool(weight.isfinite().all())]
    bad += not_numbers(dict(module.named_buffers()))
    memory = {weight: kept for optimizer in trainer.optimizers for weight, kept in optimizer.state.items()}
    bad += [f"the optimizer's memory of {name}" for name, w in module.named_parameters() if not_numbers(memory.get(w))]
    if trainer.strategy.reduce_boolean_decision(bool(bad), all=False):
        raise TrainingError(
            f"{', '.join(bad[:3]) or 'a weight of another process'} holds NaN or Inf after epoch "
            f"{trainer.current_epoch}: training broke down. Lower optimizer.lr, add optimizer.warmup_epochs=5 or "
            "trainer.gradient_clip_val=1; the checkpoint of the epoch before is kept"
        )
