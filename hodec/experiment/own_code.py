"""Code of one's own that a run calls: its net, optimizer, scheduler, callbacks and logger, from their dotted names."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from pytorch_lightning import Callback
from torch import Tensor, nn

from hodec.errors import ConfigError, literal
from hodec.experiment.config.options import SCHEDULER_WORDS, OptimizerSettings, TrainerSettings
from hodec.experiment.config.own import CustomLogger, CustomModel, CustomOptimizer
from hodec.experiment.config.targets import maker
from hodec.experiment.data.images import ImageData

Scheduled = Callable[[torch.optim.Optimizer], dict[str, Any]]


def own_net(model: CustomModel, data: ImageData) -> nn.Module:
    """The net of a dotted name, in training mode, for the images of a run.

    Raises:
        ConfigError: what is made is no net, or does not give one score a class for such an image.
    """
    sizes = {"in_channels": data.in_channels, "num_classes": data.num_classes, "image_size": min(data.image_size)}
    net = maker(model.node(), **sizes)()
    if not isinstance(net, nn.Module):
        raise ConfigError(f"model._target_: {model._target_} makes a {type(net).__name__}; allowed: a torch.nn.Module")
    image = torch.zeros(2, data.in_channels, *data.image_size)
    try:
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            scores = net.eval()(image)
    except Exception as error:  # whatever the net raises
        raise ConfigError(
            f"model._target_: {model._target_} does not take images of {tuple(image.shape)} ({type(error).__name__}: "
            f"{error}); it gets in_channels, num_classes and image_size where it has such arguments"
        ) from error
    given = tuple(scores.shape) if isinstance(scores, Tensor) else type(scores).__name__
    if given != (2, data.num_classes):
        raise ConfigError(
            f"model._target_: {model._target_} gives {given} for 2 images; allowed: one score a class, a tensor of "
            f"(2, {data.num_classes})"
        )
    return net.train()


def optimizer_maker(option: OptimizerSettings) -> Callable[..., torch.optim.Optimizer] | None:
    """What makes an optimizer of one's own for a net, with lr and other arguments; None for those of hodec.

    Raises:
        ConfigError: when called, what is made is no optimizer.
    """
    if not isinstance(option, CustomOptimizer):
        return None

    def make(net: nn.Module, **options: object) -> torch.optim.Optimizer:
        node = {**option.node(), **options}
        made = maker(node)(cast(Iterable[nn.Parameter], net.parameters()))
        if not isinstance(made, torch.optim.Optimizer):
            raise ConfigError(
                f"optimizer._target_: {option._target_} makes a {type(made).__name__}; allowed: an Optimizer"
            )
        return made

    return make


def scheduler_maker(option: OptimizerSettings) -> Scheduled | None:
    """What makes Lightning's entry of a scheduler for an optimizer; None where ``schedule`` is followed."""
    if not isinstance(option.scheduler, Mapping):
        return None
    node = dict(option.scheduler)
    words = {key: node.pop(key) for key in SCHEDULER_WORDS if key in node}
    return lambda optimizer: {"scheduler": maker(node)(optimizer), **words}


def own_callbacks(settings: TrainerSettings) -> list[Callback]:
    """The callbacks of one's own, made anew.

    Raises:
        ConfigError: one is no callback of pytorch_lightning.
    """
    nodes = cast(Sequence[Mapping[str, object]], settings.callbacks or ())
    made = [maker(node)() for node in nodes]
    for one in made:
        if not isinstance(one, Callback):
            raise ConfigError(
                f"trainer.callbacks: a {literal(type(one).__name__)} given; allowed: a pytorch_lightning.Callback"
            )
    return made


def own_logger(option: CustomLogger, folder: Path) -> Any:
    """The logger of one's own.

    Raises:
        ConfigError: it does not log.
    """
    made = maker(option.node(), folder=str(folder), save_dir=str(folder))()
    if not all(callable(getattr(made, name, None)) for name in ("log_metrics", "finalize")):
        raise ConfigError(
            f"logger._target_: {option._target_} makes a {type(made).__name__}; allowed: an object with "
            "log_metrics(metrics, step) and finalize(status)"
        )
    return made
