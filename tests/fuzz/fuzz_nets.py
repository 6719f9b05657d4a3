"""Small random nets through plan, convert, merge, fuse, save, load, export: the answers stay those of the weights."""

import random
from pathlib import Path

import torch
from hypothesis import strategies as st
from small_nets import NORMS, dense_layer
from torch import Tensor, nn

import hodec
from hodec.errors import PlanError
from hodec.methods import METHODS
from hodec.ranks import Energy, Manual, Ratio, Vbmf

# One in so many nets is exported, which takes a second.
EXPORTED = 40


class Branches(nn.Module):
    """Two ways through the same or other modules, added up."""

    def __init__(self, first: nn.Module, second: nn.Module) -> None:
        super().__init__()
        self.first, self.second = first, second

    def forward(self, x: Tensor) -> Tensor:
        return self.first(x) + self.second(x)


class Recurrent(nn.Module):
    """The outputs of an LSTM or GRU."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)[0]


class Attention(nn.Module):
    """Attention of a sequence to itself, without a mask."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.inner = nn.MultiheadAttention(width, heads, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x, x, x, need_weights=False)[0]


def conv(draw: random.Random, dims: int, inp: int, out: int) -> nn.Module:
    """A convolution with odd settings that shrinks its input little."""
    kernel = tuple(draw.choice([1, 2, 3, 3]) for _ in range(dims))
    bias = draw.random() < 0.5
    if draw.random() < 0.2:
        stride, padding = draw.choice([1, 2]), draw.choice([0, 0, 1]) * (min(kernel) > 1)
        return dense_layer(f"conv_transpose{dims}d", inp, out, kernel, stride=stride, padding=padding, bias=bias)
    groups = draw.choice([g for g in (1, 1, 1, 2, 3, inp) if inp % g == out % g == 0])
    stride = draw.choice([1, 1, 1, 2])
    padding = draw.choice(["same", "valid", 1, 0, 2]) if stride == 1 else draw.choice([0, 1])
    mode = draw.choice(["zeros", "zeros", "replicate", "circular"])
    return dense_layer(f"conv{dims}d", inp, out, kernel, stride=stride, padding=padding,
                       dilation=draw.choice([1, 1, 2]), groups=groups, bias=bias, padding_mode=mode)  # fmt: skip


def image_net(draw: random.Random) -> tuple[nn.Module, Tensor]:
    """Convolutions with norms, branches and layers that hang in the net twice."""
    dims, size = draw.choice([1, 2, 2, 2, 3]), draw.choice([8, 10])
    first = channels = draw.randint(1, 9)
    layers: list[nn.Module] = []
    for _ in range(draw.randint(1, 3)):
        out = draw.choice([channels, draw.randint(1, 20), 16])
        one = conv(draw, dims, channels, out)
        if out == channels and draw.random() < 0.3:
            same = dense_layer(f"conv{dims}d", channels, channels, 3, padding=1)
            one = Branches(same, draw.choice([same, nn.Identity()]))
        layers += [
            one,
            *draw.choice([[], [NORMS[dims](out)], [nn.ReLU()], [NORMS[dims](out), nn.GELU()]]),
        ]
        channels = out
    pool = [nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d][dims - 1](1)
    net = nn.Sequential(*layers, pool, nn.Flatten(), nn.Linear(channels, draw.randint(1, 12)))
    return net, torch.randn(draw.choice([1, 2, 3]), first, *[size] * dims)


def sequence_net(draw: random.Random) -> tuple[nn.Module, Tensor]:
    """Embeddings, linear layers, recurrent ones and attention."""
    width = draw.choice([4, 6, 8, 12, 16])
    tokens = draw.random() < 0.4
    layers: list[nn.Module] = [nn.Embedding(draw.randint(2, 40), width)] if tokens else []
    for _ in range(draw.randint(1, 3)):
        out = draw.choice([width, 7, 12, 16])
        kind = draw.randrange(5)
        if kind == 0:
            layers.append(Recurrent(draw.choice([nn.LSTM, nn.GRU, nn.RNN])(width, out, batch_first=True)))
        elif kind == 1 and width % 2 == 0:
            layers.append(Attention(width, 2))
            out = width
        else:
            layers += [nn.Linear(width, out, bias=draw.random() < 0.5), draw.choice([nn.ReLU(), nn.LayerNorm(out)])]
        width = out
    if tokens and draw.random() < 0.5 and width == layers[0].embedding_dim:
        head = nn.Linear(width, layers[0].num_embeddings, bias=False)
        head.weight = layers[0].weight
        layers.append(head)
    first = layers[0]
    x = torch.zeros(2, 5, dtype=torch.int64) if tokens else torch.randn(2, 5, _width(first))
    return nn.Sequential(*layers), x


def _width(layer: nn.Module) -> int:
    inner = getattr(layer, "inner", layer)
    return next(getattr(inner, name) for name in ("in_features", "input_size", "embed_dim") if hasattr(inner, name))


def close(given: Tensor, wanted: Tensor, share: float = 1e-3) -> bool:
    """Whether two answers agree to rounding, measured by the largest number."""
    assert given.shape == wanted.shape
    if not wanted.numel():
        return True
    return float((given - wanted).abs().max()) <= share * max(1.0, float(wanted.abs().max()))


@torch.no_grad()
def check(data: st.DataObject, folder: Path) -> str:
    """One net, one plan."""
    chosen = data.draw(st.integers(0, 2**32))
    draw = random.Random(chosen)
    torch.manual_seed(chosen % 2**31)
    net, x = draw.choice([image_net, image_net, sequence_net])(draw)
    net.eval()
    try:
        wanted = net(x)
    except (RuntimeError, ValueError):
        return "the dense net does not run"
    method = draw.choice(sorted(METHODS))
    full = draw.random() < 0.3 and not method.startswith("cp")
    rule = (
        Manual(10**6)
        if full
        else draw.choice([Manual(draw.randint(1, 6)), Energy(draw.choice([0.3, 0.9])), Ratio(0.5), Vbmf()])
    )
    options = {"method": method, "n_modes": draw.choice([1, 2, 3]), "allow_larger": full or draw.random() < 0.5}
    try:
        plan = hodec.make_plan(net, rule, example_input=x, **options)
    except PlanError as error:
        if "no layer is left" not in str(error):
            raise AssertionError(str(error)) from error
        return "no layer is left"
    small = hodec.convert(net, plan)
    assert torch.equal(net(x), wanted), "the dense net was changed"
    given = small(x)
    assert not full or close(given, wanted), "full rank is not the dense net"
    assert close(hodec.merge(small)(x), given)
    assert close(hodec.fuse(small, example_input=x, target="macs")(x), given)
    hodec.save(small, folder / "net.safetensors")
    again = hodec.load(folder / "net.safetensors", net)
    assert torch.equal(again(x), given)
    assert hodec.Plan.from_dict(plan.to_dict()).to_dict() == plan.to_dict()
    if draw.randrange(EXPORTED) == 0:
        return f"right, {exported(draw, small, x, folder)}"
    return "right, of full rank" if full else "right"


def exported(draw: random.Random, small: nn.Module, x: Tensor, folder: Path) -> str:
    """The net in a file of another kind, which ``verify`` compares; returns the kind."""
    if draw.random() < 0.5:
        hodec.to_onnx(small, folder / "net.onnx", example_input=x)
        return "onnx"
    hodec.to_program(small, folder / "net.pt2", example_input=x)
    return "pt2"
