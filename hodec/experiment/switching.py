"""The dense training ends early where the stable ranks of the planned layers have come to rest."""

import logging
from collections.abc import Mapping
from typing import cast

from pytorch_lightning import Callback, LightningModule, Trainer

from hodec.conversion.swap import stable_ranks
from hodec.experiment.lit import LitClassifier
from hodec.io.atomic import JsonObject
from hodec.plan.plan import Plan

log = logging.getLogger(__name__)


class SwitchWhenStable(Callback):
    """Ends a fit after the first epoch in which the stable ranks moved by less than ``below``; see ``change_of``.

    Ranks at the end of an epoch of the warm-up are no measure: at its low rates nothing moves. So the first epoch that
    can be the last is the second one, and the first one behind the warm-up.

    Source: Wang et al., Cuttlefish, MLSys 2023, arXiv 2305.02538, which goes by the derivative of the stable ranks over
    the epochs. It waits for every layer and takes the stable ranks as the planned ones; here the mean over the planned
    layers decides, and their ranks stay those of the plan.

    Attributes:
        latest: values of the last epoch, by the names under which they are logged.
        after: epochs of the fit, where it was ended; else None.
    """

    def __init__(self, plan: Plan, *, below: float, warmup_epochs: int = 0) -> None:
        self.plan, self.below, self.warmup_epochs = plan, below, warmup_epochs
        self.latest: dict[str, object] = {}
        self.after: int | None = None
        self.left = 0  # epochs that the fit was to have besides
        self._ranks: dict[str, float] = {}  # at the end of the last epoch
        self._change: float | None = None

    def state_dict(self) -> JsonObject:
        return {"after": self.after, "left": self.left, "ranks": dict(self._ranks), "change": self._change}

    def load_state_dict(self, state_dict: JsonObject) -> None:
        self.after, self.left = state_dict["after"], state_dict["left"]
        self._ranks, self._change = state_dict["ranks"], state_dict["change"]

    def facts(self) -> JsonObject:
        """How the fit ended: ``after`` how many epochs, how many were ``left``, and the last ``change``."""
        return {"after": self.after, "left": self.left, "change": self._change}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.after is not None:  # the checkpoint was written just before the fit ended
            trainer.should_stop = True

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        net = cast(LitClassifier, pl_module).net
        # One process decides for all: sums may round otherwise in another.
        ranks: dict[str, float] = trainer.strategy.broadcast(stable_ranks(net, self.plan))
        self._change = change_of(self._ranks, ranks) if self._ranks else None
        self._ranks = ranks
        self.latest = {"switch/stable_rank": sum(ranks.values()) / len(ranks)}
        if self._change is None:
            return
        self.latest["switch/change"] = self._change
        done, epochs = trainer.current_epoch + 1, trainer.max_epochs or 0
        if self._change < self.below and self.warmup_epochs < done < epochs:
            self.after, self.left = done, epochs - done
            trainer.should_stop = True
            log.info(
                "the dense training ends after %d of %d epochs: stable ranks moved by %.3g, less than "
                "admm.switch_below=%g; the other %d go to retraining",
                done, epochs, self._change, self.below, self.left,
            )  # fmt: skip


def change_of(before: Mapping[str, float], now: Mapping[str, float]) -> float:
    """The mean over the layers of |r' - r| / r, r and r' the stable rank before and now; r counts as 1 from 0 to 1."""
    return sum(abs(now[name] - rank) / max(1.0, rank) for name, rank in before.items()) / len(before)
