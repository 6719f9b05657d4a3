"""compress_file on files of other kinds: layers without rows, weights that spare nothing, odd outputs."""

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from hodec.errors import CheckpointError, ConvertError, NothingPays, PlanError
from hodec.onnx_graph import compress_int8
from hodec.onnx_graph.compress import Calibration, Task, compress_file
from hodec.onnx_graph.fit_file import fit_file
from hodec.onnx_graph.judge import squared_errors
from hodec.plan.plan import Plan

from small_graphs import answer, node, numbers, save  # isort: skip
from test_onnx_compress import DATA, MACS, _own_cache, low_rank, net_of_low_rank, smooth  # isort: skip  # noqa: F401


SIZE = {**MACS, "target": "size"}


def recurrent_net(path):
    """A recurrent node, no rows of whose weights are looked at, and a product."""
    nodes = [
        node("LSTM", "x w r", "h", name="memory", hidden_size=16), node("Squeeze", "h axis", "s"),
        node("MatMul", "s v", "y", name="product"),
    ]  # fmt: skip
    weights = {"w": low_rank(64, 24)[None], "r": low_rank(64, 16, seed=1)[None], "v": low_rank(16, 20, seed=3)}
    return save(path, nodes, {**weights, "axis": np.array([1])}, inputs={"x": (6, "n", 24)})


def test_layers_without_rows_keep_what_truncation_gives(tmp_path):
    """One such layer in a group of its own too, where nothing is measured."""
    source, out = recurrent_net(tmp_path / "in.onnx"), tmp_path / "out.onnx"
    data = [{"x": smooth(6 * 4, 24, seed=k).reshape(6, 4, 24)} for k in range(12)]
    result = compress_file(source, out, data=data, loss="error", max_drop=0.2, **SIZE)
    assert len(result.changes) > 1
    outputs = [[answer(path, **feeds) for feeds in data] for path in (out, source)]
    assert squared_errors(*outputs)[0] ** 0.5 < 0.25


def half_net(path):
    """A product in float16 of full rank, whose weight is not stored any shorter."""
    weights = {"w": numbers(24, 20).astype(np.float16)}
    return save(path, [node("MatMul", "x w")], weights, inputs={"x": ("n", 24)}, dtype=TensorProto.FLOAT16)


def test_a_file_that_is_no_smaller_is_not_written_where_size_is_the_target(tmp_path):
    source, x = half_net(tmp_path / "in.onnx"), np.random.default_rng(0).standard_normal((48, 24))
    with pytest.raises(NothingPays, match="nothing pays"):
        compress_file(source, tmp_path / "out.onnx", data={"x": x.astype(np.float16)}, max_drop="0.1%", **SIZE)
    assert [path.name for path in tmp_path.iterdir()] == ["in.onnx"]


def test_what_is_said_of_an_8_bit_file_is_of_that_file(tmp_path, monkeypatch):
    monkeypatch.setattr(compress_int8, "_is_better", lambda *_: (True, ""))  # of so small a file it is not
    source = net_of_low_rank(tmp_path / "in.onnx")
    how = {"data": DATA, "loss": "error", "max_drop": 0.3, "store": "float16", **MACS}
    result = compress_file(source, tmp_path / "out.onnx", int8=True, **how)
    assert any("in 8 bits" in one for one in result.remarks)
    assert not any("weights are stored as float16" in one for one in result.remarks)


def test_outputs_that_are_no_arrays_are_refused_by_name(tmp_path):
    source = net_of_low_rank(tmp_path / "in.onnx")
    model = onnx.load(source)
    model.graph.node.append(node("SequenceConstruct", "y y", "several"))
    kind = helper.make_sequence_type_proto(helper.make_tensor_type_proto(TensorProto.FLOAT, None))
    model.graph.output.append(helper.make_value_info("several", kind))
    onnx.save(model, source)
    with pytest.raises(ConvertError, match="its outputs several are no tensors"):
        compress_file(source, tmp_path / "out.onnx", data=DATA, loss="error", **MACS)


def test_a_plan_without_layers_is_refused(tmp_path):
    source = net_of_low_rank(tmp_path / "in.onnx")
    plan = Plan({}, {"first": "left"}, "manual", 1, 1)
    with pytest.raises(PlanError, match="the plan has no layers"):
        fit_file(source, tmp_path / "out.onnx", Task(Calibration(DATA)), plan=plan)
    assert [path.name for path in tmp_path.iterdir()] == ["in.onnx"]


def test_a_quantized_file_that_cannot_be_read_leaves_the_one_in_float(tmp_path, monkeypatch):
    def unreadable(*_, **__):
        raise CheckpointError("both.onnx is not a valid ONNX model")

    monkeypatch.setattr(compress_int8, "four_rows", unreadable)
    source = net_of_low_rank(tmp_path / "in.onnx")
    how = {"data": DATA, "loss": "error", "max_drop": 0.3, **MACS}
    result = compress_file(source, out := tmp_path / "out.onnx", int8=True, **how)
    assert any("in float, as 8 bits cannot be had: both.onnx is not" in one for one in result.remarks)
    assert np.isfinite(answer(out, **DATA)[0]).all()
