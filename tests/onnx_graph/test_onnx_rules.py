"""Rank rules on a model file: AMCT's ranks, rules that need a net, and a Gemm that no tensor train replaces."""

import pytest

from hodec.errors import PlanError
from hodec.onnx_graph.decompose import decompose_file
from hodec.ranks import Amct, Greedy, Manual
from hodec.ranks.planning import PlanSettings

from small_graphs import conv_net, node, numbers, save  # isort: skip

ANY = PlanSettings(allow_larger=True)


def decompose(source, rule, method="tucker", options=ANY):
    out = source.with_name("out.onnx")
    return decompose_file(source, out, method=method, rule=rule, options=options), out


def test_amct_ranks(tmp_path):
    nodes = [
        node("Conv", "x w", "h", name="wide", pads=[1, 1, 1, 1]),
        node("Conv", "h v", "g", name="dilated", dilations=[2, 2]),
        node("Conv", "g u", "y", name="pointwise"),
    ]
    weights = {"w": numbers(64, 64, 3, 3), "v": numbers(64, 64, 3, 3), "u": numbers(64, 64, 1, 1)}
    source = save(tmp_path / "in.onnx", nodes, weights, inputs={"x": ("n", 64, 10, 12)})
    outcome, _ = decompose(source, Amct(), method="spatial_svd", options=PlanSettings())
    assert outcome.changes["wide"].layer.ranks == (32,)
    assert "dilation is not 1" in outcome.plan.skipped["dilated"]
    assert "kernel is below 3" in outcome.plan.skipped["pointwise"]


def test_rules_that_evaluate_a_net_are_refused(tmp_path):
    with pytest.raises(PlanError, match="rule greedy evaluates the net.*for files: manual, ratio, energy"):
        decompose(conv_net(tmp_path / "in.onnx"), Greedy(lambda net: 0.0, 0.5))


def test_a_gemm_with_factors_of_its_own_is_no_tensor_train(tmp_path):
    nodes = [node("Gemm", "x w", name="g", alpha=0.5)]
    source = save(tmp_path / "in.onnx", nodes, {"w": numbers(16, 16)}, inputs={"x": (1, 16)})
    with pytest.raises(PlanError, match="no place for a Gemm's alpha and beta"):
        decompose(source, Manual(1), method="tt")
