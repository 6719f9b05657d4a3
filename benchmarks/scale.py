"""What planning, conversion and a Z-update of large nets take: seconds, peak memory, bytes sent.

Each command runs in a process of its own and prints one line of JSON; ``docs/scale.md`` has what was seen.

    python -m benchmarks.scale plan llama7b ratio          # llama7b, linear1e9, convs1000
    python -m benchmarks.scale write FOLDER 4              # a transformer of 4 blocks with random weights, in shards
    python -m benchmarks.scale convert FOLDER OUT          # from shards to shards
    python -m benchmarks.scale whole FOLDER OUT            # loads the model and converts it; compares with OUT
    python -m benchmarks.scale update 2 1024 1             # a Z-update of weights that 2 processes divide
    python -m benchmarks.scale estimate llama70b 8 60 50   # by a model: 8 processes, 60 G multiply-adds/s, 50 GB/s
"""

import json
import resource
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed, multiprocessing, nn

import hodec
from hodec.export.checkpoint import weights_digest
from hodec.io.shards import Shards, grouped, shard_name, write_index, write_shard

TOKENS = torch.zeros(1, 128, dtype=torch.long)
SHARD = 200 * 2**20  # bytes


class Block(nn.Module):
    """A block of a language model like Llama; (n, t, width) -> the same."""

    def __init__(self, width: int, hidden: int, keys: int = 0) -> None:
        super().__init__()
        self.norm, self.norm2 = nn.RMSNorm(width), nn.RMSNorm(width)
        self.q, self.o = (nn.Linear(width, width, bias=False) for _ in range(2))
        self.k, self.v = (nn.Linear(width, keys or width, bias=False) for _ in range(2))
        self.gate, self.up = (nn.Linear(width, hidden, bias=False) for _ in range(2))
        self.down = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        q, k, v = (f(y).unflatten(-1, (-1, 128)).transpose(1, 2) for f in (self.q, self.k, self.v))
        attended = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        x = x + self.o(attended.transpose(1, 2).flatten(-2))
        y = self.norm2(x)
        return x + self.down(self.up(y) * nn.functional.silu(self.gate(y)))


def transformer(blocks: int, width: int, hidden: int, keys: int = 0) -> nn.Module:
    """Token numbers (n, t) -> scores (n, t, 32000); ``keys``: width of keys and values, where queries share them."""
    layers = [Block(width, hidden, keys) for _ in range(blocks)]
    return nn.Sequential(nn.Embedding(32000, width), *layers, nn.RMSNorm(width), nn.Linear(width, 32000, bias=False))


def small(blocks: int) -> nn.Module:
    return transformer(blocks, 2048, 5504).bfloat16()


NETS: dict[str, tuple[Callable[[], nn.Module], Tensor, str]] = {
    "llama7b": (lambda: transformer(32, 4096, 11008), TOKENS, "svd"),
    "llama70b": (lambda: transformer(80, 8192, 28672, 1024), TOKENS, "svd"),
    "linear1e9": (lambda: nn.Sequential(nn.Linear(31623, 31623)), torch.zeros(1, 31623), "svd"),
    "convs1000": (
        lambda: nn.Sequential(*(nn.Conv2d(64, 64, 3, padding=1) for _ in range(1000))),
        torch.zeros(1, 64, 16, 16),
        "tucker",
    ),
}


def on_meta(build: Callable[[], nn.Module]) -> nn.Module:
    with torch.device("meta"):
        return build()


