"""A LightningModule as a user would write it, its data and its trainer: nothing in it knows ADMM."""

import copy
import logging
import math
import warnings
from collections.abc import Callable
from typing import Any

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from hodec.admm.lightning import AdmmCallback
from hodec.plan.plan import Plan
from hodec.ranks import Manual, make_plan

LAYERS = ("conv1", "conv2", "fc1")
BATCHES = 4  # per epoch
SGD = {"lr": 0.05, "momentum": 0.9}


class Net(nn.Module):
    """Three layers to factorize and a head; (N, 3, 8, 8) -> (N, 5)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 12, 3, padding=1)
        self.conv2 = nn.Conv2d(12, 12, 3, padding=1)
        self.dropout = nn.Dropout(0.1)
        self.fc1 = nn.Linear(48, 12)
        self.head = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.conv2(F.relu(self.conv1(x))))
        return self.head(F.relu(self.fc1(self.dropout(F.avg_pool2d(x, 4).flatten(1)))))


def new_net(seed: int = 0) -> Net:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Net()


def plan_of(net: nn.Module, ranks: Any = 3, **settings: Any) -> Plan:
    given = ranks if isinstance(ranks, dict) else {"conv*": ranks, "fc1": ranks}
    return make_plan(net, Manual(given), example_input=torch.zeros(1, 3, 8, 8), include=list(given), **settings)


def samples(count: int = 8 * BATCHES) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(1)
    return torch.randn(count, 3, 8, 8, generator=g), torch.randint(0, 5, (count,), generator=g)


def batches(*, shuffle: bool = False, batch_size: int = 8) -> DataLoader[Any]:
    return DataLoader(TensorDataset(*samples()), batch_size=batch_size, shuffle=shuffle)


# Lightning's advice, which is not about ADMM; every other warning fails a test.
HARMLESS = (
    "does not have many workers",
    "LeafSpec",
    "smaller than the logging interval",
    "but have no `val_dataloader`",
    "callbacks used to create the checkpoint",
    "The dirpath has changed",
    "returned `None`",
)

MakeOptimizer = Callable[[nn.Module], Any]


def sgd(module: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(module.parameters(), **SGD)


class Users(pl.LightningModule):
    """Somebody's own module: cross entropy, any optimizer."""

    def __init__(self, net: nn.Module, optimizer: MakeOptimizer = sgd, *, loss_factor: float = 1.0) -> None:
        super().__init__()
        self.backbone, self.make_optimizer, self.loss_factor = net, optimizer, loss_factor

    def forward(self, x: Tensor) -> Tensor:
        return self.backbone(x)

    def training_step(self, batch: Any, index: int) -> Tensor:
        x, y = batch
        return self.loss_factor * F.cross_entropy(self(x), y)

    def validation_step(self, batch: Any, index: int) -> None:
        x, y = batch
        self.log("val_loss", F.cross_entropy(self(x), y), sync_dist=True)

    def configure_optimizers(self) -> Any:
        return self.make_optimizer(self)


def fit(
    module: pl.LightningModule,
    *callbacks: pl.Callback,
    epochs: int = 1,
    data: Any = None,
    val: Any = None,
    resume: Any = None,
    **options: Any,
) -> pl.Trainer:
    """Train on one CPU thread without anything on the terminal."""
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    settings = {"accelerator": "cpu", "devices": 1, "logger": False, "enable_checkpointing": False, **options}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for harmless in HARMLESS:
            warnings.filterwarnings("ignore", f".*{harmless}.*")
        trainer = pl.Trainer(
            max_epochs=epochs,
            callbacks=list(callbacks),
            enable_progress_bar=False,
            enable_model_summary=False,
            num_sanity_val_steps=0,
            **settings,
        )
        trainer.fit(module, batches() if data is None else data, val, ckpt_path=resume)
    return trainer


class Probe(pl.Callback):
    """Calls ``look(trainer)`` before each optimizer step; put it after the ADMM callback."""

    def __init__(self, look: Callable[[pl.Trainer], Any]) -> None:
        self.look, self.seen = look, []

    def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: Any, optimizer: Any) -> None:
        self.seen.append(self.look(trainer))


def admm(net: nn.Module, rho: Any = "auto", *, ranks: Any = 3, **options: Any) -> AdmmCallback:
    return AdmmCallback(plan_of(net, ranks), **{"rho": rho, "track_truncated": False, **options})


def distance(a: Tensor, b: Tensor) -> float:
    return float((a - b).detach().norm())


def cosine(optimizer: torch.optim.Optimizer, steps: int) -> Any:
    """A schedule that moves the learning rate at every step."""
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: 0.55 + 0.45 * math.cos(math.pi * min(1, step / steps))
    )
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class Flat(Users):
    """Its loss has no say: what moves the weights is ADMM alone."""

    def training_step(self, batch, index):
        return 0 * super().training_step(batch, index)


class Covered(pl.Callback):
    """The share of its way to Z - U that each layer covers in each epoch; put it behind the ADMM callback."""

    def __init__(self, callback):
        self.callback, self.shares, self.reported = callback, [], []

    def on_train_epoch_start(self, trainer, module):
        admm = self.callback.admm
        self.start = {
            n: (w.detach().clone(), admm.states[n].z - admm.states[n].u)
            for n, w in admm.weights.items()
            if n in admm.states
        }

    def on_train_batch_end(self, trainer, module, *rest):
        """Behind the ADMM callback the Z-update is done already: the weights are those that it saw."""
        if trainer.is_last_batch:
            weights = self.callback.admm.weights
            ways = [
                1 - distance(weights[n], t) / distance(w, t)
                for n, (w, t) in self.start.items()
                if distance(w, t) > 0.01
            ]
            self.shares.append(min(ways) if ways else None)

    def on_train_epoch_end(self, trainer, module):
        self.reported.append(self.callback.latest.get("admm/pull"))


def covered(module, callback, **options):
    seen = Covered(callback)
    fit(module, callback, seen, **options)
    return seen


def plain_sgd(module):
    return torch.optim.SGD(module.parameters(), lr=0.05)


def gone_on(stopped, net, make, *, until):
    """A copy of a net, and its Admm by ``make`` that goes on from ``stopped``, which has done ``until`` steps."""
    again = copy.deepcopy(net)
    resumed = make(again)
    resumed.optimizer.load_state_dict(copy.deepcopy(stopped.optimizer.state_dict()))
    resumed.load_state_dict(copy.deepcopy(stopped.state_dict()))
    if until % BATCHES == 0:
        resumed.end_epoch()
    return again, resumed
