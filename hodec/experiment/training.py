"""One fit of the pipeline: the trainer, its callbacks, rows per epoch, checkpoints, exact resume."""

import contextlib
import logging
import signal
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TypeVar, cast

import torch
from pytorch_lightning import Callback, LightningDataModule, LightningModule, Trainer, seed_everything
from pytorch_lightning.callbacks import RichProgressBar
from pytorch_lightning.utilities.exceptions import SIGTERMException

from hodec.admm.lightning import AdmmCallback
from hodec.errors import MachineError
from hodec.experiment.checkpoints import KeepCheckpoint
from hodec.experiment.config.schema import Config
from hodec.experiment.context import RunContext
from hodec.experiment.data.images import ImageData
from hodec.experiment.data.loaders import AnyLoader, train_loader, val_loader
from hodec.experiment.fading import FadeResidual
from hodec.experiment.lit import LitClassifier
from hodec.experiment.own_code import own_callbacks
from hodec.experiment.retraining import WarnOfLoss
from hodec.experiment.run_folder import checkpoint_epoch
from hodec.experiment.signals import Stopped, soft
from hodec.experiment.switching import SwitchWhenStable
from hodec.io.atomic import JsonObject

log = logging.getLogger(__name__)
T = TypeVar("T")

# What a phase has besides training: each has ``latest``, values that are in the row of an epoch.
PhaseCallback = AdmmCallback | SwitchWhenStable | FadeResidual

PHASES = ("pretrain", "admm", "dense", "retrain")
METRICS = ("train/loss", "train/accuracy", "val/loss", "val/accuracy")
# The numbers of a row that a person reads while waiting, in this order.
SHOWN = {
    "train/loss": "loss {:.4f}",
    "train/accuracy": "train {:.2%}",
    "val/accuracy": "val {:.2%}",
    "admm/primal_residual": "|W-Z|/|W| {:.4f}",
    "admm/truncated_accuracy": "truncated {:.2%}",
    "admm/rho": "rho {:.3g}",
    "switch/change": "stable ranks moved {:.3g}",
    "fade/share": "W-Z {:.0%}",
    "seconds": "{:.1f} s",
}


class LitData(LightningDataModule):
    """Loaders of one data set on the device and for the process that Lightning chose."""

    def __init__(self, data: ImageData, config: Config) -> None:
        super().__init__()
        self.data, self.config = data, config

    def _placed(self, loader: Callable[..., T]) -> Callable[..., T]:
        trainer = cast(Trainer, self.trainer)  # Lightning has set it when it asks for loaders
        return partial(
            loader,
            self.data,
            device=trainer.strategy.root_device,
            rank=trainer.global_rank,
            world_size=trainer.world_size,
            channels_last=self.config.trainer.channels_last,
        )

    def train_dataloader(self) -> AnyLoader:
        return self._placed(train_loader)(seed=self.config.seed)

    def val_dataloader(self) -> AnyLoader | list[AnyLoader]:
        return self._placed(val_loader)() or []


class SeedEpochs(Callback):
    """Random numbers of an epoch are a function of (seed, phase, epoch), so that a resumed epoch repeats itself."""

    def __init__(self, seed: int, phase: str) -> None:
        self.base = seed * 1000 + PHASES.index(phase) * 100_000_007

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        with quiet_lightning():
            seed_everything((self.base + trainer.current_epoch) % 2**32, verbose=False)


class RecordEpochs(Callback):
    """A row per epoch in metrics.jsonl, in the loggers, and as one line of the log."""

    def __init__(self, run: RunContext, phase: str, callback: PhaseCallback | None) -> None:
        self.run, self.phase, self.callback = run, phase, callback
        self.made = self.began = time.perf_counter()
        self.lr, self.earlier = 0.0, 0.0  # seconds of the phase before this start

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.began = time.perf_counter()
        self.lr = float(trainer.optimizers[0].param_groups[0]["lr"])

    def state_dict(self) -> JsonObject:
        now = time.perf_counter()
        return {"lr": self.lr, "seconds": now - self.began, "phase_seconds": self.earlier + now - self.made}

    def load_state_dict(self, state_dict: JsonObject) -> None:
        self.lr, self.began = state_dict["lr"], time.perf_counter() - state_dict["seconds"]  # of an epoch under way
        self.earlier = state_dict.get("phase_seconds", 0.0)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        epoch = trainer.current_epoch
        metrics = {key: float(trainer.callback_metrics[key]) for key in METRICS if key in trainer.callback_metrics}
        row: JsonObject = {"phase": self.phase, "epoch": epoch, "lr": self.lr, **metrics}
        row["seconds"] = round(time.perf_counter() - self.began, 3)
        if self.callback is not None:
            row |= self.callback.latest
        if not trainer.is_global_zero:
            return
        epochs = self.run.epochs(self.phase)
        try:
            self.run.folder.append_row(row)
        except OSError as error:
            # A full disk is no reason to lose the training, which is worth more than its curves.
            log.warning("a row of the curves could not be written (%s); training goes on", error)
        if not self.run.loggers.began:
            self.run.loggers.log_again(self.run.folder.rows()[: epochs[epoch]])
        self.run.loggers.log({key: value for key, value in row.items() if key != "epoch"}, epochs[epoch])
        log.info("%s", epoch_line(row, len(epochs)))


def epoch_line(row: JsonObject, epochs: int) -> str:
    """Return a row as one line of text, ``admm 3/15  loss 0.5000  val 91.23%  12.3 s``."""
    numbers = [text.format(row[key]) for key, text in SHOWN.items() if key in row]
    return "  ".join([f"{row['phase']} {row['epoch'] + 1}/{epochs}", *numbers])


