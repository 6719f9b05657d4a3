"""A model file run on calibration data, with weights to try in place of its own: what its layers are fitted by.

The file becomes a trial graph whose weights are inputs, so that one session serves every weight that is tried, and
each of whose layers adds a shift to its outputs, another input. What is fed there stands for a file that would first
have to be written.
"""

import logging
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import cast

import numpy as np
import onnx_ir as ir
import torch
import torch.nn.functional as F
from onnx_ir.passes.common import RemoveUnusedNodesPass
from torch import Tensor

from hodec.calibration.im2col import windows
from hodec.calibration.moments import FitMoments
from hodec.export.runtime import Array, Cannot, Session, first_line, open_session, quiet
from hodec.onnx_graph.consumers import WeightConsumer
from hodec.onnx_graph.graph import OnnxGraph, name_of
from hodec.onnx_graph.sites import GraphSite

Feeds = Mapping[str, Array]

# Operators whose layers are fitted; others keep what truncation gives.
MEASURED = ("Conv", "ConvTranspose", "Gemm", "MatMul")
# Rows of a layer's input that its sums are made of: twice the numbers in a patch, between these.
LEAST_ROWS, MOST_ROWS = 4096, 16384


@dataclass(frozen=True)
class Replacement:
    """What a layer is tried with.

    Attributes:
        weight: (O, I, ..).
        shift: (O,), what is added to its outputs.
    """

    weight: Tensor
    shift: Tensor


@dataclass
class TrialGraph:
    """The graph with its layers' weights as inputs.

    Attributes:
        threads: of each operator in onnxruntime.
    """

    graph: OnnxGraph
    sites: Mapping[str, GraphSite]
    threads: int = 1
    _sessions: dict[tuple[str, ...], Session] = field(default_factory=dict)
    _fed: dict[str, tuple[Replacement | None, dict[str, Array]]] = field(default_factory=dict)

    @cached_property
    def outputs(self) -> tuple[str, ...]:
        """Names of the model's outputs."""
        return tuple(name_of(one) for one in self.graph.graph.outputs)

    def run(
        self, feeds: Feeds, taps: Sequence[str] = (), tried: Mapping[str, Replacement] | None = None
    ) -> list[Array]:
        """Values of the graph; by default its outputs.

        Args:
            taps: names of values, as in the file; what a layer gives is without its shift.
            tried: site -> what it runs with instead of its own weight.

        Raises:
            Cannot: it does not run.
        """
        wanted = tuple(taps) or self.outputs
        made = tuple(dict.fromkeys(name for name in wanted if name not in feeds))
        found: dict[str, Array] = {name: feeds[name] for name in wanted if name in feeds}
        if made:
            session = self._session(made)
            given = {**feeds}
            for name in self.sites:
                given |= self._given(name, (tried or {}).get(name))
            try:
                found |= zip(made, cast(list[Array], session.run(None, given)), strict=True)
            except Exception as error:
                raise Cannot(first_line(error)) from error
        return [found[name] for name in wanted]

    def forget(self) -> None:
        """Drop sessions that are not of the outputs."""
        self._sessions = {key: one for key, one in self._sessions.items() if key == self.outputs}

    def _given(self, name: str, one: Replacement | None) -> dict[str, Array]:
        """The inputs of a layer; remembered, as they are the same in every call."""
        known = self._fed.get(name)
        if known is None or known[0] is not one:
            self._fed[name] = known = (one, self._arrays(name, one))
        return known[1]

    def _arrays(self, name: str, one: Replacement | None) -> dict[str, Array]:
        site, k = self.sites[name], list(self.sites).index(name)
        first = site.consumers[0]
        stored = self.graph.array(first.weight)
        out = site.layer.shape[0]
        weight = stored
        if one is not None:
            weight = first.from_oihw(one.weight.to(site.layer.weight.dtype)).numpy().astype(stored.dtype)
            weight = weight.reshape(stored.shape)
        given = {_weight(k): np.ascontiguousarray(weight)}
        if not unmeasured(site, self.graph):
            shift = np.zeros(out) if one is None else one.shift.numpy()
            given[_shift(k)] = _shaped(first, shift).astype(stored.dtype)
        return given

    def _session(self, taps: tuple[str, ...]) -> Session:
        if taps not in self._sessions:
            self._sessions[taps] = open_session(
                self._content(taps), threads=self.threads, folder=self.graph.path.parent
            )
        return self._sessions[taps]

    def _content(self, taps: tuple[str, ...]) -> bytes:
        """The trial graph with these values as outputs."""
        model = self.graph.model.clone()
        nodes = dict(zip(self.graph.graph.all_nodes(), model.graph.all_nodes(), strict=True))
        values = ir.convenience.create_value_mapping(model.graph, include_subgraphs=False)
        for k, site in enumerate(self.sites.values()):
            stored = self.graph.array(site.consumers[0].weight)
            weight = _input(_weight(k), stored.dtype, stored.shape)
            model.graph.inputs.append(weight)
            for one in site.consumers:
                nodes[one.node].replace_input_with(one.input_index, weight)
            if unmeasured(site, self.graph):
                continue
            shift = _input(_shift(k), stored.dtype, _shaped(site.consumers[0], np.zeros(site.layer.shape[0])).shape)
            model.graph.inputs.append(shift)
            for one in site.consumers:
                _corrected(model.graph, nodes[one.node], shift)
        ends = list(model.graph.outputs) if taps == self.outputs else [values[name] for name in taps]
        model.graph.outputs.clear()
        model.graph.outputs.extend(ends)
        with quiet("onnx_ir", logging.CRITICAL):
            RemoveUnusedNodesPass()(model)
        model.ir_version = max(4, model.ir_version)
        try:
            return ir.to_proto(model).SerializeToString()
        except ValueError as error:  # protobuf refuses what is larger than 2 GiB
            raise Cannot(f"without its layers' weights it is still too large to be tried: {error}") from error


