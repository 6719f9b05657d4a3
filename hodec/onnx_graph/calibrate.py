"""A model file run on calibration data, with weights to try in place of its own: what its layers are fitted by.

The file becomes a trial graph whose weights are inputs, so that one session serves every weight that is tried, and
each of whose layers adds a shift to its outputs, another input. What is fed there stands for a file that would first
have to be written.
"""

import logging
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, cast

import numpy as np
import onnx_ir as ir
import torch
import torch.nn.functional as F
from onnx_ir.passes.common import RemoveUnusedNodesPass
from torch import Tensor

from hodec.calibration.im2col import windows
from hodec.calibration.moments import FitMoments
from hodec.export.runtime import Array, Cannot, Session, open_session, quiet
from hodec.formats.same_padding import same_sides
from hodec.onnx_graph.consumers import WeightConsumer
from hodec.onnx_graph.graph import OnnxGraph, name_of
from hodec.onnx_graph.nodes import initializer
from hodec.onnx_graph.session import run_session
from hodec.onnx_graph.sites import GraphSite

Feeds = Mapping[str, Array]

# What inputs are called that stand for a layer's weight and for what is added to its outputs.
WEIGHT, SHIFT = "hodec weight", "hodec shift"
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
        given = {**feeds}
        for name in self.sites:
            given |= self._given(name, (tried or {}).get(name))
        return _values(tuple(taps) or self.outputs, feeds, lambda made: run_session(self._session(made), given))

    def fixed(
        self, taps: Sequence[str] = (), tried: Mapping[str, Replacement] | None = None
    ) -> Callable[[Feeds], list[Array]]:
        """``run`` with the same ``taps`` and ``tried`` in all calls, for which onnxruntime packs the weights."""
        wanted = tuple(taps) or self.outputs
        opened: list[Session] = []

        def session(made: tuple[str, ...]) -> Session:
            opened[:] = opened or [self._opened(self._content(made, tried or {}))]
            return opened[0]

        return lambda feeds: _values(wanted, feeds, lambda made: run_session(session(made), feeds))

    def _given(self, name: str, one: Replacement | None) -> dict[str, Array]:
        """The inputs of a layer; remembered, as they are the same in every call."""
        known = self._fed.get(name)
        if known is None or known[0] is not one:
            k = list(self.sites).index(name)
            self._fed[name] = known = (one, {f"{key} {k}": array for key, array in self._arrays(name, one).items()})
        return known[1]

    def _arrays(self, name: str, one: Replacement | None) -> dict[str, Array]:
        """A layer's weight as it is stored and, where its outputs can be shifted, its shift; in this order."""
        site = self.sites[name]
        first = site.consumers[0]
        weight = stored = self.graph.array(first.weight)
        if one is not None:
            weight = first.from_oihw(one.weight.to(site.layer.weight.dtype)).numpy().astype(stored.dtype)
        given = {WEIGHT: np.ascontiguousarray(weight.reshape(stored.shape))}
        if not unmeasured(site, self.graph):
            shift = np.zeros(site.layer.shape[0]) if one is None else one.shift.numpy()
            given[SHIFT] = _shaped(first, shift).astype(stored.dtype)
        return given

    def _session(self, taps: tuple[str, ...]) -> Session:
        if taps not in self._sessions:
            self._sessions[taps] = self._opened(self._content(taps))
        return self._sessions[taps]

    def _opened(self, content: bytes) -> Session:
        return open_session(content, threads=self.threads, folder=self.graph.path.parent)

    def _content(self, taps: tuple[str, ...], fixed: Mapping[str, Replacement] | None = None) -> bytes:
        """The graph with these values as outputs: layers with what is ``fixed``, or all with inputs for weights."""
        model = self.graph.model.clone()
        nodes = dict(zip(self.graph.graph.all_nodes(), model.graph.all_nodes(), strict=True))
        values = ir.convenience.create_value_mapping(model.graph, include_subgraphs=False)
        for k, name in enumerate(self.sites if fixed is None else fixed):
            arrays = self._arrays(name, None if fixed is None else fixed[name])
            weight, *shift = (_value(f"{key} {k}", array, model.graph, fixed is None) for key, array in arrays.items())
            for one in self.sites[name].consumers:
                nodes[one.node].replace_input_with(one.input_index, weight)
                for each in shift:
                    _corrected(model.graph, nodes[one.node], each)
        ends = list(model.graph.outputs) if taps == self.outputs else [values[name] for name in taps]
        model.graph.outputs.clear()
        model.graph.outputs.extend(ends)
        with quiet("onnx_ir", logging.CRITICAL):
            RemoveUnusedNodesPass()(model)
        model.ir_version = max(4, model.ir_version)
        try:
            content: bytes = ir.to_proto(model).SerializeToString()
            return content
        except ValueError as error:  # protobuf refuses what is larger than 2 GiB
            raise Cannot(f"without its layers' weights it is still too large to be tried: {error}") from error


def _values(wanted: Sequence[str], feeds: Feeds, give: Callable[[tuple[str, ...]], Sequence[object]]) -> list[Array]:
    """Values by their names: those that are fed as they are, the others as ``give`` makes them."""
    made = tuple(dict.fromkeys(name for name in wanted if name not in feeds))
    found = {**feeds, **(dict(zip(made, cast(Sequence[Array], give(made)), strict=True)) if made else {})}
    return [found[name] for name in wanted]


