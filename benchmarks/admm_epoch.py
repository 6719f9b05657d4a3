"""Whole epochs with the Lightning callback beside plain ones: on fake images, same net, same batches."""

import logging
import warnings
from collections.abc import Callable
from typing import Any

import torch
from pytorch_lightning import Callback, LightningModule, Trainer
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.rows import Row, Target
from benchmarks.settings import Settings
from benchmarks.timing import Times
from hodec.admm.lightning import AdmmCallback
from hodec.cost.timing import clock
from hodec.experiment.lit import LitClassifier
from hodec.experiment.training import quiet_lightning
from hodec.models import build_model
from hodec.ranks import Manual, make_plan

NET, BATCH = "resnet20", 64
TARGET = Target("<=", 1.05)


class Stopwatch(Callback):
    """From the start of the first epoch to the end of training, what all callbacks do then included; put it first."""

    def __init__(self) -> None:
        self.began, self.seconds = 0.0, 0.0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.began = clock()()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.seconds = clock()() - self.began


def epochs(group: str, settings: Settings) -> Row:
    """An epoch under ADMM over a plain one, each a fit of its own, in turns; a Z-update at its start and at its end."""
    steps, rounds = (4, 1) if settings.quick else (24, 5)
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(steps * BATCH, 3, 32, 32, generator=generator)
    labels = torch.randint(0, 10, (steps * BATCH,), generator=generator)
    data = DataLoader(TensorDataset(images, labels), batch_size=BATCH)
    plan = make_plan(_net(), Manual(16), example_input=images[:1], n_modes=1, exclude=["conv1", "linear"])
    kinds: dict[str, Callable[[], list[Callback]]] = {
        "plain": list,
        "admm": lambda: [AdmmCallback(plan, stop_when_converged=False)],
    }
    fit(data, [])  # warm-up
    samples: dict[str, list[float]] = {kind: [] for kind in kinds}
    for turn in range(rounds):
        for kind in list(kinds)[:: 1 if turn % 2 else -1]:
            samples[kind].append(fit(data, kinds[kind]()))
    times = Times({kind: tuple(seconds) for kind, seconds in samples.items()})
    return Row(
        group,
        f"epoch of {steps} steps of {NET} (batch {BATCH}) under ADMM",
        "plain epoch",
        **times.beside("admm", "plain", inverse=True),
        target=TARGET,
        note=f"{len(plan)} layers, callback with update_every of one epoch, the first Z counted too; ours over the "
        "peer's, less is better; CIFAR-10 has 391 steps of 128, over which the two updates spread thinner",
    )


def _net() -> Any:
    torch.manual_seed(0)
    return build_model(NET, in_channels=3, num_classes=10)


def fit(data: Any, callbacks: list[Callback]) -> float:
    """Seconds of one epoch from the same first weights."""
    module, watch = LitClassifier(_net(), options={"lr": 1e-3, "momentum": 0.9}, schedule="constant"), Stopwatch()
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    with quiet_lightning():
        warnings.filterwarnings("ignore", ".*but have no `val_dataloader`.*")
        trainer = Trainer(
            max_epochs=1,
            accelerator="cpu",
            devices=1,
            callbacks=[watch, *callbacks],
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            num_sanity_val_steps=0,
        )
        trainer.fit(module, data)
    return watch.seconds
