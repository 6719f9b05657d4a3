"""BatchNorm's running statistics after conversion."""

import copy
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn

from hodec.inference import Batch, observation, run_batches


@torch.no_grad()
def reestimate_batchnorm(model: nn.Module, batches: Iterable[Batch]) -> int:
    """Replace BatchNorm's running statistics by averages over ``batches``; returns how many were used.

    Without any batch the statistics stay as they are.

    Truncation changes every layer's output distribution, and most of the accuracy lost right after it comes
    back when the statistics are right again.

    Args:
        model: any net; modes are restored. A net without BatchNorm is left alone.
        batches: model inputs in any form that ``make_plan`` takes, or (images, labels); moved to the model's device.

    Raises:
        DataError: the model does not run on a batch; the statistics are as they were.

    Examples:
        >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))
        >>> hodec.reestimate_batchnorm(net, [torch.randn(16, 3, 8, 8) for _ in range(4)])
        4
    """
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.track_running_stats]
    if not norms:
        return 0
    with fresh_statistics(model, norms):
        return run_batches(model, batches)


@contextmanager
def fresh_statistics(model: nn.Module, norms: Sequence[nn.modules.batchnorm._BatchNorm]) -> Iterator[None]:
    """Evaluation mode without gradients, in which some BatchNorms average the statistics of what they are given.

    Compiled parts run as written. Those that are given nothing keep their statistics; all do where the block raises.
    """
    before = [(norm.momentum, copy.deepcopy(norm.state_dict())) for norm in norms]
    done = False
    try:
        with observation(model):
            for norm in norms:
                norm.reset_running_stats()
                norm.momentum = None  # cumulative average
                norm.training = True
            yield
        done = True
    finally:
        for norm, (momentum, state) in zip(norms, before, strict=True):
            norm.momentum = momentum
            if not done or not norm.num_batches_tracked:
                norm.load_state_dict(state)
