"""Multiply-adds of the operators that torch's counter has no formula for, and which parameters operators read."""

import math
from bisect import bisect_right
from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor
from torch._ops import OpOverload, OpOverloadPacket
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

Shape = Sequence[int]
Formula = Callable[..., int]


def _rnn_layer(x: Shape, w_ih: Shape, w_hh: Shape, *_: object, **__: object) -> int:
    """One direction of one recurrent layer; a packed batch has its steps in one axis."""
    return 2 * math.prod(x[:-1]) * (math.prod(w_ih) + math.prod(w_hh))


def _rnn(x: Shape, weights: Sequence[Shape], *_: object, **__: object) -> int:
    """All layers and directions: each weight matrix is multiplied by once a step, biases are added."""
    return 2 * math.prod(x[:-1]) * sum(math.prod(weight) for weight in weights if len(weight) > 1)


def _first(a: Shape, *_: object, **__: object) -> int:
    """Each number of the first argument is multiplied once."""
    return 2 * math.prod(a)


def _addmm(_: Shape, a: Shape, b: Shape, *__: object, **___: object) -> int:
    """Also of stacked matrices, whose products are summed."""
    return 2 * math.prod(a) * b[-1]


def _grouped_mm(a: Shape, b: Shape, *_: object, **__: object) -> int:
    """Each row (or column) of one side belongs to one of the matrices of the other."""
    groups = a[0] if len(a) > len(b) else 1
    return 2 * math.prod(a) * b[-1] // groups


def _trilinear(a: Shape, b: Shape, c: Shape, *_: object, out_shape: Shape, **__: object) -> int:
    """As ``nn.Bilinear`` calls it: (n, i), (o, i, j), (n, j) -> (n, o), the first two multiplied first."""
    return 2 * out_shape[0] * (math.prod(b) + b[0] * b[-1])


def _embedding_bag(weight: Shape, indices: Shape, *rest: object, **named: object) -> int:
    """Rows are added up; each is multiplied only where samples have weights, as the seventh argument says."""
    scaled = named.get("per_sample_weights", rest[4] if len(rest) > 4 else None)
    return 2 * math.prod(indices) * weight[-1] if scaled is not None else 0


_FORMULAS: dict[str, Formula] = {
    "mkldnn_rnn_layer": _rnn_layer,
    "_cudnn_rnn": _rnn,
    "miopen_rnn": _rnn,
    "_lstm_mps": lambda x, _, weights, *rest, **named: _rnn(x, weights),
    "mv": _first,
    "addmv": lambda _, matrix, *rest, **named: _first(matrix),
    "dot": _first,
    "_addmm_activation": _addmm,
    "addbmm": _addmm,
    "_grouped_mm": _grouped_mm,
    "_trilinear": _trilinear,
    "_embedding_bag": _embedding_bag,
    "_embedding_bag_forward_only": _embedding_bag,
}

FORMULAS: dict[OpOverloadPacket, Formula] = {
    getattr(torch.ops.aten, name): formula
    for name, formula in _FORMULAS.items()
    if hasattr(torch.ops.aten, name)  # a torch older than the operator
}
"""Operator -> FLOPs from the shapes of its arguments, as ``FlopCounterMode(custom_mapping=..)`` takes them."""


COPIES = (torch.ops.aten.clone, torch.ops.aten._to_copy)


class ParameterFlops(TorchDispatchMode):
    """Adds up the FLOPs of the products with each parameter.

    A parameter is known by its memory, so that slices, transposes and reshapes of it are known too, and its latest copy
    (another memory order or type); one on the meta device, which has no memory, by its storage. An operator that reads
    several shares its FLOPs among them by size.

    Args:
        parameters: name and parameter, each parameter once.
        formulas: operator -> FLOPs, ``FlopCounterMode.flop_registry``.
    """

    supports_higher_order_operators = True

    def __init__(self, parameters: Iterable[tuple[str, Tensor]], formulas: Mapping[object, Formula]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.formulas, self.flops = formulas, dict[str, int]()
        parameters = list(parameters)
        self.blank = {_memory(p): name for name, p in parameters if p.is_meta}
        spans = sorted(
            (p.data_ptr(), p.data_ptr() + p.nbytes, name) for name, p in parameters if p.nbytes and p.data_ptr()
        )
        self.spans, self.starts = spans, [span[0] for span in spans]
        self.copies: dict[str, Tensor] = {}  # kept, so that nothing else takes their memory
        self.copied: dict[int, str] = {}

    def __torch_dispatch__(
        self,
        func: OpOverload,
        types: Sequence[type],
        args: Sequence[Tensor] = (),
        kwargs: Mapping[str, object] | None = None,
    ) -> object:
        out, operator = func(*args, **(kwargs or {})), getattr(func, "overloadpacket", None)
        if operator in COPIES and (name := self._name(args[0])):
            if name in self.copies:
                self.copied.pop(_memory(self.copies[name]), None)
            self.copies[name], self.copied[_memory(out)] = out, name
        elif formula := self.formulas.get(operator):
            read = {self._name(x): math.prod(x.shape) for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
            read.pop("", None)
            flops = formula(*args, **(kwargs or {}), out_val=out) if read else 0
            for name, size in read.items():
                self.flops[name] = self.flops.get(name, 0) + flops * size // sum(read.values())
        return out

    def _name(self, x: Tensor) -> str:
        """The name of the parameter that ``x`` is a part of; empty for others, and for vectors such as biases."""
        if x.ndim < 2:
            return ""
        if x.is_meta:
            return self.blank.get(_memory(x)) or self.copied.get(_memory(x), "")
        at = bisect_right(self.starts, x.data_ptr()) - 1
        if at >= 0 and x.data_ptr() < self.spans[at][1]:
            return self.spans[at][2]
        return self.copied.get(_memory(x), "")


def _memory(x: Tensor) -> int:
    storage = x.untyped_storage()
    return storage._cdata if x.is_meta else storage.data_ptr()
