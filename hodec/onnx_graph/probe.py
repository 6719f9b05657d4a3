"""One run of a graph as it is written: the sizes of its values, which branches it took, how often its loops turned."""

from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import onnx_ir as ir

from hodec.errors import first_line
from hodec.export.runtime import Array, Cannot
from hodec.onnx_graph.cost import counted_values
from hodec.onnx_graph.graph import OnnxGraph, UniqueNames, name_of
from hodec.onnx_graph.session import run_model
from hodec.onnx_graph.sizes import Size

BRANCHES = {True: "then_branch", False: "else_branch"}


@dataclass(frozen=True)
class Ran:
    """Which subgraphs ran.

    Attributes:
        branches: ``If`` node -> the branch that ran.
        turns: ``Loop`` node -> how often its body ran; in a loop around it, in the first turn of that.
    """

    branches: Mapping[ir.Node, ir.Graph] = field(default_factory=dict)
    turns: Mapping[ir.Node, int] = field(default_factory=dict)

    def nodes(self, graph: ir.Graph) -> Iterator[ir.Node]:
        """The nodes of a graph, with those that ran in the place of each ``If`` and ``Loop``, as often as they ran."""
        for node in graph:
            if node in self.branches:
                yield from self.nodes(self.branches[node])
            elif node in self.turns:
                inner = list(self.nodes(node.attributes["body"].as_graph()))
                yield from inner * self.turns[node]
            else:
                yield node

    def times(self, graph: OnnxGraph, place: ir.Graph) -> int:
        """How often a subgraph ran, if it did."""
        times = 1
        while place in graph.owners:
            owner = graph.owners[place]
            times *= self.turns.get(owner, 1)
            place = owner.graph  # type: ignore[assignment]
        return times


@dataclass(frozen=True)
class Probe:
    """What a run tells.

    Attributes:
        sizes: value -> its size, of those that were asked for and made; in a loop, in its first turn.
        reason: why the model does not run, in the words of onnxruntime; empty where it does.
    """

    sizes: Mapping[str, Size] = field(default_factory=dict)
    ran: Ran = field(default_factory=Ran)
    reason: str = ""


def probed(
    graph: OnnxGraph, feeds: Mapping[str, Array], *, known: Container[str] = (), folder: Path | None = None
) -> Probe:
    """Run a copy of the graph, in which what runs of subgraphs stands in the main graph.

    Asked for are what ``counted_values`` names, and inputs and outputs without axes.

    Args:
        known: names of values whose sizes are not asked for.
        folder: where the graph's tensors outside of the file are, if not beside the file that it was read from.
    """
    try:
        copy = _Copy(graph, feeds, folder or graph.path.parent)
        ran = copy.flattened()
        read = [value for node in ran.nodes(graph.graph) for value in counted_values(node) if value]
        names = dict.fromkeys(name_of(value) for value in (*read, *graph.without_axes))
        wanted = [name for name in names if name not in known and name in copy.values]
        found = copy.outputs("Shape", [copy.values[name] for name in wanted])
    except (
        Cannot,
        RuntimeError,
        ValueError,
    ) as error:  # the last two: not to be copied, or too large to be given whole
        return Probe(reason=first_line(error))
    return Probe({name: _size(one) for name, one in zip(wanted, found, strict=True)}, ran)


def _size(shape: object) -> Size:
    return tuple(int(n) for n in np.asarray(shape))


