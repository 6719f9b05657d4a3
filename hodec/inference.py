"""Running a net for what it gives: in evaluation mode, without gradients, batch by batch."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from hodec.layers.base import same_random_state

#: model inputs, or what loaders give: model inputs with labels behind them
Batch = Tensor | Sequence[Tensor]


@contextmanager
def inference(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; every module's mode and the random state are as before afterwards.

    Attention's fused inference path is off, because it hides its matrix products from hooks and counters.
    """
    fused = torch.backends.mha.get_fastpath_enabled()
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        torch.backends.mha.set_fastpath_enabled(False)
        with torch.no_grad(), same_random_state(model.parameters()):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)
        for module, training in modes.items():
            module.training = training


def uncompiled(model: nn.Module) -> nn.Module:
    """The model inside ``torch.compile``'s wrapper, which renames every layer."""
    inner: nn.Module = getattr(model, "_orig_mod", model)
    return inner


def run_batches(model: nn.Module, batches: Iterable[Batch], *, count: int = 1) -> int:
    """Run the model on each batch for what its layers do by the way; returns how many batches there were.

    Args:
        model: in the mode it is to run in.
        batches: model inputs, or tuples whose first ``count`` are the inputs and whose rest (labels) is not used; they
            are moved to the model's device.
        count: inputs that the model takes.
    """
    device, used = next((p.device for p in model.parameters()), torch.device("cpu")), 0
    for batch in batches:
        inputs = (batch,) if isinstance(batch, Tensor) else tuple(batch)[:count]
        model(*(x.to(device) for x in inputs))
        used += 1
    return used
