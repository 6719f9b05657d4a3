"""A graph with planned layers replaced: new nodes where the old ones stood, shared weights still shared."""

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from onnx import NodeProto, TensorProto, helper, numpy_helper

from hodec.errors import ConvertError
from hodec.linalg.svd import naming
from hodec.onnx_graph.constants import Constants, every_name
from hodec.onnx_graph.layer_check import check_layer
from hodec.onnx_graph.model_file import Array, ModelFile
from hodec.onnx_graph.nodes import Names, Writer, as_stored
from hodec.onnx_graph.recipes import Convolve, Multiply, Recipe, dense_of, error_of, factors_of, recipe_of
from hodec.onnx_graph.sites import GraphSite, Use
from hodec.plan.layer import LayerPlan
from hodec.plan.plan import Plan

log = logging.getLogger(__name__)

METADATA = "hodec.changes"
FORMAT, VERSION = "hodec-onnx-changes", 1


@dataclass(frozen=True)
class Change:
    """What became of one node.

    Attributes:
        nodes, weights: names of the new nodes and of their initializers.
        error: norm(W - factorized W) / norm(W) of the weights as they stand in the file.
    """

    nodes: tuple[str, ...]
    weights: tuple[str, ...]
    layer: LayerPlan
    error: float

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {
            "nodes": list(self.nodes),
            "weights": list(self.weights),
            "method": self.layer.method,
            "kind": self.layer.layer_type,
            "shape": list(self.layer.shape),
            "ranks": list(self.layer.ranks),
            "runs_as": self.layer.resolved_execution,
            "error": float(f"{self.error:.4g}"),
        }


def rewrite(model: ModelFile, sites: Mapping[str, GraphSite], plan: Plan) -> dict[str, Change]:
    """Replace the planned layers of ``model``, in place; returns what became of each node.

    Every replaced node is run beside its dense reconstruction first, see ``check_layer``.

    Raises:
        ConvertError: a factor that the weight's type cannot hold, or nodes that do not compute what they should.
    """
    constants, names = Constants(model), Names(every_name(model.graph))
    replacements: dict[str, list[NodeProto]] = {}
    changes: dict[str, Change] = {}
    for name, layer in plan.items():
        site = sites[name]
        done = _replace(site, layer, constants, names)
        for use, writer in zip(site.uses, done.writers, strict=True):
            replacements[use.node.output[0]] = writer.nodes
            _add_initializers(model, writer.constants)
            new = tuple(node.name for node in writer.nodes)
            changes[use.name] = Change(new, tuple(t.name for t in done.tensors), layer, done.error)
        _add_initializers(model, done.tensors)
        log.info("%s: %s at ranks %s, error %.4f", name, layer.method, list(layer.ranks), done.error)
    _put(model, replacements)
    _drop_unread(model, [sites[name].uses[0].weight for name in plan])
    _note(model, changes, plan)
    return changes


@dataclass(frozen=True)
class _Done:
    tensors: list[TensorProto]
    writers: list[Writer]
    error: float


def _replace(site: GraphSite, layer: LayerPlan, constants: Constants, names: Names) -> _Done:
    first = site.uses[0]
    with naming(f"node {first.name}"):
        factors = factors_of(layer, site.layer.weight)
    recipe = recipe_of(layer, factors)
    arrays = _arrays(first, recipe, np.dtype(constants.type_of(first.weight)))
    weights = [names.new(f"{first.weight}.{k}") for k in range(len(arrays))]
    tensors = [numpy_helper.from_array(array, name) for array, name in zip(arrays, weights, strict=True)]
    dtype, opset = tensors[0].data_type, constants.model.opset
    writers = [Writer(use, weights, dtype, names, opset).write(recipe) for use in site.uses]
    dense = dense_of(layer, factors)
    size = site.layer.call_sites.calls[0][1]
    for use, writer in zip(site.uses, writers, strict=True):
        numbers = dict(zip(weights, arrays, strict=True))
        check_layer(use, writer, numbers, dense, model=constants.model, outputs=layer.shape[0], size=size)
    return _Done(tensors, writers, error_of(layer, factors, site.layer.weight, dense))


def _arrays(use: Use, recipe: Recipe, dtype: np.dtype[Any]) -> list[Array]:
    with np.errstate(over="ignore"):
        steps = [step for step in recipe.steps if isinstance(step, Convolve | Multiply)]
        arrays = [as_stored(use, step, dtype) for step in steps]
    if not all(np.isfinite(array).all() for array in arrays):
        raise ConvertError(
            f"{use.name}: its factors have numbers that {dtype} cannot hold; leave it dense with --exclude {use.name}, "
            "or decompose the float32 model"
        )
    return arrays


def _put(model: ModelFile, replacements: Mapping[str, Sequence[NodeProto]]) -> None:
    nodes: list[NodeProto] = []
    for node in model.graph.node:
        new = replacements.get(node.output[0]) if node.output else None
        nodes.extend([node] if new is None else new)
    copies = onnx.GraphProto()
    copies.node.extend(nodes)  # before the originals go
    del model.graph.node[:]
    model.graph.node.extend(copies.node)


def _add_initializers(model: ModelFile, tensors: Sequence[TensorProto]) -> None:
    model.graph.initializer.extend(tensors)
    if model.listed:
        model.graph.input.extend(
            helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims) for tensor in tensors
        )


def _drop_unread(model: ModelFile, weights: Sequence[str]) -> None:
    """Remove the replaced weights, and the constants that only they were made from."""
    constants, gone = Constants(model), set[str]()
    unread = [name for name in weights if not constants.readers[name]]
    while unread:
        name = unread.pop()
        gone.add(name)
        node = constants.producers.get(name)
        for one in node.input if node else ():
            if one and all(reader is not None and reader.output[0] in gone for reader in constants.readers[one]):
                unread.append(one)
    graph = model.graph
    for field, key in ((graph.initializer, "name"), (graph.input, "name"), (graph.value_info, "name")):
        for k in reversed([k for k, one in enumerate(field) if getattr(one, key) in gone]):
            del field[k]
    for k in reversed([k for k, node in enumerate(graph.node) if len(node.output) == 1 and node.output[0] in gone]):
        del graph.node[k]


def _note(model: ModelFile, changes: Mapping[str, Change], plan: Plan) -> None:
    """Write what was changed into the model's metadata, beside what earlier calls wrote."""
    entry = next((one for one in model.proto.metadata_props if one.key == METADATA), None)
    before: dict[str, Any] = {}
    if entry is None:
        entry = model.proto.metadata_props.add(key=METADATA)
    else:
        before = earlier_changes(entry.value)
    value = {
        "format": FORMAT,
        "version": VERSION,
        "rule": plan.rule,
        "layers": {**before, **{name: change.to_dict() for name, change in changes.items()}},
        "skipped": dict(plan.skipped),
    }
    entry.value = json.dumps(value)


def earlier_changes(text: str) -> dict[str, Any]:
    """The layers of a map of changes; none if it is not one."""
    try:
        value = json.loads(text)
    except ValueError:
        return {}
    layers = value.get("layers") if isinstance(value, dict) else None
    return layers if isinstance(layers, dict) else {}
