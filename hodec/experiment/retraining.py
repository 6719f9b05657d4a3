"""The rate of retraining: found by short descents, and a warning where it throws away what conversion has left."""

import logging
import math
from collections.abc import Callable, Sequence
from itertools import islice
from statistics import mean, stdev
from typing import NamedTuple

import torch
from pytorch_lightning import Callback, LightningModule, Trainer
from torch import Tensor

from hodec.experiment.context import RunContext
from hodec.experiment.data.loaders import train_loader, val_loader
from hodec.experiment.lit import LitClassifier, evaluate
from hodec.io.atomic import JsonObject
from hodec.text_table import accuracy

log = logging.getLogger(__name__)

# Steps of one descent: twice the memory of a momentum of 0.9, so that a rate that is too high shows.
STEPS = 20
# Batches that score where a descent ended: of 128 images each, the mean's standard error is 1/sqrt(512) of the spread.
SCORED = 4
# The rates that are tried: halves of the highest, down to a hundredth of it.
RATES = 8


class Rate(NamedTuple):
    """The highest learning rate of retraining.

    Attributes:
        lr: the rate.
        probes: descents that found it; 0 where it was given.
        end: ``lowest`` or ``highest`` of the rates tried, beyond which a better one may lie; else None.
        level: of the other rates, those whose losses these descents cannot tell from its own.
    """

    lr: float
    probes: int = 0
    end: str | None = None
    level: int = 0


def probed_rate(run: RunContext, module_at: Callable[[float], LitClassifier], *, highest: float) -> Rate:
    """Return the rate at which a short descent from the same start, on the same batches, ends at the lowest loss.

    Each descent is of STEPS steps whose rate falls to 0 in a line, as that of the training will; the rates rise by
    factors of two, and stop where the loss does not fall any more.

    Args:
        run: its training images and its seed are used.
        module_at: makes the module to be trained at a rate, each time anew.
        highest: rate that is not exceeded, that of the dense net.
    """
    config = run.config
    loader = train_loader(run.data, seed=config.seed, device=run.device, channels_last=config.trainer.channels_last)
    batches = list(islice(loader, STEPS + SCORED))
    each: dict[float, list[float]] = {}
    found: dict[float, float] = {}
    for rate in (highest / 2**halvings for halvings in reversed(range(RATES))):
        each[rate] = _descent(module_at(rate).to(run.device), batches)
        found[rate] = sum(each[rate]) / len(each[rate])
        best = min(found, key=found.__getitem__)
        if list(found).index(best) + 2 < len(found):  # where two in a row end higher, higher ones would too
            break
    end = {min(found): "lowest", max(found): "highest"}.get(best)
    level = sum(_level(losses, each[best]) for rate, losses in each.items() if rate != best)
    tried = ", ".join(f"{rate:.3g}: {loss:.4g}" for rate, loss in found.items())
    words = f"; {level} of the others are level with it" if level else ""
    log.info("rate of retraining %.3g%s; losses after %d steps at each rate: %s", best, words, STEPS, tried)
    if end:
        log.warning(
            "the %s rate of those tried was the best, so that a better one may lie beyond: optimizer.retrain_lr=RATE "
            "gives one",
            end,
        )
    return Rate(best, len(found), end, level)


def _level(losses: Sequence[float], best: Sequence[float]) -> bool:
    """Whether the mean of the paired differences lies within twice its standard error; False where that is unknown."""
    apart = [a - b for a, b in zip(losses, best, strict=True)]
    if len(apart) < 2 or not all(map(math.isfinite, apart)):
        return False
    return mean(apart) <= 2 * stdev(apart) / math.sqrt(len(apart))


def _descent(module: LitClassifier, batches: Sequence[tuple[Tensor, Tensor]]) -> list[float]:
    """The losses of the last SCORED batches after a descent on the others; infinite where it broke down."""
    scored = min(SCORED, max(1, len(batches) // 2))  # of a set of few batches
    training, held = batches[:-scored] or batches, batches[-scored:]
    optimizer = module.make_optimizer()
    highest = [group["lr"] for group in optimizer.param_groups]
    module.train()
    module.on_fit_start()
    for step, (x, y) in enumerate(training):
        for group, rate in zip(optimizer.param_groups, highest, strict=True):
            group["lr"] = rate * (1 - step / len(training))
        optimizer.zero_grad()
        module.loss(module.net(x), x, y).backward()
        optimizer.step()
    with torch.no_grad():
        losses = [float(module.loss(module.net(x), x, y)) for x, y in held]
    module.on_fit_end()
    return [loss if math.isfinite(loss) else math.inf for loss in losses]


class WarnOfLoss(Callback):
    """Says so when the first epoch of retraining has thrown away what conversion had left."""

    def __init__(self, run: RunContext, words: str, *, lost: float = 0.05) -> None:
        """``words``: the way out; ``lost``: share of the images, more than which the other epochs have to win back."""
        self.run, self.words, self.lost = run, words, lost
        self.before: float | None = None

    def state_dict(self) -> JsonObject:
        return {"before": self.before}

    def load_state_dict(self, state_dict: JsonObject) -> None:
        self.before = state_dict["before"]

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        validation = val_loader(self.run.data, device=pl_module.device)
        if validation is not None and trainer.global_step == 0 and isinstance(pl_module, LitClassifier):
            self.before = evaluate(pl_module.net, validation, pl_module.device)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        after = trainer.callback_metrics.get("val/accuracy")
        if trainer.current_epoch or after is None or self.before is None:
            return
        # twice the standard error of a difference of two such shares
        chance = 2 * math.sqrt(2 * self.before * (1 - self.before) / max(1, len(self.run.data.val or ())))
        if self.before - float(after) > max(self.lost, chance):
            log.warning(
                "the first epoch of retraining has taken the validation accuracy from %s to %s: its rate throws away "
                "what conversion has left; %s",
                accuracy(self.before),
                accuracy(float(after)),
                self.words,
            )
