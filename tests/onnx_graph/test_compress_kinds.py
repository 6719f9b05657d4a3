"""compress_file on files of other kinds: layers without rows, weights that spare nothing, odd outputs."""

import numpy as np

from hodec.onnx_graph.compress import compress_file
from hodec.onnx_graph.judge import squared_errors

from small_graphs import answer, node, save  # isort: skip
from test_onnx_compress import MACS, _own_cache, low_rank, smooth  # isort: skip  # noqa: F401


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
