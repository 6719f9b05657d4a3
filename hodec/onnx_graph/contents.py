"""What a model file holds besides the layers that are decomposed: operators, their share of it, and why they stay."""

from collections.abc import Iterable, Mapping

from hodec.errors import PlanError, literal
from hodec.onnx_graph.changes import shortened
from hodec.onnx_graph.cost import counted_values, multiply_adds
from hodec.onnx_graph.facts import GraphFacts
from hodec.onnx_graph.feeds import hints, inputs_words


def skipped_costs(
    facts: GraphFacts, layers: Iterable[str], skipped: Iterable[str]
) -> tuple[dict[str, tuple[int, int | None]], dict[str, int]]:
    """Parameters and multiply-adds of nodes that stay dense; and the parameters of all other nodes by operator.

    A weight that several nodes read counts for the first one.
    """
    consumers = {one.name: one for group in facts.groups for one in group}
    nodes = {name: node for node, name in facts.graph.node_names.items()}
    nodes |= {name: one.node for name, one in consumers.items()}
    costs, other = dict[str, tuple[int, int | None]](), dict[str, int]()
    for name in skipped:
        if name in consumers and consumers[name].directions:  # its node has two weights
            costs[name] = facts.graph.array(consumers[name].weight).size, None
            continue
        macs, uncounted = multiply_adds([nodes[name]], facts.sizes)
        known = counted_values(nodes[name]) and not uncounted
        costs[name] = facts.params.get(nodes[name], 0), macs // facts.batch if known else None
    planned = {nodes[name] for name in (*layers, *costs)}
    for node, count in facts.params.items():
        if node not in planned:
            kind = node.op_type if node else "outputs"
            other[kind] = other.get(kind, 0) + count
    return costs, other


def nothing_to_decompose(facts: GraphFacts, skipped: Mapping[str, str], *, most: int = 6) -> PlanError:
    """The error for a file without a layer that can be decomposed: ``most`` kinds of nodes it holds, with shares."""
    names, found = facts.graph.node_names, dict[tuple[str, str], dict[str, int]]()
    nodes = [*facts.params, *(node for node, name in names.items() if name in skipped and node not in facts.params)]
    for node in nodes:
        kind, name = (node.op_type, names[node]) if node else ("outputs", "")
        reason = skipped.get(name) or skipped.get(f"{name}.W") or skipped.get(f"{name}.R", "")
        found.setdefault((kind, reason), {})[name] = facts.params.get(node, 0)
    whole = sum(facts.params.values()) or 1
    rows = sorted(found.items(), key=lambda row: -sum(row[1].values()))
    words = [_words(*kind, shares, whole) for kind, shares in rows[:most]]
    text = literal(f"no layer is left to decompose; the model holds {'; '.join(words) or 'no parameters'}")
    flags = hints(facts.graph, facts.feeds)
    if facts.reason:
        text += literal(f". onnxruntime does not run it on {inputs_words(facts.feeds)}: {facts.reason.rstrip('.')}")
    if flags and (facts.reason or facts.graph.owners):
        return PlanError(f"{text}. Give other inputs with {' '.join(f'{{{key}}}' for key in flags)}", **flags)
    return PlanError(text.replace("{{", "{").replace("}}", "}"))


def _words(kind: str, reason: str, counts: Mapping[str, int], whole: int) -> str:
    """``LSTM lstm_1 and 1 more, 66.2 % of the parameters: recurrent layers stay dense``."""
    first, *more = counts
    others, why = f" and {len(more)} more" if more else "", f": {reason}" if reason else ""
    return f"{kind} {shortened(first)}{others}, {sum(counts.values()) / whole:.1%} of the parameters{why}"
