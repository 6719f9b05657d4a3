"""``hodec decompose`` of a whole ONNX file: seconds and peak memory, in a process of its own.

ResNet-50, and one convolution of 2048 to 2048 channels with 5x5 kernels, with random weights, by several methods and
rules. Counted is all that the command does: reading, choosing ranks, decomposing, writing, and running both files once
to compare their outputs; start-up included; CPU seconds. The convolution also on two threads, in seconds on the clock.
"""

import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks.child import in_child, peak_row
from benchmarks.rows import Row, Target, in_unit, missing
from benchmarks.settings import Settings, not_installed, standalone
from hodec.export.onnx import to_onnx
from hodec.models import build_model

GROUP = "files"
MEMORY = Target("<=", 2 * 2**30, "B")
TUCKER, TRAIN, ASCEND = "Tucker-2, half", "tensor train, half", "spatial split, Ascend's ranks"
FLAGS = {
    TUCKER: ["--method", "tucker", "--rule", "ratio", "--target", "0.5"],
    TRAIN: ["--method", "tt", "--rule", "ratio", "--target", "0.5"],
    ASCEND: ["--preset", "amct"],
}
NET_SECONDS = dict.fromkeys(FLAGS, 30)
# Ascend's own table has 430 s and 32 GB for its split of this kernel, on other hardware.
CONV_SECONDS = {TUCKER: 20, TRAIN: 20, ASCEND: 60}


def decompose(source: str, target: str, flags: list[str]) -> int:
    """The verb's exit status; what the parent measures."""
    from hodec.cli.main import main

    return main(["decompose", source, "-o", target, *flags])


def nothing() -> None:
    """Imports what ``decompose`` does."""
    import hodec.cli.decompose
    import hodec.onnx_graph.decompose  # noqa: F401


def rows(settings: Settings) -> Iterator[Row]:
    """Seconds and memory of each way."""
    if reason := not_installed("onnx", "onnxruntime", "onnxscript"):
        yield missing(GROUP, "hodec decompose", "", reason)
        return
    name, size = ("resnet18", 64) if settings.quick else ("resnet50", 224)
    channels = 128 if settings.quick else 2048
    flags = dict(list(FLAGS.items())[: 1 if settings.quick else None])
    in_child("benchmarks.files:nothing")  # so that its modules are compiled, as those of an installed package are
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "dense.onnx"
        torch.manual_seed(0)
        net = build_model(f"torchvision/{name}", in_channels=3, num_classes=1000)
        write(net, source, torch.zeros(1, 3, size, size))
        for how, given in flags.items():
            yield from _measured(f"{name}.onnx, {how}", source, given, NET_SECONDS[how], MEMORY)
        write(nn.Conv2d(channels, channels, 5, padding=2), source, torch.zeros(1, channels, 8, 8))
        for how, given in flags.items():
            what = f"one convolution of {channels} to {channels} channels, 5x5, {how}"
            yield from _measured(what, source, given, CONV_SECONDS[how], None)
            yield from _measured(what, source, given, CONV_SECONDS[how], None, threads=2)


def write(net: nn.Module, path: Path, example: Tensor) -> None:
    """The dense model file."""
    to_onnx(net.eval(), path, example_input=example, verify=False)


def _measured(
    what: str, source: Path, flags: list[str], most: int, memory: Target | None, *, threads: int | None = None
) -> Iterator[Row]:
    target = source.with_name("small.onnx")
    target.unlink(missing_ok=True)
    done = in_child("benchmarks.files:decompose", threads=threads, source=str(source), target=str(target), flags=flags)
    if done.problem or done.value:
        yield missing(GROUP, what, "", done.problem or f"the command ended with {done.value}")
        return
    seconds = done.wall if threads else done.startup + done.seconds
    sizes = " -> ".join(in_unit(path.stat().st_size, "B") for path in (source, target))
    yield Row(
        GROUP,
        f"{what}: seconds" + (f" on the clock, {threads} threads" if threads else ""),
        ours=seconds,
        figure=seconds,
        figure_unit="s",
        target=Target("<=", most, "s"),
        note=f"{done.startup:.1f} s of it start-up; file {sizes}",
    )
    if not threads:
        yield peak_row(GROUP, what, done, memory)


if __name__ == "__main__":
    standalone(rows)
