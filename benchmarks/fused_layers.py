"""No fused layer is slower than its dense form: every layer of whole nets, measured again after fusing.

    python -m benchmarks.fused_layers [NET ..]

Nets of torchvision, random weights, Tucker-2 by a budget of a third of the multiply-adds, one image of 224 x 224.
``hodec.fuse`` chooses by its own measurements; these are others, of the layers as they stand in the fused net, on the
inputs they get there, beside the same layers of the dense net fused alike. What stays dense is not measured again.
"""

import sys
from collections.abc import Iterator

import torch
import torchvision
from torch import Tensor, nn

import hodec
from benchmarks.fused import plan_of
from benchmarks.rows import Row, Target
from benchmarks.settings import Settings, standalone
from benchmarks.timing import Times, in_turns

GROUP = "layers"
NETS = ["resnet18", "vgg11_bn", "densenet121"]
KEPT, MULTIPLE, SIZE = 0.33, 8, 224


def rows(settings: Settings) -> Iterator[Row]:
    """One row a net: its slowest fused layer."""
    for name in NETS[:1] if settings.quick else NETS:
        yield slowest(name, settings)


@torch.no_grad()
def slowest(name: str, settings: Settings) -> Row:
    """The fused layer of a net that gains least over its dense form."""
    torch.manual_seed(0)
    net = torchvision.models.get_model(name, weights=None).eval()
    x = torch.randn(1, 3, SIZE, SIZE)
    fused = hodec.fuse(hodec.convert(net, plan_of(net, KEPT, MULTIPLE)), example_input=x)
    report = fused.fuse_report
    dense = hodec.fuse(net, example_input=x, memory_format=report.memory_format)
    changed = [layer for layer, choice in report.layers.items() if choice.variant != "dense"]
    found = {layer: _again(fused, dense, layer, given, settings) for layer, given in _inputs(fused, changed, x).items()}
    told = f"{len(changed)} of {len(report.layers)} planned layers are fused, the others stay dense"
    if not found:
        return Row(GROUP, f"slowest fused layer of {name}", "dense", note=told)
    worst = min(found, key=lambda layer: found[layer].ratio("dense", "fused"))
    times = found[worst]
    figures = times.beside("fused", "dense")
    noise = max(figures["spread"] or 0.0, 0.02)
    return Row(
        GROUP,
        f"slowest fused layer of {name} ({worst}, {report.layers[worst].variant})",
        "dense",
        **figures,
        target=Target(">=", round(1 - noise, 2)),  # no slower by more than the noise
        note=told,
    )


def _inputs(net: nn.Module, names: list[str], x: Tensor) -> dict[str, Tensor]:
    """What the first call of each layer is given."""
    given: dict[str, Tensor] = {}
    hooks = [
        net.get_submodule(name).register_forward_pre_hook(
            lambda _, inputs, name=name: given.update({name: inputs[0].clone()})
        )
        for name in names
    ]
    net(x)
    for hook in hooks:
        hook.remove()
    return given


def _again(fused: nn.Module, dense: nn.Module, name: str, x: Tensor, settings: Settings) -> Times:
    one, other = fused.get_submodule(name), dense.get_submodule(name)
    works = {"fused": lambda: one(x), "dense": lambda: other(x)}
    return in_turns(works, seconds=settings.seconds(1), rounds=settings.rounds(9, 100))


if __name__ == "__main__":
    standalone(lambda settings: (slowest(name, settings) for name in sys.argv[1:] or NETS))
