"""BatchNorm's running statistics before a validation: those of the weights of now."""

import logging
from collections import deque
from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.hooks import RemovableHandle

from hodec.admm.processes import Processes
from hodec.conversion.batchnorm import fresh_statistics
from hodec.inputs import ModelInput

log = logging.getLogger(__name__)


class RecentCalls:
    """What the training called the net's parts with in its last batches, so that they can be called again.

    Whatever stands around the calls in somebody's training step (a transform, several nets, a loss) is of no account.
    Of nested modules it keeps the call of the outermost one. BatchNorms that do not train, as frozen ones in evaluation
    mode, are left alone.

    Args:
        model: the module that trains; a call of it that another forward stands in for (Lightning does so for DDP) is
            not kept.
        most: batches, the last ones.
    """

    def __init__(self, model: nn.Module, most: int) -> None:
        self._model, self._batches = model, deque[list[tuple[nn.Module, ModelInput]]](maxlen=most)
        self._handles: list[RemovableHandle] = []
        self._norms: dict[str, _BatchNorm] = {}

    def listen(self) -> None:
        """Begin a batch."""
        self.close()
        self._norms = {name: m for name, m in self._model.named_modules() if isinstance(m, _BatchNorm) and _trains(m)}
        norms, calls = set(self._norms.values()), list[tuple[nn.Module, ModelInput]]()
        self._batches.append(calls)
        inner = dict[nn.Module, set[nn.Module]]()
        for module in self._model.modules():
            below = set(module.modules())
            if not isinstance(module, _BatchNorm) and below & norms:
                inner[module] = below

        def keep(module: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]) -> None:
            stood_in = module is self._model and "forward" in vars(module)
            # A part of what was called runs within it, or once more for its gradients (activation checkpointing).
            if not stood_in and not any(module in inner[outer] - {outer} for outer, _ in calls):
                calls.append((module, ModelInput(args, dict(kwargs)).map(lambda x: x.detach().to("cpu", copy=True))))

        self._handles = [module.register_forward_pre_hook(keep, with_kwargs=True) for module in inner]

    def close(self) -> None:
        """End a batch."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def measure(self, processes: Processes, precision: AbstractContextManager[object]) -> str:
        """Measure the statistics on the batches that are kept, those of all processes together.

        Returns:
            Why it could not be done, and the statistics are as they were; empty otherwise.
        """
        calls = [call for batch in self._batches for call in batch]
        if not self._norms or not self._batches:
            return ""
        statistics, failure = self._statistics(), ""
        before = {name: one.clone() for name, one in statistics.items()}
        try:
            with precision, fresh_statistics(self._model, list(self._norms.values())):
                for module, given in calls:
                    given.to(next((p.device for p in module.parameters()), torch.device("cpu"))).run(module)
        except Exception as error:  # whatever somebody's forward raises when it is called once more
            failure = f"{type(error).__name__}: {error}"
        if not calls:
            failure = "the training step calls its layers one by one, and no module that holds BatchNorm and them"
        failures = processes.gather(failure)
        result = before if any(failures) else _mean(processes.gather(statistics))
        for name, one in statistics.items():
            one.copy_(result[name])
        return next(filter(None, failures), "")

    def _statistics(self) -> dict[str, Tensor]:
        each = ((f"{name}.{key}", one) for name, norm in self._norms.items() for key, one in norm.named_buffers())
        return {name: one for name, one in each if one.is_floating_point()}


def _trains(norm: _BatchNorm) -> bool:
    """Whether its statistics follow the training; a momentum of None is the mean of all of it, 0 is frozen."""
    return norm.training and norm.track_running_stats and bool(norm.momentum)


def _mean(each: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Over the processes."""
    return {name: torch.stack([one[name].cpu() for one in each]).mean(0) for name in each[0]}
