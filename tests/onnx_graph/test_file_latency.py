"""Times of a file's layers in onnxruntime. No test asserts how long anything takes."""

import math

import numpy as np
import onnx
import pytest

from hodec.cli import main as cli
from hodec.errors import ConfigError, PlanError
from hodec.formats.ops import Op
from hodec.onnx_graph import latency
from hodec.onnx_graph.facts import graph_facts
from hodec.onnx_graph.graph import load_graph
from hodec.onnx_graph.latency import inner_counts, latency_table, layer_ms, neighbours, with_counts
from hodec.onnx_graph.layer_session import LayerSession
from hodec.onnx_graph.planning import eligible_sites, plan_graph
from hodec.onnx_graph.profile import Kernel, _chosen, block_width, profiles
from hodec.ranks import Budget, Energy, Manual
from hodec.ranks.planning import PlanSettings

from small_graphs import node, numbers, save  # isort: skip


def residual_net(path, channels=64):
    """Conv+Relu, Conv+Add+Relu with a shortcut, Conv+Clip, Gemm+Relu; and a product with its bias in an Add."""
    nodes = [
        node("Conv", "x w0", "h0", name="stem", pads=[1, 1, 1, 1]),
        node("Relu", "h0", "r0", name="act0"),
        node("Conv", "r0 w1 b1", "h1", name="body", pads=[1, 1, 1, 1]),
        node("Add", "r0 h1", "s1", name="sum"),
        node("Relu", "s1", "r1", name="act1"),
        node("Conv", "r1 w2", "h2", name="last", pads=[1, 1, 1, 1], strides=[2, 2]),
        node("Clip", "h2 low high", "r2", name="act2"),
        node("GlobalAveragePool", "r2", "p", name="pool"),
        node("Flatten", "p", "f", name="flatten"),
        node("Gemm", "f w3 b3", "g", name="hidden", transB=1),
        node("Relu", "g", "r3", name="act3"),
        node("MatMul", "r3 w4", "m", name="head"),
        node("Add", "m b4", "y", name="bias"),
    ]
    weights = {
        "w0": numbers(channels, 3, 3, 3),
        "w1": numbers(channels, channels, 3, 3, seed=1),
        "b1": numbers(channels, seed=2),
        "w2": numbers(channels, channels, 3, 3, seed=3),
        "w3": numbers(channels, channels, seed=4),
        "b3": numbers(channels, seed=5),
        "w4": numbers(channels, channels, seed=6),
        "b4": numbers(channels, seed=7),
        "low": numbers(),
        "high": (numbers() + 6).astype(np.float32),  # numpy 1 makes it a float64
    }
    return save(path, nodes, weights, inputs={"x": (1, 3, 24, 24)})


@pytest.fixture
def facts(tmp_path):
    return graph_facts(load_graph(residual_net(tmp_path / "net.onnx")), {})


def sites_of(facts, *methods):
    return eligible_sites(facts, methods)[0]


def session_of(facts, name):
    consumer = next(one for group in facts.groups for one in group if one.name == name)
    return LayerSession(consumer, facts.graph, facts.sizes)


@pytest.mark.parametrize(("layer", "tail"), [
    ("stem", []),  # its activation is read twice, but its own output only by that
    ("body", ["Add", "Relu"]),
    ("last", ["Clip"]),
    ("hidden", ["Relu"]),
    ("head", ["Add"]),
])  # fmt: skip
def test_the_nodes_behind_a_layer_that_are_fused_into_it(facts, layer, tail):
    wanted = ["Relu"] if layer == "stem" else tail
    assert [one.op_type for one in session_of(facts, layer).tail] == wanted


