"""A model whose numbers stand in another file: where that is said to be may be anything."""

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from hodec.errors import CheckpointError
from hodec.onnx_graph.graph import load_graph

# (file, offset, length) of the one tensor; the file beside the model has 2,048 bytes.
ODD = {
    "NUL": ("w\0.bin", "0", "1024"),
    "5,000 characters": ("w" * 5000, "0", "1024"),
    "a negative offset": ("w.bin", "-1024", "1024"),
    "a negative length": ("w.bin", "0", "-5"),
    "an offset in words": ("w.bin", "x", "1024"),
    "an offset beyond its end": ("w.bin", str(10**30), "1024"),
    "the folder itself": (".", "0", "1024"),
    "nowhere": ("", "0", "1024"),
    "outside": ("../w.bin", "0", "1024"),
}


@pytest.mark.parametrize("odd", ODD)
def test_odd_locations_are_one_message(tmp_path, odd):
    tensor = TensorProto(name="w", dims=[16, 16], data_type=TensorProto.FLOAT, data_location=TensorProto.EXTERNAL)
    for key, value in zip(("location", "offset", "length"), ODD[odd], strict=True):
        tensor.external_data.add(key=key, value=value)
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, 16]) for name in ("x", "y")]
    graph = helper.make_graph([helper.make_node("MatMul", ["x", "w"], ["y"])], "g", ends[:1], ends[1:], [tensor])
    (tmp_path / "w.bin").write_bytes(np.zeros(512, np.float32).tobytes())
    path = tmp_path / "m.onnx"
    path.write_bytes(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9).SerializeToString()
    )
    assert onnx.load(path, load_external_data=False).graph.initializer[0].name == "w"
    with pytest.raises(CheckpointError) as error:
        load_graph(path)
    assert "\n" not in str(error.value)
    if "negative" in odd or "words" in odd:
        assert "allowed: a whole number from 0" in str(error.value)
