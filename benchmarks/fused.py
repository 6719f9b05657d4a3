"""What fusing gains: whole ResNet-18 compressed and fused, over the dense net in the same setting.

    python -m benchmarks.fused [--batches 1 32] [--settings eager compiled onnxruntime tltorch ..] [--macs KEEP]

The dense net is not the plain one but the dense net treated alike: batch norms folded, its better memory format, the
same compiler or runtime. Random weights, published ranks (or by Budget), one process, one thread, medians of
interleaved rounds in that thread's own time (what else runs on the core does not count). The table is Markdown.
``benchmarks.fused_layers`` has the slowest fused layer of other nets.
"""

import argparse
import copy
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torchvision
from torch import Tensor, nn

import hodec
from benchmarks.machine import Ceilings
from benchmarks.rows import Row, Target, missing
from benchmarks.settings import Settings, not_installed, standalone
from benchmarks.timing import Times, Work, in_turns
from hodec.export.onnx import session, to_onnx
from hodec.plan.plan import Plan
from hodec.ranks import Budget, Manual, make_plan

GROUP = "inference"
# setting -> batch -> least ratio of dense to fused seconds
TARGETS = {
    "eager": {1: 1.7, 32: 1.7},
    "compiled": {1: 2.0, 32: 2.0},
    "onnxruntime": {1: 1.7, 32: 2.0},
    "tltorch": {1: 1.8, 32: 1.8},
    "tltorch_channels_last": {1: 1.8, 32: 1.8},
}
SIZE = 224

# Ranks (in, out) published for ResNet-18, at three quarters of them and in multiples of 16.
RANKS = {
    "layer1.*.conv*": [32, 32],
    "layer2.*.conv*": [48, 48],
    "layer2.0.conv1": [32, 64],
    "layer3.*.conv*": [96, 96],
    "layer3.0.conv1": [64, 112],
    "layer4.*.conv*": [160, 160],
    "layer4.0.conv1": [96, 176],
}

Works = dict[str, Work]


class Skip(Exception):
    """A setting that cannot be measured here, with the reason."""


def eager(dense: nn.Module, fused: nn.Module, x: Tensor, plan: Plan) -> Works:
    """As PyTorch runs them."""
    return {"dense": lambda: dense(x), "fused": lambda: fused(x)}


def compiled(dense: nn.Module, fused: nn.Module, x: Tensor, plan: Plan) -> Works:
    """By torch.compile, weights taken for constants."""
    if not any(shutil.which(one) for one in ("g++", "clang++", "c++")):
        raise Skip("no C++ compiler")
    import torch._inductor.config as inductor

    inductor.freezing = True
    torch.compiler.reset()
    nets = {name: torch.compile(net) for name, net in {"dense": dense, "fused": fused}.items()}
    return {name: lambda net=net: net(x) for name, net in nets.items()}


def onnxruntime(dense: nn.Module, fused: nn.Module, x: Tensor, plan: Plan) -> Works:
    """As ONNX files in ONNX Runtime."""
    if reason := not_installed("onnx", "onnxruntime", "onnxscript"):
        raise Skip(reason)
    call_sites = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, net in {"dense": dense, "fused": fused}.items():
            path = to_onnx(net, Path(folder) / f"{name}.onnx", example_input=x[:1], verify=False).path
            call_sites[name] = session(path.read_bytes(), threads=torch.get_num_threads())
    return {name: lambda run=run: run(x) for name, run in call_sites.items()}


def tltorch(dense: nn.Module, fused: nn.Module, x: Tensor, plan: Plan) -> Works:
    """TensorLy-Torch's factorized Tucker convolution at the same ranks, as it comes, in place of the dense net."""
    net = _tltorch_net(plan)
    return {"dense": lambda: net(x), "fused": lambda: fused(x)}


def tltorch_channels_last(dense: nn.Module, fused: nn.Module, x: Tensor, plan: Plan) -> Works:
    """The same in a memory order that it does not choose by itself."""
    net = _tltorch_net(plan).to(memory_format=torch.channels_last)
    return {"dense": lambda: net(x), "fused": lambda: fused(x)}


def _tltorch_net(plan: Plan) -> nn.Module:
    if reason := not_installed("tltorch"):
        raise Skip(reason)
    import tltorch as tl

    net: Any = copy.deepcopy(resnet18())
    for name, layer in plan.items():
        conv = net.get_submodule(name)
        rank = (layer.ranks[-1], layer.ranks[0], *conv.kernel_size)
        settings = {"stride": conv.stride[0], "padding": conv.padding[0], "bias": conv.bias is not None}
        how = {"order": 2, "factorization": "tucker", "implementation": "factorized", "rank": rank}
        made = tl.FactorizedConv(conv.in_channels, conv.out_channels, conv.kernel_size[0], **settings, **how)
        net.set_submodule(name, made)
    return net.eval()


