"""A script for `test_divided`: processes train nets together, one after the other; each writes what it holds.

A job is WAY-KIND-EPOCH: after that epoch, where it is not 0, the run goes on in new objects, from a checkpoint.
"""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from admm_fits import new_net, plan_of, samples, sgd
from torch import Tensor, distributed, multiprocessing, nn
from torch.distributed.checkpoint import load, save
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

import hodec

BATCH, EPOCHS = 8, 4
X, Y = samples()


def plain_net() -> nn.Module:
    net = new_net()
    net.dropout.p = 0.0
    return net


def divided(net: nn.Module, mesh: Any) -> nn.Module:
    """One layer by itself and the rest together, as users wrap blocks."""
    fully_shard(net.conv2, mesh=mesh)
    fully_shard(net, mesh=mesh)
    return net


WAYS: dict[str, Callable[[nn.Module, int], nn.Module]] = {
    "whole": lambda net, count: net,
    "ddp": lambda net, count: DistributedDataParallel(net),
    "fsdp": lambda net, count: divided(net, init_device_mesh("cpu", (count,))),
    "hsdp": lambda net, count: divided(net, init_device_mesh("cpu", (2, count // 2), mesh_dim_names=("copy", "part"))),
}

KINDS: dict[str, dict[str, Any]] = {
    "pulled": {"ranks": 2, "method": "tt"},
    "moved": {"ranks": 2, "method": "tt", "optimizer": "adam"},
    "projected": {"ranks": 2, "method": "tt", "mode": "project"},
    "falling": {"ranks": 2, "method": "tt", "mode": "project", "share": 0.5, "falling_epochs": 3},
    "iterated": {"ranks": 4, "method": "cp"},
}


class Run:
    """Training under ADMM in this process, which gets its share of each batch of eight."""

    def __init__(self, way: str, kind: str, *, rank: int = 0, count: int = 1) -> None:
        self.rank, self.count = rank, count
        given, dense = KINDS[kind], plain_net()
        plan = plan_of(dense, given["ranks"], method=given["method"])
        self.net = WAYS[way](dense, count)
        adam = given.get("optimizer") == "adam"
        self.optimizer = torch.optim.Adam(self.net.parameters(), 0.01) if adam else sgd(self.net)
        settings = {key: value for key, value in given.items() if key not in ("ranks", "method", "optimizer")}
        self.admm = hodec.Admm(self.net, plan, self.optimizer, steps_per_epoch=len(X) // BATCH, **settings)
        self.reports: list[dict[str, float]] = []

    def epoch(self) -> None:
        share = BATCH // self.count
        for first in range(0, len(X), BATCH):
            mine = slice(first + self.rank * share, first + (self.rank + 1) * share)
            self.optimizer.zero_grad()
            cross_entropy(self.net(X[mine]), Y[mine]).backward()
            self.admm.before_step()
            self.optimizer.step()
            self.admm.after_step()
        self.reports.append(self.admm.end_epoch(self.accuracy))

    @torch.no_grad()
    def accuracy(self) -> float:
        """A forward pass without gradients, after which FSDP2 keeps the gathered weights of the outermost module."""
        return float((self.net(X).argmax(1) == Y).float().mean())

    def state(self) -> dict[str, Any]:
        """All that is needed to go on, for torch's distributed checkpoints."""
        return {"net": self.net.state_dict(), "optimizer": self.optimizer.state_dict(), "admm": self.admm.state_dict()}

    def held(self) -> dict[str, Any]:
        """The end of training, whole."""
        skeleton = None
        if any(hasattr(p, "full_tensor") for p in self.net.parameters()):
            with torch.device("meta"):
                skeleton = plain_net()
        small = self.admm.convert(skeleton=skeleton)
        weights = {name: whole(t) for name, t in self.net.state_dict().items()}
        states = {name: {k: whole(one[k]) for k in "zu"} for name, one in self.admm.state_dict()["layers"].items()}
        factors = dict(small.state_dict())
        return {"weights": weights, "states": states, "small": factors, "reports": self.reports}


def whole(tensor: Tensor) -> Tensor:
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).detach().clone()


def resumed(run: Run, way: str, kind: str, folder: Path) -> Run:
    """Another run that goes on from what this one wrote."""
    save({"run": run.state()}, checkpoint_id=folder / "checkpoint")
    other = Run(way, kind, rank=run.rank, count=run.count)
    for p in other.net.parameters():
        p.grad = torch.zeros_like(p)
    if not isinstance(other.optimizer, torch.optim.SGD):
        other.optimizer.step()  # makes its state, to be read into
    other.admm.start()
    state = {"run": other.state()}
    if isinstance(other.optimizer, torch.optim.SGD):
        state["run"]["optimizer"]["state"] = {
            k: {"momentum_buffer": torch.zeros_like(p)} for k, p in enumerate(other.net.parameters())
        }
    load(state, checkpoint_id=folder / "checkpoint")
    other.net.load_state_dict(state["run"]["net"])
    other.optimizer.load_state_dict(state["run"]["optimizer"])
    other.admm.load_state_dict(state["run"]["admm"])
    other.reports = list(run.reports)
    return other


def work(rank: int, count: int, folder: Path, jobs: list[str]) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=count)
    for job in jobs:
        way, kind, stop = job.split("-")
        run = Run(way, kind, rank=rank, count=count)
        for epoch in range(EPOCHS):
            run.epoch()
            if epoch + 1 == int(stop):
                run = resumed(run, way, kind, folder)
        torch.save(run.held(), folder / f"{job}-{rank}.pt")
    distributed.destroy_process_group()


if __name__ == "__main__":
    multiprocessing.spawn(work, (int(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:]), nprocs=int(sys.argv[1]))
