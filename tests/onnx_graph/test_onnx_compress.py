"""compress_file: a search over data, and what keeps it from writing a file that loses too much."""

from dataclasses import replace

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, numpy_helper

import hodec
from hodec.calibration.data import load_samples
from hodec.calibration.fit import fit_layer
from hodec.cost.metric import CostMetric
from hodec.errors import ConfigError, DataError, NothingPays
from hodec.export.runtime import Cannot, open_session
from hodec.onnx_graph import compress, int8, saved, search, sensitivity, trial_file
from hodec.onnx_graph.compress import compress_file, input_specs
from hodec.onnx_graph.graph import load_graph
from hodec.onnx_graph.judge import squared_errors
from hodec.onnx_graph.planning import plan_graph
from hodec.onnx_graph.sensitivity import Sensitivity
from hodec.onnx_graph.trial_file import runner
from hodec.ranks import Manual

from small_graphs import answer, conv_net, node, numbers, save  # isort: skip


def smooth(n, *size, seed=0):
    """Inputs that lie near four patterns: what real data are like, and random numbers are not."""
    generator = np.random.default_rng(seed)
    patterns = np.random.default_rng(99).standard_normal((4, *size))
    mixed = np.tensordot(generator.standard_normal((n, 4)), patterns, 1)
    return (mixed + 0.01 * generator.standard_normal((n, *size))).astype(np.float32)


@pytest.fixture(autouse=True)
def _own_cache(monkeypatch, tmp_path_factory):
    monkeypatch.setenv("HODEC_CACHE", str(tmp_path_factory.mktemp("cache")))


def low_rank(out, *size, seed=0, rank=3):
    """A weight near low rank, as those of trained nets are."""
    first, second = numbers(out, rank, seed=seed), numbers(rank, *size, seed=seed + 50)
    return np.tensordot(first, second, 1).astype(np.float32) + 0.01 * numbers(out, *size, seed=seed + 90)


def net_of_low_rank(path):
    """``conv_net`` whose convolutions have weights near low rank."""
    model = onnx.load(conv_net(path))
    better = {"w1": low_rank(16, 8, 3, 3), "w2": low_rank(16, 16, 3, 3, seed=2)}
    for tensor in model.graph.initializer:
        if tensor.name in better:
            tensor.CopyFrom(numpy_helper.from_array(better[tensor.name], tensor.name))
    onnx.save(model, path)
    return path


@pytest.fixture
def source(tmp_path):
    return net_of_low_rank(tmp_path / "in.onnx")


MACS = {"target": "macs", "seconds": 0.1}  # of so small a file every layer is fastest dense
DATA = {"x": smooth(48, 8, 10, 12)}


@pytest.fixture(scope="module")
def compressed(tmp_path_factory):
    """A file, the one that a search within a loss of 0.2 wrote, and what it said; for tests that only look at them."""
    folder = tmp_path_factory.mktemp("compressed")
    source, out = net_of_low_rank(folder / "in.onnx"), folder / "out.onnx"
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("HODEC_CACHE", str(folder / "cache"))
        return source, out, compress_file(source, out, data=DATA, loss="error", max_drop=0.2, **MACS)


def test_the_written_file_keeps_its_outputs_on_other_data(source, tmp_path):
    out = tmp_path / "out.onnx"
    result = hodec.compress_file(source, out, data=DATA, loss="error", max_drop=0.1, **MACS)
    assert result.after.macs < 0.5 * result.before.macs
    assert out.stat().st_size == result.bytes_after < source.stat().st_size
    x = smooth(64, 8, 10, 12, seed=5)
    (error,) = squared_errors([answer(out, x=x)], [answer(source, x=x)])
    assert error**0.5 < 0.15


def test_the_score_is_of_the_written_file_on_what_was_held_out(compressed):
    source, out, result = compressed
    _, held = load_samples(DATA, input_specs(load_graph(source))).split()
    outputs = [[answer(path, x=call["x"]) for call in held.calls] for path in (out, source)]
    (error,) = squared_errors(*outputs)
    assert result.score == pytest.approx(1 - error**0.5, abs=1e-5)
    assert result.samples == (32, 16)
    assert result.score >= 0.8


