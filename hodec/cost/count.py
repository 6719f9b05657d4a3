"""Parameters and multiply-adds (MACs) of a model, and how often and at which size each layer runs."""

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial

from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from hodec.errors import PlanError
from hodec.formats.calls import CallSites
from hodec.formats.layer_types import layer_type_of
from hodec.inference import inference

Inputs = Tensor | Sequence[Tensor]


@dataclass(frozen=True)
class Cost:
    """``params``: elements of all parameters; ``macs``: multiply-adds of one image (1 MAC = 2 FLOPs)."""

    params: int
    macs: int


def as_inputs(example_input: Inputs) -> tuple[Tensor, ...]:
    """The example input as a tuple of tensors whose first axis is the batch.

    Raises:
        PlanError: not tensors with a batch axis.
    """
    inputs = (example_input,) if isinstance(example_input, Tensor) else tuple(example_input)
    if not inputs or not all(isinstance(x, Tensor) and x.ndim >= 1 and len(x) >= 1 for x in inputs):
        raise PlanError("example_input must be a tensor, or several, with the batch as its first axis")
    return inputs


def count_cost(model: nn.Module, example_input: Inputs) -> Cost:
    """Parameters and MACs of one image, by torch's own counter (convolutions, matrix products, attention).

    Merging cores is done once per set of weights and not counted; see ``FactorizedLayer``.
    """
    inputs = as_inputs(example_input)
    params = sum(p.numel() for p in model.parameters())
    with inference(model):
        model(*inputs)
        # attention as plain products: some torch versions do not count its fused kernels
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            model(*inputs)
    return Cost(params, counter.get_total_flops() // 2 // len(inputs[0]))


def trace_call_sites(model: nn.Module, example_input: Inputs) -> dict[str, CallSites]:
    """The calls of each convolution, linear layer and embedding for one image.

    A layer that is called twice has both calls; one that is never called (its weight used functionally, or not at
    all) is absent.
    """
    inputs, seen = as_inputs(example_input), dict[str, CallSites]()
    batch = len(inputs[0])

    def remember(
        module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor], output: Tensor, *, name: str
    ) -> None:
        call = _call(module, args[0] if args else next(iter(kwargs.values())), output, batch)
        seen[name] = seen[name].also(call) if name in seen else call

    with inference(model), ExitStack() as hooks:
        for name, module in model.named_modules():
            if isinstance(module, nn.Linear | nn.Embedding | nn.modules.conv._ConvNd) or layer_type_of(module):
                hook = module.register_forward_hook(partial(remember, name=name), with_kwargs=True)
                hooks.callback(hook.remove)
        model(*inputs)
    return seen


def _call(module: nn.Module, given: Tensor, output: Tensor, batch: int) -> CallSites:
    """One call: linear layers and embeddings visit positions, convolutions have sizes, and may run on more images."""
    if isinstance(module, nn.modules.conv._ConvNd):
        dims = len(module.kernel_size)
        images = given.shape[0] if given.ndim == dims + 2 else 1
        return CallSites(((max(1, images // batch), tuple(given.shape[-dims:]), tuple(output.shape[-dims:])),))
    positions = output.numel() // output.shape[-1] // batch
    return CallSites.once((positions,), (positions,))
