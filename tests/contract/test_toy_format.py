"""A new format in three small pieces (mathematics, layer, table entry) does all that the others do.

It obeys the laws of ``tests/contract``, is planned, converted, counted, timed and fused, and goes into ONNX files,
while no file of hodec knows of it.
"""

import inspect
import itertools
import pickle
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import pytest
import test_format_laws
import test_layer_laws
import test_layer_state_laws
import torch
from cases import Case
from torch import Tensor, nn

import hodec
from hodec import methods
from hodec.cost import latency
from hodec.cost.count import count_cost
from hodec.cost.latency import LatencyTable
from hodec.errors import PlanError
from hodec.formats.base import Ranks
from hodec.formats.layer_types import LAYER_TYPES
from hodec.formats.modes import Modes
from hodec.formats.ops import Op, Shape, pointwise, spatial_axes
from hodec.formats.staged import StagedFormat
from hodec.layers.base import FactorizedLayer
from hodec.layers.staged import StagedConv
from hodec.methods import METHODS, Method, register
from hodec.ranks import Manual

from small_nets import SmallResNet  # isort: skip

# -- the three pieces ----------------------------------------------------------------------------------------------


class ToyFormat(StagedFormat):
    """An SVD whose singular values are a factor of their own: K x K to the rank, a depthwise 1x1, 1x1."""

    def chain(self, shape: Shape, ranks: Sequence[int]) -> list[Op]:
        (out, inp, *kernel), (r,) = shape, ranks
        ones = [1] * len(kernel)
        scale = Op((r, 1, *ones), depthwise=r > 1)
        return [Op((r, inp, *kernel), spatial_axes(shape)), scale, pointwise(out, r, shape)]

    def max_ranks(self, shape: Shape, modes: Modes) -> Ranks:
        return (min(shape[0], torch.Size(shape[1:]).numel()),)

    def ranks(self, factors: Sequence[Tensor]) -> Ranks:
        return (factors[0].shape[0],)

    def decompose(self, weight: Tensor, ranks: Sequence[int], modes: Modes) -> list[Tensor]:
        u, s, vh = torch.linalg.svd(weight.flatten(1), full_matrices=False)
        ones, r = [1] * (weight.ndim - 2), ranks[0]
        return [vh[:r].reshape(r, *weight.shape[1:]), s[:r].reshape(r, 1, *ones), u[:, :r].reshape(-1, r, *ones)]

    def reconstruct(self, factors: Sequence[Tensor], shape: Shape, modes: Modes) -> Tensor:
        vh, s, u = (factor.flatten(1) for factor in factors)
        return (u @ (s * vh)).reshape(tuple(shape))

    def unfoldings(self, weight: Tensor, modes: Modes) -> list[tuple[int, Tensor]]:
        return [(0, weight.flatten(1))]


class ToyConv2d(StagedConv):
    format, layer_type = ToyFormat(), LAYER_TYPES["conv2d"]


class ToyConvTranspose2d(StagedConv):
    format, layer_type = ToyFormat(transposed=True), LAYER_TYPES["conv_transpose2d"]


TOY = Method("toy", {"conv2d": ToyConv2d, "conv_transpose2d": ToyConvTranspose2d}, "this file")


@pytest.fixture(autouse=True)
def _registered() -> Iterator[None]:
    with register(TOY):
        yield


# -- the laws ------------------------------------------------------------------------------------------------------

LAWS = {
    f"{module.__name__}.{name}": law
    for module in (test_format_laws, test_layer_laws, test_layer_state_laws)
    for name, law in vars(module).items()
    if name.startswith("test_")
}


def settings_of(law: Callable[..., None]) -> Iterator[dict[str, object]]:
    """The values of a law's parameters, beside the case and its execution."""
    axes = []
    for mark in law.pytestmark:
        names = [mark.args[0]] if isinstance(mark.args[0], str) else list(mark.args[0])
        if "case" not in names:
            axes.append([(names[0], value) for value in mark.args[1]])
    yield from (dict(values) for values in itertools.product(*axes))


@pytest.mark.parametrize("kind", list(TOY.layers))
@pytest.mark.parametrize("law", LAWS)
def test_the_toy_obeys(law: str, kind: str):
    case = Case("toy", kind, Modes((8,), (12,)))
    assert case.cls is TOY.layers[kind]
    execution = {"execution": "merged"} if "execution" in inspect.signature(LAWS[law]).parameters else {}
    for settings in settings_of(LAWS[law]):
        LAWS[law](case=case, **execution, **settings)


# -- the rooms of the house ----------------------------------------------------------------------------------------

