"""Networks small enough to plan, convert and run in milliseconds."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hodec.formats.layer_types import DENSE_CLASSES

IMAGE = (2, 6, 12, 12)


class SmallResNet(nn.Module):
    """Stem with a bias, one residual block with stride 2 and a 1x1 shortcut, linear head; (N, 6, H, W) -> (N, 10)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(6, 12, 3, padding=1)
        self.bn1 = nn.BatchNorm2d(12)
        self.layer1 = nn.ModuleDict(
            {
                "conv1": nn.Conv2d(12, 24, 3, stride=2, padding=1, bias=False),
                "bn1": nn.BatchNorm2d(24),
                "conv2": nn.Conv2d(24, 24, 3, padding=1, bias=False),
                "bn2": nn.BatchNorm2d(24),
                "shortcut": nn.Conv2d(12, 24, 1, stride=2, bias=False),
            }
        )
        self.dropout = nn.Dropout(0.5)
        self.fc = nn.Linear(24, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        block = self.layer1
        y = block["bn2"](block["conv2"](F.relu(block["bn1"](block["conv1"](x)))))
        return self.fc(self.dropout(F.relu(y + block["shortcut"](x)).mean(dim=(2, 3))))


class Tokens(nn.Module):
    """Linear layers over a sequence; (B, T, 16) -> (B, T, 8)."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(16, 36)
        self.down = nn.Linear(36, 8, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x)))


class Twice(nn.Module):
    """One module called twice, at two sizes, and one module that hangs under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.again = nn.Conv2d(6, 6, 3, padding=1)
        self.first = nn.Conv2d(6, 6, 3, padding=1)
        self.second = self.first

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(self.again(x), 2)
        return self.second(self.first(self.again(x)))


def snapshot(model: nn.Module) -> dict[str, object]:
    """Everything about a model that planning and converting must leave alone."""
    return {
        "state": {key: value.clone() for key, value in model.state_dict().items()},
        "identity": [id(p) for p in model.parameters()],
        "versions": [p._version for p in model.parameters()],
        "frozen": [p.requires_grad for p in model.parameters()],
        "training": [m.training for m in model.modules()],
        "types": [type(m) for m in model.modules()],
        "hooks": [len(m._forward_hooks) for m in model.modules()],
        "random": torch.get_rng_state(),
    }


def assert_untouched(model: nn.Module, before: dict[str, object]) -> None:
    """``model`` is bit for bit what ``before`` says."""
    after = snapshot(model)
    for key in ("identity", "versions", "frozen", "training", "types", "hooks"):
        assert after[key] == before[key], key
    torch.testing.assert_close(after["state"], before["state"], rtol=0, atol=0)
    assert torch.equal(after["random"], before["random"])


class Conv1D(nn.Module):
    """What ``Conv1D`` of transformers is: x @ weight + bias, with a weight (I, O)."""

    def __init__(self, inp: int, out: int, bias: bool = True) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(inp, out))
        self.bias = nn.Parameter(torch.randn(out)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight if self.bias is None else x @ self.weight + self.bias


Conv1D.__module__ = "transformers.pytorch_utils"  # which is what it is recognized by

# Kinds of dense layers, each with a kernel that tells its axes apart.
KERNELS: dict[str, tuple[int, ...]] = {
    "conv1d": (5,),
    "conv2d": (3, 3),
    "conv3d": (3, 2, 3),
    "conv_transpose1d": (3,),
    "conv_transpose2d": (3, 3),
    "conv_transpose3d": (3, 2, 3),
    "linear": (),
    "linear_in_first": (),
    "embedding": (),
}
NORMS = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}


def dense_layer(kind: str, inp: int, out: int, kernel: int | tuple[int, ...] = (), **settings: object) -> nn.Module:
    """A dense layer of one of KERNELS, with that kernel unless one is given; an embedding has ``inp`` entries."""
    make = Conv1D if kind == "linear_in_first" else DENSE_CLASSES[kind]
    return make(inp, out, kernel or KERNELS[kind], **settings) if KERNELS[kind] else make(inp, out, **settings)
