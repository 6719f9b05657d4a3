"""The inputs that a model file is tried on: sizes and values that were given, and usual ones for the rest."""

import math
import shlex
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike

from hodec.errors import ConfigError, Use, literal
from hodec.export.runtime import Array
from hodec.onnx_graph.graph import OnnxGraph
from hodec.onnx_graph.session import example_feeds
from hodec.onnx_graph.sizes import Size, input_sizes, is_fixed, shapes_use
from hodec.plan.plan import MOST_INPUT


def parse_values(texts: Iterable[str]) -> dict[str, ArrayLike]:
    """``sr=16000`` -> {sr: 16000.0}, ``h=state.npy`` -> {h: the array of that file}.

    Raises:
        ConfigError: another form, or a file that holds no array.
    """
    values: dict[str, ArrayLike] = {}
    for text in texts:
        name, _, value = text.partition("=")
        if not name or not value:
            raise ConfigError(f"--input {text!r} is not of the form NAME=NUMBER or NAME=FILE.npy")
        values[name] = _array(value, text) if value.endswith(".npy") else _number(value, text)
    return values


def _number(value: str, text: str) -> float | int:
    for kind in (int, float):
        try:
            return kind(value)
        except ValueError:
            continue
    raise ConfigError(f"--input {text!r}: {value!r} is neither a number nor the name of an .npy file")


def _array(value: str, text: str) -> Array:
    try:
        loaded: Array = np.load(Path(value), allow_pickle=False)
    except (OSError, ValueError) as error:
        raise ConfigError(f"--input {text!r}: {value} cannot be read as an array: {error}") from error
    return loaded


def example_inputs(
    graph: OnnxGraph, shapes: Mapping[str, Size], values: Mapping[str, ArrayLike]
) -> tuple[dict[str, Size], dict[str, Array]]:
    """Sizes of the graph's inputs, and an example of each.

    Args:
        shapes: sizes that were given.
        values: numbers that fill an input, or whole arrays, whose sizes count as given.

    Raises:
        ConfigError: one that does not fit the model's inputs.
    """
    arrays = {name: np.asarray(value) for name, value in values.items()}
    sizes = input_sizes(graph, {**shapes, **{name: one.shape for name, one in arrays.items() if one.ndim}})
    for name, array in arrays.items():
        if name not in sizes:
            raise ConfigError(
                f"{{value}}: the model has no such input; it has {literal(', '.join(sizes) or 'none')}",
                value=value_use(name, array),
            )
        if shapes.get(name, sizes[name]) != sizes[name]:
            raise ConfigError(f"{{value}} is not of the size {shapes[name]}, which is given too",
                              value=value_use(name, array))  # fmt: skip
    _check_memory(graph, sizes)
    feeds = example_feeds(graph, sizes)
    return sizes, {name: _filled(feeds[name], name, arrays.get(name)) for name in feeds}


def _check_memory(graph: OnnxGraph, sizes: Mapping[str, Size]) -> None:
    """Refuse inputs that would fill the memory: a file of a few bytes may say that it takes them."""
    numbers = sum(math.prod(size) for size in sizes.values())
    if numbers > MOST_INPUT:
        listed = ", ".join(f"{name} {list(size)}" for name, size in sizes.items())
        raise ConfigError(
            f"{literal(f'{graph.path}: its inputs ({listed})')} hold more than {MOST_INPUT:,} numbers. Where axes are "
            "open, give smaller ones with {shapes}",
            shapes=shapes_use({name: tuple(min(n, 1) for n in size) for name, size in sizes.items()}),
        )


def _filled(usual: Array, name: str, given: Array | None) -> Array:
    """The given array in the type and size of the usual input."""
    if given is None:
        return usual
    with np.errstate(invalid="ignore", over="ignore"):
        cast = given.astype(usual.dtype)
    # floating inputs take what is nearest, as data are often in double precision
    rounds = usual.dtype.kind not in "iub" and np.can_cast(given.dtype, usual.dtype, "same_kind")
    if not rounds and not np.array_equal(given, cast):
        raise ConfigError(f"{{value}}: the model takes {usual.dtype} there", value=value_use(name, given))
    return np.broadcast_to(cast, usual.shape).copy()


def value_use(name: str, array: Array) -> Use:
    """The setting that gives an input its values."""
    words = array.item() if array.size == 1 else "FILE.npy"
    return Use("values", {name: words}, f"--input {shlex.quote(f'{name}={words}')}")


def inputs_words(feeds: Mapping[str, Array]) -> str:
    """The inputs as they were tried, with their types: ``input float32 (1, 512), sr int64 = 16000``."""
    return ", ".join(
        f"{name} {one.dtype} = {one.item()}" if not one.ndim else f"{name} {one.dtype} {one.shape}"
        for name, one in feeds.items()
    )


def hints(graph: OnnxGraph, feeds: Mapping[str, Array]) -> dict[str, Use]:
    """The settings that give other inputs of this kind: sizes of those with open axes, and values of whole numbers."""
    dims = {name: value.shape for name, value in graph.inputs.items()}
    open_ones = {name: feeds[name].shape for name, one in dims.items() if one is None or not all(map(is_fixed, one))}
    whole = {name: one.flat[0].item() for name, one in feeds.items() if one.dtype.kind in "iub" and one.size}
    flags = " ".join(f"--input {shlex.quote(f'{name}={value}')}" for name, value in whole.items())
    uses = {"shapes": shapes_use(open_ones), "values": Use("values", whole, flags)}
    return {key: use for key, use in uses.items() if use.value}