@pytest.mark.parametrize("layer", ["stem", "body", "last", "hidden", "head"])
def test_a_small_session_runs_and_leaves_the_graph_alone(facts, layer):
    session = session_of(facts, layer)
    uses = {value.name: len(value.uses()) for one in facts.graph.graph for value in one.outputs}
    model, feeds = session.dense()
    (runs,) = profiles([(model, feeds)], seconds=0.0, rounds=(2, 2))
    assert 1 <= len(runs) <= 2  # without one that others interrupted
    assert all(layer_ms(run) > 0 for run in runs)
    assert {value.name: len(value.uses()) for one in facts.graph.graph for value in one.outputs} == uses


def test_neighbours_and_what_follows_them_do_not_count():
    kernels = [Kernel(name, ms, ()) for name, ms in (
        ("hodec.neighbour.in_nchwc", 1.0), ("hodec.out_nchwc", 2.0), ("hodec.neighbour.0.0_nchwc", 4.0),
        ("ReorderInput", 8.0), ("hodec.neighbour.end_nchwc", 16.0), ("ReorderOutput", 32.0),
    )]  # fmt: skip
    assert layer_ms(kernels) == 10.0
    assert layer_ms(kernels[:3]) == 2.0


def test_interrupted_runs_do_not_count_where_there_are_others():
    runs = [[Kernel("a", ms, ())] for ms in (1.0, 2.0, 3.0)]
    assert _chosen(runs, [True, False, True]) == [runs[0], runs[2]]
    assert _chosen(runs, [False, False, False]) == runs


def test_a_fused_sum_is_counted_with_the_layer_not_with_its_neighbour(facts):
    """The convolution that stands for the shortcut must not take the sum and the activation."""
    model, feeds = session_of(facts, "body").dense()
    (runs,) = profiles([(model, feeds)], seconds=0.0, rounds=(1, 1))
    names = [kernel.name for kernel in runs[0]]
    at = next(k for k, name in enumerate(names) if "hodec.out" in name or name.startswith("layer"))
    other = [k for k, name in enumerate(names) if "hodec.neighbour.0" in name]
    assert all(k < at for k in other)


def test_the_block_is_one_that_machines_have():
    assert block_width() in (1, 4, 8, 16, 32)


@pytest.mark.parametrize(("n", "around"), [
    (16, [16]), (17, [32]), (128, [128]), (129, [128, 160]), (160, [160]), (3, [4]), (13, [16]), (9, [12]),
    (300, [256, 320]), (512, [512]), (513, [512, 640]),
])  # fmt: skip
def test_counts_lie_between_those_that_are_measured(n, around):
    found = neighbours(n, 16)
    assert [m for _, m in found] == around
    assert sum(share for share, _ in found) == pytest.approx(1)
    width = 16 if n > 12 else 4
    assert sum(share * m for share, m in found) == pytest.approx(math.ceil(n / width) * width)


def test_the_counts_between_ops_can_be_changed():
    ops = [Op((5, 8, 1, 1)), Op((5, 1, 3, 3), (0, 1), depthwise=True), Op((6, 5, 1, 1)), Op((9, 6, 1, 1))]
    assert inner_counts(ops) == (5, 6)
    changed = with_counts(ops, (16, 32))
    assert [op.kernel for op in changed] == [(16, 8, 1, 1), (16, 1, 3, 3), (32, 16, 1, 1), (9, 32, 1, 1)]
    assert with_counts(ops, (5, 6)) == ops


SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in ("svd", "spatial_svd", "tucker", "cp")]


@pytest.mark.parametrize("method", ["tt", *SLOW])
def test_every_method_can_be_timed(facts, tmp_path, method):
    sites = sites_of(facts, method)
    table = latency_table(facts, sites, folder=tmp_path)
    plan, _ = plan_graph(facts, Manual(8), method, PlanSettings())
    for layer in plan.values():
        assert table.after(layer) > 0
        assert table.before(layer) > 0
    assert table.predicted_ms(plan.layers) == pytest.approx(
        table.whole_ms() + sum(table.after(one) - table.before(one) for one in plan.values())
    )