@contextmanager
def told(**values: Any) -> Iterator[dict[str, Any]]:
    """Print what the block puts in, with its seconds and the peak of the process's memory."""
    wall, cpu = time.perf_counter(), time.process_time()
    yield values
    values |= {"seconds": time.perf_counter() - wall, "cpu_seconds": time.process_time() - cpu}
    values["peak_gb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(json.dumps({k: round(v, 3) if isinstance(v, float) else v for k, v in values.items()}), flush=True)


def plan(name: str, rule: str) -> None:
    build, x, method = NETS[name]
    net = on_meta(build)
    with told(net=name, rule=rule, parameters=sum(p.numel() for p in net.parameters())) as values:
        made = hodec.make_plan(net, int(rule) if rule.isdigit() else rule, method=method, example_input=x)
        values["plan"] = repr(made)


def write(folder: str, blocks: str) -> None:
    """Weights one by one, so that this takes no memory either."""
    own, target = on_meta(lambda: small(int(blocks))).state_dict(), Path(folder)
    target.mkdir()
    groups = grouped({name: t.nbytes for name, t in own.items()}, SHARD)
    with told(blocks=int(blocks), bytes=sum(t.nbytes for t in own.values()), shards=len(groups)):
        files = {shard_name(k, len(groups)): names for k, names in enumerate(groups, 1)}
        for k, (file, names) in enumerate(files.items()):
            torch.manual_seed(k)
            write_shard(target / file, {n: torch.randn(own[n].shape, dtype=own[n].dtype) / 45 for n in names})
        write_index(target, files, sum(t.nbytes for t in own.values()))


def _blocks(folder: str) -> int:
    return len({name.split(".")[0] for name in Shards(folder) if ".up." in name})


def convert(folder: str, out: str) -> None:
    skeleton = on_meta(lambda: small(_blocks(folder)))
    with told(bytes=Shards(folder).nbytes, largest=max(one.nbytes for one in Shards(folder).values())) as values:
        made = hodec.make_plan(skeleton, "ratio", method="svd", example_input=TOKENS)
        hodec.convert_shards(skeleton, made, folder, out, shard_bytes=SHARD)
        values["bytes_out"] = Shards(out).nbytes


def whole(folder: str, out: str) -> None:
    net, shards = small(_blocks(folder)), Shards(folder)
    net.load_state_dict({name: shards.read(name) for name in shards})
    with told(bytes=shards.nbytes) as values:
        made = hodec.make_plan(net, "ratio", method="svd", example_input=TOKENS)
        converted = hodec.convert(net, made)
    read = hodec.load(out, on_meta(lambda: small(_blocks(folder))))
    values = {"equal": weights_digest(read) == weights_digest(converted)}
    print(json.dumps(values))


def update(count: str, width: str = "1024", blocks: str = "2") -> None:
    """One Z-update of a divided net on the CPU, by gloo."""
    multiprocessing.spawn(_update, (int(count), int(width), int(blocks)), nprocs=int(count))


def _update(rank: int, count: int, width: int, blocks: int) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    torch.set_num_threads(1)
    store = distributed.TCPStore("127.0.0.1", 29577, count, is_master=rank == 0)
    distributed.init_process_group("gloo", store=store, rank=rank, world_size=count)
    torch.manual_seed(0)
    made = hodec.make_plan(
        on_meta(lambda: nn.Sequential(*(Block(width, 2 * width) for _ in range(blocks)))),
        "ratio", method="svd", example_input=torch.zeros(1, 16, width),
    )  # fmt: skip
    net = nn.Sequential(*(Block(width, 2 * width) for _ in range(blocks)))
    if count > 1:
        fully_shard(net, mesh=init_device_mesh("cpu", (count,)))
    admm = hodec.Admm(net, made, torch.optim.SGD(net.parameters(), 0.01), steps_per_epoch=1)
    sent = _counting()
    with told(processes=count, rank=rank, layers=len(made), numbers=sum(p.params_before for p in made.values())) as out:
        admm.start()
        out |= {"received_bytes": sent["bytes"], "messages": sent["messages"]}
        out["state_bytes"] = sum(s.z.nbytes + s.u.nbytes for s in admm.states.values()) + sum(
            t.nbytes for t in admm._targets.values()
        )
    distributed.destroy_process_group()


def estimate(name: str, processes: str, giga_macs: str, giga_bytes: str) -> None:
    """What a net would take, by the formulas of ``docs/scale.md``.

    Args:
        name: one of NETS.
        processes: that divide it.
        giga_macs: 1e9 multiply-adds of the Gram matrices that one process decomposes a second.
        giga_bytes: 1e9 bytes that one process receives a second.
    """
    build, x, method = NETS[name]
    made = hodec.make_plan(on_meta(build), "ratio", method=method, example_input=x)
    count, numbers = int(processes), sum(p.params_before for p in made.values())
    largest = max(p.params_before for p in made.values())
    work = sum(p.params_before * min(p.shape[:2]) for p in made.values())
    received, seconds = 8 * numbers * (count - 1) / count, work / float(giga_macs) / 1e9
    values = {
        "net": name, "layers": len(made), "numbers": numbers, "largest": largest, "work": work,
        "read_gb": 2 * numbers / 1e9, "conversion_seconds": seconds,
        "state_gb_a_process": 12 * numbers / count / 1e9, "layers_at_a_time_gb": 8 * largest / 1e9,
        "received_gb_a_process": received / 1e9, "messages_a_process": 2 * len(made) * (count > 1),
        "update_seconds": seconds / count + received / float(giga_bytes) / 1e9,
    }  # fmt: skip
    print(json.dumps({k: round(v, 2) if isinstance(v, float) else v for k, v in values.items()}))


def _counting() -> dict[str, int]:
    """Counts what collectives bring to this process from now on."""
    from hodec.admm.division import Division

    seen = {"bytes": 0, "messages": 0}
    gather, send = Division.whole, Division.sent

    def whole_of(self: Division, name: str, part: Tensor) -> Tensor:
        result = gather(self, name, part)
        seen["bytes"] += result.nbytes - part.nbytes
        seen["messages"] += 1
        return result

    def sent_of(self: Division, name: str, one: Tensor | None, source: int, dtype: torch.dtype) -> Tensor:
        seen["bytes"] += 0 if one is not None else self.like[name].numel() * dtype.itemsize
        seen["messages"] += 1
        return send(self, name, one, source, dtype)

    Division.whole, Division.sent = whole_of, sent_of  # type: ignore[method-assign]
    return seen


if __name__ == "__main__":
    {"plan": plan, "write": write, "convert": convert, "whole": whole, "update": update, "estimate": estimate}[
        sys.argv[1]
    ](*sys.argv[2:])