def fit_phase(run: RunContext, phase: str, module: LitClassifier, *, callback: PhaseCallback | None = None) -> float:
    """Train ``module`` for the epochs of the phase, going on from the phase's checkpoint if there is one.

    Args:
        phase: one of PHASES.
        callback: what pulls the dense net towards its ranks, ends its training early, or fades it out.

    Returns:
        The seconds that earlier starts took to come to the checkpoint; 0 without one.

    Raises:
        TrainingError: NaN, or a setting that cannot work.
        CheckpointError: no readable checkpoint among those there are.
        Stopped: by Ctrl-C or SIGTERM.
    """
    config, folder, epochs = run.config, run.folder, len(run.epochs(phase))
    resume = folder.readable_checkpoint(phase)
    done = checkpoint_epoch(resume) if resume else 0
    folder.drop_rows(phase, done)
    if resume:
        log.info("going on with phase %s after %d of %d epochs", phase, done, epochs)
    callbacks: list[Callback] = [SeedEpochs(config.seed, phase)]
    if callback is not None:
        callbacks.append(callback)
    callbacks += own_callbacks(config.trainer)
    if phase == "retrain":
        callbacks.append(WarnOfLoss(run, _way_out(config)))
    record = RecordEpochs(run, phase, callback)
    callbacks += [record, KeepCheckpoint(folder, phase, config.trainer.checkpoint_minutes)]
    with quiet_lightning():
        trainer = make_trainer(config, epochs, callbacks)
        with soft(lambda number: number == signal.SIGTERM and trainer.received_sigterm):  # it ends the batch first
            _fit(trainer, module, LitData(run.data, config), phase=phase, resume=resume)
    return record.earlier


def _way_out(config: Config) -> str:
    """What to do about a rate of retraining that is too high."""
    optimizer = config.optimizer
    if optimizer.joint_schedule or optimizer.retrain_lr == "auto":
        return "lower optimizer.lr" if optimizer.retrain_lr is None else "lower optimizer.retrain_lr"
    return "lower optimizer.retrain_lr, or let optimizer.retrain_lr=auto find it"


def _fit(trainer: Trainer, module: LitClassifier, data: LitData, *, phase: str, resume: Path | None) -> None:
    try:
        # weights_only: a checkpoint holds tensors and plain values, and is never allowed to run code.
        trainer.fit(module, datamodule=data, ckpt_path=resume, weights_only=True)
    except torch.OutOfMemoryError as error:
        raise MachineError(f"out of memory in phase {phase} ({error}); lower data.batch_size") from error
    except Stopped as stop:
        raise Stopped(stop.number, f"in phase {phase}") from stop
    except SystemExit as stop:
        # Lightning ends the program with 1 after Ctrl-C, and with 0 (success!) after SIGTERM.
        number = signal.SIGTERM if isinstance(stop, SIGTERMException) else signal.SIGINT
        raise Stopped(number, f"in phase {phase}") from stop
    if trainer.received_sigterm:  # after the last batch, where Lightning looks no more
        raise Stopped(signal.SIGTERM, f"in phase {phase}")


# CPU capabilities, as torch names them, that multiply bfloat16 numbers as they are: x86 and ARM.
BFLOAT16_UNITS = ("avx512_bf16", "amx_bf16", "avx10_2", "bf16", "sve_bf16")


def warn_of_slow_precision(config: Config) -> None:
    """Say so when bfloat16 was asked for on a CPU that has to convert each number; older torch cannot tell."""
    known: dict[str, object] = getattr(torch.cpu, "get_capabilities", dict)()
    if config.trainer.precision == "bf16-mixed" and known and not any(known.get(name) for name in BFLOAT16_UNITS):
        log.warning(
            "trainer.precision=bf16-mixed: this CPU has no bfloat16 units; on such a one a step of ResNet-20 took 2.4 "
            "times as long as in float32: trainer.precision=32-true"
        )


def make_trainer(config: Config, epochs: int, callbacks: Sequence[Callback]) -> Trainer:
    """Return the Lightning trainer of one phase."""
    settings, bar = config.trainer, sys.stderr.isatty()
    return Trainer(
        max_epochs=epochs,
        accelerator=settings.accelerator,
        devices=settings.devices,
        num_nodes=settings.num_nodes,
        strategy=settings.strategy,
        precision=settings.precision,  # type: ignore[arg-type]
        gradient_clip_val=settings.gradient_clip_val,
        accumulate_grad_batches=settings.accumulate_grad_batches,
        deterministic=settings.deterministic,
        callbacks=[*callbacks, RichProgressBar()] if bar else list(callbacks),
        logger=False,  # rows go through RecordEpochs: two fits on one logger would start its steps again
        enable_checkpointing=True,
        enable_progress_bar=bar,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,  # the loaders shard by themselves
    )


@contextlib.contextmanager
def quiet_lightning() -> Iterator[None]:
    """Keep Lightning's notices of normal things (devices found, tips) out of the log; its warnings stay."""
    loggers = [logging.getLogger(name) for name in ("pytorch_lightning", "lightning.pytorch", "lightning_fabric")]
    levels = [logger.level for logger in loggers]
    normal = ("not have many workers", "LeafSpec", "smaller than the logging interval", "across ranks is zero")
    for logger in loggers:
        logger.setLevel(logging.WARNING)
    try:
        with warnings.catch_warnings():
            for words in normal:
                warnings.filterwarnings("ignore", f".*{words}.*")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
