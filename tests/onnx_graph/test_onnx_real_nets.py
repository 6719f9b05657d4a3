"""Real networks, exported and from the onnx package's own data: exact at full rank, smaller at half the cost."""

import logging
import time
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from torch import nn

from hodec.onnx_graph.decompose import decompose_file
from hodec.ranks import Manual, Ratio
from hodec.ranks.planning import PlanSettings

from small_graphs import answer, relative  # isort: skip

log = logging.getLogger(__name__)
LIGHT = Path(onnx.__file__).parent / "backend/test/data/light"

# net -> method, side of its images
NETS = {
    "resnet18": ("tucker", 224),
    "vgg11_bn": ("spatial_svd", 224),
    "densenet121": ("svd", 224),
    "mobilenet_v2": ("weight_svd", 224),
    "efficientnet_b0": ("tucker", 224),
    "inception_v3": ("tt", 299),
    "convnext_tiny": ("svd", 224),
    "vit_b_16": ("svd", 224),
}
LIGHT_NETS = {
    "resnet50": "svd",
    "squeezenet": "tucker",
    "shufflenet": "tucker",
    "inception_v1": "svd",
    "inception_v2": "weight_svd",
    "densenet121": "svd",
}


def exported(net: nn.Module, path: Path, side: int) -> Path:
    """The net as an ONNX file whose batch is open."""
    shapes = {0: torch.export.Dim.DYNAMIC}
    example = torch.zeros(2, 3, side, side)
    torch.onnx.export(
        net.eval(), (example,), str(path), dynamo=True, external_data=False, dynamic_shapes=(shapes,), verbose=False
    )
    return path


def both_ways(source: Path, method: str, x: np.ndarray, *, exclude: list[str] | None = None) -> None:
    """Exact at full rank; at half the cost it runs and is smaller."""
    out = source.with_name("out.onnx")
    graph = onnx.load(str(source), load_external_data=False).graph
    (name,) = {value.name for value in graph.input} - {tensor.name for tensor in graph.initializer}
    (wanted, *_) = answer(source, **{name: x})
    start = time.perf_counter()
    full = decompose_file(
        source, out, method=method, rule=Manual(10**6), options=PlanSettings(allow_larger=True, exclude=exclude)
    )
    (given, *_) = answer(out, **{name: x})
    error, seconds = relative(given, wanted), time.perf_counter() - start
    assert error < 1e-3
    half = decompose_file(source, out, method=method, rule=Ratio(0.5), force=True)
    (given, *_) = answer(out, **{name: x})
    assert np.isfinite(given).all()
    assert half.after.macs < half.before.macs
    assert half.after.params < half.before.params
    kept = [100 * getattr(half.after, key) / getattr(half.before, key) for key in ("params", "macs")]
    log.info("%s %s: full rank %d layers, error %.2g, %.0f s", source.stem, method, len(full.changes), error, seconds)
    log.info("ratio 0.5: %d layers, %.1f %% of params, %.1f %% of MACs kept", len(half.changes), *kept)
    if source.stat().st_size > 10**6:  # light models make their weights from a shape and one number
        assert half.bytes_after < half.bytes_before


def image(side: int, batch: int = 1) -> np.ndarray:
    return np.random.default_rng(0).standard_normal((batch, 3, side, side)).astype("float32")


class Tiny(nn.Module):
    """What exporters make of linear layers on matrices and on sequences, of groups, of transposed convolutions."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, 16, 3, stride=2, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 16, 3, groups=4),
            nn.Conv2d(16, 24, 3, padding="same", dilation=2), nn.ConvTranspose2d(24, 16, 4, stride=2, padding=1),
        )  # fmt: skip
        self.sequence, self.head = nn.Linear(16, 20), nn.Linear(20, 10)

    def forward(self, x):
        tokens = self.sequence(self.body(x).flatten(2).transpose(1, 2))
        return self.head(tokens.mean(1))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("method", ["tucker", "tt", "spatial_svd"])
def test_a_tiny_exported_net(tmp_path, method, tiny_file):
    source = tmp_path / "tiny.onnx"
    source.write_bytes(tiny_file.read_bytes())
    both_ways(source, method, image(18, 3))


@pytest.fixture(scope="module")
def tiny_file(tmp_path_factory):
    torch.manual_seed(0)
    return exported(Tiny(), tmp_path_factory.mktemp("tiny") / "tiny.onnx", 18)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", NETS)
def test_torchvision_nets(tmp_path, name):
    import torchvision

    method, side = NETS[name]
    extra = {"init_weights": True} if name == "inception_v3" else {}
    net = torchvision.models.get_model(name, weights=None, **extra)
    for parameter in net.parameters():
        if not parameter.any():  # an untrained head of zeros would hide every error
            nn.init.normal_(parameter, std=0.1)
    # full-rank factors of matrices of 4096 columns take minutes, and show nothing that smaller ones do not
    source = exported(net, tmp_path / f"{name}.onnx", side)
    exclude = [one.name for one in onnx.load(str(source)).graph.node if one.op_type == "Gemm" and name == "vgg11_bn"]
    both_ways(source, method, image(side), exclude=exclude or None)


def without_softmax(model: onnx.ModelProto) -> onnx.ModelProto:
    """Equal weights give equal scores, and rounding alone would decide which of them softmax makes the largest."""
    last = model.graph.node[-1]
    if last.op_type == "Softmax":
        model.graph.output[0].name = last.input[0]
        del model.graph.node[-1]
    return model


@pytest.mark.slow
@pytest.mark.parametrize("name", LIGHT_NETS)
def test_light_nets_of_the_onnx_package(tmp_path, name):
    source = tmp_path / f"light_{name}.onnx"
    source.write_bytes(without_softmax(onnx.load(str(LIGHT / source.name))).SerializeToString())
    both_ways(source, LIGHT_NETS[name], image(224))
