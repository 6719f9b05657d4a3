"""docs/methods.md says what is so: every cell of its tables is tried on tiny nets or computed."""

import math
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from swaps import factorized, planned
from torch import Tensor, nn
from torch.nn.utils import prune
from torch.nn.utils.parametrizations import weight_norm

from hodec.conversion.swap import convert
from hodec.errors import HodecError
from hodec.formats.calls import CallSites
from hodec.formats.layer_types import DENSE_CLASSES
from hodec.formats.modes import Modes
from hodec.layers.base import factor_parameters
from hodec.methods import METHODS

PAGE = (Path(__file__).parents[2] / "docs" / "methods.md").read_text(encoding="utf-8")
Row = dict[str, str]


def section(title: str) -> str:
    """The text below a heading, up to the next heading of its level or above."""
    found = re.search(rf"^(#+) {re.escape(title)}\n", PAGE, re.MULTILINE)
    assert found, f"docs/methods.md has no section {title}"
    return re.split(rf"^#{{1,{len(found[1])}}} ", PAGE[found.end() :], maxsplit=1, flags=re.MULTILINE)[0]


def table(title: str) -> list[Row]:
    """The rows of the first table below a heading, by column."""
    found = re.search(r"(^\|.*\n)+", section(title), re.MULTILINE)
    assert found, f"section {title} has no table"
    lines = [[cell.strip() for cell in line.strip().strip("|").split("|")] for line in found[0].strip().splitlines()]
    assert all(len(line) == len(lines[0]) for line in lines), f"a row of section {title} has another number of cells"
    return [dict(zip(lines[0], line, strict=True)) for line in lines[2:]]


# -- layers --------------------------------------------------------------------------------------------------------

IMAGES = {dims: torch.randn(2, 8, *(6,) * dims) for dims in (0, 1, 2, 3)}
TOKENS = torch.tensor([[0, 5, 3]])


def layers_table() -> str:
    """The table of layers as it has to stand on the page."""
    rows = [["layer", *METHODS], ["---"] * (len(METHODS) + 1)]
    for name, dense in DENSE_CLASSES.items():
        layers = [method.layers.get(name) for method in METHODS.values()]
        rows.append([dense.__name__, *(layer.__name__ if layer else "dense" for layer in layers)])
    return "".join(f"| {' | '.join(row)} |\n" for row in rows).replace(" --- ", "---")


def test_the_table_of_layers_is_that_of_the_methods():
    assert layers_table() in section("Layers"), layers_table()


# -- situations ----------------------------------------------------------------------------------------------------


class OwnLinear(nn.Linear):
    """Something is different in it."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 2


class NamedLinear(nn.Linear):
    """Nothing is different in it."""


class Net(nn.Module):
    """Children by name; ``run`` says what the forward pass does with them. ``ok`` is a layer like any other."""

    def __init__(self, run: Callable[[nn.Module, Tensor], Tensor], **children: nn.Module) -> None:
        super().__init__()
        self.run, self.ok = run, nn.Linear(8, 8)
        for name, child in children.items():
            self.add_module(name, child)

    def forward(self, x: Tensor) -> Tensor:
        return self.ok(self.run(self, x))


class ScaledLinear(nn.Linear):
    """Its weight is made from its parameters."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight / self.weight.norm(), self.bias)


