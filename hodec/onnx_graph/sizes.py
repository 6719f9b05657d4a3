"""Sizes of a graph's tensors for one example input, by shape inference; where that fails, by one run."""

import logging
import re
import shlex
from collections.abc import Iterable, Mapping
from typing import TypeGuard

import onnx_ir as ir
from onnx_ir.passes.common import LiftConstantsToInitializersPass, ShapeInferencePass

from hodec.errors import ConfigError, Use, literal
from hodec.export.runtime import quiet
from hodec.onnx_graph.graph import OnnxGraph, name_of

Size = tuple[int, ...]


def shapes_use(sizes: Mapping[str, Size]) -> Use:
    """The setting that gives these sizes of inputs."""
    flags = " ".join(f"--shape {shlex.quote(shape_words(name, size))}" for name, size in sizes.items())
    return Use("shapes", dict(sizes), flags)


def shape_words(name: str, size: Size) -> str:
    """``name:1,3,224,224``, as ``parse_shapes`` reads it."""
    return f"{name}:{','.join(map(str, size))}"


def parse_shapes(texts: Iterable[str]) -> dict[str, Size]:
    """``name:1,3,224,224`` -> {name: (1, 3, 224, 224)}.

    Raises:
        ConfigError: another form.
    """
    sizes = {}
    for text in texts:
        name, _, numbers = text.rpartition(":")
        if not name or not re.fullmatch(r"[1-9]\d*(,[1-9]\d*)*", numbers):
            raise ConfigError(f"--shape {text!r} is not of the form NAME:1,3,224,224")
        sizes[name] = tuple(int(n) for n in numbers.split(","))
    return sizes


def input_sizes(graph: OnnxGraph, given: Mapping[str, Size]) -> dict[str, Size]:
    """A size for each input of the graph: its own, the given one, and a usual one for axes that are open.

    Raises:
        ConfigError: a given size that does not fit, for an input that is not there, or none for one without axes.
    """
    inputs = graph.inputs
    for name in given:
        if name not in inputs:
            known = literal(", ".join(inputs) or "none")
            raise ConfigError(
                f"{{shape}}: the model has no such input; it has {known}", shape=shapes_use({name: given[name]})
            )
    bare = {name: (1, 3, 224, 224) for name, one in inputs.items() if one.shape is None and name not in given}
    if bare:
        raise ConfigError(
            literal(
                f"{graph.path}: input {', '.join(bare)} has no shape, not even a number of axes; give its size with "
            )
            + "{shapes}",
            shapes=shapes_use(bare),
        )
    symbols: dict[str, int] = {}
    for name, size in given.items():
        symbols.update(_symbols(inputs[name], size))
    channels = _channels(graph)
    return {
        name: given[name] if name in given else _size(value.shape or (), symbols, channels.get(name))
        for name, value in inputs.items()
    }


def _channels(graph: OnnxGraph) -> dict[str, int]:
    """Name of a value -> its channels, as a convolution with an initializer for a weight asks for."""
    channels = {}
    for node in graph.graph:
        if node.op_type == "Conv" and node.inputs[0] and node.inputs[1] and node.inputs[1].const_value is not None:
            per_group = node.inputs[1].const_value.shape.numpy()[1]
            channels[name_of(node.inputs[0])] = per_group * node.attributes.get_int("group", 1)
    return channels


def _symbols(value: ir.Value, size: Size) -> dict[str, int]:
    """Name of an open axis -> its size in ``size``, which must fit the input."""
    dims = value.shape or ()
    shape = shapes_use({name_of(value): size})
    if value.shape is not None and len(dims) != len(size):
        raise ConfigError(f"{{shape}} has {len(size)} axes, the model's input has {len(dims)}", shape=shape)
    for dim, n in zip(dims, size):
        if is_fixed(dim) and dim != n:
            raise ConfigError(f"{{shape}} does not fit: the model fixes {dim} for {n}", shape=shape)
    return {dim.value: n for dim, n in zip(dims, size) if isinstance(dim, ir.SymbolicDim) and dim.value}


def _size(
    dims: Iterable[int | ir.SymbolicDim],
    symbols: Mapping[str, int],
    channels: int | None,
    *,
    image: int = 224,
    other: int = 32,
) -> Size:
    """A size for each axis. Where it is open: 1 for the batch, ``image`` for an axis of images, else ``other``."""
    dims = tuple(dims)
    usual = image if len(dims) >= 4 else other
    guess = (1, channels or usual, *(usual for _ in dims[2:]))
    names = (dim.value or "" if isinstance(dim, ir.SymbolicDim) else "" for dim in dims)
    return tuple(dim if is_fixed(dim) else symbols.get(name, n) for dim, name, n in zip(dims, names, guess))


def is_fixed(dim: int | ir.SymbolicDim) -> TypeGuard[int]:
    """Whether a model fixes an axis; some exporters write -1 for an open one, where the format wants a name."""
    return isinstance(dim, int) and dim >= 0


def inferred_sizes(graph: OnnxGraph, inputs: Mapping[str, Size]) -> dict[str, Size]:
    """Sizes of all values of the main graph that shape inference can tell for inputs of these sizes."""
    initializers = [one for part in graph.model.graphs() for one in part.initializers.items()]
    sizes = {name: tuple(one.const_value.shape.numpy()) for name, one in initializers if one.const_value is not None}
    sizes |= inputs
    try:
        with quiet("onnx_ir", logging.CRITICAL):
            copy = graph.model.clone()
            for value in (*(output for node in copy.graph for output in node.outputs), *copy.graph.inputs):
                size = inputs.get(name_of(value))
                value.shape = None if size is None else ir.Shape(size)
            LiftConstantsToInitializersPass()(copy)  # large ones are then left out of what is inferred from
            ShapeInferencePass(check_type=False, strict_mode=False)(copy)
    except Exception:  # they raise whatever they meet in graphs that they do not understand
        return sizes
    for name, value in ir.convenience.create_value_mapping(copy.graph, include_subgraphs=False).items():
        if value.shape is not None and value.shape.is_static():
            sizes.setdefault(name, value.shape.numpy())
    return sizes


def open_axes(graph: OnnxGraph, sizes: Mapping[str, Size], inputs: Mapping[str, Size]) -> dict[str, int]:
    """Input or output without a shape -> its number of axes, which onnx.checker asks for.

    Raises:
        ConfigError: it is not known, as the model does not run on its inputs.
    """
    for value in graph.without_axes:
        if name_of(value) not in sizes:
            raise ConfigError(
                literal(
                    f"{graph.path}: output {value.name} has no shape, and neither shape inference nor a run of the "
                )
                + "model tells its number of axes; give sizes that the model runs on in place of {shapes}",
                shapes=shapes_use(inputs),
            )
    return {name_of(value): len(sizes[name_of(value)]) for value in graph.without_axes}