def test_nothing_that_is_held_out_is_fitted_to(source, tmp_path, monkeypatch):
    seen = []
    fixed = compress.TrialGraph.fixed

    def spy(self, taps=(), tried=None):
        run = fixed(self, taps, tried)
        return (lambda feeds: seen.append(feeds["x"].tobytes()) or run(feeds)) if taps else run

    monkeypatch.setattr(compress.TrialGraph, "fixed", spy)
    compress_file(source, tmp_path / "out.onnx", data=DATA, loss="error", max_drop=0.2, **MACS)
    fit, held = load_samples(DATA, input_specs(load_graph(source))).split()
    assert set(seen) == {call["x"].tobytes() for call in fit.calls}
    assert not set(seen) & {call["x"].tobytes() for call in held.calls}


def test_the_held_out_check_catches_a_file_that_loses_more(source, tmp_path, monkeypatch):
    """Whatever the trials promise: the written file is run, and refused."""
    real = trial_file.write_fitted

    def spoilt(facts, plan, tried):
        worse = {name: replace(one, weight=torch.zeros_like(one.weight)) for name, one in tried.items()}
        return real(facts, plan, worse)

    monkeypatch.setattr(trial_file, "write_fitted", spoilt)
    out = tmp_path / "out.onnx"
    with pytest.raises(NothingPays):
        compress_file(source, out, data=DATA, loss="error", max_drop=0.1, **MACS)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.onnx"]


def test_a_search_leaves_a_part_of_the_allowed_loss_to_other_inputs(compressed):
    source, out, result = compressed
    assert result.changes
    task = compress.Task(compress.Calibration(DATA), loss="error", max_drop=0.2)
    judged = compress.prepared(source, None, task, methods=["svd"], threads=1, force=False)[0].judge
    (told,) = result.chance
    assert "at most" in told
    assert "on inputs like them (95% confidence)" in told
    kept = judged.loss(runner(open_session(out)))
    assert kept.lost < kept.most <= 0.2 + 1e-3  # the file is run in other kernels than the trial


def test_nothing_is_written_where_nothing_pays(source, tmp_path):
    out = tmp_path / "out.onnx"
    noise = np.random.default_rng(0).standard_normal((48, 8, 10, 12)).astype(np.float32)
    with pytest.raises(NothingPays, match="nothing pays: no smaller file keeps 100 % of 100 %"):
        compress_file(source, out, data={"x": noise}, loss="error", max_drop=0, **MACS)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.onnx"]


def test_labels_make_accuracy_what_may_drop(source, tmp_path):
    labels = answer(source, x=DATA["x"])[0].argmax(1)
    result = compress_file(source, tmp_path / "out.onnx", data=DATA, labels=labels, max_drop="10%", **MACS)
    assert result.judge == "accuracy on 16 held-out samples"
    assert result.dense == 1
    assert result.score >= 0.9


def test_a_score_of_ones_own_decides(source, tmp_path):
    x = smooth(20, 8, 10, 12, seed=7)
    wanted = answer(source, x=x)[0]
    calls = []

    def score(run):
        outputs = run({"x": x})
        calls.append(1)
        return -float(np.abs(outputs["y"] - wanted).mean() / np.abs(wanted).mean())

    result = compress_file(source, tmp_path / "out.onnx", data=DATA, evaluate=score, max_drop=0.2, **MACS)
    assert result.dense == 0
    assert -0.2 <= result.score < 0
    assert len(calls) > 3


def test_a_smaller_file_is_another_target_than_fewer_products(compressed, tmp_path):
    source, _, macs = compressed
    settings = {"loss": "error", "max_drop": 0.2, "target": "size", "seconds": 0.1}
    size = compress_file(source, tmp_path / "size.onnx", data=DATA, **settings)
    assert size.after.params <= macs.after.params < macs.before.params == size.before.params


