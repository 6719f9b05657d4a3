"""The trial graph: what it computes is what a written file computes, and its rows are what its layers multiply."""

import numpy as np
import pytest
import torch

from hodec.onnx_graph.calibrate import (
    Replacement,
    TrialGraph,
    dense_rows,
    outputs_at,
    patches_at,
    places_of,
    tried_moments,
)
from hodec.onnx_graph.compress import METHODS
from hodec.onnx_graph.facts import graph_facts
from hodec.onnx_graph.graph import load_graph
from hodec.onnx_graph.planning import eligible_sites, plan_graph
from hodec.onnx_graph.trial_file import write_fitted
from hodec.onnx_graph.writing import written
from hodec.ranks import Manual
from hodec.ranks.planning import PlanSettings

from small_graphs import answer, conv_net, node, numbers, save  # isort: skip

W2, W1 = {"w": numbers(6, 8, 3, 2), "b": numbers(6, seed=1)}, {"w": numbers(8, 6), "b": numbers(6, seed=1)}
LAYERS = {
    "conv": ([node("Conv", "x w b", pads=[1, 0, 2, 1])], W2, (2, 8, 10, 12)),
    "strided": ([node("Conv", "x w", strides=[2, 3], dilations=[2, 1])], {"w": W2["w"]}, (2, 8, 10, 12)),
    "same upper": ([node("Conv", "x w", auto_pad="SAME_UPPER", strides=[2, 2])], {"w": W2["w"]}, (2, 8, 9, 12)),
    "same lower": ([node("Conv", "x w", auto_pad="SAME_LOWER", strides=[2, 1])], {"w": W2["w"]}, (2, 8, 9, 12)),
    "conv1d": ([node("Conv", "x w b", pads=[2, 1])], {"w": numbers(6, 8, 4), "b": W2["b"]}, (2, 8, 10)),
    "transposed": (
        [node("ConvTranspose", "x w b", strides=[2, 3], pads=[1, 0, 0, 1], output_padding=[1, 0], dilations=[1, 2])],
        {"w": numbers(8, 6, 3, 2), "b": W2["b"]}, (2, 8, 5, 6),
    ),
    "gemm": ([node("Gemm", "x w b", alpha=0.5, beta=2.0)], W1, (7, 8)),
    "gemm turned": ([node("Gemm", "x w", transA=1, transB=1)], {"w": numbers(6, 8)}, (8, 7)),
    "gemm one bias": ([node("Gemm", "x w b")], {"w": W1["w"], "b": numbers(1, seed=5)}, (7, 8)),
    "conv behind an identity": (
        [node("Identity", "w", "v"), node("Conv", "x v", auto_pad="SAME_UPPER")],
        {"w": numbers(6, 4, 3, 2)},
        (2, 4, 7, 6),
    ),
    "matmul": ([node("MatMul", "x w")], {"w": W1["w"]}, (2, 5, 8)),
    "matmul and add": ([node("MatMul", "x w", "h"), node("Add", "b h")], W1, (2, 5, 8)),
    "matmul left": ([node("MatMul", "w x")], {"w": numbers(6, 8)}, (2, 8, 5)),
}  # fmt: skip


def the_file(tmp_path, nodes, weights, size):
    next(one for one in nodes if one.op_type != "Identity").name = "one"
    return save(tmp_path / "in.onnx", nodes, weights, inputs={"x": size})


@pytest.mark.parametrize("name", LAYERS)
def test_rows_are_what_a_layer_multiplies(tmp_path, name):
    nodes, weights, size = LAYERS[name]
    source = the_file(tmp_path, nodes, weights, size)
    x = np.random.default_rng(0).standard_normal(size).astype(np.float32)
    facts = graph_facts(load_graph(source), {}, {"x": x})
    site = eligible_sites(facts, METHODS)[0]["one"]
    one = site.consumers[0]
    (y,) = TrialGraph(facts.graph, {"one": site}).run({"x": x}, [one.output.name])
    places = places_of(one, torch.from_numpy(y), 10_000, torch.Generator().manual_seed(0))
    patches = patches_at(one, torch.from_numpy(x), places, site.layer.shape[2:])
    outputs = outputs_at(one, torch.from_numpy(y), places)
    made = patches.flatten(1) @ site.layer.weight.flatten(1).mT
    bias = np.broadcast_to(weights["b"] * (2 if name == "gemm" else 1), 6) if one.bias is not None else np.zeros(6)
    assert len(made) == y.size // 6
    torch.testing.assert_close(made + torch.from_numpy(bias.astype(np.float32)), outputs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", LAYERS)
def test_the_written_file_is_what_was_tried(tmp_path, name):
    nodes, weights, size = LAYERS[name]
    source = the_file(tmp_path, nodes, weights, size)
    x = np.random.default_rng(0).standard_normal(size).astype(np.float32)
    facts = graph_facts(load_graph(source), {}, {"x": x})
    plan, sites = plan_graph(facts, Manual(2), "svd", PlanSettings(allow_larger=True))
    layer, generator = plan["one"], torch.Generator().manual_seed(0)
    weight = layer.format.project(torch.randn(layer.shape, generator=generator), layer.ranks, layer.modes)
    tried = {"one": Replacement(weight, torch.randn(layer.shape[0], generator=generator))}
    (wanted,) = TrialGraph(facts.graph, sites).run({"x": x}, tried=tried)
    (same,) = TrialGraph(facts.graph, sites).fixed((), tried)({"x": x})
    np.testing.assert_allclose(same, wanted, rtol=1e-4, atol=1e-4)
    again, changes, _ = write_fitted(facts, plan, tried)
    out = tmp_path / "out.onnx"
    with written(again.graph, out):
        pass
    (found,) = answer(out, x=x)
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-4)
    assert np.abs(found - answer(source, x=x)[0]).max() > 0.1
    assert list(changes) == ["one"]


def test_sums_are_of_the_tried_inputs_and_the_dense_outputs(tmp_path):
    source = conv_net(tmp_path / "in.onnx")
    x = np.random.default_rng(0).standard_normal((3, 8, 10, 12)).astype(np.float32)
    facts = graph_facts(load_graph(source), {}, {"x": x})
    sites = eligible_sites(facts, METHODS)[0]
    net = TrialGraph(facts.graph, sites)
    tried = {"first": Replacement(torch.zeros(16, 8, 3, 3), torch.ones(16))}
    rows, sums = dense_rows(net, ["head"], [{"x": x}])
    dense, other = sums["head"], tried_moments(net, rows, ["head"], [{"x": x}], tried)["head"]
    assert tried_moments(net, rows, [], [{"x": x}], tried) == {}
    torch.testing.assert_close(dense.y, other.y)
    assert not torch.allclose(dense.x, other.x)
    pooled = net.run({"x": x}, [sites["head"].consumers[0].data.name], tried)[0]
    torch.testing.assert_close(other.x, torch.from_numpy(pooled).double().sum(0), rtol=1e-5, atol=1e-5)
