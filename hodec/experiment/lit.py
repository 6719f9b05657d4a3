"""LitClassifier: loss, accuracy, optimizer. It knows no ADMM and no format; LitData feeds it."""

import math
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from pytorch_lightning import LightningModule
from pytorch_lightning.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from hodec.distillation import FeatureDistillation
from hodec.errors import ConfigError, MachineError, TrainingError
from hodec.inference import inference, laid_out
from hodec.layers.plain import copied
from hodec.optim.factor_sgd import FactorSGD, factorized_layers

# What makes the optimizer of a net.
OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "sgd": lambda net, **options: torch.optim.SGD(net.parameters(), **options),
    "adamw": lambda net, **options: torch.optim.AdamW(net.parameters(), **options),
    "muon": partial(FactorSGD, factors="muon"),
    "scaled_gd": partial(FactorSGD, factors="scaled_gd"),
}

# The fraction of the schedule that is done, 0..1 -> the factor on the learning rate.
SCHEDULES: dict[str, Callable[[float], float]] = {
    "constant": lambda done: 1.0,
    "linear": lambda done: 1 - done,
    "cosine": lambda done: 0.5 * (1 + math.cos(math.pi * done)),
    "step": lambda done: 0.1 ** ((done >= 0.5) + (done >= 0.75)),
}

# Batches from one question that training waits for to the next: on a GPU, whether the loss is a number; of several
# processes, whether a checkpoint is due. On a CPU, and of a process alone, every batch is asked.
ASKED_EVERY = 50


