"""How good a net is on held-out data: by a score of the user's own, or by its agreement with the dense net."""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from hodec.calibration.data import LEAST_SAMPLES
from hodec.compare import tensors_in
from hodec.errors import DataError
from hodec.inference import Batch, inference, run_on
from hodec.inputs import as_input, required

Evaluate = Callable[[nn.Module, Sequence[Batch]], float]
"""A score of a net on batches, higher is better."""


def split(batches: Sequence[Batch], model: nn.Module) -> tuple[list[Batch], list[Batch]]:
    """Batches to fit to, and about a quarter of them, the last ones, that quality is measured on.

    Raises:
        DataError: fewer than two batches, or fewer than eight samples.
    """
    samples = sum(as_input(batch, model, most=required(model)).batch for batch in batches)
    if len(batches) < 2 or samples < LEAST_SAMPLES:
        raise DataError(
            f"data: {len(batches)} batches of {samples} samples in all given; allowed: at least two batches, of which "
            f"one is held out, and {LEAST_SAMPLES} samples; 256 are a good number"
        )
    kept = len(batches) - max(1, len(batches) // 4)
    return list(batches[:kept]), list(batches[kept:])


def score(evaluate: Evaluate, model: nn.Module, batches: Sequence[Batch]) -> float:
    """What ``evaluate`` says of a net.

    Raises:
        DataError: something that is no finite number.
    """
    with inference(model):
        found = evaluate(model, batches)
    try:
        value = float(found)
    except (TypeError, ValueError, RuntimeError):  # None, a text, a tensor of several numbers
        value = math.nan
    if not math.isfinite(value):
        raise DataError(f"evaluate gave {found!r}; allowed: a finite number, higher is better")
    return value


class Agreement:
    """A score: how far a net gives what the dense net gives, 1 where it gives the same.

    Of outputs (N, classes): the share whose largest entry is the dense net's; of others 1 - norm(difference) /
    norm(dense).
    """

    def __init__(self, dense: nn.Module) -> None:
        self.dense = dense

    def __call__(self, model: nn.Module, batches: Sequence[Batch]) -> float:
        """The score of ``model``."""
        same = missed = whole = 0.0
        count = 0
        with inference(self.dense):
            for batch in batches:
                found, wanted = (_output(net, batch) for net in (model, self.dense))
                if wanted.ndim == 2 and wanted.shape[1] > 1:
                    same += float((found.argmax(1) == wanted.argmax(1)).sum())
                    count += len(wanted)
                else:
                    missed += float((found - wanted).double().square().sum())
                    whole += float(wanted.double().square().sum())
        if count:
            return same / count
        if missed:
            return 1 - math.sqrt(missed / whole) if whole else 0.0
        return 1.0


@torch.no_grad()
def _output(net: nn.Module, batch: Batch) -> Tensor:
    """The first tensor of floating point that a net gives."""
    device = next((p.device for p in net.parameters()), torch.device("cpu"))
    found = tensors_in(run_on(net, as_input(batch, net, most=required(net)).to(device)))
    for tensor in found:
        if tensor.is_floating_point():
            return tensor
    raise DataError("the net gives no tensor of numbers to compare: give evaluate, a function of the net and batches")
