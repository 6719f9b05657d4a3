"""Plans edited by hand or by chance: read as what they say, or refused; what is read converts, or is refused."""

import copy
import json
import math
import random
from functools import cache
from pathlib import Path
from typing import Any

import torch
from hypothesis import strategies as st
from small_nets import SmallResNet, Tokens, Twice
from torch import nn

import hodec
from hodec.methods import METHODS
from hodec.plan.plan import Plan

# Numbers in example inputs beyond which a plan is read and not converted by, as that would be slow and no more.
SMALL = 2**16

ODD: list[Any] = [
    None, True, False, -1, 0, 1, 2, 3, 4, 6, 7, 24, 10**6, 2**31, 2**63, 10**30, 10**400, 1.0, 1.5, -0.0,
    math.nan, math.inf, "", "x", "auto", "chain", "merged", "rebuilt", "layer", "conv2d", "conv1d",
    "linear", "embedding", "experts",
    "float32", "int64", "complex64", "quint8", "Tensor", "conv1", "layer1.conv1", "a\nb", "\x00", "{ranks}", "x" * 300,
    [], [1], [1, 1], [2, 3], [4, 4, 4], [[1, [8, 8], [8, 8]]], [[1, [], []]], [[]], [None], [1] * 70, ["conv1"],
    {}, {"a": 1}, {"in": [6], "out": [12]}, {"tensor": 0}, {"tensor": 9}, {"in": [], "out": []},
    *METHODS,
]  # fmt: skip


class Tied(nn.Module):
    """An embedding and a head of one weight, a grouped and a transposed convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(24, 16), nn.Linear(16, 24, bias=False)
        self.head.weight = self.embed.weight
        self.grouped = nn.Conv1d(16, 16, 3, padding=1, groups=2)
        self.up = nn.ConvTranspose1d(16, 16, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.embed(x).transpose(1, 2)
        return self.head(self.up(self.grouped(h)).transpose(1, 2))


NETS: dict[str, tuple[type[nn.Module], Any]] = {
    "resnet": (SmallResNet, torch.randn(2, 6, 12, 12, generator=torch.Generator().manual_seed(0))),
    "tokens": (Tokens, torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(0))),
    "twice": (Twice, torch.randn(2, 6, 8, 8, generator=torch.Generator().manual_seed(0))),
    "tied": (Tied, torch.zeros(2, 7, dtype=torch.int64)),
}
KINDS = [(net, method, modes) for net in NETS for method in METHODS for modes in (1, 2)]


@cache
def net_of(kind: str) -> nn.Module:
    """A net of NETS, always of the same weights."""
    torch.manual_seed(0)
    return NETS[kind][0]().eval()


@cache
def text_of(kind: str, method: str, modes: int) -> str:
    """The plan of a net as JSON; empty where the method has no layer for it."""
    net, x = net_of(kind), NETS[kind][1]
    try:
        plan = hodec.make_plan(net, 3, method=method, example_input=x, allow_larger=True, n_modes=modes)
    except hodec.HodecError:
        return ""
    return json.dumps(plan.to_dict())


PLANNED = [kind for kind in KINDS if text_of(*kind)]


def paths_of(value: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The path of every value within nested ones."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [at, *(path for key, one in items for path in paths_of(one, (*at, key)))]


def edited(tree: Any, draw: random.Random) -> Any:
    """A copy in which a value was replaced, removed, doubled, or given another name or a neighbour's place."""
    tree = copy.deepcopy(tree)
    *way, last = draw.choice(paths_of(tree)[1:])
    holder = tree
    for key in way:
        holder = holder[key]
    act = draw.randrange(8)
    if act == 0:
        del holder[last]
    elif act == 1 and isinstance(holder, list):
        holder.insert(last, copy.deepcopy(holder[last]))
    elif act == 1:
        holder[draw.choice(["x", "kind", "fc", "conv1", "", "layer1.conv2"])] = holder.pop(last)
    elif act == 2 and type(holder[last]) is int:
        holder[last] = max(-1, holder[last] + draw.choice([-1, 1, 2, holder[last]]))
    elif act == 3:
        keys = list(holder) if isinstance(holder, dict) else range(len(holder))
        other = draw.choice(list(keys))
        holder[last], holder[other] = holder[other], holder[last]
    else:
        holder[last] = copy.deepcopy(draw.choice(ODD))
    return tree


def check_applied(plan: Plan, kind: str) -> str:
    """A plan that was read is written as it was read, is shown, and converts the net rightly or is refused."""
    again = Plan.from_dict(json.loads(json.dumps(plan.to_dict())))
    assert again.to_dict() == plan.to_dict()
    assert str(plan)
    assert repr(plan)
    if sum(math.prod(shape) for shape, _ in plan.inputs) > SMALL:
        return "read, of large inputs"
    net, x = net_of(kind), NETS[kind][1]
    small = hodec.convert(net, plan)
    with torch.no_grad():
        wanted, given = hodec.merge(small)(x), small(x)
    assert bool(given.isfinite().all())
    assert torch.allclose(given, wanted, rtol=1e-3, atol=1e-4), float((given - wanted).abs().max())
    planned = sum(p.numel() for p in small.parameters())
    if {plan.dense_params} == {sum(p.numel() for p in net.parameters())}:
        assert planned == plan.params_after
    return "converted"


def check_edits(data: st.DataObject, folder: Path) -> str:
    """A plan with one to three edits."""
    kind, draw = data.draw(st.sampled_from(PLANNED)), random.Random(data.draw(st.integers(0, 2**32)))
    tree = json.loads(text_of(*kind))
    for _ in range(draw.choice([1, 1, 1, 2, 3])):
        tree = edited(tree, draw)
    path = folder / "plan.json"
    path.write_text(json.dumps(tree))
    return check_applied(Plan.load(path), kind[0])


def check_bytes(data: st.DataObject, folder: Path) -> str:
    """The file of a plan with its bytes altered."""
    from fuzz_files import altered

    kind, draw = data.draw(st.sampled_from(PLANNED)), random.Random(data.draw(st.integers(0, 2**32)))
    path = folder / "plan.json"
    path.write_bytes(altered(text_of(*kind).encode(), draw))
    return check_applied(Plan.load(path), kind[0])