X = torch.randn(1, 6, 12, 12, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def planned() -> tuple[nn.Module, hodec.Plan]:
    net = SmallResNet().eval()
    return net, hodec.make_plan(net, rule=Manual(4), method="toy", example_input=X, allow_larger=True)


def test_it_is_planned_converted_and_counted(planned):
    net, plan = planned
    assert len(plan) >= 3
    assert type(hodec.Plan.from_dict(plan.to_dict())["conv1"].format) is ToyFormat
    compressed = hodec.convert(net, plan)
    layers = [m for m in compressed.modules() if isinstance(m, FactorizedLayer)]
    assert {type(layer) for layer in layers} == {ToyConv2d}
    cost = count_cost(compressed, X)
    assert (cost.params, cost.macs) == (plan.params_after, plan.macs_after)
    again = pickle.loads(pickle.dumps(compressed))
    torch.testing.assert_close(again(X), compressed(X), rtol=0, atol=0)


def test_it_is_saved_and_loaded(planned, tmp_path):
    net, plan = planned
    compressed = hodec.convert(net, plan)
    hodec.save(compressed, tmp_path / "small.safetensors")
    torch.testing.assert_close(hodec.load(tmp_path / "small.safetensors", net)(X), compressed(X), rtol=0, atol=0)


def test_its_ops_are_timed(planned, monkeypatch, tmp_path):
    """With multiply-adds for milliseconds, the table finds the plan's own counts: 4 is a rank of its grid."""

    def counted(works, **_):
        found = {}
        for name, work in works.items():
            with torch.utils.flop_counter.FlopCounterMode(display=False) as counter:
                work()
            found[name] = counter.get_total_flops() / 2e6
        return found

    monkeypatch.setattr(latency, "medians_ms", counted)
    table = LatencyTable(folder=tmp_path)
    for layer in planned[1].values():
        assert table.after(layer) == pytest.approx(layer.macs_after / 1e6, rel=1e-6)


def test_it_is_fused(planned):
    net, plan = planned
    compressed = hodec.convert(net, plan)
    fused = hodec.fuse(compressed, example_input=X, target="macs")
    assert not any(isinstance(module, FactorizedLayer) for module in fused.modules())
    assert "dense" not in {choice.variant for choice in fused.fuse_report.layers.values()}
    torch.testing.assert_close(fused(X), compressed(X), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", list(TOY.layers))
def test_it_goes_into_model_files(kind, tmp_path):
    from hodec.onnx_graph.decompose import decompose_file
    from hodec.ranks.planning import PlanSettings

    from small_graphs import node, numbers, save  # isort: skip

    transposed = "transpose" in kind
    one = node("ConvTranspose" if transposed else "Conv", "x w b", name="layer", strides=[2, 1])
    weights = {"w": numbers(8, 12, 3, 2) if transposed else numbers(12, 8, 3, 5), "b": numbers(12)}
    source = save(tmp_path / "in.onnx", [one], weights, inputs={"x": ("n", 8, 13, 14)})
    options = PlanSettings(allow_larger=True)
    outcome = decompose_file(source, tmp_path / "out.onnx", method="toy", rule=Manual(3), options=options)
    assert outcome.plan["layer"].method == "toy"  # its nodes were run beside the dense reconstruction


def test_it_is_exported(planned, tmp_path):
    import onnxruntime

    net, plan = planned
    compressed = hodec.convert(net, plan)
    hodec.to_onnx(compressed, tmp_path / "small.onnx", example_input=X)
    session = onnxruntime.InferenceSession(str(tmp_path / "small.onnx"), providers=["CPUExecutionProvider"])
    (output,) = session.run(None, {session.get_inputs()[0].name: X.numpy()})
    np.testing.assert_allclose(output, compressed(X).detach().numpy(), rtol=1e-3, atol=1e-4)


# -- the table -----------------------------------------------------------------------------------------------------


def test_a_taken_name_and_a_wrong_layer_are_refused():
    with pytest.raises(PlanError, match=r"hodec.methods.register: there is a method 'toy' already"):
        register(TOY)
    with pytest.raises(
        PlanError, match="ToyConv2d stands in for layers of type 'conv2d', but method odd has it for 'lin"
    ):
        register(Method("odd", {"linear": ToyConv2d}, ""))
    assert "odd" not in METHODS


class Point:
    """An entry point."""

    def __init__(self, name: str, loaded: object) -> None:
        self.name, self.value, self.loaded = name, f"package:{name}", loaded

    def load(self) -> object:
        if isinstance(self.loaded, Exception):
            raise self.loaded
        return self.loaded


def table_with(monkeypatch: pytest.MonkeyPatch, *points: Point) -> methods.Methods:
    loads: list[str] = []
    monkeypatch.setattr(methods, "entry_points", lambda group: loads.append(group) or points)
    table = methods.Methods([METHODS["svd"]])
    table.loads = loads
    return table


def test_installed_packages_bring_methods(monkeypatch):
    table = table_with(monkeypatch, Point("toy", TOY))
    assert table.loads == []  # nothing is imported before somebody asks
    assert list(table) == ["svd", "toy"]
    assert table["toy"] is TOY
    assert table.loads == ["hodec.methods"]


@pytest.mark.parametrize(
    ("loaded", "message"),
    [
        (
            Method("svd", {}, ""),
            "entry point 'one' = package:one of group hodec.methods: there is a method 'svd' already",
        ),
        (ImportError("no torch"), r"package:one .* cannot be loaded \(ImportError: no torch\)"),
        (ToyConv2d, "is a type; a hodec.methods.Method is needed"),
    ],
)
def test_a_package_that_does_not_fit_is_named_at_every_reading(monkeypatch, loaded, message):
    table = table_with(monkeypatch, Point("toy", TOY), Point("one", loaded))
    for _ in range(2):
        with pytest.raises(PlanError, match=message):
            list(table)
