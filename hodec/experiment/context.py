"""The context of a run: what all its phases share and none of them changes."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

import torch
from torch import Tensor

from hodec.errors import ConfigError, Use
from hodec.experiment.config.schema import Config
from hodec.experiment.data.images import ImageData
from hodec.experiment.data.loaders import train_loader
from hodec.experiment.loggers import Loggers
from hodec.experiment.run_folder import RunFolder
from hodec.ranks import RankRule


def device_of(config: Config) -> torch.device:
    """Return the device that the pipeline itself computes on: the GPU when training uses one."""
    wanted = config.trainer.accelerator
    return torch.device("cuda" if wanted != "cpu" and torch.cuda.is_available() else "cpu")


def check_machine(config: Config) -> None:
    """Refuse devices that this machine does not have, before any work is done.

    Raises:
        ConfigError: naming what there is.
    """
    wanted, count = config.trainer.accelerator, config.trainer.devices
    there = {"cuda": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available())}
    there["gpu"] = there["cuda"] or there["mps"]
    there["auto"] = there["gpu"] or count  # processes of the CPU are as many as one likes
    if count > there.get(wanted, count):
        found = f"{there[wanted]} of them" if there[wanted] else "none"
        raise ConfigError(
            f"{{wanted}}, {{count}}: this machine has {found}, as torch {torch.__version__} sees it; allowed here: "
            + ("{cpu}" if not there[wanted] else "{fewer}"),
            wanted=Use("trainer.accelerator", wanted),
            count=Use("trainer.devices", count),
            cpu=Use("trainer.accelerator", "cpu"),
            fewer=Use("trainer.devices", there[wanted]),
        )


@dataclass(frozen=True)
class RunContext:
    """What all phases of a run share.

    Attributes:
        config: the settings.
        data: the images.
        folder: the run folder, which keeps the result of each phase.
        loggers: they take the curves.
        rule: it chooses the ranks; None where a plan is given.
    """

    config: Config
    data: ImageData
    folder: RunFolder
    loggers: Loggers
    rule: RankRule | None

    @property
    def device(self) -> torch.device:
        return device_of(self.config)

    @property
    def example(self) -> Tensor:
        """One blank image, (1, C, H, W)."""
        return torch.zeros(1, self.data.in_channels, *self.data.image_size)

    @property
    def reads_weights(self) -> bool:
        """Whether the plan depends on trained weights."""
        return self.rule is not None and self.rule.reads_weights

    @property
    def pretrain_epochs(self) -> int:
        """Epochs without ADMM."""
        return self.config.pretraining

    @property
    def trained_before(self) -> bool:
        """Whether the dense net is a trained one when ADMM begins."""
        return self.config.init is not None or self.pretrain_epochs > 0

    def epochs(self, phase: str) -> range:
        """The epochs of a training phase, numbered over all phases of the run."""
        config, first = self.config, self.pretrain_epochs
        end = first + config.dense_epochs + config.retrain_epochs
        last = first + config.dense_epochs - self.folder.handed_over
        spans = {"pretrain": (0, first), "retrain": (last, end)}
        return range(*spans.get(phase, (first, last)))

    def training_images(self, batches: int) -> Iterator[Tensor]:
        """The first batches of training images, (N, C, H, W) each, on the device."""
        loader = train_loader(self.data, seed=self.config.seed, device=self.device)
        return (images for images, _ in islice(loader, batches))