def test_a_saved_table_measures_nothing(facts, tmp_path, monkeypatch):
    sites = sites_of(facts, "spatial_svd")
    plan, _ = plan_graph(facts, Energy(0.5), "spatial_svd", PlanSettings())
    first = latency_table(facts, sites, folder=tmp_path)
    times = [first.after(layer) for layer in plan.values()]
    whole = first.whole_ms()
    assert first.times.measured > len(times)
    first.save()
    monkeypatch.setattr(latency, "profiles", None)
    monkeypatch.setattr(latency, "file_ms", None)
    second = latency_table(facts, sites, folder=tmp_path)
    assert [second.after(layer) for layer in plan.values()] == times
    assert second.whole_ms() == whole
    assert second.times.measured == 0
    other = latency_table(facts, sites, threads=2, folder=tmp_path)
    assert other.times.ms == {}
    assert other.times.path != second.times.path


def test_a_target_in_milliseconds_leaves_layers_dense_where_the_pair_is_slower(facts, tmp_path, monkeypatch):
    """Times are invented here: two ops take longer than one in all layers but ``body``."""

    def runs(problems, **_):
        body = any(name.op_type == "Add" for name in onnx.load_model_from_string(problems[0][0]).graph.node)
        gain = 0.5 if body else 1.5
        return [[[Kernel("hodec.out", 2.0, ())]], *([[Kernel("hodec.out", 2.0 * gain, ())]] for _ in problems[1:])]

    monkeypatch.setenv("HODEC_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(latency, "profiles", runs)
    monkeypatch.setattr(latency, "file_ms", lambda *_: 20.0)
    plan, sites = plan_graph(facts, Budget(latency_ms=19.5), "spatial_svd", PlanSettings(include=["body", "last"]))
    assert list(plan) == ["body"]
    table = latency_table(facts, sites, folder=tmp_path / "cache")
    assert table.predicted_ms(plan.layers) == pytest.approx(19.0)
    every, _ = plan_graph(facts, Manual(16), "spatial_svd", PlanSettings(include=["body", "last"]))
    assert list(table.slower(every.layers)) == ["last"]
    assert "3 ms (dense 2 ms)" in table.slower(every.layers)["last"]
    with pytest.raises(PlanError, match="least reachable: 19"):
        plan_graph(facts, Budget(latency_ms=18.0), "spatial_svd", PlanSettings(include=["body", "last"]))


def test_ranks_of_files_are_multiples_of_the_block(facts):
    plan, _ = plan_graph(facts, Energy(0.5), "spatial_svd", PlanSettings())
    assert {"stem", "body", "last"} <= {*plan}
    assert all(plan.layers[name].ranks[0] % 16 == 0 for name in ("body", "last"))
    assert plan.layers["stem"].ranks[0] in (4, 8)  # at most 9
    single, _ = plan_graph(facts, Energy(0.5, round_to=1), "spatial_svd", PlanSettings())
    assert any(single.layers[name].ranks[0] % 16 for name in ("body", "last"))


def test_threads_are_at_least_one(facts):
    with pytest.raises(ConfigError, match="threads=0 is not a whole number of at least 1"):
        latency_table(facts, {}, threads=0)


def test_a_latency_at_the_shell(capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("HODEC_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(latency, "file_ms", lambda *_: 1e6)
    source, out = residual_net(tmp_path / "net.onnx"), tmp_path / "out.onnx"
    assert cli.main(["decompose", str(source), "-o", str(out), "--method", "svd", "--latency-ms", "1000"]) == 2
    assert "--latency-ms 1000 (least reachable: " in capsys.readouterr().err
    assert not out.exists()


def test_a_layer_that_does_not_run_is_named(facts, monkeypatch, tmp_path):
    session = session_of(facts, "last")
    monkeypatch.setattr(LayerSession, "dense", lambda self: (b"no model", {}))
    table = latency_table(facts, {}, folder=tmp_path)
    with pytest.raises(PlanError, match="last cannot be timed"):
        table.times.dense(session)
