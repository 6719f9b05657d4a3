"""Formats and layers: every method, odd shapes, modes, ranks, settings and weights."""

import math
from contextlib import suppress
from pathlib import Path

import torch
from hypothesis import strategies as st
from small_nets import dense_layer
from torch import Tensor, nn

from hodec.errors import RankError
from hodec.formats.base import Format
from hodec.formats.layer_types import LAYER_TYPES, layer_type_of
from hodec.formats.modes import Modes, split_channels
from hodec.methods import METHODS

PAIRS = sorted(
    (name, kind)
    for name, method in METHODS.items()
    for kind in method.layers
    if kind == "linear" or kind.startswith("conv")
)
# Of those that are found by iteration there are fewer, as each takes a hundred times as long.
PAIRS += [pair for pair in PAIRS if not METHODS[pair[0]].format(pair[1]).iterative] * 5
# How a weight is scaled, and what of it is zero or alike.
WEIGHTS = ["normal", "normal", "normal", "huge", "tiny", "zero", "low rank", "one row", "spread", "whole numbers"]


def draw_modes(data: st.DataObject, fmt: Format, out: int, inp: int) -> Modes:
    """Modes in any order of their factors."""
    count = data.draw(st.integers(fmt.min_modes, 4)) if fmt.uses_modes else 1
    sides = [data.draw(st.permutations(split_channels(n, count))) for n in (inp, out)]
    return Modes(tuple(sides[0]), tuple(sides[1]))