def types_of(path):
    return {tensor.data_type for tensor in onnx.load(path).graph.initializer}


def test_weights_are_stored_as_asked_for(compressed, tmp_path):
    source, out, _ = compressed
    assert types_of(out) == {TensorProto.FLOAT, TensorProto.FLOAT16}
    settings = {"data": DATA, "loss": "error", "max_drop": 0.2, **MACS}
    compress_file(source, tmp_path / "float32.onnx", **settings, store="float32")
    assert types_of(tmp_path / "float32.onnx") == {TensorProto.FLOAT}
    with pytest.raises(ConfigError, match=r"--store: 'bfloat16' given; allowed: float32 \| float16 \| int8"):
        compress_file(source, tmp_path / "no.onnx", **settings, store="bfloat16")


def test_a_file_whose_layers_can_spare_nothing_is_stored_shorter(tmp_path):
    source = conv_net(tmp_path / "in.onnx")  # of random weights
    noise = np.random.default_rng(0).standard_normal((48, 8, 10, 12)).astype(np.float32)
    settings = {"data": {"x": noise}, "loss": "error", "target": "size", "methods": ["svd"], "seconds": 0.1}
    sizes = {
        (out.stat().st_size, bool(result.changes), TensorProto.INT8 in types_of(out))
        for drop in (0.02, 0.002)
        if (result := compress_file(source, out := tmp_path / f"{drop}.onnx", **settings, max_drop=drop))
    }
    (short, *_), (longer, *_) = sorted(sizes)
    assert short < longer < source.stat().st_size
    assert {one[1:] for one in sizes} == {(False, True), (False, False)}  # dense, in 8 bits and in 16
    with pytest.raises(NothingPays):
        compress_file(source, tmp_path / "out.onnx", **settings, max_drop=0)


def test_shared_weights_and_two_inputs(tmp_path):
    nodes = [
        node("MatMul", "a w", "h", name="one"), node("MatMul", "b w", "k", name="two"),
        node("Add", "h bias", "g"), node("Sub", "g k", "d"), node("Relu", "d", "y"),
    ]  # fmt: skip
    weights = {"w": low_rank(24, 20), "bias": numbers(20, seed=1)}
    source = save(tmp_path / "in.onnx", nodes, weights, inputs={"a": ("n", 24), "b": ("n", 24)})
    data = {"a": smooth(64, 24), "b": smooth(64, 24, seed=1)}
    result = compress_file(source, tmp_path / "out.onnx", data=data, loss="error", max_drop=0.1, **MACS)
    assert set(result.changes) == {"one", "two"}
    a, b = smooth(32, 24, seed=2), smooth(32, 24, seed=3)
    (error,) = squared_errors([answer(tmp_path / "out.onnx", a=a, b=b)], [answer(source, a=a, b=b)])
    assert error**0.5 < 0.15


@pytest.mark.parametrize(("settings", "kind", "words"), [
    ({"target": "speed"}, ConfigError, "'speed' given; allowed: latency | macs | size"),
    ({"max_drop": "much"}, ConfigError, "'much' given; allowed: a number"),
    ({"max_drop": -1}, ConfigError, "-1 given"),
    ({"loss": "tokens"}, ConfigError, "no output is"),
    ({"loss": "wer"}, ConfigError, "allowed: top1 | tokens | error"),
    ({"evaluate": lambda run: next(COUNT)}, ConfigError, "scores 0, then 1; allowed: the same every time"),
    ({"evaluate": lambda run: float("nan")}, ConfigError, "score is nan"),
    ({"evaluate": lambda run: 1 / 0}, ConfigError, "the function fails: ZeroDivisionError"),
    ({"labels": np.zeros(48)}, ConfigError, "they are compared with the largest"),
    ({"data": {"x": DATA["x"] * np.float32(2e37)}}, DataError, "NaN or Inf"),
])  # fmt: skip
def test_what_has_to_be_mended_is_said_before_anything_is_written(source, tmp_path, settings, kind, words):
    with pytest.raises(kind, match=words.replace("|", r"\|")):
        compress_file(source, tmp_path / "out.onnx", **{"data": DATA, **MACS, **settings})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.onnx"]