SETTINGS: dict[str, Callable[[nn.Module, nn.Module, Tensor, Plan], Works]] = {
    one.__name__: one for one in (eager, compiled, onnxruntime, tltorch, tltorch_channels_last)
}
PEERS = {
    "tltorch": "tltorch Tucker, factorized, batch norms as they are",
    "tltorch_channels_last": "the same given channels last, which it does not choose by itself",
}


def resnet18() -> nn.Module:
    """Random weights, seeded."""
    torch.manual_seed(0)
    return torchvision.models.resnet18().eval()


def plan_of(net: nn.Module, keep: float | None, round_to: int, *, size: int = SIZE) -> Plan:
    """A Tucker plan: by the ranks above, or by Budget at this share of the multiply-adds; the stem stays dense."""
    x = torch.zeros(1, 3, size, size)
    rule = Manual(RANKS) if keep is None else Budget(macs=keep, round_to=round_to)
    first = next(name for name, module in net.named_modules() if isinstance(module, nn.Conv2d))
    return make_plan(net, rule, method="tucker", n_modes=1, example_input=x, exclude=[first])


def images(batch: int, size: int = SIZE) -> Tensor:
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(0))


def rows(settings: Settings) -> Iterator[Row]:
    """Whole ResNet-18, fused, over the dense net treated alike; and over tensorly-torch's layers."""
    size, batches = (64, (1,)) if settings.quick else (SIZE, (1, 32))
    yield from whole_nets(settings, resnet18(), plan_of(resnet18(), None, 8, size=size), size=size, batches=batches)


def whole_nets(  # noqa: PLR0913
    settings: Settings,
    net: nn.Module,
    plan: Plan,
    *,
    size: int = SIZE,
    batches: Sequence[int],
    names: Sequence[str] = (),
    report: bool = False,
) -> Iterator[Row]:
    """A row for each batch and setting, by default all of them.

    Args:
        report: whether to print what became of each layer.
    """
    small = hodec.convert(net, plan)
    for batch in batches:
        x = images(batch, size)
        dense, fused = hodec.fuse(net, example_input=x), hodec.fuse(small, example_input=x)
        for setting in names or SETTINGS:
            peer = PEERS.get(setting, f"dense, {setting}, batch norms folded")
            what = f"resnet18 at {size}x{size}, batch {batch}, fused, {setting}"
            if setting == "compiled" and not settings.compiled:
                yield missing(GROUP, what, peer, "asked for by --compiled only, as it takes minutes")
                continue
            try:
                with torch.no_grad():
                    works = SETTINGS[setting](dense, fused, x, plan)
                with torch.inference_mode():
                    times = in_turns(works, seconds=settings.seconds(20), rounds=settings.rounds(7, 41))
            except Skip as reason:
                yield missing(GROUP, what, peer, str(reason))
                continue
            least, limit = TARGETS[setting].get(batch), _limit(settings.ceilings, plan, batch, times)
            target = None if least is None else Target(">=", least)
            yield Row(GROUP, what, peer, **times.beside("fused", "dense"), target=target, limit=limit)
        if report:
            print(fused.fuse_report)


def _limit(ceilings: Ceilings, plan: Plan, batch: int, times: Times) -> str:
    """Multiply-adds at the rate of a 3x3 convolution; each weight read once."""
    flops, nbytes = 2.0 * plan.macs_after * batch, 4.0 * plan.params_after
    return ceilings.limit(times.median("fused"), flops=flops, nbytes=nbytes, conv=True)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 32])
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=list(SETTINGS))
    parser.add_argument("--macs", type=float, help="share of the multiply-adds to keep; default: published ranks")
    parser.add_argument("--round-to", type=int, default=8, help="ranks are multiples of this")
    parser.add_argument("--report", action="store_true", help="print what became of each layer")
    given = parser.parse_args()
    net = resnet18()
    plan = plan_of(net, given.macs, given.round_to)
    less = ", ".join(f"{share:.1%} fewer {what}" for what, share in plan.reduction.items())
    print(f"resnet18 at {SIZE}: {less}, {len(plan)} layers")
    how = {"batches": given.batches, "names": given.settings, "report": given.report}
    standalone(lambda settings: whole_nets(replace(settings, compiled=True), net, plan, **how))


if __name__ == "__main__":
    main()
