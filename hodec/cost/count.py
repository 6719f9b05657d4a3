"""Parameters and multiply-adds (MACs) of a model, and how often and at which size each layer runs."""

from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial

from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from hodec.cost.ops import FORMULAS, ParameterFlops
from hodec.formats.calls import CallSites
from hodec.formats.layer_types import layer_type_of
from hodec.inference import observation, settled_input
from hodec.inputs import Inputs


@dataclass(frozen=True)
class Cost:
    """``params``: elements of all parameters; ``macs``: multiply-adds of one image (1 MAC = 2 FLOPs)."""

    params: int
    macs: int


def count_cost(model: nn.Module, example_input: Inputs) -> Cost:
    """Parameters and MACs of one image; see ``count_by_parameter``."""
    return count_by_parameter(model, example_input)[0]


def count_by_parameter(model: nn.Module, example_input: Inputs) -> tuple[Cost, dict[str, int]]:
    """Parameters and MACs of one image, and the MACs of each parameter's products by name.

    Counted are convolutions, matrix products (einsum, bilinear and grouped ones too), attention, and recurrent layers,
    by torch's own counter and ``hodec.cost.ops``. What is computed element by element takes no MACs. Products of two
    activations belong to no parameter. Merging cores is done once per set of weights and not counted; see
    ``FactorizedLayer``.
    """
    inputs = settled_input(model, example_input)
    with observation(model):
        inputs.run(model)
        counter = FlopCounterMode(display=False, custom_mapping=FORMULAS)
        by_parameter = ParameterFlops(model.named_parameters(), counter.flop_registry)
        # attention as plain products: some torch versions do not count its fused kernels
        with sdpa_kernel(SDPBackend.MATH), counter, by_parameter:
            inputs.run(model)
    params, batch = sum(p.numel() for p in model.parameters()), inputs.batch
    shares = {name: flops // 2 // batch for name, flops in by_parameter.flops.items()}
    return Cost(params, counter.get_total_flops() // 2 // batch), shares


def trace_call_sites(model: nn.Module, example_input: Inputs) -> dict[str, CallSites]:
    """The calls of each convolution, linear layer and embedding for one image.

    A layer that is called twice has both calls; one that is never called (its weight used functionally, or not at
    all) is absent.
    """
    inputs, seen = settled_input(model, example_input), dict[str, CallSites]()
    batch = inputs.batch

    def remember(
        module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor], output: Tensor, *, name: str
    ) -> None:
        if not output.numel():  # e.g. an expert that gets no token
            return
        call = _call(module, args[0] if args else next(iter(kwargs.values())), output, batch)
        seen[name] = seen[name].also(call) if name in seen else call

    with observation(model), ExitStack() as hooks:
        for name, module in model.named_modules():
            if isinstance(module, nn.Linear | nn.Embedding | nn.modules.conv._ConvNd) or layer_type_of(module):
                hook = module.register_forward_hook(partial(remember, name=name), with_kwargs=True)
                hooks.callback(hook.remove)
        inputs.run(model)
    return seen


def _call(module: nn.Module, given: Tensor, output: Tensor, batch: int) -> CallSites:
    """One call: linear layers and embeddings visit positions, convolutions have sizes, and may run on more images."""
    if isinstance(module, nn.modules.conv._ConvNd):
        dims = len(module.kernel_size)
        images = given.shape[0] if given.ndim == dims + 2 else 1
        return CallSites(((max(1, images // batch), tuple(given.shape[-dims:]), tuple(output.shape[-dims:])),))
    positions = max(1, output.numel() // output.shape[-1] // batch)
    return CallSites.once((positions,), (positions,))
