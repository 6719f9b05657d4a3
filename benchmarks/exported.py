"""A run's compressed net as ONNX beside its dense one: ``python -m benchmarks.exported RUN [data.root]``, one thread.

Reads the test set once per net: accuracy in PyTorch and in ONNX Runtime, as float32, float16 and int8; then the latency
of each file over the dense one's, the two run in turns.
"""

import sys
import tempfile
from pathlib import Path

import onnxruntime
import torch
import yaml
from torch import nn

import hodec
from hodec.experiment.config.schema import Config
from hodec.experiment.config.schema import config_of as read
from hodec.experiment.data.images import ImageData, build_data
from hodec.experiment.data.loaders import test_loader, train_loader
from hodec.experiment.lit import evaluate
from hodec.experiment.run_folder import RunFolder
from hodec.experiment.run_model import model_of_run
from hodec.export.checkpoint import named_skeleton
from hodec.export.onnx import session
from hodec.onnx_graph.bench import bench_files

CALIBRATION = 8  # batches of training images for int8
SECONDS = 8.0  # of measuring a pair


def config_of(run: Path, root: str | None) -> Config:
    """The settings of a run, its data perhaps moved."""
    settings = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))
    if root:
        settings["data"]["root"] = root
    return read(settings)


def dense_of(run: Path, facts: dict[str, object]) -> nn.Module:
    """The dense net that the run compressed: before ADMM where it had been trained by then."""
    folder = RunFolder.open(run, (run / "config.yaml").read_text(encoding="utf-8"), writes=False)
    net = named_skeleton(run, {"facts": facts})
    folder.load_phase(next(name for name in ("pretrain", "dense", "admm") if folder.done(name)), net)
    return net.eval()


def accuracy(file: Path, data: ImageData) -> float:
    """Share of the test set that a file classifies rightly in ONNX Runtime."""
    run, right, count = session(file.read_bytes(), threads=1), 0, 0
    for images, labels in test_loader(data):
        (scores,) = run(images)
        right += int((scores.argmax(dim=1) == labels).sum())
        count += len(labels)
    return right / count


def main(run: str, root: str | None = None) -> None:
    """Export, evaluate, measure, print one table."""
    torch.set_num_threads(1)
    folder = Path(run)
    config, made = config_of(folder, root), model_of_run(folder)
    data = build_data(config.data)
    x, cpu = made.example(), torch.device("cpu")
    batches = [images for images, _ in zip(train_loader(data, seed=0), range(CALIBRATION))]
    calibration = [images for images, _ in batches]
    dense = dense_of(folder, made.facts)
    loader = test_loader(data)
    print(f"{made.facts['model']}, {torch.get_num_threads()} thread, ONNX Runtime {onnxruntime.__version__}, batch 1")
    print(f"PyTorch: dense {evaluate(dense, loader, cpu):.2%}, compressed {evaluate(made.model, loader, cpu):.2%}")
    with tempfile.TemporaryDirectory() as scratch:
        files = {"dense": (hodec.fuse(dense, example_input=x), "fp32"), "compressed": (made.model, "fp32")}
        fused = hodec.fuse(made.model, example_input=x)
        files |= {f"fused {p}": (fused, p) for p in ("fp32", "fp16", "int8")}
        for name, (net, precision) in files.items():
            path = Path(scratch) / f"{name.replace(' ', '_')}.onnx"
            ranges = calibration if precision == "int8" else None
            hodec.to_onnx(net, path, example_input=x, precision=precision, calibration=ranges)
            pair = bench_files(Path(scratch) / "dense.onnx", path, seconds=SECONDS)
            print(
                f"{name:12} {accuracy(path, data):7.2%}  {path.stat().st_size / 1e3:7.1f} kB  "
                f"{pair.second_ms:6.3f} ms, {pair.speedup:.2f} times as fast as dense (noise {pair.noise:.1%})"
            )


if __name__ == "__main__":
    main(*sys.argv[1:])
