"""ONNX files: plain operators, right at any batch size, whole or absent."""

import math

import pytest
import torch
from torch import nn

import hodec
from hodec.errors import CheckpointError, ConvertError
from hodec.export import onnx as module
from hodec.export.layer_errors import _varying_distance, check_layers, layer_errors
from hodec.export.onnx import session, to_onnx
from hodec.export.program import plain_net
from hodec.fusion.search import fuse
from hodec.ranks import Manual, make_plan

from small_nets import SmallResNet  # isort: skip

onnx_file = pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")

X = torch.randn(1, 6, 12, 12, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def small() -> nn.Module:
    torch.manual_seed(0)
    net = SmallResNet()
    return hodec.convert(net, make_plan(net, Manual(3), n_modes=2, example_input=X)).eval()


@pytest.fixture(scope="module")
def content(small) -> bytes:
    """The small net as torch's exporter writes it, which takes seconds."""
    return module._content(plain_net(small, (X,)), (X,), True, ["x"])


@pytest.fixture
def once(content, monkeypatch):
    """Tests of what comes behind the exporter take what it wrote before."""
    monkeypatch.setattr(module, "_content", lambda *_: content)


def test_a_factorized_net_comes_out_as_plain_convolutions(small, tmp_path):
    written = to_onnx(small, tmp_path / "net.onnx", example_input=X)
    assert written.error < 1e-5
    assert written.batches == (1, 3)
    assert written.nodes["Conv"] >= 5
    assert set(written.nodes) <= {"Conv", "Relu", "Add", "ReduceMean", "Gemm", "MatMul", "Reshape"}
    assert [path.name for path in tmp_path.iterdir()] == ["net.onnx"]
    run = session(written.path.read_bytes())
    x = torch.randn(5, 6, 12, 12)
    torch.testing.assert_close(run(x)[0], small(x), rtol=1e-4, atol=1e-4)
    assert "net.onnx" in str(written)


@pytest.mark.usefixtures("once")
def test_what_is_not_verified_says_so(small, tmp_path):
    written = to_onnx(small, tmp_path / "net.onnx", example_input=X, dynamic_batch=False, verify=False)
    assert written.error is None
    assert written.batches == ()
    assert "not verified" in str(written)


def test_a_fused_net_is_taken_as_it_is(small):
    fused = fuse(small, example_input=X, target="macs")
    assert plain_net(fused, (X,)) is fused


def test_float16_inside_and_float32_outside(small, content, tmp_path):
    half = to_onnx(small, tmp_path / "b.onnx", example_input=X, precision="fp16")
    assert 1e-6 < half.error < 5e-2
    assert half.nodes == {**module.nodes_of(content), "Cast": 2}
    models = onnx_file.load_model_from_string(content), onnx_file.load(half.path)
    names = [[i.name for i in model.graph.input] for model in models]
    assert names[0] == names[1]
    assert session(half.path.read_bytes())(X)[0].dtype == torch.float32


@pytest.mark.usefixtures("once")
@pytest.mark.parametrize("calibrated", [False, True])
def test_int8(small, tmp_path, calibrated):
    batches = [torch.randn(4, 6, 12, 12) for _ in range(2)] if calibrated else None
    written = to_onnx(small, tmp_path / "net.onnx", example_input=X, precision="int8", calibration=batches)
    assert 1e-6 < written.error < 0.2
    assert ("QuantizeLinear" in written.nodes) == calibrated
    assert ("ConvInteger" in written.nodes) == (not calibrated)


@pytest.mark.usefixtures("once")
def test_a_calibrated_file_is_compared_on_what_it_was_calibrated_with(small, tmp_path):
    """Not on an example input far out of those ranges, where every such file is wrong."""
    far, near = 30 * X, [torch.randn(4, 6, 12, 12, generator=torch.Generator().manual_seed(1))]
    written = to_onnx(small, tmp_path / "net.onnx", example_input=far, precision="int8", calibration=near)
    assert written.error < 0.2
    run = session(written.path.read_bytes())
    assert (run(far)[0] - small(far)).norm() > 0.5 * small(far).norm()


def without_weights(content, number):
    """The quantized file with the weights of one layer set to what stands for zero."""
    graph = (model := onnx_file.load_model_from_string(content)).graph
    numbers = {one.name: one for one in graph.initializer}
    names = [name for name, one in numbers.items() if name.endswith("_quantized") and len(one.dims) > 1]
    weight, zero = numbers[names[number]], numbers[names[number].replace("_quantized", "_zero_point")]
    array = onnx_file.numpy_helper.to_array(weight)
    filled = array * 0 + onnx_file.numpy_helper.to_array(zero).reshape(-1)[0]
    weight.CopyFrom(onnx_file.numpy_helper.from_array(filled.astype(array.dtype), weight.name))
    return model.SerializeToString()


CALIBRATION = [(torch.randn(4, 6, 12, 12, generator=torch.Generator().manual_seed(1)),)]


@pytest.mark.parametrize("batches", [None, CALIBRATION])
def test_an_int8_file_that_lost_the_weights_of_a_layer_is_found(content, batches):
    """Behind a shortcut that changes the net's outputs by 0.4 % of their norm, less than rounding does elsewhere."""
    right = module._quantized(content, batches)
    errors = layer_errors(content, right, [X])
    assert len(errors) >= 10
    assert 1e-4 < max(errors.values()) < 0.2
    for number in range(12):
        errors = layer_errors(content, without_weights(right, number), [X])
        with pytest.raises(ConvertError, match=r"those of its layer '.*' differ by (0\.[6-9]|1)") as error:
            check_layers("net", errors)
        assert "\n" not in str(error.value)
    assert set(layer_errors(content, content, [X]).values()) == {0.0}


@pytest.mark.usefixtures("once")
def test_an_int8_file_that_lost_the_weights_of_a_layer_is_not_written(small, tmp_path, monkeypatch):
    right = module._quantized
    monkeypatch.setattr(module, "_quantized", lambda *given: without_weights(right(*given), 5))
    with pytest.raises(ConvertError, match="those of its layer '.*' differ by"):
        to_onnx(small, tmp_path / "net.onnx", example_input=X, precision="int8")
    assert list(tmp_path.iterdir()) == []


def test_a_layer_whose_outputs_hardly_vary_is_not_judged_by_rounding():
    wanted = 1000 + torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    assert _varying_distance(wanted + torch.randn_like(wanted), wanted) < 0.1
    assert _varying_distance(torch.full_like(wanted, torch.nan), wanted) == math.inf
    assert _varying_distance(torch.zeros(1, 10), torch.ones(1, 10)) == 1


@pytest.mark.usefixtures("once")
def test_a_file_that_computes_something_else_is_not_written(small, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "session", lambda content: lambda x: [torch.zeros(len(x), 10)])
    with pytest.raises(ConvertError, match="does not give the outputs of the model: at batch 1 they differ by 1"):
        to_onnx(small, tmp_path / "net.onnx", example_input=X)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("settings", "kind", "message"),
    [
        ({"path": "net.pt"}, CheckpointError, r"ends in \.onnx, not '\.pt'"),
        ({"precision": "fp8"}, ConvertError, r"precision='fp8' is not one of fp32, fp16, int8"),
        ({"calibration": [X]}, ConvertError, "calibration is for precision='int8'"),
        ({"precision": "int8", "calibration": []}, ConvertError, "calibration has no batches"),
    ],
)
def test_a_wrong_setting_is_named(small, tmp_path, settings, kind, message):
    settings = {"path": "net.onnx", **settings}
    with pytest.raises(kind, match=message):
        to_onnx(small, tmp_path / settings.pop("path"), example_input=X, **settings)


