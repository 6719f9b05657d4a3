"""The accuracy that hard truncation would leave, measured while training goes on."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import islice
from typing import Any, TypeAlias

import torch
from torch import Tensor

from hodec.inference import inference

# Trainer and LightningModule of whichever Lightning is in use.
Trainer: TypeAlias = Any
Module: TypeAlias = Any


def validation_accuracy(trainer: Trainer, module: Module) -> float | None:
    """Top-1 accuracy, 0..1, of ``module(x)`` over the validation batches (x, y); None if there is nothing to measure.

    As many batches as the trainer's own validation takes, those of all processes together. The user's random
    numbers stay where they are: iterating a DataLoader would draw from them.
    """
    loaders = trainer.val_dataloaders
    if loaders is None:
        return None
    loaders = list(loaders) if isinstance(loaders, list | tuple) else [loaders]
    counts = torch.zeros(2, device=module.device, dtype=torch.float64)  # right, all
    gpus = [module.device] if module.device.type == "cuda" else []
    with torch.random.fork_rng(devices=gpus), inference(module):
        for loader, most in zip(loaders, trainer.num_val_batches, strict=False):
            for batch in islice(loader, None if most == math.inf else int(most)):
                if not _is_labelled(batch):
                    return None
                counts += _right_and_all(trainer, module, batch)
    right, count = trainer.strategy.reduce(counts, reduce_op="sum").tolist()
    return right / count if count else None


def _right_and_all(trainer: Trainer, module: Module, batch: object) -> Tensor:
    """How many of a batch are classified rightly, and how many there are; precision as in validation."""
    x, y = trainer.strategy.batch_to_device(trainer.precision_plugin.convert_input(batch), module.device)
    with trainer.precision_plugin.forward_context():
        scores = module(x)
    if not (isinstance(scores, Tensor) and scores.ndim == 2 and scores.shape[1] > 1):
        raise ValueError(f"its output {tuple(getattr(scores, 'shape', ()))} is no scores (images, classes)")
    right = (scores.argmax(dim=-1) == y).sum().double()
    return torch.stack([right, torch.full_like(right, len(y))])


def _is_labelled(batch: object) -> bool:
    if not isinstance(batch, list | tuple) or len(batch) != 2:
        return False
    y = batch[1]
    return isinstance(y, Tensor) and y.ndim == 1 and not y.is_floating_point()


def forward_of(module: Module) -> Callable[..., object] | None:
    """The ``forward`` of somebody's LightningModule; None where it has only the one that raises."""
    forward: Callable[..., object] = type(module).forward
    return None if forward.__module__.split(".")[0] in ("torch", "pytorch_lightning", "lightning") else forward


@contextmanager
def averaged(trainer: Trainer, module: Module) -> Iterator[None]:
    """Within the block the module has the averaged weights that a WeightAveraging callback will end the fit with."""
    for callback in trainer.callbacks:
        if getattr(callback, "_average_model", None) is not None and hasattr(callback, "_swap_models"):
            callback._swap_models(module)
            try:
                yield
            finally:
                callback._swap_models(module)
            return
    yield
