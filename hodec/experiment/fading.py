"""Retraining begins with the net as it was before conversion, and what conversion cut off fades out."""

import logging
from typing import cast

from pytorch_lightning import Callback, LightningModule, Trainer
from torch import nn

from hodec.experiment.lit import LitClassifier
from hodec.fade_in import FadeIn

log = logging.getLogger(__name__)


class FadeResidual(Callback):
    """Lets the share s of W - Z that is left, see ``hodec.FadeIn``, fall from 1 to 0 in a line over the first epochs.

    s depends on the optimizer steps done, so a checkpoint needs nothing of it. BatchNorm begins with the dense net's
    statistics, because those after conversion are of the factorized net. What is validated after an epoch is the net as
    it is trained, with its share of W - Z; the fit ends with the factorized net alone.

    Args:
        dense: the net before conversion.
        epochs: in which s falls to 0, from 1.

    Attributes:
        latest: s after the last epoch, by the name under which it is logged; empty once it was 0 before.
    """

    def __init__(self, dense: nn.Module, epochs: int) -> None:
        self.dense, self.epochs = dense, epochs
        self.latest: dict[str, object] = {}
        self._fade: FadeIn | None = None

    @property
    def fade(self) -> FadeIn:
        """That of the fit."""
        return cast(FadeIn, self._fade)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        # Before a checkpoint puts trained factors into the net: W - Z is of the converted ones.
        self._fade = FadeIn(cast(LitClassifier, pl_module).net, self.dense)
        self.fade.step(0)  # others look at the converted net before the first batch

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: object, batch_idx: int) -> None:
        if trainer.current_epoch == batch_idx == 0:
            statistics = dict(self.dense.named_buffers())  # conversion changes no others
            cast(LitClassifier, pl_module).net.load_state_dict(statistics, strict=False)
        self.fade.step(self._share(trainer))

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: object, batch: object, batch_idx: int
    ) -> None:
        self.fade.step(self._share(trainer))  # before validation

    def _share(self, trainer: Trainer) -> float:
        steps = -(-int(trainer.num_training_batches) // trainer.accumulate_grad_batches)
        return max(0.0, 1 - trainer.global_step / (self.epochs * steps))

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.latest = {"fade/share": self.fade.share} if trainer.current_epoch < self.epochs else {}

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.fade.share:
            log.warning(
                "retraining was ended with %.0f %% of what conversion cut off still in the net, which has gone now: "
                "give fewer fade_epochs",
                100 * self.fade.share,
            )
        self.fade.remove()