@pytest.mark.parametrize(("slower", "pays"), [(False, True), (True, False)])
def test_a_layer_is_decomposed_for_latency_where_it_gets_faster(source, tmp_path, monkeypatch, slower, pays):
    """Times of layers by their multiply-adds: timing is no matter of a test."""

    def times(*_):
        def after(layer):
            return layer.macs_before + 1.0 if slower else layer.macs_after

        return CostMetric("latency_ms", after, lambda layer: layer.macs_before, rest=1000.0)

    monkeypatch.setattr(search, "latency_metric", times)
    measured = trial_file.bench_files
    even = {"low": 0.9, "high": 1.1}
    monkeypatch.setattr(trial_file, "bench_files", lambda *files, **how: replace(measured(*files, **how), **even))
    out = tmp_path / "out.onnx"
    settings = {"data": DATA, "loss": "error", "max_drop": 0.2, "seconds": 0.1}
    if pays:
        assert compress_file(source, out, **settings).changes
    else:
        with pytest.raises(NothingPays):
            compress_file(source, out, **settings)
    assert out.exists() == pays


COUNT = iter(range(100))


def test_int8_stands_on_top_within_the_same_loss(source, tmp_path):
    out = tmp_path / "out.onnx"
    result = compress_file(source, out, data=DATA, loss="error", max_drop=0.2, int8=True, **MACS)
    assert [line.split(" score")[0].strip() for line in result.rows] == [
        "fp32 dense", "int8 dense", "decomposed", "decomposed, int8"
    ]  # fmt: skip
    assert result.score >= 0.8
    assert result.bytes_after == out.stat().st_size
    assert any("8 bits" in remark for remark in result.remarks)
    answer(out, x=DATA["x"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.onnx", "out.onnx"]


def test_the_four_files_are_measured_on_inputs_of_the_size_of_the_data(source, tmp_path):
    """A size of its own choice, 224, would not run: the file takes its input apart into images of 8 x 10 x 12."""
    model = onnx.load(source)
    for axis, name in zip(model.graph.input[0].type.tensor_type.shape.dim[2:], "HW", strict=True):
        axis.dim_param = name
    model.graph.initializer.append(numpy_helper.from_array(np.array([-1, 8, 10, 12]), "size"))
    model.graph.node[0].input[0] = "images"
    model.graph.node.insert(0, node("Reshape", "x size", "images", name="apart"))
    onnx.save(model, source)
    result = compress_file(source, tmp_path / "out.onnx", data=DATA, loss="error", max_drop=0.2, int8=True, **MACS)
    assert len(result.rows) == 4


def test_a_file_that_cannot_be_quantized_is_written_in_float(source, tmp_path, monkeypatch):
    """As one of basic-pitch 0.4.0, of which onnxruntime's quantizer makes a file that onnxruntime refuses."""

    def refused(*_):
        raise Cannot("Transpose of a vector")

    monkeypatch.setattr(int8, "_fewest_floats", lambda *args, **how: refused())
    result = compress_file(
        source, tmp_path / "out.onnx", data=DATA, loss="error", max_drop=0.2, int8=True, **MACS
    )  # fmt: skip
    assert result.changes
    assert any("does not run what its quantizer makes of it (Transpose of a vector)" in one for one in result.remarks)
    answer(tmp_path / "out.onnx", x=DATA["x"])


def test_the_second_search_knows_the_first(source, tmp_path, monkeypatch):
    settings = {"data": DATA, "loss": "error", "max_drop": 0.2, **MACS}
    first = compress_file(source, tmp_path / "first.onnx", **settings)
    trials = []
    judged = search.Search.judged
    monkeypatch.setattr(search.Search, "judged", lambda self, *args: trials.append(1) or judged(self, *args))
    monkeypatch.setattr(Sensitivity, "_weight", None)  # no table is made again
    second = compress_file(source, tmp_path / "second.onnx", **settings)
    assert len(trials) == 1
    assert second.changes.keys() == first.changes.keys()
    assert second.score >= 0.8
    third = compress_file(source, tmp_path / "third.onnx", **{**settings, "max_drop": 0.1})
    assert len(trials) > 2  # another question
    assert third.score >= 0.9


@pytest.mark.parametrize("what", ["__version__", "FORMAT"])
def test_what_another_version_found_is_not_taken(source, monkeypatch, what):
    graph = load_graph(source)
    fit, _ = load_samples(DATA, input_specs(graph)).split()
    paths = {saved.Saved.of(graph, fit, ["svd"]).path for _ in range(2)}
    monkeypatch.setattr(saved, what, "another")
    assert saved.Saved.of(graph, fit, ["svd"]).path not in paths
    assert len(paths) == 1


def test_a_search_goes_on_where_it_was_stopped(source, tmp_path, monkeypatch):
    settings = {"data": DATA, "loss": "error", "max_drop": 0.2, **MACS}
    monkeypatch.setattr(sensitivity, "MEMORY", 1)  # a group for each layer
    seen, weight = [], Sensitivity._weight

    def stopped(self, options, several, *rest):
        seen.append(several[0].name)
        if seen.count("head") == 1 and seen[-1] == "head":
            raise KeyboardInterrupt
        return weight(self, options, several, *rest)

    monkeypatch.setattr(Sensitivity, "_weight", stopped)
    with pytest.raises(KeyboardInterrupt):
        compress_file(source, tmp_path / "out.onnx", **settings)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.onnx"]
    compress_file(source, tmp_path / "out.onnx", **settings)
    assert seen == ["first", "second", "head", "head"]


@pytest.mark.parametrize("method", ["svd", "spatial_svd", "tucker"])
def test_quick_fits_are_those_of_fit_layer(source, tmp_path, method):
    task = compress.Task(compress.Calibration(DATA), loss="error")
    found, _ = compress.prepared(source, None, task, methods=[method], threads=1, force=False)
    plan, _ = plan_graph(found.facts, Manual(3), method, found.settings)
    moments = found.tables.dense_moments(["first"])["first"]
    wanted = fit_layer(plan["first"], found.sites["first"].layer.weight, moments, solver="none")
    for _ in range(2):  # the second time from what was kept
        quick = found.tables.problems({"first": plan["first"]})["first"].fitted(plan["first"])
        torch.testing.assert_close(quick.weight, wanted.weight.float(), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(quick.shift, wanted.bias, rtol=1e-6, atol=1e-6)


def test_half_precision_is_fitted_and_stays_half(tmp_path):
    nodes = [
        node("Conv", "x w b", "h", name="one", pads=[1, 1, 1, 1]), node("Relu", "h", "r"),
        node("MatMul", "r v", "y", name="two"),
    ]  # fmt: skip
    weights = {"w": low_rank(24, 8, 3, 3), "b": numbers(24, seed=1), "v": low_rank(24, 20, seed=3)}
    half = {name: array.astype(np.float16) for name, array in weights.items()}
    source = save(
        tmp_path / "in.onnx", nodes, half, inputs={"x": ("n", 8, 6, 24)}, dtype=TensorProto.FLOAT16
    )  # fmt: skip
    out = tmp_path / "out.onnx"
    result = compress_file(source, out, data={"x": smooth(48, 8, 6, 24)}, loss="error", max_drop=0.1, **MACS)
    assert result.changes
    kinds = {tensor.data_type for tensor in onnx.load(out).graph.initializer}
    assert kinds == {TensorProto.FLOAT16}
    x = smooth(16, 8, 6, 24, seed=4).astype(np.float16)
    (error,) = squared_errors([answer(out, x=x)], [answer(source, x=x)])
    assert error**0.5 < 0.15
