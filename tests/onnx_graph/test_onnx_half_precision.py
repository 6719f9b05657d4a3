"""A real-size net in float16 and bfloat16, against the float32 run of the same factors."""

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, numpy_helper

from hodec.models import build_model
from hodec.onnx_graph.decompose import decompose_file
from hodec.ranks import Budget, Manual
from hodec.ranks.planning import PlanSettings

from small_graphs import answer, reference  # isort: skip

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]


@pytest.fixture(scope="module")
def single(tmp_path_factory):
    """ResNet-18 for images of 64 pixels, in float32."""
    path = tmp_path_factory.mktemp("half") / "single.onnx"
    torch.manual_seed(0)
    net = build_model("torchvision/resnet18", num_classes=1000, in_channels=3, image_size=64).eval()
    torch.onnx.export(net, (torch.zeros(1, 3, 64, 64),), str(path), dynamo=True, external_data=False, verbose=False)
    return path


def cast(source: Path, out: Path, number: int, back: bool) -> Path:
    """The model with its weights, inputs and outputs in another type; ``back``: the other way, for a run in float32."""
    model = onnx.load(str(source))
    given, wanted = (number, TensorProto.FLOAT) if back else (TensorProto.FLOAT, number)
    dtype = onnx.helper.tensor_dtype_to_np_dtype(wanted)
    for tensor in model.graph.initializer:
        if tensor.data_type == given:
            tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor).astype(dtype), tensor.name))
    for value in (*model.graph.input, *model.graph.output):
        value.type.tensor_type.elem_type = wanted
    del model.graph.value_info[:]
    onnx.save(model, str(out))
    return out


def apart(first: np.ndarray, second: np.ndarray) -> float:
    """Largest difference over the largest number."""
    return float(np.abs(first.astype(np.float64) - second.astype(np.float64)).max() / np.abs(second).max())


@pytest.mark.parametrize(("number", "run", "tolerance"), [
    (TensorProto.FLOAT16, answer, 1e-2), (TensorProto.BFLOAT16, reference, 5e-2),
])  # fmt: skip
@pytest.mark.parametrize("method", ["svd", "tucker", "spatial_svd"])
def test_half_precision_is_as_near_to_float32_decomposed_as_dense(tmp_path, single, number, run, tolerance, method):
    dtype = onnx.helper.tensor_dtype_to_np_dtype(number)
    half, out = cast(single, tmp_path / "half.onnx", number, False), tmp_path / "out.onnx"
    x = np.random.default_rng(0).standard_normal((1, 3, 64, 64)).astype(dtype)
    (name,) = (value.name for value in onnx.load(str(half)).graph.input)
    exact = cast(half, tmp_path / "exact.onnx", number, True)
    dense = apart(run(half, **{name: x})[0], answer(exact, **{name: x.astype(np.float32)})[0])
    outcome = decompose_file(half, out, method=method, rule=Budget(macs=0.5))
    assert outcome.after.macs <= 0.5 * outcome.before.macs
    assert {one.data_type for one in onnx.load(str(out)).graph.initializer} <= {number, TensorProto.INT64}
    exact = cast(out, tmp_path / "exact.onnx", number, True)
    small = apart(run(out, **{name: x})[0], answer(exact, **{name: x.astype(np.float32)})[0])
    assert small < max(tolerance, 3 * dense)
    if method == "svd":
        settings = PlanSettings(allow_larger=True)
        decompose_file(half, out, method=method, rule=Manual(10**6), options=settings, force=True)
        assert apart(run(out, **{name: x})[0], run(half, **{name: x})[0]) < max(tolerance, 3 * dense)