def draw_weight(data: st.DataObject, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """A weight of one of the kinds of WEIGHTS."""
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**31)))
    w, kind = torch.randn(shape, generator=generator, dtype=torch.float64), data.draw(st.sampled_from(WEIGHTS))
    out = shape[0]
    changed = {
        "huge": lambda: w * 1e30,
        "tiny": lambda: w * 1e-30,
        "zero": lambda: w * 0,
        "low rank": lambda: w[:1] * torch.randn(out, *(1,) * (len(shape) - 1), generator=generator),
        "one row": lambda: w * (torch.arange(out) == out // 2).reshape(-1, *(1,) * (len(shape) - 1)),
        "spread": lambda: w * 10.0 ** torch.linspace(0, -12, out).reshape(-1, *(1,) * (len(shape) - 1)),
        "whole numbers": lambda: w.round(),
    }
    return changed.get(kind, lambda: w)().to(dtype)


def norm(t: Tensor) -> float:
    """Norm in float64, which squares of 1e30 fit into."""
    return float(t.detach().double().norm())


def check_ranks(data: st.DataObject, fmt: Format, shape: tuple[int, ...], modes: Modes) -> tuple[int, ...]:
    """Ranks that fit what was drawn; what does not fit is refused."""
    most = fmt.max_ranks(shape, modes)
    # factors of higher ranks take seconds, and show nothing else
    asked = [data.draw(st.integers(1, min(top + 3, 5 if fmt.iterative else 24))) for top in most]
    ranks = fmt.fit_ranks(shape, modes, asked)
    assert len(ranks) == len(most)
    assert all(1 <= r <= min(a, m) for r, a, m in zip(ranks, asked, most)), (ranks, asked, most)
    assert fmt.check_ranks(shape, modes, ranks) == ranks
    odd = data.draw(st.lists(st.one_of(st.integers(-3, 30), st.floats(), st.booleans(), st.none()), max_size=9))
    with suppress(RankError):
        given = fmt.check_ranks(shape, modes, odd)
        assert list(given) == odd
        assert given == fmt.fit_ranks(shape, modes, given)
    return ranks


def check_factors(fmt: Format, w: Tensor, ranks: tuple[int, ...], modes: Modes) -> None:
    """Laws of decompose, reconstruct, project and params."""
    size, single = norm(w), w.dtype != torch.float64
    factors = fmt.decompose(w, ranks, modes)
    assert sum(f.numel() for f in factors) == fmt.params(w.shape, ranks, modes)
    assert all(bool(f.isfinite().all()) for f in factors)
    near = fmt.reconstruct(factors, w.shape, modes)
    assert near.shape == w.shape
    slack = 1e-4 if single else 1e-9
    assert norm(w.double() - near.double()) <= (1 + slack) * size, "a truncation lost more than all"
    if not fmt.iterative:
        z = fmt.project(w, ranks, modes)
        assert (z.shape, z.dtype) == (w.shape, w.dtype)
        assert norm(z.double() - near.double()) <= 10 * slack * size, "project is not reconstruct of decompose"
        again = fmt.project(z, ranks, modes)
        assert norm(again.double() - z.double()) <= 10 * slack * size, "projecting twice changed something"
    full = fmt.max_ranks(w.shape, modes)
    if sum(full) <= (6 if fmt.iterative else 60):
        assert norm(fmt.project(w, full, modes).double() - w.double()) <= 10 * slack * size, "full rank is not exact"


def draw_layer(data: st.DataObject, kind: str, method: str, shape: tuple[int, ...]) -> nn.Module:
    """A dense layer with odd settings."""
    out, inp, *kernel = shape
    bias = data.draw(st.booleans())
    if kind == "linear":
        return dense_layer(kind, inp, out, bias=bias)
    few = lambda low, high: tuple(data.draw(st.integers(low, high)) for _ in kernel)  # noqa: E731
    stride, dilation = few(1, 3), few(1, 2)
    if LAYER_TYPES[kind].transposed:
        extra = tuple(data.draw(st.integers(0, max(s, d) - 1)) for s, d in zip(stride, dilation))
        padding = tuple(data.draw(st.integers(0, d * (k - 1))) for d, k in zip(dilation, kernel))
        settings = {"stride": stride, "padding": padding, "output_padding": extra, "dilation": dilation, "bias": bias}
        return dense_layer(kind, inp, out, tuple(kernel), **settings)
    groups = data.draw(st.sampled_from([1, 1, 2, 3])) if METHODS[method].grouped.get(kind) else 1
    same = data.draw(st.booleans()) and set(stride) == {1}
    padding = data.draw(st.sampled_from(["same", "valid"])) if same else few(0, 2)
    mode = data.draw(st.sampled_from(["zeros", "zeros", "reflect", "replicate", "circular"]))
    return dense_layer(
        kind, inp * groups, out * groups, tuple(kernel),
        stride=stride, padding=padding, dilation=dilation, groups=groups, bias=bias, padding_mode=mode,
    )  # fmt: skip


@torch.no_grad()
def check_layer(data: st.DataObject, dense: nn.Module, method: str, weight: Tensor) -> str:
    """The factorized layer answers as the dense one with the weight that it stands for, in every execution."""
    layer_type, groups = layer_type_of(dense), getattr(dense, "groups", 1)
    cls = METHODS[method].layer(layer_type.name, groups)
    fmt, shape = cls.format, tuple(layer_type.to_oihw(dense.weight).shape)
    modes = draw_modes(data, fmt, shape[0], shape[1])
    top = 3 if fmt.iterative else 8
    ranks = fmt.fit_ranks(shape, modes, [data.draw(st.integers(1, top)) for _ in fmt.max_ranks(shape, modes)])
    dense = dense.to(torch.float64)
    execution = data.draw(st.sampled_from(fmt.executions))
    layer = cls.from_dense(dense, ranks, modes=modes, execution=execution)
    dense.weight.copy_(layer.dense_weight())
    sides = [data.draw(st.integers(1, 9)) for _ in range(layer_type.dims)]
    lead = data.draw(st.sampled_from([(), (1,), (3,)])) if layer_type.dims else (2, 3)
    x = torch.randn(*lead, groups * shape[1], *sides, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    try:
        wanted = dense(x)
    except (RuntimeError, ValueError):  # kernels larger than the input, padding by more than it reflects
        return "the dense layer does not run"
    for training in (True, False):
        given = layer.train(training)(x)
        assert given.shape == wanted.shape
        scale = max(1.0, float(wanted.abs().max()) if wanted.numel() else 0.0, norm(dense.weight))
        assert torch.allclose(given, wanted, rtol=0, atol=1e-9 * scale), (cls, dense, execution)
    return "right"


def check(data: st.DataObject, folder: Path) -> str:
    """One format or one layer."""
    method, kind = data.draw(st.sampled_from(PAIRS))
    dims = LAYER_TYPES[kind].dims
    channel = st.one_of(st.integers(1, 12), st.sampled_from([1, 7, 13, 16, 17, 18, 24, 31]))
    shape = (
        data.draw(channel),
        data.draw(channel),
        *(data.draw(st.integers(1, 5 if dims < 3 else 3)) for _ in range(dims)),
    )
    if data.draw(st.booleans()):
        dense = draw_layer(data, kind, method, shape)
        return f"layer {check_layer(data, dense, method, dense.weight)}"
    fmt = METHODS[method].format(kind)
    modes = draw_modes(data, fmt, shape[0], shape[1])
    ranks = check_ranks(data, fmt, shape, modes)
    dtype = data.draw(st.sampled_from([torch.float32, torch.float64]))
    check_factors(fmt, draw_weight(data, shape, dtype), ranks, modes)
    return "format right"


def check_modes(data: st.DataObject, folder: Path) -> str:
    """Modes given by hand: they fit, or are refused."""
    numbers = st.lists(st.one_of(st.integers(-2, 12), st.floats(), st.booleans(), st.text(max_size=2)), max_size=5)
    inp, out = data.draw(st.integers(1, 60)), data.draw(st.integers(1, 60))
    some = lambda n: st.permutations(split_channels(n, data.draw(st.integers(1, 5))))  # noqa: E731
    sides = [data.draw(st.one_of(numbers, some(n), some(n), some(n))) for n in (inp, out)]
    modes = Modes(tuple(sides[0]), tuple(sides[1]))
    modes.check(inp, out)
    assert math.prod(modes.inputs) == inp
    assert math.prod(modes.outputs) == out
    return "right"
