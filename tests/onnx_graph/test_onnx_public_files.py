"""Model files inside public packages: ``uv run --with rapidocr-onnxruntime --with silero-vad --with ddddocr``."""

from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

from hodec.onnx_graph.decompose import Outcome, decompose_file
from hodec.onnx_graph.facts import graph_facts
from hodec.onnx_graph.feeds import example_inputs
from hodec.onnx_graph.graph import load_graph
from hodec.ranks import Budget, Manual
from hodec.ranks.planning import PlanSettings

from small_graphs import answer, relative  # isort: skip

pytestmark = pytest.mark.slow

# package, file -> sizes and values of its inputs
FILES = {
    ("rapidocr_onnxruntime", "models/ch_PP-OCRv4_rec_infer.onnx"): ({"x": (1, 3, 48, 320)}, {}),
    ("rapidocr_onnxruntime", "models/ch_ppocr_mobile_v2.0_cls_infer.onnx"): ({"x": (1, 3, 48, 192)}, {}),
    ("silero_vad", "data/silero_vad.onnx"): ({"input": (1, 512), "state": (2, 1, 128)}, {"sr": 16000}),
    ("silero_vad", "data/silero_vad_op18_ifless.onnx"): ({"input": (1, 576), "state": (2, 1, 128)}, {"sr": 16000}),
    ("silero_vad", "data/silero_vad_half.onnx"): ({"input": (1, 576), "state": (2, 1, 128)}, {}),
    ("ddddocr", "common.onnx"): ({"input1": (1, 1, 64, 160)}, {}),
}


def file_of(package: str, name: str) -> Path:
    spec = find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        pytest.skip(f"needs the package {package}")
    return Path(spec.submodule_search_locations[0]) / name


def decomposed(key: tuple[str, str], out: Path, **how: object) -> tuple[Path, Outcome]:
    shapes, values = FILES[key]
    source = file_of(*key)
    return source, decompose_file(source, out, shapes=shapes, values=values, **how)  # type: ignore[arg-type]


@pytest.mark.parametrize("key", FILES, ids=lambda key: key[1])
@pytest.mark.parametrize("method", ["svd", "tucker", "spatial_svd"])
def test_full_rank_is_exact(tmp_path, key, method):
    out = tmp_path / "out.onnx"
    settings = PlanSettings(allow_larger=True)
    source, outcome = decomposed(key, out, method=method, rule=Manual(10**6), options=settings)
    _, feeds = example_inputs(load_graph(source), *FILES[key])
    for given, wanted in zip(answer(out, **feeds), answer(source, **feeds), strict=True):
        assert relative(given, wanted) < 1e-3
    assert len(outcome.changes) >= 5


@pytest.mark.parametrize("key", FILES, ids=lambda key: key[1])
@pytest.mark.parametrize("method", ["svd", "tucker", "tt"])
def test_multiply_adds_after_are_those_of_the_written_file(tmp_path, key, method):
    out = tmp_path / "out.onnx"
    _, outcome = decomposed(key, out, method=method, rule=Budget(macs=0.8))
    again = graph_facts(load_graph(out), *FILES[key])
    assert (again.cost, again.uncounted) == (outcome.after, outcome.uncounted)
    assert outcome.after.macs <= 0.8 * outcome.before.macs
    assert outcome.after.macs == outcome.plan.macs_after


def test_the_tiny_weights_of_pp_ocr_are_set_to_zero_and_its_outputs_stay(tmp_path):
    key, out = next(iter(FILES)), tmp_path / "out.onnx"
    settings = PlanSettings(include=["*MatMul*"], allow_larger=True)
    source, outcome = decomposed(key, out, method="svd", rule=Manual(10**6), options=settings)
    assert any(remark.startswith("36,9") and "set to 0" in remark for remark in outcome.remarks)
    _, feeds = example_inputs(load_graph(source), *FILES[key])
    for given, wanted in zip(answer(out, **feeds), answer(source, **feeds), strict=True):
        np.testing.assert_allclose(given, wanted, atol=1e-4)