class PaddedConv(nn.Conv1d):
    """Stride 2 and TensorFlow's padding."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.pad(x, [0, 1] if x.shape[-1] % 2 == 0 else [1, 1]))


def padded() -> nn.Module:
    conv = PaddedConv(5, 5, 3, stride=2)
    return Net(lambda self, x: self.layer(x).repeat(1, 1, 2), layer=conv)


def grouped() -> nn.Module:
    return Net(lambda self, x: self.layer(x.mT).mT, layer=nn.Conv1d(8, 8, 3, padding=1, groups=2))


def linear() -> nn.Linear:
    return nn.Linear(8, 8)


def shared() -> nn.Module:
    one = linear()
    return Net(lambda self, x: self.layer(self.again(x)), layer=one, again=one)


def tied(key: str) -> nn.Module:
    net = Net(lambda self, x: self.layer(self.other(x)), layer=linear(), other=linear())
    setattr(net.other, key, getattr(net.layer, key))
    return net


def tied_to_bilinear() -> nn.Module:
    net = Net(lambda self, x: self.layer(x) + self.other(x, x), layer=linear(), other=nn.Bilinear(8, 8, 8))
    net.other.kept = net.layer.weight
    return net


def in_a_list() -> nn.Module:
    net = Net(lambda self, x: self.kept[0](x), layer=linear())
    net.kept = [net.layer]
    return net


def plain(layer: nn.Module) -> nn.Module:
    return Net(lambda self, x: self.layer(x), layer=layer)


def broken() -> nn.Module:
    net = plain(linear())
    net.layer.weight.data[0, 0] = math.nan
    return net


def attention() -> nn.Module:
    return Net(lambda self, x: self.a(x, x, x)[0], a=nn.MultiheadAttention(8, 2, batch_first=True))


def encoder() -> nn.Module:
    return Net(lambda self, x: self.a(x), a=nn.TransformerEncoderLayer(8, 2, 16, batch_first=True))


def recurrent() -> nn.Module:
    return Net(lambda self, x: self.a(x)[0], a=nn.LSTM(8, 8, batch_first=True))


def experts() -> nn.Module:
    stack = Net(lambda self, x: torch.einsum("bsi,eoi->bso", x, self.up))
    stack.num_experts, stack.up = 3, nn.Parameter(torch.randn(3, 8, 8))
    return Net(lambda self, x: self.a(x), a=stack)


def embedding(entries: int = 24, **settings: object) -> nn.Module:
    return Net(lambda self, x: self.layer(TOKENS).sum() + x, layer=nn.Embedding(entries, 8, **settings))


def functional(self: nn.Module, x: Tensor) -> Tensor:
    return F.linear(x, self.layer.weight)


# situation -> net, name of its layer, settings of the plan
SITUATIONS: dict[str, tuple[Callable[[], nn.Module], str, dict[str, object]]] = {
    "a module under two names": (shared, "layer", {}),
    "a module called twice": (lambda: Net(lambda self, x: self.layer(self.layer(x)), layer=linear()), "layer", {}),
    "frozen weight": (lambda: plain(linear().requires_grad_(False)), "layer", {}),
    "weight tied with another layer of its kind": (lambda: tied("weight"), "layer", {}),
    "weight tied with a layer of another kind": (tied_to_bilinear, "layer", {}),
    "bias tied with another layer": (lambda: tied("bias"), "layer", {}),
    "weight used functionally only": (lambda: Net(functional, layer=linear()), "layer", {}),
    "weight used functionally and by calls": (
        lambda: Net(lambda self, x: self.layer(functional(self, x)), layer=linear()),
        "layer",
        {},
    ),
    "layer never used": (lambda: Net(lambda self, x: x, layer=linear()), "layer", {}),
    "layer held in a list too": (in_a_list, "layer", {}),
    "MultiheadAttention, its projections": (attention, "a.in_proj_weight", {}),
    "TransformerEncoderLayer, linear layers": (encoder, "a.linear1", {}),
    "LSTM, GRU or RNN": (recurrent, "a.weight_hh_l0", {}),
    "stacked weights of experts": (experts, "a.up", {}),
    "weight_norm or another parametrization": (lambda: plain(weight_norm(linear())), "layer", {}),
    "pruned weight": (lambda: plain(prune.l1_unstructured(linear(), "weight", 0.5)), "layer", {}),
    "subclass of a layer with a forward pass of its own": (lambda: plain(OwnLinear(8, 8)), "layer", {}),
    "subclass that makes its weight from parameters": (lambda: plain(ScaledLinear(8, 8)), "layer", {}),
    "subclass that pads as TensorFlow does": (padded, "layer", {}),
    "subclass of a layer that computes the same": (lambda: plain(NamedLinear(8, 8)), "layer", {}),
    "Bilinear": (lambda: Net(lambda self, x: self.layer(x, x), layer=nn.Bilinear(8, 8, 8)), "layer", {}),
    "Lazy layer without a weight": (lambda: plain(nn.LazyLinear(8)), "layer", {}),
    "the model is the layer": (linear, "", {}),
    "weight with NaN": (broken, "layer", {}),
    "Embedding with max_norm": (lambda: embedding(max_norm=1.0), "layer", {}),
    "Embedding of a prime vocabulary, tt": (lambda: embedding(23), "layer", {"method": "tt"}),
    "Linear of one mode a side, tt": (
        lambda: Net(lambda self, x: self.layer(x), layer=linear(), ok=nn.Conv1d(5, 5, 3, padding=1)),
        "layer",
        {"method": "tt", "n_modes": 1},
    ),
    "grouped convolution": (grouped, "layer", {}),
    "depthwise convolution": (
        lambda: Net(lambda self, x: self.layer(x), layer=nn.Conv1d(5, 5, 3, padding=1, groups=5)),
        "layer",
        {},
    ),
    "ranks that save nothing": (lambda: plain(nn.Linear(8, 8)), "layer", {"ranks": {"layer": 8, "ok": 1}}),
}


def test_all_situations_are_in_the_table():
    assert [row["situation"] for row in table("Situations")] == list(SITUATIONS)


@pytest.mark.parametrize("method", ["svd", "tt"])
@pytest.mark.parametrize("row", table("Situations"), ids=lambda row: row["situation"])
def test_situations(row: Row, method: str):
    build, name, settings = SITUATIONS[row["situation"]]
    if settings.get("method", method) != method:
        pytest.skip(f"a matter of {settings['method']} only")
    settings = {"ranks": 2, "allow_larger": "save" not in row["situation"], **settings, "method": method}
    net, x = build(), torch.randn(2, 5, 8)
    if row["outcome"] == "error":
        with pytest.raises(HodecError, match=re.escape(row["words"])):
            convert(net, planned(net, x=x, **settings))
        return
    plan = planned(net, x=x, **settings)
    small = convert(net, plan)
    found = plan[name].module(name) if name in plan else name
    assert (found in factorized(small)) == (row["outcome"] == "factorized")
    if row["outcome"] == "dense":
        assert row["words"] in plan.skipped[name]
    else:
        FACTS[row["words"]](plan, small)


FACTS: dict[str, Callable[[object, nn.Module], None]] = {}


def fact(words: str) -> Callable[[Callable], Callable]:
    """What the words of a factorized situation claim."""
    return lambda check: FACTS.setdefault(words, check)


@fact("one layer under both names")
def _(plan, small):
    assert small.layer is small.again


@fact("the weight is rebuilt where it is read")
def _(plan, small):
    torch.testing.assert_close(small.layer.weight + 0, small.layer.dense_weight())
    assert not [name for name, _ in small.layer.named_parameters() if name.startswith("weight")]


@fact("computed from other parameters")
def _(plan, small):
    assert "computed from other parameters" in plan["layer"].notes[0]
    assert len(list(small.layer.parameters())) == len(list(small.ok.parameters()))


@fact("the same padding")
def _(plan, small):
    assert small.layer.padding == "same_upper"
    assert small.layer(torch.zeros(1, 5, 7)).shape == (1, 5, 4)


@fact("grouped like the dense one")
def _(plan, small):
    assert small.layer.groups == plan["layer"].groups == 2


@fact("its factors are those of other too")
def _(plan, small):
    assert plan["layer"].notes[0].startswith("its factors are those of other too")
    assert set(factor_parameters(small.layer)) == set(factor_parameters(small.other))


@fact("the bias stays shared")
def _(plan, small):
    assert small.layer.bias is small.other.bias
    assert small.layer.factors()[0].data_ptr() != small.other.factors()[0].data_ptr()


@fact("like any other")
def _(plan, small):
    assert type(small.layer) is type(small.ok)


@fact("one layer, its costs counted twice")
def _(plan, small):
    assert plan["layer"].macs_before == 2 * 5 * 64
    assert plan["ok"].macs_before == 5 * 64


@fact("factors are frozen too")
def _(plan, small):
    assert not any(p.requires_grad for p in small.layer.parameters())
    assert all(p.requires_grad for p in small.ok.parameters())


@fact("called in both modes")
def _(plan, small):
    seen, x = [], torch.randn(2, 5, 8)
    small.a.linear1.register_forward_hook(lambda *_: seen.append(1))
    with torch.no_grad():
        small.train()(x), small.eval()(x)
    assert len(seen) == 2


@fact("its weights are planned one by one")
def _(plan, small):
    assert {name.rpartition(".")[0] for name in plan if plan[name].role.value != "layer"} <= {"a", "a.out_proj"}


# -- formulas ------------------------------------------------------------------------------------------------------

WEIGHTS = {  # O, I, kernel; input and output positions along each axis
    "conv2d": [
        ((12, 8, 3, 5), (9, 8), (5, 4)),
        ((8, 12, 3, 5), (9, 8), (5, 4)),
        ((12, 8, 5, 3), (7, 7), (7, 7)),
        ((4, 24, 2, 3), (6, 5), (3, 5)),
    ],
    "conv_transpose2d": [((12, 8, 3, 5), (5, 4), (9, 8)), ((8, 12, 3, 5), (5, 4), (9, 8))],
    "linear": [((12, 8), (7,), (7,)), ((4, 24), (1,), (1,))],
    "embedding": [((12, 8), (7,), (7,)), ((4, 24), (1,), (1,))],
}


def names_of(shape: tuple[int, ...], modes: Modes, before: tuple[int, ...], after: tuple[int, ...]) -> dict[str, int]:
    """What the formulas' letters stand for."""
    out, inp, *kernel = shape
    letters = {"O": out, "I": inp, "K": math.prod(kernel), "Q": math.prod(before), "P": math.prod(after)}
    letters |= {f"I{k}": n for k, n in enumerate(modes.inputs, 1)} | {
        f"O{k}": n for k, n in enumerate(modes.outputs, 1)
    }
    if kernel:
        first = 0 if (out >= inp) == (kernel[0] <= kernel[1]) else 1
        half = {0: after[0] * before[1], 1: before[0] * after[1]}
        letters |= {"K1": kernel[0], "K2": kernel[1], "Ka": kernel[first], "Kb": kernel[1 - first]}
        letters |= {"M": half[0], "N": half[first]}
    return letters