def _weight(k: int) -> str:
    return f"hodec weight {k}"


def _shift(k: int) -> str:
    return f"hodec shift {k}"


def _input(name: str, dtype: np.dtype[np.generic], shape: Sequence[int]) -> ir.Value:
    return ir.Value(name=name, type=ir.TensorType(ir.DataType.from_numpy(dtype)), shape=ir.Shape(shape))


def _shaped(one: WeightConsumer, shift: Array) -> Array:
    """(O,) -> as it is added to the layer's output."""
    axes = one.dims or (1 if one.input_index == 0 else 0)
    return shift.reshape(-1, *(1,) * axes)


def _corrected(graph: ir.Graph, node: ir.Node, shift: ir.Value) -> None:
    """Let all that read a node read it plus a shift."""
    raw = node.outputs[0]
    add = ir.node("Add", [raw, shift], outputs=[ir.val(f"{raw.name} hodec shifted")])
    for use in list(raw.uses()):
        if use.node is not add:
            use.node.replace_input_with(use.idx, add.outputs[0])
    for k, end in enumerate(graph.outputs):
        if end is raw:
            graph.outputs[k] = add.outputs[0]
    graph.insert_after(node, add)


# -- rows of a layer's input and output ------------------------------------------------------------------------


def unmeasured(site: GraphSite, graph: OnnxGraph) -> str:
    """Why a layer's rows cannot be had, or an empty string: then it keeps the weight that truncation gives."""
    for one in site.consumers:
        if one.node.op_type not in MEASURED or one.groups > 1 or (one.lead and one.is_left):
            return f"rows of a {one.node.op_type} of its kind are not looked at"
        if one.place is not graph.graph:
            return "it stands in a subgraph"
        if one.bias is not None and one.bias not in graph.constants:
            return "its bias is computed"
        if one.node.op_type == "ConvTranspose" and (one.ints("output_shape") or _auto_pad(one) not in ("", "NOTSET")):
            return "its padding is left to the runtime"
    return ""


