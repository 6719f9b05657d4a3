"""Large weights: compared by their first rows, error taken from norms, not read twice. Here every weight is large."""

import numpy as np
import onnx
import pytest
import torch

from hodec.errors import CheckpointError, ConvertError
from hodec.methods import METHODS
from hodec.onnx_graph import recipes
from hodec.onnx_graph.decompose import decompose_file
from hodec.onnx_graph.graph import load_graph
from hodec.ranks import Manual
from hodec.ranks.planning import PlanSettings

from small_graphs import conv_net, node, numbers, save  # isort: skip

ANY = PlanSettings(allow_larger=True)
LAYERS = {
    "Conv": (node("Conv", "x w b", name="layer", strides=[2, 1]), (12, 8, 3, 5), ("n", 8, 13, 14)),
    "ConvTranspose": (node("ConvTranspose", "x w b", name="layer", strides=[2, 1]), (8, 12, 3, 2), ("n", 8, 6, 7)),
    "Gemm": (node("Gemm", "x w b", name="layer", transB=1), (12, 8), ("n", 8)),
    "MatMul": (node("MatMul", "x w", name="layer"), (8, 12), ("n", 3, 8)),
    "MatMul, weight first": (node("MatMul", "w x", name="layer"), (12, 8), ("n", 8, 4)),
}
CASES = [(name, method) for name in LAYERS for method in METHODS if method != "tt_classical" and (
    "MatMul" not in name and name != "Gemm" or method in ("svd", "tucker")
)]  # fmt: skip


@pytest.fixture
def all_large(monkeypatch):
    monkeypatch.setattr(recipes, "LARGE", 1)
    monkeypatch.setattr(recipes, "ROWS", 5)


def decomposed(tmp_path, name, method):
    layer, shape, size = LAYERS[name]
    source = save(tmp_path / "in.onnx", [layer], {"w": numbers(*shape), "b": numbers(12)}, inputs={"x": size})
    out = tmp_path / "out.onnx"
    outcome = decompose_file(source, out, method=method, rule=Manual(3), options=ANY, force=True)
    return outcome, onnx.load(str(out))


@pytest.mark.parametrize(("name", "method"), CASES)
def test_nothing_but_the_way_differs(tmp_path, request, name, method):
    usual, file = decomposed(tmp_path, name, method)
    request.getfixturevalue("all_large")
    large, same = decomposed(tmp_path, name, method)
    assert large.changes["layer"].error == pytest.approx(usual.changes["layer"].error, rel=1e-4)
    assert [t.raw_data for t in same.graph.initializer] == [t.raw_data for t in file.graph.initializer]


@pytest.mark.usefixtures("all_large")
@pytest.mark.parametrize("method", ["tucker", "tt", "svd"])
def test_wrong_nodes_are_found_by_the_first_rows(tmp_path, monkeypatch, method):
    from hodec.onnx_graph.nodes import Writer

    rightly = Writer.add

    def wrongly(self, kind, inputs, **settings):
        settings.pop("strides", None)
        return rightly(self, kind, inputs, **settings)

    monkeypatch.setattr(Writer, "add", wrongly)
    with pytest.raises(ConvertError, match="layer .*this is a fault of hodec"):
        decomposed(tmp_path, "Conv", method)


@pytest.mark.usefixtures("all_large")
@pytest.mark.parametrize("method", ["tucker", "tt", "svd"])
def test_wrong_factors_are_found_by_the_first_rows(tmp_path, monkeypatch, method):
    """The rows come from the format's own formula, not from the nodes."""
    fmt = type(METHODS[method].format("conv2d"))
    rightly = fmt.leading
    monkeypatch.setattr(fmt, "leading", lambda self, *given: 1.01 * rightly(self, *given))
    with pytest.raises(ConvertError, match="layer .*differ from the layer they stand for by 0.0[01]"):
        decomposed(tmp_path, "Conv", method)


@pytest.mark.usefixtures("all_large")
def test_errors_too_small_for_a_difference_of_norms_are_measured(tmp_path):
    source = conv_net(tmp_path / "in.onnx")
    outcome = decompose_file(source, tmp_path / "out.onnx", rule=Manual(10**6), options=ANY)
    # of 1 - kept^2 in float32 the square root would be some 1e-4, or 0
    assert all(1e-9 < change.error < 1e-5 for change in outcome.changes.values())


@pytest.mark.usefixtures("all_large")
def test_too_few_bytes_are_still_found(tmp_path):
    model = onnx.load(str(conv_net(tmp_path / "in.onnx")))
    tensor = model.graph.initializer[0]
    tensor.raw_data = tensor.raw_data[:-4]
    (tmp_path / "in.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(CheckpointError, match=r"in\.onnx is not a valid ONNX model"):
        load_graph(tmp_path / "in.onnx")


@pytest.mark.usefixtures("all_large")
def test_a_broken_node_beside_large_weights_is_still_found(tmp_path):
    model = onnx.load(str(conv_net(tmp_path / "in.onnx")))
    model.graph.node[1].op_type = "Relo"
    (tmp_path / "in.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(CheckpointError, match="not a valid ONNX model.*Relo"):
        load_graph(tmp_path / "in.onnx")


def test_norms_of_many_numbers_are_summed_in_float64():
    from hodec.linalg.svd import norm

    x = torch.full((3, 2**21), 0.1)
    assert norm(x) == pytest.approx(float(np.float32(0.1)) * (3 * 2**21) ** 0.5, rel=1e-10)
    assert norm(x.T) == norm(x)
    assert norm(torch.zeros(0)) == 0.0
