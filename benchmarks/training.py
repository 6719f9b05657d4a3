"""Training steps of a net with tensor-train layers, beside the published chain and the dense net; and what they keep.

ResNet-32 on random images, float32: forward, backward, SGD with momentum. Its 3x3 convolutions of 32 and more outputs
are tensor trains of two modes a side at 29/64 of the channels, run as hodec trains them: merged in each call. The
published chain has cores of the same sizes. Kept memory is what autograd saves for the backward pass and grows with the
batch, per image.
"""

import copy
from collections.abc import Iterator
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import hodec
from benchmarks.kernels import train_plan
from benchmarks.published_chain import PublishedChain
from benchmarks.rows import Row, Target
from benchmarks.settings import Settings, standalone
from benchmarks.timing import Work, in_turns
from hodec.models import build_model
from hodec.plan.plan import Plan
from hodec.ranks import Manual, make_plan

GROUP = "training"
NET, SHARE, LEAST_OUTPUTS = "resnet32", 29 / 64, 32
# The chain as published has channels first; that it gains from the other order too is said, and no aim of ours.
PEERS = {
    "published chain, channels first": Target(">=", 1.6),
    "published chain, channels last": None,
    "dense, channels last": Target(">=", 1),
}


def rows(settings: Settings) -> Iterator[Row]:
    """Seconds of a step, then kept bytes."""
    torch.manual_seed(0)
    batch = 8 if settings.quick else 128
    net = build_model(NET, in_channels=3, num_classes=10)
    x, y = torch.randn(batch, 3, 32, 32), torch.randint(0, 10, (batch,))
    plan = train_plan(net, x, SHARE, lambda conv: conv.out_channels >= LEAST_OUTPUTS, execution="merged")
    yield from _steps(net, plan, x, y, settings)
    yield from _trainer_settings(net, x, y, settings)
    yield from _kept(net, plan, x[:4])


def chained(net: nn.Module, plan: Plan) -> nn.Module:
    """The net with published chains in place of the planned layers."""
    net = copy.deepcopy(net)
    for name, layer in plan.items():
        net.set_submodule(name, PublishedChain(net.get_submodule(name), layer.ranks, layer.modes))
    return net


def stepper(net: nn.Module, x: Tensor, y: Tensor, *, last: bool, bfloat16: bool = False) -> Work:
    """One training step of its own copy; ``last``: with channels last in memory."""
    if last:
        net, x = copy.deepcopy(net).to(memory_format=torch.channels_last), x.to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(net.train().parameters(), lr=1e-4, momentum=0.9)

    def step() -> None:
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
            loss = F.cross_entropy(net(x), y)
        loss.backward()
        optimizer.step()

    return step


def _steps(net: nn.Module, plan: Plan, x: Tensor, y: Tensor, settings: Settings) -> Iterator[Row]:
    small, chain = hodec.convert(net, plan), chained(net, plan)
    works = {
        "ours": stepper(small, x, y, last=True),
        "published chain, channels first": stepper(chain, x, y, last=False),
        "published chain, channels last": stepper(chain, x, y, last=True),
        "dense, channels last": stepper(net, x, y, last=True),
    }
    times = in_turns(works, seconds=settings.seconds(40), rounds=settings.rounds(5, 15))
    seconds = times.median("ours")
    # forward, gradients of inputs, gradients of weights; what is kept is written once and read once
    flops = 2.0 * 3 * plan.macs_after * len(x)
    limit = settings.ceilings.limit(seconds, flops=flops, nbytes=2.0 * kept_bytes(small, x[:4]) * len(x), conv=True)
    for peer, target in PEERS.items():
        yield Row(
            GROUP,
            f"training step of {NET} with {len(plan)} tensor-train layers, batch {len(x)}",
            peer,
            **times.beside("ours", peer),
            target=target,
            limit=limit,
            note=f"{plan.reduction['macs']:.0%} fewer multiply-adds than dense",
        )


def _trainer_settings(net: nn.Module, x: Tensor, y: Tensor, settings: Settings) -> Iterator[Row]:
    """What ``trainer.channels_last`` and ``trainer.precision`` bring to the dense net."""
    base = "float32, channels first"
    works = {
        base: stepper(net, x, y, last=False),
        "float32, channels last": stepper(net, x, y, last=True),
        "bf16-mixed, channels first": stepper(net, x, y, last=False, bfloat16=True),
        "bf16-mixed, channels last": stepper(net, x, y, last=True, bfloat16=True),
    }
    times = in_turns(works, seconds=settings.seconds(20), rounds=settings.rounds(3, 9))
    for name in list(works)[1:]:
        what = f"training step of dense {NET}, batch {len(x)}, {name}"
        yield Row(GROUP, what, base, **times.beside(name, base))


def _kept(net: nn.Module, plan: Plan, x: Tensor) -> Iterator[Row]:
    """Saved bytes beside the merged form's, whose three convolutions are parameters, and the dense net's."""
    tucker = {name: [layer.ranks[1], layer.ranks[2]] for name, layer in plan.items()}
    merged_plan = make_plan(
        net, Manual(tucker), method="tucker", example_input=x[:1], include=list(tucker), allow_larger=True
    )
    ours = kept_bytes(hodec.convert(net, plan), x)
    row = Row(GROUP, f"activations kept for the backward pass, {NET}, per image", "merged form", unit="B")
    for peer, other, target in (
        ("merged form", hodec.convert(net, merged_plan), Target("<=", 1)),
        ("dense", net, None),
    ):
        theirs = kept_bytes(other, x)
        yield replace(row, peer=peer, ours=ours, theirs=theirs, figure=ours / theirs, target=target)


def kept_bytes(net: nn.Module, x: Tensor) -> float:
    """Bytes that autograd keeps from forward to backward for one image more."""
    half = len(x) // 2  # copied below: a part of a tensor keeps all of it
    return (_saved(net, x.clone()) - _saved(net, x[:half].clone())) / (len(x) - half)


def _saved(net: nn.Module, x: Tensor) -> int:
    saved: dict[int, Tensor] = {}  # storage -> what keeps it alive, so that no address is given away twice

    def keep(tensor: Tensor) -> Tensor:
        saved[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = net.train()(x).square().sum()
    total = sum(tensor.untyped_storage().nbytes() for tensor in saved.values())
    del loss
    return total


if __name__ == "__main__":
    standalone(rows)
