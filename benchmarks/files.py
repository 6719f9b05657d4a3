"""``hodec decompose`` of a whole ONNX file: seconds and peak memory, in a process of its own.

ResNet-50 with random weights, by several methods and rules. Counted is all that the command does: reading, choosing
ranks, decomposing, writing, and running both files once to compare their outputs; start-up included.
"""

import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch

from benchmarks.child import in_child
from benchmarks.rows import Row, Target, in_unit, missing
from benchmarks.settings import Settings, not_installed
from hodec.export.onnx import to_onnx
from hodec.models import build_model

GROUP = "files"
SECONDS, MEMORY = Target("<=", 30, "s"), Target("<=", 2 * 2**30, "B")
FLAGS = {
    "Tucker-2, half of the multiply-adds": ["--method", "tucker", "--rule", "budget", "--macs", "0.5"],
    "tensor train, half of each layer": ["--method", "tt", "--rule", "ratio", "--target", "0.5"],
    "spatial split, Ascend's ranks": ["--preset", "ascend"],
}


def decompose(source: str, target: str, flags: list[str]) -> int:
    """The verb's exit status; what the parent measures."""
    from hodec.cli import main

    return main(["decompose", source, "-o", target, *flags])


def rows(settings: Settings) -> Iterator[Row]:
    """Seconds and memory of each way."""
    name, size = ("torchvision/resnet18", 64) if settings.quick else ("torchvision/resnet50", 224)
    what = f"hodec decompose {name.removeprefix('torchvision/')}.onnx"
    if reason := not_installed("onnx", "onnxruntime", "onnxscript"):
        yield missing(GROUP, what, "", reason)
        return
    with tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(0)
        net = build_model(name, in_channels=3, num_classes=1000).eval()
        source = to_onnx(net, Path(folder) / "dense.onnx", example_input=torch.zeros(1, 3, size, size), verify=False)
        del net
        for how, flags in dict(list(FLAGS.items())[: 1 if settings.quick else None]).items():
            yield from _measured(f"{what}, {how}", source.path, flags)


def _measured(what: str, source: Path, flags: list[str]) -> Iterator[Row]:
    target = source.with_name("small.onnx")
    done = in_child("benchmarks.files:decompose", source=str(source), target=str(target), flags=[*flags, "--force"])
    if done.problem or done.value:
        yield missing(GROUP, what, "", done.problem or f"the command ended with {done.value}")
        return
    seconds = done.startup + done.seconds
    sizes = " -> ".join(in_unit(path.stat().st_size, "B") for path in (source, target))
    yield Row(
        GROUP,
        f"{what}: seconds",
        ours=seconds,
        figure=seconds,
        figure_unit="s",
        target=SECONDS,
        note=f"{done.startup:.1f} s of it start-up; file {sizes}",
    )
    yield Row(
        GROUP,
        f"{what}: peak memory of the process",
        ours=done.peak,
        unit="B",
        figure=done.peak,
        figure_unit="B",
        target=MEMORY,
        note=f"{in_unit(done.peak - done.before, 'B')} above what importing torch and hodec takes",
    )
