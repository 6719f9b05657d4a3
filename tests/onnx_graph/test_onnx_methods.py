"""A budget over several methods for a file: each layer takes a method that the file's node has room for."""

import numpy as np
import pytest

from hodec.onnx_graph.decompose import decompose_file
from hodec.ranks import Budget

from small_graphs import answer, node, numbers, save  # isort: skip


def decompose(source, rule):
    out = source.with_name("out.onnx")
    return decompose_file(source, out, rule=rule), out


@pytest.mark.parametrize("methods", [["svd", "tt"], ["tt", "svd"], ["tt", "tucker", "svd"]])
@pytest.mark.parametrize("alpha", [1.0, 0.5])
def test_each_layer_of_a_file_takes_a_method_that_fits_it(tmp_path, methods, alpha):
    """A Gemm with factors of its own is for matrices; a linear tensor train might be refused after the choice."""
    nodes = [node("Gemm", "x w", name="g", alpha=alpha)]
    source = save(tmp_path / "in.onnx", nodes, {"w": numbers(64, 64)}, inputs={"x": (1, 64)})
    rule = Budget(params=0.4, tolerance=0.2, methods=methods, round_to=1)
    outcome, out = decompose(source, rule)
    assert outcome.plan["g"].method in ("svd", "tucker")
    assert outcome.after.params <= 0.4 * outcome.before.params
    answer(out, x=np.ones((1, 64), np.float32))


def test_layers_of_several_methods_stay_in_the_order_of_the_graph(tmp_path):
    """spatial_svd has no layer for the first node, a one-dimensional convolution."""
    nodes = [
        node("Conv", "x w", "h", name="c"), node("Flatten", "h", "f"), node("Gemm", "f v", "y", name="g"),
    ]  # fmt: skip
    weights = {"w": numbers(32, 16, 3), "v": numbers(32 * 8, 64)}
    source = save(tmp_path / "in.onnx", nodes, weights, inputs={"x": (1, 16, 10)})
    rule = Budget(params=0.5, tolerance=0.3, weights={"c": 0.0}, methods=["spatial_svd", "tucker"], round_to=1)
    outcome, _ = decompose(source, rule)
    assert [(name, layer.method) for name, layer in outcome.plan.layers.items()] == [
        ("c", "tucker"), ("g", "spatial_svd"),
    ]  # fmt: skip


def test_what_no_method_fits_has_the_first_one_s_reason(tmp_path):
    nodes = [node("Conv", "x w", "h", name="c"), node("Conv", "h d", "y", name="d", group=8)]
    weights = {"w": numbers(8, 8, 3, 3), "d": numbers(8, 1, 3, 3)}
    source = save(tmp_path / "in.onnx", nodes, weights, inputs={"x": (1, 8, 10, 12)})
    outcome, _ = decompose(source, Budget(params=0.6, tolerance=0.3, methods=["tucker", "spatial_svd"], round_to=1))
    assert list(outcome.changes) == ["c"]
    assert "group" in outcome.plan.skipped["d"]
