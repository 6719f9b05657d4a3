"""A graph with planned layers replaced: new nodes where the old ones stood, shared weights still shared."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from torch import Tensor

from hodec.errors import ConvertError, literal
from hodec.export.runtime import Array
from hodec.formats.roles import Role
from hodec.linalg.svd import naming
from hodec.onnx_graph.changes import METADATA, Change, changes_text, earlier_layers
from hodec.onnx_graph.consumers import WeightConsumer
from hodec.onnx_graph.cost import multiply_adds
from hodec.onnx_graph.facts import GraphFacts
from hodec.onnx_graph.graph import OnnxGraph, UniqueNames, name_of
from hodec.onnx_graph.layer_check import check_layer
from hodec.onnx_graph.nodes import Writer, as_stored, count_layer, initializer
from hodec.onnx_graph.recipes import Recipe, dense_of, error_of, factors_of, recipe_of
from hodec.onnx_graph.sites import GraphSite
from hodec.plan.layer import LayerPlan
from hodec.plan.plan import Plan

log = logging.getLogger(__name__)


def rewrite(
    facts: GraphFacts, sites: Mapping[str, GraphSite], plan: Plan, fitted: Mapping[str, Tensor] | None = None
) -> tuple[dict[str, Change], int]:
    """Replace the planned layers of ``facts.graph``, in place.

    Every replaced node is run beside its dense reconstruction first, see ``check_layer``. Inputs and outputs without a
    shape get their number of axes.

    Args:
        fitted: layer -> the weight (O, I, ..) to decompose instead of its own.

    Returns:
        What became of each node, and the multiply-adds of the whole example input afterwards, without those of the
        graph's uncounted nodes.

    Raises:
        ConvertError: a factor that the weight's type cannot hold, or nodes that do not compute what they should.
    """
    graph, names = facts.graph, UniqueNames.of_model(facts.graph.model)
    for value in graph.without_axes:
        value.shape = ir.Shape([None] * facts.axes[name_of(value)])
    changes, total_macs = dict[str, Change](), facts.total_macs
    for name, layer in plan.items():
        if layer.role is Role.PARAMETER:
            changes |= _rebuilt(sites[name], layer, graph, names)
            continue
        lowered = _lowered(sites[name], layer, facts, names, (fitted or {}).get(name))
        before = [one.node for one in sites[name].consumers for _ in range(one.times)]
        total_macs += lowered.macs - multiply_adds(before, facts.sizes)[0]
        weights = tuple(name_of(one) for one in lowered.weights)
        for one, writer in zip(sites[name].consumers, lowered.writers, strict=True):
            nodes = tuple(name_of(node) for node in writer.nodes)
            changes[one.name] = Change(nodes, weights, layer, lowered.error)
            add_initializers(graph, writer.constants, one.place)
            ir.convenience.replace_nodes_and_values(
                one.place, one.node, [one.node], writer.nodes, [one.output], [writer.output]
            )
        weight = sites[name].consumers[0].weight
        add_initializers(graph, lowered.weights, weight.graph or graph.graph)
        remove_unread(graph, sites[name].consumers[0].weight)
        log.info("%s: %s at ranks %s, error %.4f", name, layer.method, list(layer.ranks), lowered.error)
    notes = graph.model.metadata_props
    notes[METADATA] = changes_text(earlier_layers(notes.get(METADATA, "")), changes, plan)
    return changes, total_macs


@dataclass(frozen=True)
class _Lowered:
    weights: list[ir.Value]
    writers: list[Writer]
    error: float
    macs: int


def _lowered(
    site: GraphSite, layer: LayerPlan, facts: GraphFacts, names: UniqueNames, fitted: Tensor | None
) -> _Lowered:
    first, graph = site.consumers[0], facts.graph
    with naming(f"node {first.name}"):
        factors = factors_of(layer, site.layer.weight if fitted is None else fitted)
    recipe = recipe_of(layer, factors)
    arrays = _arrays(first, recipe, graph.array(first.weight).dtype)
    weights = [initializer(names.new(f"{first.weight.name}.{k}"), array) for k, array in enumerate(arrays)]
    writers = [Writer(one, weights, names, graph.opset).write(recipe) for one in site.consumers]
    dense = dense_of(layer, factors)
    for writer in writers:
        check_layer(writer, dense, graph=graph, outputs=layer.shape[0], size=site.layer.call_sites.calls[0][1])
    sizes = {**facts.sizes, **{name_of(one): array.shape for one, array in zip(weights, arrays, strict=True)}}
    counts = [count_layer(writer, graph, sizes) for writer in writers]
    known = [n * one.times for one, n in zip(site.consumers, counts, strict=True) if n is not None]
    macs = sum(known) if len(known) == len(counts) else layer.macs_after * facts.batch
    return _Lowered(weights, writers, error_of(layer, factors, site.layer.weight, dense), macs)


def _rebuilt(site: GraphSite, layer: LayerPlan, graph: OnnxGraph, names: UniqueNames) -> dict[str, Change]:
    """Let recurrent nodes read the product of two constants, which runtimes multiply out once, when they load it."""
    first = site.consumers[0]
    with naming(f"weight {first.name}"):
        right, left = factors_of(layer, site.layer.weight)  # (r, I), (O, r)
    dtype = graph.array(first.weight).dtype
    arrays = [first.from_oihw(left).numpy().astype(dtype), right.numpy().astype(dtype)]
    weights = [initializer(names.new(f"{first.weight.name}.{k}"), array) for k, array in enumerate(arrays)]
    add_initializers(graph, weights, first.weight.graph or graph.graph)
    error, changes = error_of(layer, [right, left], site.layer.weight, dense_of(layer, [right, left])), {}
    for one in site.consumers:
        name = names.new(f"{one.name}.0")
        product = ir.node("MatMul", weights, outputs=[ir.val(name)], name=name)
        one.place.insert_before(one.node, [product])
        one.node.replace_input_with(one.input_index, product.outputs[0])
        changes[one.name] = Change((name,), tuple(map(name_of, weights)), layer, error)
    remove_unread(graph, first.weight)
    return changes


def _arrays(one: WeightConsumer, recipe: Recipe, dtype: np.dtype[np.generic]) -> list[Array]:
    with np.errstate(over="ignore"):
        arrays = [as_stored(one, step, dtype) for step in recipe.steps]
    if not all(np.isfinite(array).all() for array in arrays):
        raise ConvertError(
            literal(f"{one.name}: its factors have numbers that {dtype} cannot hold; leave it dense with ")
            + "{exclude}, or decompose the float32 model",
            exclude=one.exclusion,
        )
    return arrays


def add_initializers(graph: OnnxGraph, values: Sequence[ir.Value], place: ir.Graph | ir.Function) -> None:
    for value in values:
        place.register_initializer(value)  # type: ignore[union-attr]
        if graph.lists_initializers and place is graph.graph:
            place.inputs.append(value)
        else:
            value.type = value.shape = None  # its tensor has both


def remove_unread(graph: OnnxGraph, weight: ir.Value) -> None:
    """Remove a replaced weight, and the constants that only it was made from; other dead code is the user's."""
    unread: list[ir.Value | None] = [weight]
    while unread:
        value = unread.pop()
        if value is None or value.uses() or graph.is_given_out(value):
            continue
        place = value.graph
        if (node := value.producer()) and place:
            inputs = list(node.inputs)
            place.remove(node, safe=True)
            unread += inputs
        elif value.is_initializer() and isinstance(place, ir.Graph):
            del place.initializers[name_of(value)]
            if value.is_graph_input():
                place.inputs.remove(value)
