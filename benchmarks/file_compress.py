"""A model file of ResNet-50's size fitted to data and searched: seconds and peak memory, in a process of its own.

``hodec decompose --data`` (one plan, fitted in order) and ``hodec compress`` (a search for multiply-adds), with 64
samples of 224 x 224 pixels. The net is torchvision's with random weights, whose singular values are made to fall as
those of trained nets do, so that there is something to find; its outputs may differ by a fifth. Counted is all that the
command does, start-up included; CPU seconds on one thread, of torch and onnxruntime alike.
"""

import math
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import nn

from benchmarks.child import in_child, peak_row
from benchmarks.files import write
from benchmarks.rows import Row, Target, missing
from benchmarks.settings import Settings, not_installed, standalone
from hodec.models import build_model

GROUP = "file_compress"
SAMPLES, PIXELS, SMALL = 64, 224, 32
MEMORY = Target("<=", 4 * 2**30, "B")
FIT = "decompose --data, svd at half of the multiply-adds"
SEARCH = "compress, a search for multiply-adds"
FLAGS = {
    FIT: ["decompose", "--method", "svd", "--macs", "0.5"],
    SEARCH: ["compress", "--target", "macs", "--loss", "error", "--max-drop", "20%"],
}
SECONDS = {FIT: 180, SEARCH: 600}
# Singular values k of n fall as exp(-FALL k / n): half of them hold 98 % of a weight's energy.
FALL = 4.0


def verb(flags: list[str]) -> int:
    """The verb's exit status; what the parent measures."""
    from hodec.cli.main import main

    torch.set_num_threads(1)
    return main(flags)


def rows(settings: Settings) -> Iterator[Row]:
    """Seconds and memory of each verb."""
    if reason := not_installed("onnx", "onnxruntime", "onnxscript"):
        yield missing(GROUP, "hodec compress", "", reason)
        return
    name, size = ("resnet18", SMALL) if settings.quick else ("resnet50", PIXELS)
    with tempfile.TemporaryDirectory() as folder:
        source, data = Path(folder) / "dense.onnx", Path(folder) / "calib.npz"
        torch.manual_seed(0)
        net = falling(build_model(f"torchvision/{name}", in_channels=3, num_classes=1000))
        write(net, source, torch.zeros(1, 3, size, size))
        np.savez(data, **{input_name(source): blurred(SAMPLES, size)})  # type: ignore[arg-type]
        for what, flags in FLAGS.items():
            out = Path(folder) / "small.onnx"
            out.unlink(missing_ok=True)
            given = [flags[0], str(source), "--data", str(data), "-o", str(out), *flags[1:]]
            yield from _measured(f"{name}.onnx, {SAMPLES} samples, {what}", given, SECONDS[what])


@torch.no_grad()
def falling(net: nn.Module) -> nn.Module:
    """The net with convolutions whose singular values fall, of the norms that they had."""
    for one in net.modules():
        if isinstance(one, nn.Conv2d):
            u, s, v = torch.linalg.svd(one.weight.flatten(1), full_matrices=False)
            fallen = torch.exp(-FALL * torch.arange(len(s)) / len(s))
            whole = (u * fallen * (s.norm() / fallen.norm())) @ v
            one.weight.copy_(whole.reshape(one.weight.shape))
    return net


def blurred(count: int, size: int) -> np.ndarray:
    """Images (count, 3, size, size) whose neighbouring pixels are alike."""
    rng = np.random.default_rng(0)
    coarse = torch.from_numpy(rng.standard_normal((count, 3, math.ceil(size / 16), math.ceil(size / 16))))
    image: np.ndarray = nn.functional.interpolate(coarse.float(), size=(size, size), mode="bicubic").numpy()
    return image


def input_name(path: Path) -> str:
    """Of the file's only input."""
    from hodec.onnx_graph.graph import load_graph

    return next(iter(load_graph(path).inputs))


def _measured(what: str, flags: list[str], most: int) -> Iterator[Row]:
    done = in_child("benchmarks.file_compress:verb", limit=8.0 * most, threads=1, flags=flags)
    if done.problem or done.value not in (0, 3):  # 3: nothing paid, after the whole search
        yield missing(GROUP, what, "", done.problem or f"exit status {done.value}")
        return
    total = done.seconds + done.startup
    yield Row(
        GROUP, what, ours=total, figure=total, figure_unit="s", target=Target("<=", most, "s"),
        note=f"exit status {done.value}; on the clock {done.wall:.0f} s, {done.startup:.1f} s of imports",
    )  # fmt: skip
    yield peak_row(GROUP, what, done, MEMORY)


if __name__ == "__main__":
    standalone(rows)
