"""One run of a graph as it is written: the sizes of its values, and which branches it took."""

from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import onnx_ir as ir

from hodec.export.runtime import Array, Cannot, first_line
from hodec.onnx_graph.cost import counted_values
from hodec.onnx_graph.graph import OnnxGraph, name_of
from hodec.onnx_graph.session import run_model
from hodec.onnx_graph.sizes import Size

BRANCHES = {True: "then_branch", False: "else_branch"}


@dataclass(frozen=True)
class Probe:
    """What a run tells.

    Attributes:
        sizes: value -> its size, of those that were asked for and made.
        branches: ``If`` node -> the branch that ran.
        reason: why the model does not run, in the words of onnxruntime; empty where it does.
    """

    sizes: Mapping[str, Size] = field(default_factory=dict)
    branches: Mapping[ir.Node, ir.Graph] = field(default_factory=dict)
    reason: str = ""


def probed(
    graph: OnnxGraph, feeds: Mapping[str, Array], *, known: Container[str] = (), folder: Path | None = None
) -> Probe:
    """Run a copy of the graph, in which the branches that it takes stand in the place of their ``If`` nodes.

    Asked for are what ``counted_values`` names, and inputs and outputs without axes.

    Args:
        known: names of values whose sizes are not asked for.
        folder: where the graph's tensors outside of the file are, if not beside the file that it was read from.
    """
    folder = folder or graph.path.parent
    try:
        probe = graph.model.clone()
        origin = dict(zip(probe.graph.all_nodes(), graph.graph.all_nodes(), strict=True))
        values = ir.convenience.create_value_mapping(probe.graph)
        branches = _without_branches(probe, origin, values, feeds, folder)
        read = [value for node in nodes_run(graph.graph, branches) for value in counted_values(node) if value]
        names = dict.fromkeys(name_of(value) for value in (*read, *graph.without_axes))
        wanted = [name for name in names if name not in known and name in values]
        found = _outputs(probe, "Shape", [values[name] for name in wanted], feeds, folder)
    except (
        Cannot,
        RuntimeError,
        ValueError,
    ) as error:  # the last two: not to be copied, or too large to be given whole
        return Probe(reason=first_line(error))
    sizes = {name: tuple(int(n) for n in size) for name, size in zip(wanted, found, strict=True)}  # type: ignore[attr-defined]
    return Probe(sizes, branches)


def nodes_run(graph: ir.Graph, branches: Mapping[ir.Node, ir.Graph]) -> Iterator[ir.Node]:
    """The nodes of a graph, with those of the branch that ran in the place of each ``If``."""
    for node in graph:
        if node in branches:
            yield from nodes_run(branches[node], branches)
        else:
            yield node


def _without_branches(
    probe: ir.Model,
    origin: Mapping[ir.Node, ir.Node],
    values: dict[str, ir.Value],
    feeds: Mapping[str, Array],
    folder: Path,
) -> dict[ir.Node, ir.Graph]:
    """Put the branches that run in the place of their nodes, outer ones first; ``values`` follows.

    Returns:
        ``If`` node of the graph that ``probe`` is a copy of -> its branch that runs.
    """
    taken: dict[ir.Node, ir.Graph] = {}
    while nodes := [node for node in probe.graph if node.op_type == "If" and not node.domain]:
        answers = _outputs(probe, "Identity", [node.inputs[0] for node in nodes], feeds, folder)
        for node, answer in zip(nodes, answers, strict=True):
            which = BRANCHES[bool(answer)]
            taken[origin[node]] = origin[node].attributes[which].as_graph()
            made = _inline(probe.graph, node, node.attributes[which].as_graph())
            values |= {name_of(old): new for old, new in zip(node.outputs, made, strict=True)}
    return taken


def _inline(graph: ir.Graph, node: ir.Node, branch: ir.Graph) -> list[ir.Value]:
    """Move the nodes of a branch to the place of its node, which goes; the values in place of its outputs."""
    made, nodes = list(branch.outputs), list(branch)
    branch.outputs.clear()
    branch.remove(nodes)
    graph.insert_before(node, nodes)
    for name, value in list(branch.initializers.items()):
        del branch.initializers[name]
        graph.register_initializer(value)
    for old, new in zip(node.outputs, made, strict=True):
        old.replace_all_uses_with(new, replace_graph_outputs=True)
    graph.remove(node)
    return made


def _outputs(
    probe: ir.Model, op_type: str, values: Sequence[ir.Value | None], feeds: Mapping[str, Array], folder: Path
) -> list[object]:
    """What nodes of one kind give for these values, in a run that has no other outputs."""
    if not values:
        return []
    probe.graph.outputs.clear()
    nodes = [ir.node(op_type, [value], outputs=[ir.val(f"hodec probe {k}")]) for k, value in enumerate(values)]
    probe.graph.extend(nodes)
    probe.graph.outputs.extend(node.outputs[0] for node in nodes)
    found = run_model(ir.to_proto(probe), feeds, folder=folder)
    probe.graph.outputs.clear()
    probe.graph.remove(nodes)
    return found
