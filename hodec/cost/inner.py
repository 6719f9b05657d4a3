"""How much the weights inside recurrent modules, attention and experts run."""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from typing import cast

from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from hodec.formats.calls import CallSites
from hodec.formats.roles import Role
from hodec.inference import observation, settled_input
from hodec.inputs import Inputs
from hodec.layers.inner import RECURRENT, inner_weights

Given = Tensor | PackedSequence | None


def trace_inner_weights(model: nn.Module, example_input: Inputs) -> dict[str, tuple[Role, CallSites]]:
    """Path of each weight inside a module that is called -> what uses it, and its calls for one image.

    A weight visits a position for each row that it multiplies: a recurrent one for each time step of each sequence, an
    expert's for each token that is sent to an expert. One weight for queries, keys and values multiplies, by a third
    each, the rows of all three: where these are different tensors, only the rebuilt weight can do that.
    """
    inner = {name: m for name, m in model.named_modules() if inner_weights(m)}
    seen: dict[str, tuple[Role, CallSites]] = {}
    if not inner:
        return seen
    inputs = settled_input(model, example_input)

    def remember(
        module: nn.Module, args: Sequence[Given], kwargs: Mapping[str, Given], _: object, *, name: str
    ) -> None:
        for leaf, (role, rows) in _rows(module, args, kwargs).items():
            path, call = f"{name}.{leaf}" if name else leaf, CallSites.once(*[(rows // inputs.batch,)] * 2)
            if path in seen:
                before, calls = seen[path]
                role, call = (role if role is before else Role.PARAMETER), calls.also(call)
            seen[path] = role, call

    with observation(model), ExitStack() as hooks:
        for name, module in inner.items():
            hook = module.register_forward_hook(partial(remember, name=name), with_kwargs=True)
            hooks.callback(hook.remove)
        inputs.run(model)
    return seen


def _rows(module: nn.Module, args: Sequence[Given], kwargs: Mapping[str, Given]) -> dict[str, tuple[Role, int]]:
    """Weight -> what uses it and the rows that it multiplies in one call."""
    weights = inner_weights(module)
    if isinstance(module, nn.MultiheadAttention):
        names = ("query", "key", "value")
        query, key, value = (cast(Tensor, args[k] if k < len(args) else kwargs[name]) for k, name in enumerate(names))
        q, k, v = (x.numel() // x.shape[-1] for x in (query, key, value))
        joint = Role.PROJECTION if query is key and key is value else Role.PARAMETER
        rows = {"in_proj_weight": (q + k + v) // 3, "k_proj_weight": k, "v_proj_weight": v}
        return {
            leaf: (joint if leaf == "in_proj_weight" else role, rows.get(leaf, q)) for leaf, role in weights.items()
        }
    tensors = [x for x in (*args, *kwargs.values()) if isinstance(x, Tensor | PackedSequence)]
    if isinstance(module, RECURRENT):
        x = tensors[0].data if isinstance(tensors[0], PackedSequence) else tensors[0]
        count = x.numel() // x.shape[-1]
    else:
        chosen = [x for x in tensors if not x.data.is_floating_point()]  # the experts of each token
        count = chosen[0].data.numel() if chosen else tensors[0].data.numel() // tensors[0].data.shape[-1]
    return {leaf: (role, count) for leaf, role in weights.items()}