class _Copy:
    """A copy of a graph whose subgraphs are taken apart.

    Attributes:
        values: name in the graph -> the value of the copy that is it.
    """

    def __init__(self, graph: OnnxGraph, feeds: Mapping[str, Array], folder: Path) -> None:
        self.model = graph.model.clone()
        self.graph, self.feeds, self.folder = self.model.graph, feeds, folder
        self.origin = dict(zip(self.graph.all_nodes(), graph.graph.all_nodes(), strict=True))
        self.values = ir.convenience.create_value_mapping(self.graph)
        self.names = UniqueNames.of_model(self.model)
        self.first_names: dict[str, str] = {}

    def flattened(self) -> Ran:
        """Put the branches that run in the place of their nodes, and a first turn before each loop; outer ones first.

        Returns:
            What ran, by the nodes of the graph.
        """
        branches, turns = dict[ir.Node, ir.Graph](), dict[ir.Node, int]()
        while True:
            choices = [node for node in self.graph if node.op_type == "If" and not node.domain]
            loops = [node for node in self.graph if node.op_type == "Loop" and self.origin[node] not in turns]
            if not choices and not loops:
                return Ran(branches, turns)
            for node, answer in zip(choices, self.outputs("Identity", [one.inputs[0] for one in choices]), strict=True):
                which = BRANCHES[bool(np.asarray(answer))]
                branches[self.origin[node]] = self.origin[node].attributes[which].as_graph()
                self._inline(node, node.attributes[which].as_graph())
            counts = self.outputs("Shape", [self._turns(node) for node in loops])
            for node, count in zip(loops, counts, strict=True):
                turns[self.origin[node]] = _size(count)[0]
                self._unroll(node)

    def outputs(self, op_type: str, values: Sequence[ir.Value | None]) -> list[object]:
        """What nodes of one kind give for these values, in a run that has no other outputs."""
        if not values:
            return []
        self.graph.outputs.clear()
        nodes = [ir.node(op_type, [value], outputs=[ir.val(f"hodec probe {k}")]) for k, value in enumerate(values)]
        for node, value in zip(nodes, values, strict=True):  # where the value is made: it need not be kept to the end
            producer = value.producer() if value else None
            if producer is None:
                self.graph.append(node)
            else:
                self.graph.insert_after(producer, [node])
        self.graph.outputs.extend(node.outputs[0] for node in nodes)
        found = run_model(ir.to_proto(self.model), self.feeds, folder=self.folder)
        self.graph.outputs.clear()
        self.graph.remove(nodes)
        return found

    def _inline(self, node: ir.Node, branch: ir.Graph) -> None:
        """Move the nodes of a branch to the place of its node, which goes."""
        made = self._move(branch, node)
        for old, new in zip(node.outputs, made, strict=True):
            self._stands_for(new, old)
            old.replace_all_uses_with(new, replace_graph_outputs=True)
        self.graph.remove(node)

    def _turns(self, node: ir.Node) -> ir.Value:
        """A further output of a loop: the numbers of its turns, in a list."""
        body = node.attributes["body"].as_graph()
        name = self.names.new("hodec turn")
        number = ir.node("Identity", [body.inputs[0]], outputs=[ir.val(name)])
        body.append(number)
        body.outputs.append(number.outputs[0])
        node.resize_outputs(len(node.outputs) + 1)
        node.outputs[-1].name = self.names.new("hodec turns")
        return node.outputs[-1]

    def _unroll(self, node: ir.Node) -> None:
        """Put the nodes of a loop's first turn before it, which stays: what reads it needs its last turn."""
        body = node.attributes["body"].as_graph()
        turn = body.clone(allow_outer_scope_values=True)
        pairs = list(zip(turn.all_nodes(), body.all_nodes(), strict=True))
        self.origin |= {new: self.origin[old] for new, old in pairs if old in self.origin}
        starts = [self._constant(np.array(0)), node.inputs[1] or self._constant(np.array(True)), *node.inputs[2:]]
        for given, start, inner in zip(list(turn.inputs), starts, body.inputs, strict=True):
            if start is not None:
                given.replace_all_uses_with(start)
                self._stands_for(start, inner)
        for new, old in pairs:
            new.name = self.names.new(name_of(new))
            for made, known in zip(new.outputs, old.outputs, strict=True):
                if made.name:
                    self._rename(made)
                    self._stands_for(made, known)
        for name, value in list(turn.initializers.items()):
            del turn.initializers[name]
            self._rename(value)
            turn.initializers[name_of(value)] = value
            self._stands_for(value, value)
        self._move(turn, node)

    def _rename(self, value: ir.Value) -> None:
        """Give a value of a copied subgraph a name of its own."""
        name = name_of(value)
        value.name = self.names.new(name)
        self.first_names[value.name] = self.first_names.get(name, name)

    def _stands_for(self, value: ir.Value, old: ir.Value) -> None:
        """Note that a value is what the graph knows by the name that ``old`` had first."""
        name = name_of(old)
        self.values[self.first_names.get(name, name)] = value

    def _constant(self, array: Array) -> ir.Value:
        name = self.names.new("hodec start")
        value = ir.val(name, const_value=ir.tensor(array, name=name))
        self.graph.register_initializer(value)
        return value

    def _move(self, part: ir.Graph, node: ir.Node) -> list[ir.Value]:
        """Move the nodes and initializers of a subgraph before ``node``; its outputs."""
        made, nodes = list(part.outputs), list(part)
        part.outputs.clear()
        part.remove(nodes)
        self.graph.insert_before(node, nodes)
        for name, value in list(part.initializers.items()):
            del part.initializers[name]
            self.graph.register_initializer(value)
        return made