class LitClassifier(LightningModule):
    """A classifier under cross entropy, optionally distilled from a teacher.

    Args:
        net: images (N, C, H, W) -> scores (N, classes).
        optimizer: ``sgd``, ``adamw``, ``muon`` or ``scaled_gd``; see ``FactorSGD`` for the last two. Or what
            makes one of a net and ``options``.
        options: keyword arguments of that optimizer (lr, momentum, weight_decay, ..); its lr is 0.1 by default.
        schedule: ``cosine``, ``linear``, ``step`` (x0.1 at 1/2 and 3/4) or ``constant``, over the whole fit, per step.
            Or what makes Lightning's entry of a scheduler (``scheduler``, ``interval``, ..) of an optimizer.
        warmup_epochs: epochs of linear warm-up from 0, where the schedule begins.
        span: the part of the schedule that this fit covers, (0, 1) for all of it.
        label_smoothing: 0..1.
        teacher: the net to distil from; a copy of it is run in evaluation mode and not saved with this module.
        distill_weight: weight of the distillation loss, 0..1. Source: Hinton, Vinyals, Dean, arXiv 1503.02531, 2015.
        temperature: of the distillation, above 0.
        feature_weight: weight of the distances of the factorized layers' outputs from the teacher's.
        channels_last: memory order of the net's weights.
        compiled: train through ``torch.compile``; parameters, checkpoints and validation are those of ``net`` itself.
            Equal up to rounding, except for random numbers drawn inside the net (dropout), which are others.
    """

    def __init__(  # noqa: PLR0913
        self,
        net: nn.Module,
        *,
        optimizer: str | Callable[..., torch.optim.Optimizer] = "sgd",
        options: Mapping[str, object] | None = None,
        schedule: str | Callable[[torch.optim.Optimizer], dict[str, Any]] = "cosine",
        warmup_epochs: float = 0,
        span: tuple[float, float] = (0.0, 1.0),
        label_smoothing: float = 0.0,
        teacher: nn.Module | None = None,
        distill_weight: float = 0.0,
        temperature: float = 4.0,
        feature_weight: float = 0.0,
        channels_last: bool = False,
        compiled: bool = False,
    ) -> None:
        super().__init__()
        known = callable(optimizer) or optimizer in OPTIMIZERS
        if not known or not (callable(schedule) or schedule in SCHEDULES):
            raise ConfigError(
                f"optimizer.name={optimizer}, optimizer.schedule={schedule}: there are {', '.join(OPTIMIZERS)}, and "
                f"{', '.join(SCHEDULES)}"
            )
        self.net = laid_out(net, torch.channels_last) if channels_last else net
        self.optimizer, self.schedule, self.span = optimizer, schedule, span
        self.warmup_epochs = 0 if span[0] else warmup_epochs
        self.options = {"lr": 0.1, **(options or {})}
        self.label_smoothing, self.distill_weight, self.temperature = label_smoothing, distill_weight, temperature
        # Hidden in tuples: neither is a part of this module's parameters or checkpoints.
        self._compiled = (torch.compile(self.net),) if compiled else ()
        self.feature_weight = feature_weight if factorized_layers(self.net) else 0.0
        teachers = (teacher,) if teacher is not None and max(distill_weight, self.feature_weight) > 0 else ()
        self._teacher = tuple(copied(each).eval().requires_grad_(False) for each in teachers)
        self._features = tuple(FeatureDistillation(self.net, t) for t in self._teacher if self.feature_weight)

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.net(x))

    def on_fit_end(self) -> None:
        for features in self._features:
            features.remove()

    def on_fit_start(self) -> None:
        for teacher in self._teacher:
            teacher.to(self.device)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        x, y = batch
        scores = self._trained(x)
        loss = self.loss(scores, x, y)
        due = x.device.type == "cpu" or batch_idx % ASKED_EVERY == 0
        if due and not bool(torch.isfinite(loss)):
            raise TrainingError(
                f"the loss is {loss.item()} at epoch {self.current_epoch}, step {self.global_step}: training broke "
                "down. Lower optimizer.lr, add optimizer.warmup_epochs=5 or trainer.gradient_clip_val=1; the "
                "checkpoint of the last whole epoch is kept"
            )
        self._log("train", loss, scores, y)
        return loss

    def _trained(self, x: Tensor) -> Tensor:
        """Return the scores of a training batch; all batches have one size, so a compiled net is compiled once."""
        if not self._compiled:
            return self.net(x)  # type: ignore[no-any-return]
        from torch._dynamo.exc import TorchDynamoException

        try:
            return self._compiled[0](x)  # type: ignore[no-any-return]
        except TorchDynamoException as error:
            lines = [line.strip() for line in str(error).splitlines() if line.strip()]
            reason = " ".join(lines[:2]) or type(error).__name__  # who raised it, and what
            raise MachineError(
                f"trainer.compile=true: torch cannot compile the net here ({reason}); give trainer.compile=false "
                "or install what it needs: a C++ compiler on a cpu, Triton on a gpu"
            ) from error

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        x, y = batch
        scores = self.net(x)
        self._log("val", F.cross_entropy(scores.float(), y), scores, y)

    def loss(self, scores: Tensor, x: Tensor, y: Tensor) -> Tensor:
        """What training descends: cross entropy, mixed with the distances from the teacher, which sees ``x``."""
        loss = F.cross_entropy(scores.float(), y, label_smoothing=self.label_smoothing)
        for teacher in self._teacher:
            with torch.no_grad():
                target = F.log_softmax(teacher(x).float() / self.temperature, dim=1)
            student = F.log_softmax(scores.float() / self.temperature, dim=1)
            # Gradients of softened targets shrink with 1 / T^2; undo that so the weight keeps its meaning.
            distance = F.kl_div(student, target, reduction="batchmean", log_target=True) * self.temperature**2
            loss = (1 - self.distill_weight) * loss + self.distill_weight * distance
        for features in self._features:  # the teacher has just seen the batch
            loss = loss + self.feature_weight * features.loss()
        return loss

    def _log(self, split: str, loss: Tensor, scores: Tensor, y: Tensor) -> None:
        accuracy = (scores.argmax(dim=1) == y).float().mean()
        values = {f"{split}/loss": loss.detach(), f"{split}/accuracy": accuracy}
        self.log_dict(values, on_step=False, on_epoch=True, batch_size=len(y), prog_bar=True, sync_dist=True)

    def make_optimizer(self) -> torch.optim.Optimizer:
        """A new optimizer of the net, at its highest rate."""
        make = self.optimizer if callable(self.optimizer) else OPTIMIZERS[self.optimizer]
        return make(self.net, **self.options)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        optimizer = self.make_optimizer()
        if callable(self.schedule):
            return cast(OptimizerLRScheduler, {"optimizer": optimizer, "lr_scheduler": self.schedule(optimizer)})
        schedule = SCHEDULES[self.schedule]
        total = max(1, int(self.trainer.estimated_stepping_batches))
        epochs = self.trainer.max_epochs or 1
        warmup = int(total * min(1.0, self.warmup_epochs / epochs)) if epochs > 0 else 0
        begin, end = self.span

        def factor(step: int) -> float:
            if step < warmup:
                return (step + 1) / (warmup + 1)
            done = min(1.0, (step - warmup) / max(1, total - warmup))
            return schedule(begin + (end - begin) * done)

        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": LambdaLR(optimizer, factor), "interval": "step"}}


def evaluate(net: nn.Module, batches: Iterable[tuple[Tensor, Tensor]], device: torch.device | str = "cpu") -> float:
    """Return the top-1 accuracy of a net, 0..1; see ``hits``."""
    right = hits(net, batches, device)
    return int(right.sum()) / len(right)


def hits(net: nn.Module, batches: Iterable[tuple[Tensor, Tensor]], device: torch.device | str = "cpu") -> Tensor:
    """Return which images a net classifies rightly, bool (N,) on the CPU, in evaluation mode and float32.

    The net moves to ``device``.

    Raises:
        TrainingError: no batches, or scores that are not finite.
    """
    right = []
    net = net.to(device)
    with inference(net):
        for x, y in batches:
            scores = net(x.to(device))
            if not bool(torch.isfinite(scores).all()):
                raise TrainingError("the net gives NaN or Inf on the evaluation data: it cannot be scored")
            right.append(scores.argmax(dim=1).cpu() == y.cpu())
    if not right:
        raise TrainingError("the evaluation data has no batches")
    return torch.cat(right)
