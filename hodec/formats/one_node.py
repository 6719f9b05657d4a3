"""Modules that ``torch.fx.symbolic_trace`` takes down as one node, as it does torch's own layers."""

from typing import cast

from torch import nn
from torch.fx import Proxy, Tracer


class OneNode(nn.Module):
    """Base of such modules."""

    def __call__(self, *args: object, **kwargs: object) -> object:
        """The output; one node of the graph where the arguments are those of a tracer."""
        traced = [one for one in (*args, *kwargs.values()) if isinstance(one, Proxy)]
        if not traced:
            return super().__call__(*args, **kwargs)
        tracer = cast(Tracer, traced[0].tracer)
        return tracer.create_proxy("call_module", tracer.path_of_module(self), args, kwargs)