def value(formula: str, letters: dict[str, int]) -> object:
    return eval(formula.strip("`"), {"min": min, "max": max}, letters)


FORMULAS = [(method, row) for method in METHODS for row in table(method)]


@pytest.mark.parametrize(
    ("method", "row"), FORMULAS, ids=lambda v: v if isinstance(v, str) else str(list(v.values())[:2])
)
def test_formulas(method: str, row: Row):
    fmt = METHODS[method].format(row["layer"])
    assert row["execution"] in fmt.executions
    for shape, before, after in WEIGHTS[row["layer"]]:
        modes = Modes.split(shape[1], shape[0], 2 if fmt.uses_modes else 1)
        letters = names_of(shape, modes, before, after)
        most = value(row["most ranks"], letters)
        assert fmt.max_ranks(shape, modes) == (most if isinstance(most, tuple) else (most,))
        for cap in (2, 3, 100):
            ranks = fmt.fit_ranks(shape, modes, [cap] * len(fmt.max_ranks(shape, modes)))
            letters |= {f"r{k}": rank for k, rank in enumerate(ranks, 1)}
            assert value(row["parameters"], letters) == fmt.params(shape, ranks, modes)
            macs = fmt.macs(shape, ranks, modes, call_sites=CallSites.once(before, after), execution=row["execution"])
            assert value(row["MACs"], letters) == macs


@pytest.mark.parametrize("method", METHODS)
def test_every_method_has_its_section_with_its_source(method: str):
    assert f"Source: {METHODS[method].source}\n" in section(method)
    shown = {row["layer"] for row in table(method)}
    assert {"conv2d", "linear", "embedding"} & set(METHODS[method].layers) <= shown


def test_covariances_cover_the_axes_of_the_table():
    rows = table("Projection whitened by the input")
    assert {row["method"] for row in rows} == set(METHODS)
    for row in rows:
        fmt = METHODS[row["method"]].format(row["layer"])
        shape, *_ = WEIGHTS[row["layer"]][0]
        modes = Modes.split(shape[1], shape[0], 2 if fmt.uses_modes else 1)
        axes = ["I1", "I2", "K1", "K2"] if fmt.uses_modes else ["I", "K1", "K2"]
        found = [[axes[a] for a in group] for group in fmt.mixable(shape, modes)]
        assert found == [group.split() for group in row["axes covered together"].split(";")], row