def test_missing_packages_are_named(small, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "find_spec", lambda name: None)
    with pytest.raises(ConvertError, match=r"needs onnx, onnxscript, onnxruntime: pip install 'hodec\[export\]'"):
        to_onnx(small, tmp_path / "net.onnx", example_input=X)


@pytest.mark.usefixtures("once")
def test_labels_in_calibration_batches_are_left_out(small, tmp_path):
    batches = [(X, torch.zeros(1)), (X + 1, torch.ones(1))]
    labelled = to_onnx(small, tmp_path / "a.onnx", example_input=X, precision="int8", calibration=batches)
    plain = to_onnx(small, tmp_path / "b.onnx", example_input=X, precision="int8", calibration=[x for x, _ in batches])
    assert labelled.path.read_bytes() == plain.path.read_bytes()


@pytest.mark.usefixtures("once")
def test_calibration_batches_that_do_not_fit_are_one_message(small, tmp_path):
    batches = [torch.randn(1, 5, 12, 12)]
    with pytest.raises(ConvertError, match="calibration: the model does not run on these batches") as error:
        to_onnx(small, tmp_path / "a.onnx", example_input=X, precision="int8", calibration=batches)
    assert "\n" not in str(error.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.usefixtures("once")
def test_a_folder_in_its_place_is_one_message(small, tmp_path):
    (tmp_path / "net.onnx").mkdir()
    with pytest.raises(CheckpointError, match=r"net\.onnx could not be written: Is a directory"):
        to_onnx(small, tmp_path / "net.onnx", example_input=X, verify=False)