def moments_of(
    net: TrialGraph,
    names: Iterable[str],
    calls: Sequence[Feeds],
    tried: Mapping[str, Replacement] | None = None,
) -> dict[str, FitMoments]:
    """Sums of some layers: their inputs in the net that is ``tried``, their outputs in the dense net."""
    sites = {name: net.sites[name] for name in names}
    moments = {name: FitMoments(site.layer.shape) for name, site in sites.items()}
    inputs = list(dict.fromkeys(name_of(one.data) for site in sites.values() for one in site.consumers))
    outputs = list(dict.fromkeys(name_of(one.output) for site in sites.values() for one in site.consumers))
    for at, feeds in enumerate(calls):
        if tried:
            found = dict(zip(inputs, net.run(feeds, inputs, tried), strict=True))
            found |= zip(outputs, net.run(feeds, outputs), strict=True)
        else:
            both = list(dict.fromkeys((*inputs, *outputs)))
            found = dict(zip(both, net.run(feeds, both), strict=True))
        for name, site in sites.items():
            for k, one in enumerate(site.consumers):
                rows = -(-_rows(site.layer.shape) // (len(calls) * len(site.consumers)))
                generator = torch.Generator().manual_seed(1000 * at + k)
                x, y = _tensor(found[name_of(one.data)]), _tensor(found[name_of(one.output)])
                moments[name].add(*rows_of(one, x, y - _own_bias(one, net.graph), rows, generator))
    return moments


def _rows(shape: Sequence[int]) -> int:
    return min(MOST_ROWS, max(LEAST_ROWS, 2 * math.prod(shape[1:])))


def _tensor(array: Array) -> Tensor:
    return torch.from_numpy(np.asarray(array, np.float32 if array.dtype.itemsize <= 4 else np.float64))


def _own_bias(one: WeightConsumer, graph: OnnxGraph) -> Tensor:
    """What the node adds by itself, as it is subtracted from its output."""
    if one.bias is None:
        return torch.zeros(())
    bias = _tensor(graph.array(one.bias))
    if one.dims:
        return bias.reshape(-1, *(1,) * one.dims)
    return bias * one.node.attributes.get_float("beta", 1.0)


def rows_of(one: WeightConsumer, x: Tensor, y: Tensor, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """At most ``count`` patches (M, I, K..) of a node's input and its outputs (M, O) there, drawn at random."""
    if not one.dims:
        return _linear_rows(one, x, y, count, generator)
    kernel = [int(n) for n in one.ints("kernel_shape")] or _kernel(one)
    transposed = one.node.op_type == "ConvTranspose"
    spread = (_spread if transposed else _padded)(one, x, kernel)
    ones = [1] * len(kernel)
    steps = ones if transposed else one.ints("strides") or ones
    found = windows(spread, kernel, steps, one.ints("dilations") or ones)
    places = _drawn((len(y), *y.shape[2:]), count, generator)
    at = (places[0], slice(None), *places[1:])
    patches = found[at]
    if transposed:
        patches = patches.flip(tuple(range(2, 2 + len(kernel))))
    return patches, y[at]


def _linear_rows(
    one: WeightConsumer, x: Tensor, y: Tensor, count: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    if one.input_index == 0:  # the weight stands on the left: columns are what it is applied to
        x, y = x.unsqueeze(-1) if x.ndim == 1 else x, y.unsqueeze(-1) if x.ndim == 1 else y
        x, y = x.mT, y.mT
    if one.flag("transA"):
        x = x.mT
    x, y = x.reshape(-1, x.shape[-1]), y.reshape(-1, y.shape[-1])
    (at,) = _drawn((len(x),), count, generator)
    return x[at] * one.node.attributes.get_float("alpha", 1.0), y[at]


def _drawn(sizes: Sequence[int], count: int, generator: torch.Generator) -> tuple[Tensor, ...]:
    total = math.prod(sizes)
    drawn = torch.randperm(total, generator=generator)[:count]
    return torch.unravel_index(drawn, tuple(sizes))


def _kernel(one: WeightConsumer) -> list[int]:
    shape = one.weight.shape or (one.weight.const_value.shape if one.weight.const_value is not None else None)
    return [int(n) for n in tuple(shape or ())[2:]]


def _auto_pad(one: WeightConsumer) -> str:
    return one.node.attributes.get_string("auto_pad", "")


def _padded(one: WeightConsumer, x: Tensor, kernel: Sequence[int]) -> Tensor:
    """A convolution's input with the zeros around it."""
    dims, auto = len(kernel), _auto_pad(one)
    pads = one.ints("pads") or [0] * 2 * dims
    sides = list(zip(pads[:dims], pads[dims:], strict=True))
    if auto == "VALID":
        sides = [(0, 0)] * dims
    elif auto.startswith("SAME"):
        steps, gaps = (one.ints(key) or [1] * dims for key in ("strides", "dilations"))
        sides = []
        for size, k, step, gap in zip(x.shape[2:], kernel, steps, gaps, strict=True):
            total = max(0, (-(-size // step) - 1) * step + gap * (k - 1) + 1 - size)
            less = total // 2
            sides.append((less, total - less) if auto == "SAME_UPPER" else (total - less, less))
    return F.pad(x, [n for side in reversed(sides) for n in side])


def _spread(one: WeightConsumer, x: Tensor, kernel: Sequence[int]) -> Tensor:
    """A transposed convolution's input with zeros between its numbers: a plain one, turned round, is over that."""
    dims = len(kernel)
    steps, gaps = (one.ints(key) or [1] * dims for key in ("strides", "dilations"))
    pads, extra = one.ints("pads") or [0] * 2 * dims, one.ints("output_padding") or [0] * dims
    spread = x.new_zeros(*x.shape[:2], *((n - 1) * step + 1 for n, step in zip(x.shape[2:], steps, strict=True)))
    spread[tuple(slice(None, None, step) for step in (1, 1, *steps))] = x
    reach = [gap * (k - 1) for gap, k in zip(gaps, kernel, strict=True)]
    sides = [(reach[a] - pads[a], reach[a] - pads[dims + a] + extra[a]) for a in range(dims)]
    return F.pad(spread, [n for side in reversed(sides) for n in side])


def batches(names: Sequence[str], most: int) -> Iterator[list[str]]:
    """The names in at most ``most`` groups of neighbours, as equal as they can be."""
    groups = min(most, len(names))
    for k in range(groups):
        yield list(names[k * len(names) // groups : (k + 1) * len(names) // groups])
