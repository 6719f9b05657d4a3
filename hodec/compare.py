"""Whether an exported net still does what it did."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import fields, is_dataclass

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from hodec.errors import ConvertError
from hodec.inference import inference
from hodec.inputs import Inputs, ModelInput, as_input


def tensors_in(output: object) -> list[Tensor]:
    """All tensors of an output, however nested, in mappings and dataclasses of any class too."""
    found: list[Tensor] = []
    for leaf in tree_leaves(output):
        if isinstance(leaf, Tensor):
            found.append(leaf)
        elif isinstance(leaf, Mapping):
            found += tensors_in(list(leaf.values()))
        elif is_dataclass(leaf) and not isinstance(leaf, type):
            found += tensors_in([getattr(leaf, one.name) for one in fields(leaf)])
    return found


def distance(made: object, expected: object) -> float:
    """Largest relative distance norm(made - expected) / norm(expected) of any tensor; infinite where shapes differ."""
    pairs = tensors_in(made), tensors_in(expected)
    if [t.shape for t in pairs[0]] != [t.shape for t in pairs[1]]:
        return float("inf")
    return max((_relative(a, b) for a, b in zip(*pairs, strict=True)), default=0.0)


def _relative(made: Tensor, expected: Tensor) -> float:
    a, b = (t.detach().cpu().double().nan_to_num(nan=torch.inf) for t in (made, expected))
    norm, apart = float(b.norm()), float((a - b).norm())
    return apart / norm if norm else apart


def outputs_of(net: nn.Module, inputs: Inputs) -> list[Tensor]:
    """All tensors that a net returns in evaluation mode."""
    with inference(net):
        return tensors_in(as_input(inputs, net).run(net))


def verified(  # noqa: PLR0913
    what: str, run: Callable[..., object], net: nn.Module, like: ModelInput, sizes: Iterable[int], *, allowed: float
) -> float:
    """The largest distance between the outputs of ``run`` and those of ``net``, on inputs of these batch sizes.

    Args:
        run: takes the arguments of ``like``, of another batch size.

    Raises:
        ConvertError: one is above what is allowed.
    """
    worst = 0.0
    for size in sizes:
        inputs = like.with_batch(size)
        with torch.no_grad():
            error = distance(inputs.run(run), outputs_of(net, inputs))
        if not error <= allowed:
            raise ConvertError(
                f"{what} does not give the outputs of the model: at batch {size} they differ by {error:.2g} of their "
                f"norm (allowed {allowed:g}); verify=False writes it all the same"
            )
        worst = max(worst, error)
    return worst


def batch_sizes(inputs: ModelInput, dynamic: bool) -> tuple[int, ...]:
    """Batch sizes to verify with: the given one, and where the batch is free also 1 and another."""
    given = inputs.batch
    return tuple(dict.fromkeys((given, 1, given + 2))) if dynamic else (given,)