def _value(name: str, array: Array, graph: ir.Graph, is_input: bool) -> ir.Value:
    """A value of a graph: an input of the array's size, or the array."""
    if not is_input:
        value = initializer(name, array)
        graph.register_initializer(value)
        return value
    kind = ir.TensorType(ir.DataType.from_numpy(array.dtype))
    value = ir.Value(name=name, type=kind, shape=ir.Shape(array.shape))
    graph.inputs.append(value)
    return value


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


Rows = dict[str, list[tuple[tuple[Tensor, ...], Tensor]]]
"""Layer -> for each call and node, which positions were drawn, and the dense outputs (M, O) there, without its bias."""


def dense_rows(net: TrialGraph, names: Iterable[str], calls: Sequence[Feeds]) -> tuple[Rows, dict[str, FitMoments]]:
    """Outputs of layers in the dense net, and the sums of them and of their inputs there."""
    sites, taps = _taps(net, names)
    moments, found = {name: FitMoments(site.layer.shape) for name, site in sites.items()}, Rows()
    run = net.fixed(taps)
    for at, feeds in enumerate(calls):
        values = dict(zip(taps, run(feeds), strict=True))
        for name, site in sites.items():
            count = -(-_rows(site.layer.shape) // (len(calls) * len(site.consumers)))
            for k, one in enumerate(site.consumers):
                y = _tensor(values[name_of(one.output)]) - _own_bias(one, net.graph)
                places = places_of(one, y, count, torch.Generator().manual_seed(1000 * at + k))
                rows = outputs_at(one, y, places)
                x = _tensor(values[name_of(one.data)])
                moments[name].add(patches_at(one, x, places, site.layer.shape[2:]), rows)
                found.setdefault(name, []).append((places, rows))
    return found, moments


def tried_moments(
    net: TrialGraph, rows: Rows, names: Iterable[str], calls: Sequence[Feeds], tried: Mapping[str, Replacement]
) -> dict[str, FitMoments]:
    """Sums of layers' inputs in the net that is ``tried``, and of their outputs in the dense net at these positions."""
    sites, _ = _taps(net, names)
    if not sites:
        return {}  # without names of values, the model's outputs would be run
    moments = {name: FitMoments(site.layer.shape) for name, site in sites.items()}
    taps = list(dict.fromkeys(name_of(one.data) for site in sites.values() for one in site.consumers))
    run = net.fixed(taps, tried)
    for at, feeds in enumerate(calls):
        values = dict(zip(taps, run(feeds), strict=True))
        for name, site in sites.items():
            for k, one in enumerate(site.consumers):
                places, outputs = rows[name][at * len(site.consumers) + k]
                x = _tensor(values[name_of(one.data)])
                moments[name].add(patches_at(one, x, places, site.layer.shape[2:]), outputs)
    return moments


def _taps(net: TrialGraph, names: Iterable[str]) -> tuple[dict[str, GraphSite], list[str]]:
    sites = {name: net.sites[name] for name in names}
    ends = [value for site in sites.values() for one in site.consumers for value in (one.data, one.output)]
    return sites, list(dict.fromkeys(map(name_of, ends)))


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


def places_of(one: WeightConsumer, y: Tensor, count: int, generator: torch.Generator) -> tuple[Tensor, ...]:
    """At most ``count`` positions of a node's output, drawn at random."""
    return _drawn((len(y), *y.shape[2:]) if one.dims else (y.numel() // _outputs(one, y),), count, generator)


def _outputs(one: WeightConsumer, y: Tensor) -> int:
    return int(y.shape[-2 if one.is_left and y.ndim > 1 else -1])


def outputs_at(one: WeightConsumer, y: Tensor, places: tuple[Tensor, ...]) -> Tensor:
    """A node's outputs (M, O) at some positions."""
    if one.dims:
        return y[_index(places)]
    return _lines(one, y)[places[0]]


def patches_at(one: WeightConsumer, x: Tensor, places: tuple[Tensor, ...], kernel: Sequence[int]) -> Tensor:
    """The patches (M, I, K..) of a node's input that its weight is multiplied by at some positions of the output."""
    if not one.dims:
        x = x.mT if one.flag("transA") else x
        return _lines(one, x)[places[0]] * one.node.attributes.get_float("alpha", 1.0)
    transposed = one.node.op_type == "ConvTranspose"
    spread = (_spread if transposed else _padded)(one, x, kernel)
    ones = [1] * len(kernel)
    steps = ones if transposed else one.ints("strides") or ones
    found = windows(spread, kernel, steps, one.ints("dilations") or ones)[_index(places)]
    return found.flip(tuple(range(2, 2 + len(kernel)))) if transposed else found


def _index(places: tuple[Tensor, ...]) -> tuple[Any, ...]:
    """Image, all channels, place."""
    return (places[0], slice(None), *places[1:])


def _lines(one: WeightConsumer, x: Tensor) -> Tensor:
    """Rows of what a product is applied to, or of its outputs; with the weight in front, its columns."""
    if one.is_left and x.ndim > 1:
        x = x.mT
    return x.reshape(-1, x.shape[-1])


def _drawn(sizes: Sequence[int], count: int, generator: torch.Generator) -> tuple[Tensor, ...]:
    total = math.prod(sizes)
    drawn = torch.randperm(total, generator=generator)[:count]
    return torch.unravel_index(drawn, tuple(sizes))


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
        upper = same_sides(x.shape[2:], kernel, steps, gaps)
        sides = upper if auto == "SAME_UPPER" else [(after, before) for before, after in upper]
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
